"""Part 3 of the GPU benchmark: the speed of loading, training steps and the runner, relative to the GPU's peak."""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from typing import Any

from runner import experiments
from runner.benchmarks import loader as loaders
from runner.benchmarks.gpu.context import Context, OutOfTimeError
from runner.benchmarks.gpu.ledger import Ledger
from runner.benchmarks.measure import interleaved, make_step, ratio, spread, synchronize
from runner.common.files import read_json
from runner.config.recipe import Experiment
from runner.system.environment import usable_cores

FLOPS_PER_MAC = 6  # in training: two each for the forward pass, the gradients of the inputs, and those of the weights
# Modes of torch.compile; "reduce-overhead" uses CUDA graphs.
MODES = {"eager": None, "compiled": "default", "graphs": "reduce-overhead"}
GOAL_EXPERIMENT = "podeti-resnet18"
WARMUP = 3  # calls before a measurement


def measure(context: Context, ledger: Ledger) -> None:
    """Measures loaders, some architectures in every mode, all in eager mode, the scripts, and the rest."""
    peak = ledger.once("peak", lambda: measure_peaks(context))
    ledger.once("loader", lambda: measure_loaders(context))
    names = one_experiment_per_architecture(context)
    ledger.once("step", lambda: step_with_loader(context, names[0]))
    modes = context.scale.modes

    def measure_steps(name: str, mode: str) -> None:
        ledger.once(f"architectures/{name}/{mode}", lambda: measure_architecture(context, name, mode, peak))

    for name in [names[0], *(name for name in context.scale.all_mode_experiments if name in names[1:])]:
        for mode in modes:
            measure_steps(name, mode)
    for name in names[1:]:
        measure_steps(name, modes[0])
    for name in context.scale.other_benchmarks:
        ledger.once(name, partial(run_benchmark, context, name))
    for mode in modes[1:]:
        for name in names[1:]:
            measure_steps(name, mode)


def one_experiment_per_architecture(context: Context) -> list[str]:
    """Returns one experiment of each architecture, first the ResNet-18 that the goals are for."""
    if context.scale.step_experiments:
        return list(context.scale.step_experiments)
    known = experiments.load()
    one_of_each: dict[str, str] = {}
    for name in (GOAL_EXPERIMENT, *known):
        one_of_each.setdefault(str(known[name].architecture), name)
    return list(one_of_each.values())


def measure_peaks(context: Context) -> dict[str, Any]:
    """Measures the GPU's peak: bf16 FLOP/s of a large matrix product, and bytes per second of a copy."""
    import torch

    side = context.scale.matmul_size
    a, b = (torch.randn(side, side, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    product = timed(lambda: a @ b, 10, context.scale.rounds, context.device)
    large = torch.empty(side * side, dtype=torch.float32, device=context.device)
    copy = timed(large.clone, 10, context.scale.rounds, context.device)
    return {
        "product": side,
        "bf16_flops": asdict(spread([2 * side**3 / seconds for seconds in product])),
        "copy_bytes_per_second": asdict(spread([8 * side * side / seconds for seconds in copy])),
    }


def timed(call: Callable[[], Any], times: int, rounds: int, device: str) -> list[float]:
    """Returns the mean seconds per call in each round of `times` calls, after WARMUP calls."""
    for _ in range(WARMUP):
        call()
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            call()
        synchronize(device)
        seconds.append((time.perf_counter() - start) / times)
    return seconds


def measure_loaders(context: Context) -> dict[str, Any]:
    """Measures the images per second that each loader delivers to the device."""
    import torch

    scale = context.scale
    size = min(scale.batch, context.manifest.splits["train"].images // 4)
    workers = min(8, usable_cores())
    benchmark = loaders.LoaderBenchmark(context.data, size, workers, scale.rounds)
    epochs = loaders.loaders(benchmark, context.manifest, torch.device(context.device))
    candidates = loaders.rate_measurements(benchmark, context.manifest, epochs)
    rates = interleaved(candidates, scale.rounds, "measure loaders")
    return {
        "batch_size": size,
        "workers": workers,
        "images_per_second": {name: asdict(spread(values)) for name, values in rates.items()},
        **loaders.ratios(rates),
    }


def step_of(context: Context, experiment: Experiment, batch: int, mode: str | None) -> Callable[..., None]:
    """Returns an optimizer step as in `runner train`: bf16 on a GPU, with the recipe's memory format and optimizer.

    Args:
        context: the part's context.
        experiment: what is trained.
        batch: images per step.
        mode: mode of torch.compile; None for eager mode.

    Returns:
        A function of images (n, 3, H, W) and labels (n,), by default a fixed batch of noise.
    """
    import torch

    from runner.system import cuda
    from runner.training import optim

    device = torch.device(context.device)
    cuda.prepare(device, False, {})
    recipe = experiment.recipe
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    model = experiment.architecture.build().to(device, memory_format=layout).train()
    optimizer = optim.build_optimizer(recipe.optimizer, model)
    side = recipe.resize or context.manifest.image_shape[0]
    noise = torch.randn(batch, 3, side, side, device=device).to(memory_format=layout)
    noise_labels = torch.arange(batch, device=device) % len(context.manifest.classes)
    train_step = make_step(torch.compile(model, mode=mode) if mode else model, optimizer, context.device)

    def step(images: torch.Tensor = noise, labels: torch.Tensor = noise_labels) -> None:
        train_step(images, labels)

    return step


def step_with_loader(context: Context, name: str) -> dict[str, Any]:
    """Measures steps on batches from the loader against steps on a fixed batch, in turn."""
    import torch

    from runner.data.open import RankInfo, open_split

    scale = context.scale
    experiment = experiments.get(name)
    recipe = replace(experiment.recipe, batch_size=scale.batch, validation=0)
    step = step_of(context, experiment, scale.batch, None)
    rank_info = RankInfo(torch.device(context.device), dtype=torch.float32 if context.rehearse else torch.bfloat16)
    stream = open_split(context.data, context.manifest, "train", recipe, rank_info)

    batches = (batch for epoch in count() for batch in stream.epoch(epoch))
    fixed = next(batches)
    calls = {"loader": lambda: step(*next(batches)), "fixed": lambda: step(*fixed)}

    def seconds_of(kind: str) -> float:
        return timed(calls[kind], scale.steps, 1, context.device)[0]

    seconds = interleaved({kind: partial(seconds_of, kind) for kind in calls}, scale.rounds, "measure steps")
    return {
        "experiment": name,
        "ratio_loader_to_fixed": ratio(seconds["loader"], seconds["fixed"]),
        "goals": {"ratio_loader_to_fixed": "≤ 1.02"},
    }


def measure_architecture(context: Context, name: str, mode: str, peak: dict[str, Any] | None) -> dict[str, Any]:
    """Measures the images per second of one architecture, its share of the GPU's peak, and its peak memory."""
    import torch

    scale, experiment = context.scale, experiments.get(name)
    gpu = context.device == "cuda"
    torch.compiler.reset()
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    step = step_of(context, experiment, scale.batch, MODES[mode])
    start = time.perf_counter()
    step()
    synchronize(context.device)
    first = time.perf_counter() - start
    if gpu:
        torch.cuda.reset_peak_memory_stats()  # cuDNN benchmarks kernels in the first step
    seconds = timed(step, scale.steps, scale.rounds, context.device)
    rate = asdict(spread([scale.batch / each for each in seconds]))
    finding: dict[str, Any] = {
        "batch": scale.batch,
        "precision": "fp32" if context.rehearse else "bf16",
        "macs": experiment.macs,
        "images_per_second": rate,
        "first_step_seconds": first,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
    }
    if peak is not None and experiment.macs:
        flops = peak["bf16_flops"]["median"]
        limit = flops / (FLOPS_PER_MAC * experiment.macs)
        finding |= {"limit_images_per_second": limit, "utilization": rate["median"] / limit}
    return finding


def run_benchmark(context: Context, name: str) -> dict[str, Any]:
    """Runs another benchmark, which starts its own processes; returns its ratios and goals.

    If the time was up before its end, returns what it had written, and `partial`.

    Raises:
        OutOfTimeError: it had written nothing.
    """
    out = context.scratch / f"{name}.json"
    out.unlink(missing_ok=True)
    argv = ["-m", f"runner.benchmarks.{name}", "--data", context.data, "--json", out]
    if name == "overhead":
        argv += ["--device", "cuda", "--experiment", GOAL_EXPERIMENT, "--batch", context.scale.batch, "--steps", 200]
    finding: dict[str, Any] = {}
    try:
        context.run_python(*argv)
    except OutOfTimeError:
        if not out.is_file():
            raise
        finding["partial"] = True
    written = read_json(out, dict[str, Any])
    return {key: written[key] for key in written if key.startswith("ratio") or key == "goals"} | finding
