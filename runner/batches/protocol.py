"""What training and evaluation ask of batches, and the opening of a prepared dataset."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from data_prep import manifest as manifests
from data_prep.console import UserError
from data_prep.manifest import Manifest
from runner.batches import beton
from runner.batches.resident import ResidentBatches
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

    def slice_of(self, step: int) -> slice:
        """Where this rank's share of global batch `step` lies in the epoch's order."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields images (n, 3, H, W), normalised, channels_last, and labels (n,) int64, on the device."""
        ...


@dataclass(frozen=True)
class Place:
    """Which rank this is, and where its batches go."""

    device: torch.device
    rank: int = 0
    world_size: int = 1


EVALUATION_BATCH = 250  # over all ranks; larger ones only cost memory


def normalisation(manifest: Manifest, recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel, in 0..255, that the recipe asks for."""
    if recipe.normalize == "half":
        return (127.5,) * 3, (127.5,) * 3
    return manifest.mean, manifest.std


def open_split(
    data: Path,
    manifest: Manifest,
    split: Literal["train", "test"],
    recipe: Recipe,
    place: Place,
    seed: int = 0,
) -> ResidentBatches:
    """Opens one split of a prepared dataset whose files the caller has checked.

    Training batches are of the recipe's size, shuffled and augmented; test batches are in file order.

    Raises:
        UserError: the batch does not divide among the ranks, or is larger than the split.
    """
    training = split == "train"
    file = manifest.splits[split]
    if training and recipe.batch_size % place.world_size:
        raise UserError(
            f"batch size {recipe.batch_size}: expected a multiple of the {place.world_size} ranks; "
            "change --recipe.batch-size or --num_processes"
        )
    if training and recipe.batch_size > file.images:
        raise UserError(f"batch size {recipe.batch_size}: expected at most the {file.images} training images")
    images, labels = beton.read(data / file.file, file, manifest)
    mean, std = normalisation(manifest, recipe)
    return ResidentBatches(
        images,
        labels,
        mean=mean,
        std=std,
        batch_size=recipe.batch_size if training else EVALUATION_BATCH,
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
        training=training,
        augment=recipe.augment if training else None,
        seed=seed,
    )


def open_manifest(data: Path) -> Manifest:
    """Reads `dataset.json` and checks every file beside it against its hash."""
    manifest = manifests.read(data)
    manifests.check_files(data, manifest)
    return manifest


def open_test_of_run(config: dict[str, Any], data: Path | None, device: torch.device) -> ResidentBatches:
    """The whole test split that a run was scored on.

    Args:
        config: the run's run.json.
        data: the prepared dataset; None for the folder that the run names.
        device: where batches go.

    Raises:
        UserError: the dataset is gone, damaged, or another one.
    """
    folder = data or Path(config["dataset"]["folder"])
    manifest = open_manifest(folder)
    if manifest.fingerprint != config["dataset"]["fingerprint"]:
        raise UserError(
            f"--data {folder}: expected the dataset of the run, {config['dataset']['name']} "
            f"{config['dataset']['fingerprint']}, found {manifest.name} {manifest.fingerprint}; give that one"
        )
    return open_split(folder, manifest, "test", recipe_from_json(config["recipe"]), Place(device))
