"""Part 3: how fast are batches, steps and the runner, and how far from what the GPU could do?"""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from runner import experiments
from runner.benchmarks import loader as loaders
from runner.benchmarks import measure as measured
from runner.benchmarks.gpu.part import Context, Ledger, spread
from runner.recipe import Experiment
from runner.runs import read_json

FLOPS_PER_MAC = 6  # of training: two for each of the forward pass and both halves of the backward pass
MODES = {"eager": None, "compiled": "default", "graphs": "reduce-overhead"}  # torch.compile's; graphs are CUDA's
FIRST = "podeti-resnet18"


def measure(context: Context, ledger: Ledger) -> None:
    """Loaders and one ResNet-18 first, then every architecture, eager before compiled, and the scripts between."""
    peak = ledger.once("peak", lambda: peaks(context))
    ledger.once("loader", lambda: loader(context))
    names = architectures(context)
    ledger.once("step", lambda: step_with_loader(context, names[0]))
    modes = context.scale.modes

    def stepped(pairs: list[tuple[str, str]]) -> None:
        for name, mode in pairs:
            place = f"architectures/{name}/{mode}"
            ledger.once(place, lambda name=name, mode=mode: steps(context, name, mode, peak))

    stepped([(names[0], mode) for mode in modes])
    stepped([(name, modes[0]) for name in names[1:]])
    for name in context.scale.scripts:
        ledger.once(name, lambda name=name: script(context, name))
    stepped([(name, mode) for mode in modes[1:] for name in names[1:]])


def architectures(context: Context) -> list[str]:
    """One experiment of each architecture, the ResNet-18 of the goals first."""
    if context.scale.architectures:
        return list(context.scale.architectures)
    known = experiments.load()
    one_of_each: dict[str, str] = {}
    for name in (FIRST, *known):
        one_of_each.setdefault(str(known[name].architecture), name)
    return list(one_of_each.values())


def peaks(context: Context) -> dict[str, Any]:
    """What the GPU itself gives: bf16 operations in a large product, and bytes in a copy, read and written."""
    import torch

    side = context.scale.product
    a, b = (torch.randn(side, side, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    product = timed(lambda: a @ b, 10, context.scale.rounds, context.device)
    large = torch.empty(side * side, dtype=torch.float32, device=context.device)
    copy = timed(large.clone, 10, context.scale.rounds, context.device)
    return {
        "product": side,
        "bf16_flops": spread([2 * side**3 / seconds for seconds in product]),
        "copy_bytes_per_second": spread([8 * side * side / seconds for seconds in copy]),
    }


def timed(call: Callable[[], Any], times: int, rounds: int, device: str) -> list[float]:
    """Seconds of a call, the mean of so many, in every round; some before that count for nothing."""
    _wait(device)
    for _ in range(3):
        call()
    found = []
    for _ in range(rounds):
        _wait(device)
        began = time.perf_counter()
        for _ in range(times):
            call()
        _wait(device)
        found.append((time.perf_counter() - began) / times)
    return found


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def loader(context: Context) -> dict[str, Any]:
    """Images a second that arrive on the device: resident, streaming, torchvision's DataLoader, FFCV's own."""
    import torch

    scale = context.scale
    size = min(scale.batch, context.manifest.splits["train"].images // 4)
    workers = min(8, len(os.sched_getaffinity(0)))
    benchmark = loaders.LoaderBenchmark(context.data, size, workers, scale.rounds)
    epochs = loaders.readers(benchmark, context.manifest, torch.device(context.device))
    subjects = loaders.rates(benchmark, context.manifest, epochs)
    rates = measured.in_turn(subjects, scale.rounds, "measure loaders")
    return {
        "batch_size": size,
        "workers": workers,
        "images_per_second": {name: spread(found) for name, found in rates.items()},
        **{name: asdict(ratio) for name, ratio in loaders.ratios(rates).items()},
    }


def step_of(context: Context, experiment: Experiment, batch: int, mode: str | None) -> Callable[..., None]:
    """One optimizer step as the runner takes it: bf16 on a GPU, the recipe's memory format and optimizer.

    Args:
        context: of the part.
        experiment: what is trained.
        batch: images of a step.
        mode: of torch.compile; None for none.

    Returns:
        A function of images (n, 3, H, W) and labels (n,), by default a fixed batch of noise.
    """
    import torch
    import torch.nn.functional as F

    from runner import cuda, optim

    device = torch.device(context.device)
    cuda.prepare(device, False, {})
    recipe = experiment.recipe
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    model = experiment.architecture.build().to(device, memory_format=layout).train()
    optimizer = optim.build(recipe.optimizer, model)
    side = recipe.resize or context.manifest.image_shape[0]
    noise = torch.randn(batch, 3, side, side, device=device).to(memory_format=layout)
    classes = torch.arange(batch, device=device) % len(context.manifest.classes)
    forward = torch.compile(model, mode=mode) if mode else model

    def step(images: torch.Tensor = noise, labels: torch.Tensor = classes) -> None:
        with torch.autocast(context.device, torch.bfloat16, enabled=not context.rehearse):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_with_loader(context: Context, name: str) -> dict[str, Any]:
    """Steps on fresh batches against steps on one batch that lies there, in turn."""
    import torch

    from runner.batches.protocol import Place, open_split

    scale = context.scale
    experiment = experiments.get(name)
    recipe = replace(experiment.recipe, batch_size=scale.batch, validation=0)
    step = step_of(context, experiment, scale.batch, None)
    stream = open_split(context.data, context.manifest, "train", recipe, Place(torch.device(context.device)))

    def batches() -> Any:
        for epoch in range(10**9):
            yield from stream.epoch(epoch)

    endless = batches()
    fixed = next(endless)
    turns = {"loader": lambda: step(*next(endless)), "fixed": lambda: step(*fixed)}
    times = {kind: lambda call=call: timed(call, scale.steps, 1, context.device)[0] for kind, call in turns.items()}
    found = measured.in_turn(times, scale.rounds, "measure steps")
    ratio = asdict(measured.ratio(found["loader"], found["fixed"]))
    return {"experiment": name, "ratio_loader_to_fixed": ratio, "goals": {"ratio_loader_to_fixed": "≤ 1.02"}}


def steps(context: Context, name: str, mode: str, peak: dict[str, Any] | None) -> dict[str, Any]:
    """Images a second of one architecture, its share of the GPU's peak, and the most memory it took."""
    import torch

    scale, experiment = context.scale, experiments.get(name)
    gpu = context.device == "cuda"
    torch.compiler.reset()
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    step = step_of(context, experiment, scale.batch, MODES[mode])
    began = time.perf_counter()
    step()
    _wait(context.device)
    first = time.perf_counter() - began
    if gpu:
        torch.cuda.reset_peak_memory_stats()  # the first step tries kernels out
    seconds = timed(step, scale.steps, scale.rounds, context.device)
    rate = spread([scale.batch / each for each in seconds])
    found: dict[str, Any] = {
        "batch": scale.batch,
        "precision": "fp32" if context.rehearse else "bf16",
        "macs": experiment.macs,
        "images_per_second": rate,
        "first_step_seconds": first,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
    }
    if peak is not None and experiment.macs:
        flops = peak["bf16_flops"]["median"]
        found["limit_images_per_second"] = flops / (FLOPS_PER_MAC * experiment.macs)
        found["utilisation"] = rate["median"] / found["limit_images_per_second"]
    return found


def script(context: Context, name: str) -> dict[str, Any]:
    """One of the other benchmarks, which starts processes of its own; its ratios."""
    out = context.out / f"{name}.json"
    words = ["-m", f"runner.benchmarks.{name}", "--data", context.data, "--json", out]
    if name == "overhead":
        words += ["--device", "cuda", "--experiment", FIRST, "--batch", context.scale.batch, "--steps", 200]
    context.command(*words)
    measured = read_json(out)
    return {key: value for key, value in measured.items() if key.startswith("ratio")} | {"goals": measured["goals"]}
