"""Part 2: is the GPU's arithmetic the same? Batches, precisions, a killed run that goes on, and ranks."""

import shutil
import signal
import time
from typing import Any

from runner.batches.protocol import Place, open_split
from runner.benchmarks.gpu.part import Context, Ledger, MissingError, OutOfTimeError, fitted
from runner.recipe import SGD, Augment, Recipe
from runner.runs import Run, read_json, read_metrics

AUGMENTATIONS = {
    "crop-flip": Augment(crop_padding=4, flip="random"),
    "reflect-alternating": Augment(crop_padding=2, crop_fill="reflect", flip="alternating"),
    "cutout": Augment(crop_padding=4, flip="random", cutout=8),
    "jitter": Augment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
}
BATCHES = 3  # of each augmentation that are compared


def measure(context: Context, ledger: Ledger) -> None:
    """Everything that a table of speeds is worth nothing without."""
    for name, augment in AUGMENTATIONS.items():
        ledger.once(f"batches/{name}", lambda augment=augment: batches(context, augment))
    for precision in context.scale.trained_in:
        ledger.once(f"losses/{precision}", lambda precision=precision: losses(context, precision))
    ledger.once("losses", lambda: differences(ledger), derived=True)
    ledger.once("resume", lambda: killed_and_resumed(context))
    ledger.once("ddp/one", lambda: one_rank(context))
    ledger.once("ddp/all", lambda: all_ranks(context, ledger))


def batches(context: Context, augment: Augment) -> dict[str, Any]:
    """The same batches made on the GPU and on the CPU, as pixels: normalisation undone and rounded.

    `equal_share` of them are the same; colour jitter computes with fractions, and may differ by one.
    """
    import torch

    size = min(context.scale.batch, context.manifest.splits["train"].images)
    recipe = Recipe(1, size, SGD(0.1), augment=augment, drop_last=False)
    made = []
    for device in (context.device, "cpu"):
        stream = open_split(
            context.data, context.manifest, "train", recipe, Place(torch.device(device), loader="resident"), seed=3
        )
        images = [batch.cpu() for (batch, _), _ in zip(stream.epoch(1), range(BATCHES), strict=False)]
        mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (context.manifest.mean, context.manifest.std))
        made.append((torch.cat(images) * std + mean).round())
    difference = (made[0] - made[1]).abs()
    return {
        "images": len(made[0]),
        "equal_share": (difference == 0).double().mean().item(),
        "largest_difference": difference.max().item(),
    }


def _experiment(context: Context) -> list[object]:
    """The options that train a ResNet-18, or in miniature a small network, for so many steps."""
    from runner import experiments

    name = "soni-2" if context.rehearse else "podeti-resnet18"
    fit = fitted(experiments.get(name), context.manifest.splits["train"].images)
    batch = context.scale.batch // 2
    return [name, *fit, "--recipe.batch-size", batch, "--recipe.epochs", 100]


def _rows(run: Run) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if "train/loss" in row]


def losses(context: Context, precision: str) -> dict[str, Any]:
    """The training loss of a precision, window by window."""
    name, *options = _experiment(context)
    words = ["--precision", precision, "--max-steps", context.scale.losses, "--evaluate-every", 1000]
    rows = _rows(context.train(name, f"loss-{precision}", *words, *options))
    return {"steps": [row["global_step"] for row in rows], "loss": [row["train/loss"] for row in rows]}


def differences(ledger: Ledger) -> dict[str, Any]:
    """How far the lower precisions' losses are from fp32's, as a share of it: mean over all windows, and most."""
    found = {
        p: ledger.found[f"losses/{p}"]["loss"] for p in ("fp32", "bf16", "fp16") if f"losses/{p}" in ledger.found
    }
    expected = found.pop("fp32", None)
    if expected is None or not found:
        raise MissingError("no losses to compare")
    return {precision: _distance(expected, loss) for precision, loss in found.items()}


def _distance(expected: list[float], other: list[float]) -> dict[str, float]:
    shares = [abs(b - a) / abs(a) for a, b in zip(expected, other, strict=True)]
    return {"mean": sum(shares) / len(shares), "most": max(shares)}


def killed_and_resumed(context: Context) -> dict[str, Any]:
    """A run that is killed in the middle and goes on, beside one that never stopped, by their weights' hashes."""
    name, *options = _experiment(context)
    steps = context.scale.killed
    options += ["--precision", "fp32" if context.rehearse else "bf16", "--max-steps", steps]
    options += ["--deterministic", "--evaluate-every", 1000, "--checkpoint-every", max(1, steps // 40)]
    for begun in ("straight", "killed"):  # by a call before this one, and perhaps stopped for lack of time
        shutil.rmtree(context.training(name, begun)[0].folder, ignore_errors=True)
    straight = context.train(name, "straight", *options)
    run, words = context.training(name, "killed", *options)
    process = context.begin(*words)
    killed_at = None
    while process.poll() is None and context.left() > 0:
        steps_kept = sorted(int(folder.name[5:]) for folder in run.checkpoints.glob("step-*"))
        if steps_kept and steps_kept[-1] < steps:
            killed_at = steps_kept[-1]
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.kill()
    process.communicate()
    if context.left() <= 0:
        raise OutOfTimeError
    if killed_at is None or run.summary.exists():
        raise RuntimeError("the run was over before it could be killed")
    context.command(*words)
    hashes = [_weights(one) for one in (straight, run)]
    (resumed,) = run.config()["resumed"][-1:]
    return {
        "steps": steps,
        "resumed_from": resumed["step"],
        "same_weights": hashes[0] == hashes[1],
        "sha256": hashes,
    }


def _weights(run: Run) -> str:
    (folder,) = run.checkpoints.glob("step-*")
    return read_json(folder / "manifest.json")["sha256"]["model.safetensors"]


def one_rank(context: Context) -> dict[str, Any]:
    """DDP with one process against none: are the gradients the same to the bit?

    Deterministic kernels need cuBLAS's variable, which this part is started with.
    """
    import torch
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    from runner import cuda, experiments

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


def all_ranks(context: Context, ledger: Ledger) -> dict[str, Any]:
    """The loss over all GPUs of the node against one, with the same global batches, batch norm over all ranks."""
    if context.gpus < 2:
        raise MissingError("one GPU here")
    alone = ledger.found.get("losses/fp32")
    if alone is None:
        raise MissingError("no losses of one process to compare with")
    name, *options = _experiment(context)
    ranks = max(n for n in range(1, context.gpus + 1) if context.scale.batch // 2 % n == 0)
    words = ["--precision", "fp32", "--max-steps", context.scale.losses, "--evaluate-every", 1000]
    words += ["--recipe.sync-batch-norm", *options]
    rows = _rows(context.train(name, f"ranks-{ranks}", *words, processes=ranks))
    return {"ranks": ranks, "difference": _distance(alone["loss"], [row["train/loss"] for row in rows])}
