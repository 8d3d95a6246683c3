"""What training and evaluation ask of batches, and the opening of a prepared dataset."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from data_prep import manifest as manifests
from data_prep.console import UserError
from data_prep.manifest import Manifest, SplitFile
from runner.batches import beton
from runner.batches.order import epoch_order
from runner.batches.resident import ResidentBatches
from runner.batches.stream import BatchStream
from runner.recipe import Recipe, recipe_from_json


class Batches(Protocol):
    """This rank's slices of the global batches of a split. The union over ranks is the same for any number."""

    @property
    def samples(self) -> int:
        """Images in the split."""
        ...

    def __len__(self) -> int:
        """Global batches in an epoch."""
        ...

    def size_of(self, step: int) -> int:
        """Images in global batch `step`, over all ranks."""
        ...

    def slice_of(self, step: int) -> slice:
        """Where this rank's share of global batch `step` lies in the epoch's order."""
        ...

    def first(self, count: int) -> torch.Tensor:
        """The first images of the split as evaluation sees them, (count, 3, H, W) float32."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields images (n, 3, H, W), normalised, channels_last, and labels (n,) int64, on the device.

        Where training batches are mixed, targets (n, classes) float32 stand in the place of labels.
        """
        ...


Split = Literal["train", "validation", "test"]
HELD_OUT_SEED = 2**32  # of the choice of validation images; no run's own seed
LoaderChoice = Literal["auto", "resident", "streaming"]
RESIDENT_SHARE = 0.25  # of the device's memory, up to which `auto` takes a split resident


@dataclass(frozen=True)
class Place:
    """Which rank this is, where its batches go, and how they are read.

    Attributes:
        device: where batches are made and left.
        rank, world_size: over all nodes.
        loader: resident, streaming, or auto.
        workers: decoding threads of the streaming loader.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    loader: LoaderChoice = "auto"
    workers: int = 1

    def loader_for(self, split: SplitFile) -> tuple[Literal["resident", "streaming"], str]:
        """The loader that a split gets here, and a sentence that tells which and why."""
        if self.loader != "auto":
            return self.loader, f"loader: {self.loader} (--loader {self.loader})"
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        share = split.bytes / memory
        chosen = "resident" if share < RESIDENT_SHARE else "streaming"
        limit = f"{share:.1%} of the device's memory, resident below {RESIDENT_SHARE:.0%}"
        return chosen, f"loader: {chosen} (auto: {split.file} is {limit})"


# Mean and deviation that torchvision's ImageNet weights expect, in 0..255.
IMAGENET = tuple(255 * m for m in (0.485, 0.456, 0.406)), tuple(255 * s for s in (0.229, 0.224, 0.225))
EVALUATION_BATCH = {"cpu": 250, "cuda": 1000}  # over all ranks; larger ones only cost memory


def normalisation(manifest: Manifest, recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel, in 0..255, that the recipe asks for."""
    if recipe.normalize == "half":
        return (127.5,) * 3, (127.5,) * 3
    if recipe.normalize == "imagenet":
        return IMAGENET
    return manifest.mean, manifest.std


def model_input(manifest: Manifest, recipe: Recipe) -> dict[str, Any]:
    """What a model trained by the recipe is to be given, for `run.json`.

    Shape (3, H, W) of an image; mean and deviation per channel, in 0..255, that were subtracted and divided by.
    """
    height, width, channels = manifest.image_shape
    mean, std = normalisation(manifest, recipe)
    return {
        "shape": [channels, recipe.resize or height, recipe.resize or width],
        "mean": list(mean),
        "std": list(std),
    }


def open_split(
    data: Path,
    manifest: Manifest,
    split: Split,
    recipe: Recipe,
    place: Place,
    seed: int = 0,
) -> BatchStream:
    """Opens one split of a prepared dataset whose files the caller has checked.

    Training batches are of the recipe's size, shuffled and augmented; the others are in file order. Validation is
    the part of the training images that the recipe holds out.

    Raises:
        UserError: the batch does not divide among the ranks, or is larger than the split; all images are held out.
    """
    training = split == "train"
    file = manifest.splits["test" if split == "test" else "train"]
    records = records_of(split, file.images, recipe.validation)
    images = file.images if records is None else len(records)
    if training and recipe.batch_size % place.world_size:
        raise UserError(
            f"batch size {recipe.batch_size}: expected a multiple of the {place.world_size} ranks; "
            "change --recipe.batch-size or --num_processes"
        )
    if training and recipe.batch_size > images:
        raise UserError(f"batch size {recipe.batch_size}: expected at most the {images} training images")
    rest = images % recipe.batch_size
    if training and not recipe.drop_last and 0 < rest < place.world_size:
        raise UserError(f"the last batch has {rest} images for {place.world_size} ranks; use --recipe.drop-last")
    smallest = min(manifest.image_shape[:2])
    if training and recipe.augment.crop_padding >= smallest:
        raise UserError(
            f"--recipe.augment.crop-padding {recipe.augment.crop_padding}: expected less than the images' side of "
            f"{smallest}"
        )
    mean, std = normalisation(manifest, recipe)
    settings = {
        "mean": mean,
        "std": std,
        "batch_size": recipe.batch_size if training else EVALUATION_BATCH[place.device.type],
        "rank": place.rank,
        "world_size": place.world_size,
        "device": place.device,
        "training": training,
        "drop_last": training and recipe.drop_last,
        "augment": recipe.augment,
        "resize": recipe.resize,
        "side": manifest.image_shape[:2],
        "classes": len(manifest.classes),
        "seed": seed,
    }
    path = data / file.file
    if place.loader_for(file)[0] == "resident":
        pixels, labels = beton.read(path, file, manifest)
        if records is not None:
            pixels, labels = pixels[records], labels[records]
        return ResidentBatches(pixels, labels, **settings)
    from runner.batches.streaming import StreamingBatches  # imports ffcv, which takes seconds

    labels = beton.read_labels(path, file, manifest)
    return StreamingBatches(
        path, labels if records is None else labels[records], records, place.workers, **settings
    )


def records_of(split: Split, images: int, held_out: int) -> np.ndarray | None:
    """Which records of its file a split has, in ascending order, (n,) int64; None for all.

    The held-out ones are the same for every run, so that runs of several seeds compare.

    Raises:
        UserError: nothing would be left to train on.
    """
    if split == "test" or not held_out:
        return None
    if held_out >= images:
        raise UserError(f"--recipe.validation {held_out}: expected less than the {images} training images")
    order = epoch_order(images, HELD_OUT_SEED, 0)
    return np.sort(order[:held_out] if split == "validation" else order[held_out:])


def open_manifest(data: Path) -> Manifest:
    """Reads `dataset.json` and checks every file beside it against its hash."""
    manifest = manifests.read(data)
    manifests.check_files(data, manifest)
    return manifest


def open_test_of_run(config: dict[str, Any], data: Path | None, device: torch.device) -> BatchStream:
    """The whole test split that a run was scored on.

    Args:
        config: the run's run.json.
        data: the prepared dataset; None for the folder that the run names.
        device: where batches go.

    Raises:
        UserError: the dataset is gone, damaged, or another one.
    """
    return _open_of_run(config, data, device, "test")


def open_train_of_run(config: dict[str, Any], data: Path | None, device: torch.device) -> BatchStream:
    """The images that a run was trained on, for `BatchStream.plain`; opened as `open_test_of_run` opens the
    others."""
    return _open_of_run(config, data, device, "train")


def _open_of_run(config: dict[str, Any], data: Path | None, device: torch.device, split: Split) -> BatchStream:
    folder = data or Path(config["dataset"]["folder"])
    manifest = open_manifest(folder)
    if manifest.fingerprint != config["dataset"]["fingerprint"]:
        raise UserError(
            f"--data {folder}: expected the dataset of the run, {config['dataset']['name']} "
            f"{config['dataset']['fingerprint']}, found {manifest.name} {manifest.fingerprint}; give that one"
        )
    recipe = replace(recipe_from_json(config["recipe"]), batch_size=1)  # how it was cut does not matter any more
    return open_split(folder, manifest, split, recipe, Place(device))
