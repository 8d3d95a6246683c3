"""Part 4 of the GPU benchmark: where the time of a step goes, by torch's profiler, as shares, figure and text."""

from collections import Counter
from functools import partial
from typing import Any

from runner import experiments
from runner.benchmarks.gpu.context import Context
from runner.benchmarks.gpu.ledger import Ledger
from runner.benchmarks.gpu.speed import WARMUP, step_of, timed

BATCHES = {"podeti-resnet18": 512, "speedrun": 2000}  # images per step, by experiment
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

    from runner.training.profile import device_microseconds, kernels, shares_of

    step = step_of(context, experiments.get(name), batch, None)
    steps = min(5, context.scale.steps)
    seconds = min(timed(step, steps, context.scale.rounds, context.device))
    gpu = context.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        timed(step, steps, 1, context.device)
    profiled_steps = steps + WARMUP
    microseconds = device_microseconds(profiler)
    total, shares = sum(microseconds.values()), shares_of(microseconds)
    busy = min(1.0, total / 1e6 / profiled_steps / seconds) if gpu else None
    return {
        "batch": batch,
        "precision": "bf16" if gpu else "fp32",
        "step_ms": 1e3 * seconds if gpu else None,
        "kernels_a_step": round(sum(event.count for event in kernels(profiler)) / profiled_steps),
        "busy": busy,
        "shares": shares,
        "kernels": {kernel[:120]: time / total for kernel, time in Counter(microseconds).most_common(TOP)},
        "summary": summarize(name, shares, busy),
    }


def picture(profiles: dict[str, dict[str, Any]], context: Context) -> dict[str, Any]:
    """Draws profile.png."""
    from runner.training.profile import draw

    shares = {name: profile["shares"] for name, profile in profiles.items()}
    return {"file": draw(shares, context.out / "profile.png").name, "steps": list(profiles)}


def summarize(name: str, shares: dict[str, float], busy: float | None) -> str:
    """Returns a summary in one or two sentences."""
    (first, largest), *rest = shares.items()
    summary = f"A step of {name} spends {largest:.0%} of its device time on {first}"
    summary += "".join(f", {share:.0%} on {kind}" for kind, share in rest[:3]) + "."
    if busy is not None:
        launching = "; the rest is launch overhead" if busy < 0.95 else ""
        summary += f" The device computes for {busy:.0%} of the step{launching}."
    return summary
