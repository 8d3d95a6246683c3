"""What larger clusters should give, predicted by a model of the all-reduce; nothing here is measured.

A step is the forward and backward pass on a GPU's own images; the backward pass reduces gradients in buckets while
it goes on, so only what is left of the all-reduce after it, and at least its last bucket, is waited for. The
assumptions are the fields of `Cluster`; launch/scaling.md tells where they come from.

    python -m runner.benchmarks.allreduce --write
"""

import math
from dataclasses import dataclass
from pathlib import Path

import tyro

from data_prep.console import UserError, run_command
from runner import experiments
from runner.recipe import Experiment

DOCUMENT = Path(__file__).parent.parent.parent / "launch" / "scaling.md"
GPUS = (1, 8, 16, 64, 256, 1024)
IMAGES = 512  # for each GPU
SHOWN = ("speedrun", "efficientnet-b0", "podeti-mobilenetv2", "merabishvili", "podeti-resnet18", "resnet50")
SHOWN += ("podeti-alexnet",)
MARKS = "<!-- predictions -->", "<!-- end of predictions -->"


@dataclass(frozen=True)
class Cluster:
    """What the prediction rests on. Bandwidths in bytes a second in one direction, latencies in seconds."""

    gpus_per_node: int = 8
    flops: float = 0.4 * 790e12
    """Of a GPU in training, bf16: the goal of 40 % of what it reaches in matrix products."""
    link: float = 0.8 * 450e9
    """Between GPUs of a node: 80 % of NVLink's."""
    link_latency: float = 3e-6
    """Of a message there."""
    network: float = 0.9 * 50e9
    """Of each GPU's own adapter between nodes: 90 % of 400 Gbit/s."""
    network_latency: float = 8e-6
    """Of a message there."""
    bucket: float = 25 * 2**20
    """Bytes that DDP reduces at once."""


def all_reduce(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds to add `size` bytes over so many GPUs: scattered and gathered in each node, in between over all
    nodes.

    Each GPU sends 2 (n - 1) / n of what it holds (Thakur et al. 2005, Patarasuk and Yuan 2009). Messages inside a
    node go round a ring; between nodes they go up and down a tree.
    """
    inside = min(gpus, cluster.gpus_per_node)
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    seconds = 2 * (inside - 1) * (size / inside / cluster.link + cluster.link_latency)
    seconds += 2 * (nodes - 1) / nodes * size / inside / cluster.network
    return seconds + 2 * math.ceil(math.log2(nodes)) * cluster.network_latency


def step(experiment: Experiment, images: int, gpus: int, cluster: Cluster) -> tuple[float, float]:
    """Seconds that one step computes and waits, with so many images on each GPU."""
    assert experiment.parameters is not None
    assert experiment.macs is not None
    computes = 6 * experiment.macs * images / cluster.flops
    size = 4.0 * experiment.parameters  # gradients are float32, also where bf16 computes them
    whole, last = (all_reduce(part, gpus, cluster) for part in (size, min(size, cluster.bucket)))
    backward = computes * 2 / 3
    return computes, 0.0 if gpus == 1 else max(whole - backward, last)


def efficiency(experiment: Experiment, images: int, gpus: int, cluster: Cluster) -> float:
    """Share of the speed of so many single GPUs."""
    computes, waits = step(experiment, images, gpus, cluster)
    return computes / (computes + waits)


def table(cluster: Cluster) -> str:
    """The predictions as Markdown."""
    known = experiments.load()
    titles = ["architecture", "gradients, MB", "computes, ms", *(f"{gpus:,} GPUs" for gpus in GPUS[1:])]
    lines = [titles, ["---"] * len(titles)]
    for name in SHOWN:
        experiment = known[name]
        computes, _ = step(experiment, IMAGES, 1, cluster)
        shares = [f"{efficiency(experiment, IMAGES, gpus, cluster):.0%}" for gpus in GPUS[1:]]
        lines.append([name, f"{4 * experiment.parameters / 1e6:.1f}", f"{computes * 1e3:.2f}", *shares])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(text: str) -> str:
    """The document with the predictions between their marks."""
    if any(text.count(mark) != 1 for mark in MARKS):
        raise UserError(f"{DOCUMENT.name}: expected {' and '.join(MARKS)} once each")
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{table(Cluster())}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


@dataclass(frozen=True)
class Prediction:
    """Print the predictions for a cluster, or write those for the assumed one into launch/scaling.md."""

    cluster: Cluster = Cluster()
    """What they rest on."""
    write: bool = False
    """Write the document's table, and its picture beside it."""

    def __call__(self) -> None:
        if not self.write:
            print(table(self.cluster))
            return
        DOCUMENT.write_text(filled(DOCUMENT.read_text()))
        draw(DOCUMENT.with_suffix(".png"))
        print(DOCUMENT)


def draw(path: Path) -> None:
    """The predictions as lines over the number of GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    known, counts = experiments.load(), [2**k for k in range(11)]
    for name in SHOWN:
        axes.plot(
            counts, [100 * efficiency(known[name], IMAGES, n, Cluster()) for n in counts], "o-", ms=3, label=name
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set(xlabel=f"GPUs, {IMAGES} images on each", ylabel="efficiency, %", ylim=(0, 102))
    axes.set_title("PREDICTION by the all-reduce model, nothing measured")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Entry point of `python -m runner.benchmarks.allreduce`."""
    run_command(lambda: tyro.cli(Prediction, prog="python -m runner.benchmarks.allreduce"), "allreduce")


if __name__ == "__main__":
    main()
