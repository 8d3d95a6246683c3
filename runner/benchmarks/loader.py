"""Compares the speed of resident and streaming batches with torch's DataLoader and FFCV's own Loader.

Resident batches come from a split that is on the device as a whole; streaming ones are read by FFCV. All have the same
batch size and augmentation (crop with padding 4, flip, normalize to float32) and come from the training split, of which
the DataLoader gets the first third. It runs torchvision's v2 transforms in worker processes; FFCV's pipeline is adapted
from its CIFAR example. They take turns, and ratios are taken within each round. The time to the first batch is measured
once, before that; it does not include opening the loaders, which for resident batches and the DataLoader reads the
split, but it includes FFCV's compilation.

    python -m runner.benchmarks.loader --data data/cifar10 --json loader.json

With --augmentation, all of them also apply RandAugment, TrivialAugmentWide, random erasing, color jitter, or a random
resized crop instead of the padded one, with torchvision's defaults. FFCV's own Loader is then left out, because it has
none of them.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from msgspec import Meta

from data_prep import beton_reader
from data_prep.manifest import Manifest
from runner.benchmarks import measure, program
from runner.common.errors import UserError
from runner.config.recipe import SGD, Augment, Count, Recipe
from runner.data.open import LoaderChoice, RankInfo, open_manifest, open_split
from runner.system import cpu
from runner.system.environment import usable_cores

GOALS = {"ratio_resident_to_torchvision": "≥ 50", "ratio_resident_to_ffcv": "≥ 8"}
AUGMENTATION_GOALS = {"ratio_resident_to_torchvision": "≥ 10"}
PADDING = 4
Augmentation = Literal["none", "rand", "trivial", "erase", "jitter", "resized-crop"]
LoaderFn = Callable[[int], Iterator[Any]]  # iterates over the batches of an epoch, given its number if that matters


@dataclass(frozen=True)
class LoaderBenchmark:
    """Compare the loaders on a prepared dataset, in turn; print ratios of their rates and times to the first batch."""

    data: Path
    """Dataset folder written by `python -m data_prep prepare`."""
    batch_size: Count = 512
    """Images per batch."""
    workers: Annotated[int, Meta(ge=1, le=1024)] = 2
    """Worker processes of torch's DataLoader, and decoding threads of FFCV and of the streaming loader."""
    rounds: measure.Rounds = measure.MIN_ROUNDS
    """Number of measurements per loader."""
    json: Path | None = None
    """File for the ratios, with hardware and versions."""
    rand_augment: bool = False
    """The same as `--augmentation rand`."""
    augmentation: Augmentation = "none"
    """Also apply this augmentation, and compare with torch's DataLoader only."""

    @property
    def applied(self) -> Augmentation:
        """The augmentation, in either spelling. Raises UserError for both."""
        if self.rand_augment and self.augmentation != "none":
            raise UserError(f"--rand-augment and --augmentation {self.augmentation}: expected one of them")
        return "rand" if self.rand_augment else self.augmentation

    def __call__(self) -> None:
        _ = self.applied
        cpu.prepare()
        manifest = open_manifest(self.data)
        epoch_fns = loaders(self, manifest, torch.device("cpu"))
        seconds = {name: _seconds_to_first_batch(epoch) for name, epoch in epoch_fns.items()}
        measured = measure.interleaved(rate_measurements(self, manifest, epoch_fns), self.rounds, "measure loaders")
        first_batch = {
            f"ratio_first_batch_{name}_to_ffcv": measure.spread([seconds[name] / seconds["ffcv"]])
            for name in ("resident", "streaming", "torchvision")
            if "ffcv" in seconds
        }
        settings = {
            "batch_size": self.batch_size,
            "workers": self.workers,
            "threads": torch.get_num_threads(),
            "dataset": manifest.name,
            "augmentation": self.applied,
            "cores": usable_cores(),
        }
        results = ratios(measured) | first_batch
        goals = GOALS if self.applied == "none" else AUGMENTATION_GOALS
        measure.report_ratios("loaders", results, goals, {"settings": settings}, self.json)


def loaders(options: LoaderBenchmark, manifest: Manifest, device: torch.device) -> dict[str, LoaderFn]:
    """Returns a function for every loader, by name, that iterates over an epoch of batches on the device."""
    # First, because opening them checks the file before FFCV's own Loader reads it.
    own: dict[str, LoaderFn] = {
        name: training_loader(options, manifest, name, device) for name in ("resident", "streaming")
    }
    baselines = {"torchvision": torchvision_loader(options, manifest)}
    if options.applied == "none":
        baselines["ffcv"] = ffcv_loader(options, manifest)
    return {
        **own,
        **{name: epoch if device.type == "cpu" else _to_device(epoch, device) for name, epoch in baselines.items()},
    }


def rate_measurements(
    options: LoaderBenchmark, manifest: Manifest, epoch_fns: dict[str, LoaderFn]
) -> dict[str, Callable[[], float]]:
    """Returns, for every loader, a function that iterates over batches and returns images per second."""
    per_epoch = manifest.splits["train"].images // options.batch_size
    # Whole epochs only: a reader that stops in the middle of one would keep working during the next turn.
    # torchvision's epoch has a third of the images, so that its turn is not much longer than the others'.
    batches = {"resident": 12 * per_epoch, "streaming": per_epoch, "torchvision": per_epoch // 3, "ffcv": per_epoch}
    return {name: _rate_measurement(epoch, batches[name], options.batch_size) for name, epoch in epoch_fns.items()}


def ratios(measured: dict[str, list[float]]) -> dict[str, measure.Spread]:
    """Returns the ratios of the training loaders' rates to those of the baselines."""
    pairs = [(name, baseline) for baseline in ("torchvision", "ffcv") for name in ("resident", "streaming")]
    return {f"ratio_{a}_to_{b}": measure.ratio(measured[a], measured[b]) for a, b in pairs if b in measured}


def training_loader(
    options: LoaderBenchmark, manifest: Manifest, loader: LoaderChoice, device: torch.device
) -> LoaderFn:
    """Returns a function that iterates over an epoch of the loader that `runner train` uses."""
    changes: dict[Augmentation, Augment] = {
        "rand": Augment(policy="rand"),
        "trivial": Augment(policy="trivial"),
        "erase": Augment(erase=0.5),
        "jitter": Augment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
        "resized-crop": Augment(random_resized_crop=0.08),
    }
    padding = 0 if options.applied == "resized-crop" else PADDING
    augment = replace(changes.get(options.applied, Augment()), crop_padding=padding, flip="random")
    recipe = Recipe(1, options.batch_size, SGD(0.1), augment=augment)
    rank_info = RankInfo(device, loader=loader, workers=options.workers)
    return open_split(options.data, manifest, "train", recipe, rank_info).epoch


def _to_device(epoch: LoaderFn, device: torch.device) -> LoaderFn:
    def on_device(number: int) -> Iterator[Any]:
        for images, labels in epoch(number):
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    return on_device


def torchvision_loader(options: LoaderBenchmark, manifest: Manifest) -> LoaderFn:
    """Returns a function that iterates over torch's DataLoader, with torchvision's transforms on one image at a time.

    Its dataset is the first third of the training images, in memory.

    Raises:
        UserError: the split has fewer than three batches.
    """
    from torchvision.transforms import v2

    split = manifest.splits["train"]
    if options.batch_size > split.images // 3:
        raise UserError(f"batch size {options.batch_size}: expected at most a third of {split.images} images")
    images, labels = beton_reader.read_split(options.data / "train.beton", split, manifest)
    size = manifest.image_shape[0]
    crops = {"resized-crop": v2.RandomResizedCrop(size, antialias=False)}
    colors = {
        "rand": v2.RandAugment(),
        "trivial": v2.TrivialAugmentWide(),
        "jitter": v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    }
    transform = v2.Compose(
        [
            crops.get(options.applied, v2.RandomCrop(size, padding=PADDING)),
            v2.RandomHorizontalFlip(),
            colors.get(options.applied, v2.Identity()),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([m / 255 for m in manifest.mean], [s / 255 for s in manifest.std]),
            v2.RandomErasing(p=0.5) if options.applied == "erase" else v2.Identity(),
        ]
    )
    samples = len(labels) // options.batch_size // 3 * options.batch_size
    planes = torch.from_numpy(images[:samples]).permute(0, 3, 1, 2).contiguous()
    loader = torch.utils.data.DataLoader(
        _Images(planes, labels.tolist()[:samples], transform),
        options.batch_size,
        shuffle=True,
        num_workers=options.workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=options.workers > 0,
    )
    return lambda epoch: iter(loader)


class _Images(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor, labels: list[int], transform: Callable[[Any], Any]) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def ffcv_loader(options: LoaderBenchmark, manifest: Manifest) -> LoaderFn:
    """Returns a function that iterates over FFCV's Loader, shuffled, with flip, translation and normalization."""
    cpu.choose_openmp()
    with cpu.preserve_torch_num_threads():
        from ffcv import transforms
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.loader import Loader, OrderOption

        image = [
            SimpleRGBImageDecoder(),
            transforms.RandomHorizontalFlip(),
            transforms.RandomTranslate(padding=PADDING, fill=(0, 0, 0)),
            transforms.NormalizeImage(np.array(manifest.mean), np.array(manifest.std), np.float32),
            transforms.ToTensor(),
            transforms.ToTorchImage(convert_back_int16=False),
        ]
        label = [IntDecoder(), transforms.ToTensor(), transforms.Squeeze()]
        loader = Loader(
            str(options.data / "train.beton"),
            batch_size=options.batch_size,
            num_workers=options.workers,
            order=OrderOption.RANDOM,
            drop_last=True,
            pipelines={"image": image, "label": label},
        )

    def epoch(number: int) -> Iterator[Any]:
        with cpu.preserve_torch_num_threads():
            return iter(loader)

    return epoch


def _seconds_to_first_batch(epoch: LoaderFn) -> float:
    start = time.perf_counter()
    next(iter(epoch(0)))
    return time.perf_counter() - start


def _rate_measurement(epoch: LoaderFn, batches: int, batch_size: int) -> Callable[[], float]:
    """Returns a function that iterates over a number of batches and returns images per second."""
    numbers = count(1)

    def run() -> float:
        left, start = batches, time.perf_counter()
        while left > 0:
            for _ in islice(epoch(next(numbers)), left):
                left -= 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return batches * batch_size / (time.perf_counter() - start)

    return run


if __name__ == "__main__":
    program.run(LoaderBenchmark, "loader")
