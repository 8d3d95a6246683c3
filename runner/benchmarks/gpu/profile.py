"""Part 4: where does the time of a step go? By torch's profiler, as shares, a picture and a paragraph."""

import re
from pathlib import Path
from typing import Any

from runner import experiments
from runner.benchmarks.gpu.part import Context, Ledger
from runner.benchmarks.gpu.speed import step_of, timed

SUBJECTS = {"podeti-resnet18": 512, "speedrun": 2000}
# What a kernel is for, by its name; the first that matches. On the CPU operators stand in for kernels.
KINDS = {
    "convolution": r"conv(?!ert)|fprop|dgrad|wgrad|implicit_gemm",
    "normalisation": r"batch_?norm|bn_|layer_?norm",
    "optimizer": r"multi_tensor|foreach|fused_(adam|sgd)|_fused",
    "matrix product": r"nvjet|gemm|cutlass|addmm|aten::mm|bmm|splitk",  # cuBLAS's on Hopper are called nvjet
    "pooling": r"pool",
    "copy and layout": r"memcpy|memset|copy|nchw|nhwc|transpose",
    "reduction": r"reduce|softmax|nll|norm|sum|mean",
    "elementwise": r"elementwise|vectorized|aten::|triton",
}
COLOURS = "tab10"
TOP = 12


def measure(context: Context, ledger: Ledger) -> None:
    """The two steps, and a picture of both."""
    for name, batch in SUBJECTS.items():
        small = min(batch, context.scale.batch) if context.rehearse else batch
        ledger.once(name, lambda name=name, batch=small: profiled(context, name, batch))
    found = {name: ledger.found[name] for name in SUBJECTS if name in ledger.found}
    if found:
        ledger.once("picture", lambda: picture(found, context), derived=True)


def profiled(context: Context, name: str, batch: int) -> dict[str, Any]:
    """Shares of a step's device time by kind, the dearest kernels, and how long the device had nothing to do."""
    from torch.profiler import ProfilerActivity, profile

    step = step_of(context, experiments.get(name), batch, None)
    times = min(5, context.scale.steps)
    seconds = min(timed(step, times, context.scale.rounds, context.device))
    gpu = context.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as watched:
        timed(step, times, 1, context.device)
    events = [
        event
        for event in watched.key_averages()
        if gpu == str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False)
    ]
    spent = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in events}
    total = sum(spent.values())
    kinds: dict[str, float] = {}
    for kernel, microseconds in spent.items():
        kinds[kind_of(kernel)] = kinds.get(kind_of(kernel), 0.0) + microseconds / total
    busy = min(1.0, total / 1e6 / (times + 3) / seconds)  # `timed` takes three steps before those that count
    shares = dict(sorted(kinds.items(), key=lambda pair: -pair[1]))
    dearest = sorted(spent.items(), key=lambda pair: -pair[1])[:TOP]
    return {
        "batch": batch,
        "precision": "bf16" if gpu else "fp32",
        "step_ms": 1e3 * seconds if gpu else None,
        "kernels_a_step": round(sum(event.count for event in events) / (times + 3)),
        "busy": busy if gpu else None,
        "shares": shares,
        "kernels": {kernel[:120]: microseconds / total for kernel, microseconds in dearest},
        "told": told(name, shares, busy if gpu else None),
    }


def picture(found: dict[str, dict[str, Any]], context: Context) -> dict[str, Any]:
    """Draws the steps that there are."""
    return {"file": draw(found, context.out / "profile.png").name, "steps": list(found)}


def kind_of(kernel: str) -> str:
    """What a kernel is for."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel.lower())), "other")


def told(name: str, shares: dict[str, float], busy: float | None) -> str:
    """The paragraph."""
    (first, most), *rest = shares.items()
    told = f"A step of {name} spends {most:.0%} of its device time on {first}"
    told += "".join(f", {share:.0%} on {kind}" for kind, share in rest[:3]) + "."
    if busy is not None:
        told += f" The device computes for {busy:.0%} of the step" + (
            "; what is left goes to launching." if busy < 0.95 else "."
        )
    return told


def draw(found: dict[str, dict[str, Any]], path: Path) -> Path:
    """One bar for each step, cut by kind."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.7 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    kinds = [*KINDS, "other"]
    for row, (_, profile) in enumerate(found.items()):
        left = 0.0
        for kind in kinds:
            share = profile["shares"].get(kind, 0.0)
            axes.barh(row, share, left=left, color=colormaps[COLOURS](kinds.index(kind)), height=0.6)
            if share > 0.04:
                axes.text(
                    left + share / 2, row, f"{share:.0%}", ha="center", va="center", color="white", fontsize=8
                )
            left += share
    for kind in kinds:
        axes.barh(0, 0, color=colormaps[COLOURS](kinds.index(kind)), label=kind)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the device time of a step")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    return path
