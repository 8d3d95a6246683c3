"""Part 2 of the GPU benchmark, correctness: batches, precisions, resuming after a kill, and ranks."""

import shutil
import signal
import time
from functools import partial
from typing import Any

from runner.benchmarks.gpu.context import Context, MissingError, OutOfTimeError, validation_options
from runner.benchmarks.gpu.ledger import Ledger
from runner.common import files
from runner.config.recipe import SGD, Augment, Recipe
from runner.data.open import RankInfo, open_split
from runner.run.folder import MANIFEST, WEIGHTS, Run
from runner.run.metrics import read_metrics
from runner.run.schema import CheckpointManifest

AUGMENTATIONS = {
    "crop-flip": Augment(crop_padding=4, flip="random"),
    "reflect-alternating": Augment(crop_padding=2, crop_fill="reflect", flip="alternating"),
    "resized-crop": Augment(random_resized_crop=0.3, flip="random"),
    "cutout": Augment(crop_padding=4, flip="random", cutout=8),
    "rand-augment": Augment(policy="rand", rand_ops=3),
    "trivial-augment": Augment(policy="trivial", erase=0.5, repeats=2),
    "jitter": Augment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
}
BATCHES = 3  # number of batches to compare per augmentation


def measure(context: Context, ledger: Ledger) -> None:
    """Runs all comparisons."""
    for name, augment in AUGMENTATIONS.items():
        ledger.once(f"batches/{name}", partial(compare_batches, context, augment))
    ledger.once("ddp/one", lambda: compare_one_ddp_rank(context))
    ledger.once("resume", lambda: killed_and_resumed(context))
    for precision in context.scale.train_precisions:
        ledger.once(f"losses/{precision}", partial(train_for_losses, context, precision))
    ledger.once("losses", lambda: loss_differences(ledger), remeasure=True)
    ledger.once("ddp/all", lambda: compare_all_ranks(context, ledger))


def compare_batches(context: Context, augment: Augment) -> dict[str, Any]:
    """Compares GPU batches with CPU batches as pixels in 0..255, after undoing the normalization and rounding.

    Color jitter computes in floating point, so some pixels may differ by one.
    """
    import torch

    size = min(context.scale.batch, context.manifest.splits["train"].images)
    recipe = Recipe(1, size, SGD(0.1), augment=augment, drop_last=False)
    pixels = []
    for device in (context.device, "cpu"):
        stream = open_split(
            context.data, context.manifest, "train", recipe, RankInfo(torch.device(device), loader="resident"), seed=3
        )
        images = [batch.cpu() for (batch, _), _ in zip(stream.epoch(1), range(BATCHES), strict=False)]
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (context.manifest.mean, context.manifest.std))
        pixels.append((torch.cat(images) * std + mean).round())
    difference = (pixels[0] - pixels[1]).abs()
    return {
        "images": len(pixels[0]),
        "equal_share": (difference == 0).double().mean().item(),
        "largest_difference": difference.max().item(),
    }


def _experiment(context: Context) -> tuple[str, list[object]]:
    """Returns the name and options that train a ResNet-18, or in a rehearsal a small network."""
    from runner import experiments

    name = "soni-2" if context.rehearse else "podeti-resnet18"
    validation = validation_options(experiments.get(name), context.manifest.splits["train"].images)
    batch = context.scale.batch // 2
    return name, [*validation, "--recipe.batch-size", batch, "--recipe.epochs", 100]


def _training_losses(run: Run) -> dict[int, float]:
    """Returns the training loss of every window of steps, by the last step of the window."""
    return {row.global_step: row.train_loss for row in read_metrics(run) if row.train_loss is not None}


def train_for_losses(context: Context, precision: str) -> dict[str, Any]:
    """Trains in a precision; returns the training loss of every window."""
    name, options = _experiment(context)
    options += ["--precision", precision, "--max-steps", context.scale.comparison_steps, "--evaluate-every", 1000]
    by_step = _training_losses(context.train(name, f"loss-{precision}", *options))
    return {"steps": list(by_step), "loss": list(by_step.values())}


def loss_differences(ledger: Ledger) -> dict[str, Any]:
    """Returns the relative differences of the bf16 and fp16 losses from the fp32 losses."""
    findings = {precision: ledger.measured.get(f"losses/{precision}") for precision in ("fp32", "bf16", "fp16")}
    losses = {precision: finding["loss"] for precision, finding in findings.items() if finding}
    expected = losses.pop("fp32", None)
    if expected is None or not losses:
        raise MissingError("no losses to compare")
    return {precision: _relative_difference(expected, values) for precision, values in losses.items()}


def _relative_difference(expected: list[float], actual: list[float]) -> dict[str, float]:
    """Returns the mean and the maximum relative difference over all windows."""
    differences = [abs(b - a) / abs(a) for a, b in zip(expected, actual, strict=True)]
    return {"mean": sum(differences) / len(differences), "most": max(differences)}


def killed_and_resumed(context: Context) -> dict[str, Any]:
    """Kills a run, resumes it, and compares the hash of its weights with that of an uninterrupted run."""
    name, options = _experiment(context)
    steps = context.scale.kill_test_steps
    options += ["--precision", "fp32" if context.rehearse else "bf16", "--max-steps", steps]
    options += ["--deterministic", "--evaluate-every", 1000, "--checkpoint-every", max(1, steps // 6)]
    uninterrupted = context.train(name, "straight", *options)  # resumed, if an earlier call ran out of time
    shutil.rmtree(context.train_command(name, "killed")[0].folder, ignore_errors=True)
    run, argv = context.train_command(name, "killed", *options)
    _train_and_kill(context, run, argv, steps)
    context.run_python(*argv)
    hashes = [_weights_sha256(one) for one in (uninterrupted, run)]
    return {
        "steps": steps,
        "resumed_from": run.config().resumed[-1].step,
        "same_weights": hashes[0] == hashes[1],
        "sha256": hashes,
    }


def _train_and_kill(context: Context, run: Run, argv: list[object], steps: int) -> None:
    """Starts training, and kills it once it has a checkpoint before the last step.

    Raises:
        OutOfTimeError: the time was up first.
        RuntimeError: the run finished first.
    """
    process = context.start_python(*argv)
    killed = False
    while process.poll() is None and context.seconds_left() > 0:
        saved = run.checkpoint_steps()
        if saved and saved[-1] < steps:
            process.send_signal(signal.SIGKILL)
            killed = True
            break
        time.sleep(0.005)
    process.kill()
    process.communicate()
    if context.seconds_left() <= 0:
        raise OutOfTimeError
    if not killed or run.summary.exists():
        raise RuntimeError("the run was over before it could be killed")


def _weights_sha256(run: Run) -> str:
    (step,) = run.checkpoint_steps()
    return files.read_json(run.step_folder(step) / MANIFEST, CheckpointManifest).sha256[WEIGHTS]


def compare_one_ddp_rank(context: Context) -> dict[str, Any]:
    """Checks that the gradients of DDP with one process are bit-identical to those without DDP.

    Deterministic kernels need an environment variable of cuBLAS; see `VARIABLES` in `__main__`.
    """
    import torch
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    from runner import experiments
    from runner.system import cuda

    device = torch.device(context.device)
    cuda.prepare(device, True, {})
    backend = "gloo" if context.rehearse else "nccl"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = experiments.get(_experiment(context)[0]).architecture.build().to(device)
        images = torch.randn(context.scale.batch // 4, 3, *context.manifest.image_shape[:2], device=device)
        labels = torch.arange(len(images), device=device) % 10
        outer = DistributedDataParallel(model, gradient_as_bucket_view=True) if wrapped else model
        torch.manual_seed(1)
        F.cross_entropy(outer(images), labels).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.distributed.destroy_process_group()
    return {"backend": backend, "same_gradients": all(map(torch.equal, *gradients))}


def compare_all_ranks(context: Context, ledger: Ledger) -> dict[str, Any]:
    """Compares the loss on all GPUs of the node with that on one, for the same global batches and synced batch norm."""
    if context.max_ranks < 2:
        raise MissingError("only one GPU")
    one_process = ledger.measured.get("losses/fp32")
    if one_process is None:
        raise MissingError("no losses of one process to compare with")
    name, options = _experiment(context)
    ranks = max(n for n in range(1, context.max_ranks + 1) if context.scale.batch // 2 % n == 0)
    options += ["--precision", "fp32", "--max-steps", context.scale.comparison_steps, "--evaluate-every", 1000]
    options += ["--recipe.sync-batch-norm"]
    by_step = _training_losses(context.train(name, f"ranks-{ranks}", *options, processes=ranks))
    return {"ranks": ranks, "difference": _relative_difference(one_process["loss"], list(by_step.values()))}
