"""Predicts the scaling efficiency of larger clusters with a model of the all-reduce; nothing here is measured.

A step is the forward and backward pass on a GPU's own images. DDP reduces gradients in buckets during the backward
pass, so a step waits only for the rest of the all-reduce, and at least for its last bucket. The assumptions are the
fields of `Cluster`; launch/scaling.md explains them.

    python -m runner.benchmarks.allreduce --write
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from runner import experiments
from runner.benchmarks import program
from runner.common.errors import UserError
from runner.config.recipe import LARGEST, Count, Experiment, NonNegative

DOCUMENT = Path(__file__).parent.parent.parent / "launch" / "scaling.md"
GPUS = (1, 8, 16, 64, 256, 1024)
IMAGES = 512  # per GPU
SHOWN = (
    "speedrun", "efficientnet-b0", "podeti-mobilenetv2", "merabishvili", "podeti-resnet18", "resnet50",
    "podeti-alexnet",
)  # fmt: skip
MARKS = "<!-- predictions -->", "<!-- end of predictions -->"
Amount = Annotated[float, Meta(ge=1, le=LARGEST)]  # bytes or operations; values below 1 could overflow a quotient


@dataclass(frozen=True)
class Cluster:
    """Assumptions of the prediction. Bandwidths are in bytes per second per direction, latencies in seconds."""

    gpus_per_node: Count = 8
    flops: Amount = 0.4 * 790e12
    """FLOP/s of a GPU in bf16 training: 40% of what it reaches in matrix products."""
    link: Amount = 0.8 * 450e9
    """Bandwidth between GPUs of a node: 80% of NVLink's."""
    link_latency: NonNegative = 3e-6
    """Latency of a message between GPUs of a node."""
    network: Amount = 0.9 * 50e9
    """Bandwidth of each GPU's own adapter between nodes: 90% of 400 Gbit/s."""
    network_latency: NonNegative = 8e-6
    """Latency of a message between nodes."""
    bucket: Amount = 25 * 2**20
    """Bytes that DDP reduces at once."""


def all_reduce(size: float, gpus: int, cluster: Cluster) -> float:
    """Returns the duration of an all-reduce of `size` bytes, in seconds.

    It consists of a reduce-scatter in each node, an all-reduce between nodes, and an all-gather in each node. Each GPU
    sends 2 (n - 1) / n of its data (Thakur et al. 2005, Patarasuk and Yuan 2009), in a ring within a node and in a tree
    between nodes.
    """
    inside = min(gpus, cluster.gpus_per_node)
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    seconds = 2 * (inside - 1) * (size / inside / cluster.link + cluster.link_latency)
    seconds += 2 * (nodes - 1) / nodes * size / inside / cluster.network
    return seconds + 2 * math.ceil(math.log2(nodes)) * cluster.network_latency


def gradient_bytes(experiment: Experiment) -> float:
    """Returns the size of the gradients, which are float32 even in bf16 training."""
    assert experiment.parameters is not None
    return 4.0 * experiment.parameters


def step(experiment: Experiment, images: int, gpus: int, cluster: Cluster) -> tuple[float, float]:
    """Returns the seconds of computation and of waiting in one step, with `images` images on each GPU."""
    assert experiment.macs is not None
    computes = 6 * experiment.macs * images / cluster.flops
    size = gradient_bytes(experiment)
    total, last_bucket = (all_reduce(each, gpus, cluster) for each in (size, min(size, cluster.bucket)))
    backward = computes * 2 / 3
    return computes, 0.0 if gpus == 1 else max(total - backward, last_bucket)


def efficiency(experiment: Experiment, images: int, gpus: int, cluster: Cluster) -> float:
    """Returns the scaling efficiency: the speed relative to the same number of single GPUs."""
    computes, waits = step(experiment, images, gpus, cluster)
    return computes / (computes + waits)


def table(cluster: Cluster) -> str:
    """Returns the predictions as a Markdown table."""
    known = experiments.load()
    titles = ["architecture", "gradients, MB", "computes, ms", *(f"{gpus:,} GPUs" for gpus in GPUS[1:])]
    lines = [titles, ["---"] * len(titles)]
    for name in SHOWN:
        experiment = known[name]
        computes, _ = step(experiment, IMAGES, 1, cluster)
        shares = [f"{efficiency(experiment, IMAGES, gpus, cluster):.0%}" for gpus in GPUS[1:]]
        lines.append([name, f"{gradient_bytes(experiment) / 1e6:.1f}", f"{computes * 1e3:.2f}", *shares])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(text: str) -> str:
    """Returns the document with the predictions between their marks.

    Raises:
        UserError: a mark is missing or occurs twice.
    """
    if any(text.count(mark) != 1 for mark in MARKS):
        raise UserError(f"{DOCUMENT.name}: expected {' and '.join(MARKS)} once each")
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{table(Cluster())}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


@dataclass(frozen=True)
class Prediction:
    """Print the predictions for a cluster, or write those for the default cluster into launch/scaling.md."""

    cluster: Cluster = Cluster()
    """Assumptions of the prediction."""
    write: bool = False
    """Write the table into the document, and the figure next to it."""

    def __call__(self) -> None:
        if not self.write:
            print(table(self.cluster))
            return
        if self.cluster != Cluster():
            raise UserError("--write: expected without --cluster; the document is about the default cluster")
        DOCUMENT.write_text(filled(DOCUMENT.read_text()))
        draw(DOCUMENT.with_suffix(".png"))
        print(DOCUMENT)


def draw(path: Path) -> None:
    """Plots the predictions over the number of GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    known, counts = experiments.load(), [2**k for k in range(11)]
    for name in SHOWN:
        axes.plot(counts, [100 * efficiency(known[name], IMAGES, n, Cluster()) for n in counts], "o-", ms=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set(xlabel=f"GPUs, {IMAGES} images on each", ylabel="efficiency, %", ylim=(0, 102))
    axes.set_title("PREDICTION by the all-reduce model, nothing measured")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    program.run(Prediction, "allreduce")
