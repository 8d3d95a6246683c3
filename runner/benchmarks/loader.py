"""How fast are batches? Resident and streaming against torchvision's DataLoader and FFCV's own Loader.

The same split, batch size and augmentation (crop with padding 4, flip, normalise to float32) for all of them;
torchvision as its documentation does it (v2 transforms, worker processes), FFCV as its CIFAR example does it.
They take turns; what counts is the ratio within a round. Start-up until the first batch is measured apart.

    python -m runner.benchmarks.loader --data data/cifar10 --json loader.json
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import tyro

from data_prep.console import UserError, run_command
from data_prep.manifest import Manifest
from runner import cpu
from runner.batches import beton
from runner.batches.protocol import LoaderChoice, Place, open_manifest, open_split
from runner.benchmarks import measure
from runner.recipe import SGD, Augment, Recipe

GOALS = {"ratio_resident_to_torchvision": "≥ 50", "ratio_resident_to_ffcv": "≥ 8"}
PADDING = 4


@dataclass(frozen=True)
class LoaderBenchmark:
    """Compare the loaders on a prepared dataset, in turn, and print the ratios of their rates."""

    data: Path
    """Folder made by `python -m data_prep prepare`."""
    batch_size: int = 512
    """Images per batch."""
    workers: int = 2
    """Worker processes of torchvision's DataLoader, decoding threads of FFCV."""
    rounds: int = measure.LEAST_ROUNDS
    """Turns that each loader takes."""
    json: Path | None = None
    """File for the ratios, with hardware and versions."""

    def __call__(self) -> None:
        if self.batch_size < 1 or self.workers < 1:
            raise UserError(f"--batch-size {self.batch_size} --workers {self.workers}: expected 1 or more of each")
        if self.rounds < measure.LEAST_ROUNDS:
            raise UserError(f"--rounds {self.rounds}: expected {measure.LEAST_ROUNDS} or more, for a spread")
        cpu.prepare()
        manifest = open_manifest(self.data)
        epochs = readers(self, manifest, torch.device("cpu"))
        first = {name: _seconds_to_first(epoch) for name, epoch in epochs.items()}
        found = measure.in_turn(rates(self, manifest, epochs), self.rounds, "measure loaders")
        first_ratios = {
            f"ratio_first_batch_{name}_to_ffcv": measure.Ratio(*[first[name] / first["ffcv"]] * 3, rounds=1)
            for name in ("resident", "streaming", "torchvision")
        }
        settings = {"batch_size": self.batch_size, "workers": self.workers, "threads": torch.get_num_threads()}
        settings |= {"dataset": manifest.name, "cores": len(os.sched_getaffinity(0))}
        title = "images per second"
        measure.conclude(title, ratios(found) | first_ratios, GOALS, {"settings": settings}, self.json)


Epoch = Callable[[int], Iterator[Any]]


def readers(benchmark: LoaderBenchmark, manifest: Manifest, device: torch.device) -> dict[str, Epoch]:
    """Every loader by its name, as a function from an epoch's number to batches on the device."""
    theirs = {"torchvision": torchvision_loader(benchmark, manifest), "ffcv": ffcv_loader(benchmark, manifest)}
    return {
        "resident": ours(benchmark, manifest, "resident", device),
        "streaming": ours(benchmark, manifest, "streaming", device),
        **{name: epoch if device.type == "cpu" else _moved(epoch, device) for name, epoch in theirs.items()},
    }


def rates(
    benchmark: LoaderBenchmark, manifest: Manifest, epochs: dict[str, Epoch]
) -> dict[str, Callable[[], float]]:
    """For every loader a function that runs through some batches and returns images per second.

    Raises:
        UserError: the batches are too large for the split.
    """
    images = manifest.splits["train"].images
    whole = images // benchmark.batch_size
    if whole < 3:
        raise UserError(f"--batch-size {benchmark.batch_size}: expected at most a third of {images} images")
    # Whole epochs only: readers that were left in the middle of one would go on beside the next in turn.
    # torchvision's is over a third of the images, so that its turn is not much longer than the others'.
    batches = {"resident": 12 * whole, "streaming": whole, "torchvision": whole // 3, "ffcv": whole}
    return {name: _rate(epoch, batches[name], benchmark.batch_size) for name, epoch in epochs.items()}


def ratios(found: dict[str, list[float]]) -> dict[str, measure.Ratio]:
    """Ours against theirs, of the rates of each."""
    pairs = [(ours, theirs) for theirs in ("torchvision", "ffcv") for ours in ("resident", "streaming")]
    return {f"ratio_{a}_to_{b}": measure.ratio(found[a], found[b]) for a, b in pairs}


def ours(benchmark: LoaderBenchmark, manifest: Manifest, loader: LoaderChoice, device: torch.device) -> Epoch:
    """Our batches as training gets them."""
    recipe = Recipe(1, benchmark.batch_size, SGD(0.1), augment=Augment(crop_padding=PADDING, flip="random"))
    place = Place(device, loader=loader, workers=benchmark.workers)
    return open_split(benchmark.data, manifest, "train", recipe, place).epoch


def _moved(epoch: Epoch, device: torch.device) -> Epoch:
    def moved(number: int) -> Iterator[Any]:
        for images, labels in epoch(number):
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    return moved


def torchvision_loader(benchmark: LoaderBenchmark, manifest: Manifest) -> Epoch:
    """torch's DataLoader over tensors in memory with torchvision's v2 transforms, one image at a time."""
    from torchvision.transforms import v2

    images, labels = beton.read(benchmark.data / "train.beton", manifest.splits["train"], manifest)
    transform = v2.Compose(
        [
            v2.RandomCrop(manifest.image_shape[0], padding=PADDING),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([m / 255 for m in manifest.mean], [s / 255 for s in manifest.std]),
        ]
    )
    count = len(labels) // benchmark.batch_size // 3 * benchmark.batch_size
    planes = torch.from_numpy(images[:count]).permute(0, 3, 1, 2).contiguous()
    dataset = _Images(planes, labels.tolist()[:count], transform)
    loader = torch.utils.data.DataLoader(
        dataset,
        benchmark.batch_size,
        shuffle=True,
        num_workers=benchmark.workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=benchmark.workers > 0,
    )
    return lambda epoch: iter(loader)


class _Images(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor, labels: list[int], transform: Callable[[Any], Any]) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def ffcv_loader(benchmark: LoaderBenchmark, manifest: Manifest) -> Epoch:
    """FFCV's Loader with the operations of its CIFAR example, random order."""
    from runner.batches.streaming import example_loader

    path = benchmark.data / "train.beton"
    with cpu.torch_threads_kept():
        loader = example_loader(path, benchmark.batch_size, benchmark.workers, PADDING, manifest.mean, manifest.std)

    def epoch(number: int) -> Iterator[Any]:
        with cpu.torch_threads_kept():
            return iter(loader)

    return epoch


def _seconds_to_first(epoch: Epoch) -> float:
    began = time.perf_counter()
    next(iter(epoch(0)))
    return time.perf_counter() - began


def _rate(epoch: Epoch, batches: int, batch_size: int) -> Callable[[], float]:
    """A function that runs through so many batches and returns images per second."""
    turns = iter(range(1, 10**9))

    def run() -> float:
        left, began = batches, time.perf_counter()
        while left > 0:
            for _ in islice(epoch(next(turns)), left):
                left -= 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return batches * batch_size / (time.perf_counter() - began)

    return run


def main() -> None:
    """Entry point of `python -m runner.benchmarks.loader`."""
    run_command(lambda: tyro.cli(LoaderBenchmark, prog="python -m runner.benchmarks.loader"), "loader")


if __name__ == "__main__":
    main()
