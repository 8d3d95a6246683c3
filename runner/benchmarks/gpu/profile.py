"""Part 4 of the GPU benchmark: where the time of a step goes, by torch's profiler, as shares, figure and text."""

import re
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from runner import experiments
from runner.benchmarks.gpu.context import Context
from runner.benchmarks.gpu.ledger import Ledger
from runner.benchmarks.gpu.speed import WARMUP, step_of, timed

BATCHES = {"podeti-resnet18": 512, "speedrun": 2000}  # images per step, by experiment
# The kind of a kernel is the first whose pattern matches its name. On the CPU, operators take the place of kernels.
KINDS = {
    "convolution": r"conv(?!ert)|fprop|dgrad|wgrad|implicit_gemm",
    "normalization": r"batch_?norm|bn_|layer_?norm",
    "optimizer": r"multi_tensor|foreach|fused_(adam|sgd)|_fused",
    "matrix product": r"nvjet|gemm|cutlass|addmm|aten::mm|bmm|splitk",  # cuBLAS's kernels on Hopper are called nvjet
    "pooling": r"pool",
    "copy and layout": r"memcpy|memset|copy|nchw|nhwc|transpose",
    "reduction": r"reduce|softmax|nll|norm|sum|mean",
    "elementwise": r"elementwise|vectorized|aten::|triton",
}
COLORS = "tab10"
TOP = 12  # number of kernels to list


def measure(context: Context, ledger: Ledger) -> None:
    """Profiles the steps, and draws them in one figure."""
    for name, batch in BATCHES.items():
        batch = min(batch, context.scale.batch) if context.rehearse else batch
        ledger.once(name, partial(profile_step, context, name, batch))
    profiles = {name: ledger.measured[name] for name in BATCHES if name in ledger.measured}
    if profiles:
        ledger.once("picture", lambda: picture(profiles, context), remeasure=True)


def profile_step(context: Context, name: str, batch: int) -> dict[str, Any]:
    """Measures the share of each kind of kernel in a step's device time, the top kernels, and the idle time."""
    from torch.profiler import ProfilerActivity, profile

    step = step_of(context, experiments.get(name), batch, None)
    steps = min(5, context.scale.steps)
    seconds = min(timed(step, steps, context.scale.rounds, context.device))
    gpu = context.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        timed(step, steps, 1, context.device)
    profiled_steps = steps + WARMUP
    events = [
        event
        for event in profiler.key_averages()
        if gpu == str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False)
    ]
    microseconds = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in events}
    total = sum(microseconds.values())
    kinds: defaultdict[str, float] = defaultdict(float)
    for kernel, time in microseconds.items():
        kinds[kind_of(kernel)] += time / total
    shares = dict(sorted(kinds.items(), key=lambda pair: -pair[1]))
    busy = min(1.0, total / 1e6 / profiled_steps / seconds) if gpu else None
    return {
        "batch": batch,
        "precision": "bf16" if gpu else "fp32",
        "step_ms": 1e3 * seconds if gpu else None,
        "kernels_a_step": round(sum(event.count for event in events) / profiled_steps),
        "busy": busy,
        "shares": shares,
        "kernels": {kernel[:120]: time / total for kernel, time in Counter(microseconds).most_common(TOP)},
        "summary": summarize(name, shares, busy),
    }


def picture(profiles: dict[str, dict[str, Any]], context: Context) -> dict[str, Any]:
    """Draws profile.png."""
    return {"file": draw(profiles, context.out / "profile.png").name, "steps": list(profiles)}


def kind_of(kernel: str) -> str:
    """Returns the kind of a kernel."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel.lower())), "other")


def summarize(name: str, shares: dict[str, float], busy: float | None) -> str:
    """Returns a summary in one or two sentences."""
    (first, largest), *rest = shares.items()
    summary = f"A step of {name} spends {largest:.0%} of its device time on {first}"
    summary += "".join(f", {share:.0%} on {kind}" for kind, share in rest[:3]) + "."
    if busy is not None:
        launching = "; the rest is launch overhead" if busy < 0.95 else ""
        summary += f" The device computes for {busy:.0%} of the step{launching}."
    return summary


def draw(profiles: dict[str, dict[str, Any]], path: Path) -> Path:
    """Draws one stacked bar per step, with the share of each kind."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.7 * len(profiles)), layout="constrained")
    axes = figure.add_subplot()
    kinds = [*KINDS, "other"]
    for row, profile in enumerate(profiles.values()):
        left = 0.0
        for kind in kinds:
            share = profile["shares"].get(kind, 0.0)
            axes.barh(row, share, left=left, color=colormaps[COLORS](kinds.index(kind)), height=0.6)
            if share > 0.04:
                axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", color="white", fontsize=8)
            left += share
    for kind in kinds:
        axes.barh(0, 0, color=colormaps[COLORS](kinds.index(kind)), label=kind)
    axes.set_yticks(range(len(profiles)), list(profiles))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the device time of a step")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    return path
