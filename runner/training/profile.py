"""Profiles optimizer steps with torch.profiler: a trace, and the share of each kind of kernel."""

import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

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


@dataclass
class StepProfiler:
    """Profiles the optimizer steps `first` to `last` of a run, and writes the trace and a picture to a folder.

    Attributes:
        folder: the folder, which is created if needed.
        title: what was trained, for the picture.
        device: "cuda" or "cpu".
        first, last: numbers of the steps, counted from 1.
    """

    folder: Path
    title: str
    device: str
    first: int
    last: int
    _active: profile | None = field(default=None, init=False)
    _step: record_function | None = field(default=None, init=False)

    @property
    def trace(self) -> Path:
        """Path of the trace."""
        return self.folder / f"steps-{self.first}-{self.last}.json.gz"

    def before_step(self, step: int) -> None:
        """Starts profiling before the first of the steps, or that at which a resumed run enters the range."""
        if not self.first <= step <= self.last:
            return
        if self._active is None:
            gpu = [ProfilerActivity.CUDA] if self.device == "cuda" else []
            self._active = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._active.start()
        self._step = record_function(f"step {step}")
        self._step.__enter__()

    def after_step(self, step: int) -> None:
        """Writes the files after the last of the steps."""
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
        if self._active is not None and step == self.last:
            finished, self._active = self._active, None
            finished.stop()
            self._write(finished)

    def _write(self, finished: profile) -> None:
        """Writes the trace last, and at once, because its presence means that the steps were profiled."""
        self.folder.mkdir(exist_ok=True)
        draw({self.title: shares_of(device_microseconds(finished))}, self.trace.with_suffix("").with_suffix(".png"))
        part = self.folder / f".part-{self.trace.name}"
        finished.export_chrome_trace(str(part))
        part.replace(self.trace)
        print(f"profile: {self.trace}", file=sys.stderr)


def device_microseconds(finished: profile) -> dict[str, float]:
    """Returns the time of each kernel on the GPU; on the CPU, that of each operator without those that it calls."""
    gpu = ProfilerActivity.CUDA in finished.activities
    return {
        event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in kernels(finished)
    }


def kernels(finished: profile) -> list[Any]:
    """Returns the kernels on the GPU by name; on the CPU, the operators."""
    gpu = ProfilerActivity.CUDA in finished.activities
    return [
        event
        for event in finished.key_averages()
        if gpu == str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False)
    ]


def kind_of(kernel: str) -> str:
    """Returns the kind of a kernel."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel.lower())), "other")


def shares_of(microseconds: Mapping[str, float]) -> dict[str, float]:
    """Returns the share of each kind of kernel in the time of all kernels, the largest first."""
    total = sum(microseconds.values())
    kinds: defaultdict[str, float] = defaultdict(float)
    for kernel, time in microseconds.items():
        kinds[kind_of(kernel)] += time / total
    return dict(sorted(kinds.items(), key=lambda pair: -pair[1]))


def draw(shares: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """Draws one stacked bar per step, with the share of each kind.

    Args:
        shares: the shares by kind, by the title of the step.
        path: the PNG file.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.7 * len(shares)), layout="constrained")
    axes = figure.add_subplot()
    kinds = [*KINDS, "other"]
    for row, by_kind in enumerate(shares.values()):
        left = 0.0
        for kind in kinds:
            share = by_kind.get(kind, 0.0)
            axes.barh(row, share, left=left, color=colormaps[COLORS](kinds.index(kind)), height=0.6)
            if share > 0.04:
                axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", color="white", fontsize=8)
            left += share
    for kind in kinds:
        axes.barh(0, 0, color=colormaps[COLORS](kinds.index(kind)), label=kind)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the device time of a step")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    return path
