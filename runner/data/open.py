"""Defines the interface of batches, and opens the splits of a prepared dataset."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from data_prep import beton_reader
from data_prep import manifest as manifests
from data_prep.manifest import Manifest, SplitFile
from runner.common import memory
from runner.common.errors import UserError
from runner.config.recipe import Recipe
from runner.data.order import epoch_order
from runner.data.resident import ResidentBatches
from runner.data.stream import BatchStream, StreamOptions
from runner.run.schema import ModelInput, RunConfig, TrainPrecision


class Batches(Protocol):
    """This rank's slices of the global batches of a split. Their union does not depend on the number of ranks."""

    @property
    def num_images(self) -> int:
        """Number of images in the split."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the images and labels."""
        ...

    def __len__(self) -> int:
        """Number of global batches in an epoch."""
        ...

    def size_of(self, step: int) -> int:
        """Number of images in global batch `step`, over all ranks."""
        ...

    def slice_of(self, step: int) -> slice:
        """Returns the positions of this rank's images of global batch `step` in the epoch's order."""
        ...

    def first_images(self, count: int) -> torch.Tensor:
        """Returns the first `count` images of the split without augmentation, (count, 3, H, W) float32, normalized."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Iterates over this rank's slices of the global batches of an epoch, from `start_step` on.

        Yields:
            images (n, 3, H, W) float, normalized, in channels_last memory, and labels (n,) int64, both on the
            device. With mixup or CutMix, targets (n, classes) float32 replace the labels.
        """
        ...


SplitName = Literal["train", "validation", "test"]
HELD_OUT_SEED = 2**32  # selects the validation images; no run can have this seed
LoaderChoice = Literal["auto", "resident", "streaming"]
DTYPES: dict[TrainPrecision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESIDENT_SHARE = 0.25  # fraction of the device's memory; `auto` keeps a smaller split resident


@dataclass(frozen=True)
class RankInfo:
    """The rank of this process, the device of its batches, and how they are read.

    Attributes:
        device: the device of the batches.
        rank, world_size: rank of this process and number of ranks, over all nodes.
        loader: resident, streaming, or auto.
        workers: decoding threads of the streaming loader.
        dtype: float type of the images in a batch.
        local_world_size: number of ranks on this node.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    loader: LoaderChoice = "auto"
    workers: int = 1
    dtype: torch.dtype = torch.float32
    local_world_size: int = 1

    def loader_for(self, manifest: Manifest, split: SplitFile) -> tuple[Literal["resident", "streaming"], str]:
        """Selects the loader of a split of a dataset; returns it with a message that gives the reason."""
        if self.loader != "auto":
            return self.loader, f"loader: {self.loader} (--loader {self.loader})"
        if self.device.type == "cuda":
            usable = torch.cuda.get_device_properties(self.device).total_memory
        else:
            usable = memory.limit() // self.local_world_size  # each rank has a copy
        share = manifest.image_bytes(split) / usable
        selected: Literal["resident", "streaming"] = "resident" if share < RESIDENT_SHARE else "streaming"
        limit = f"{share:.1%} of the device's memory, resident below {RESIDENT_SHARE:.0%}"
        if selected == "resident" and self.workers > 1:
            limit += "; --workers is not used"
        decoded = ", decoded," if manifest.records == "jpeg" else ""
        return selected, f"loader: {selected} (auto: {split.file}{decoded} is {limit})"


# Mean and standard deviation expected by torchvision's ImageNet weights, in 0..255.
IMAGENET = tuple(255 * m for m in (0.485, 0.456, 0.406)), tuple(255 * s for s in (0.229, 0.224, 0.225))
EVALUATION_BATCH = {"cpu": 250, "cuda": 1000}  # global batch size; larger batches are not faster


def normalization(manifest: Manifest, recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and standard deviation per channel, in 0..255, of the recipe's normalization."""
    if recipe.normalize == "half":
        return (127.5,) * 3, (127.5,) * 3
    if recipe.normalize == "imagenet":
        return IMAGENET
    for channel, deviation in zip(("red", "green", "blue"), manifest.std, strict=True):
        if not deviation:
            raise UserError(
                f"{manifest.name}: expected images of three channels, found one value for {channel} in all training "
                "images; use --recipe.normalize half"
            )
    return manifest.mean, manifest.std


def model_input(manifest: Manifest, recipe: Recipe) -> ModelInput:
    """Returns the model input for `run.json`: shape (3, H, W), and mean and standard deviation of the normalization."""
    height, width, channels = manifest.image_shape
    mean, std = normalization(manifest, recipe)
    size = [channels, recipe.resize or height, recipe.resize or width]
    return ModelInput(shape=size, mean=list(mean), std=list(std))


def open_split(
    data: Path,
    manifest: Manifest,
    split: SplitName,
    recipe: Recipe,
    rank_info: RankInfo,
    seed: int = 0,
) -> BatchStream:
    """Opens one split of a prepared dataset whose files the caller has checked.

    Training batches have the recipe's size and are shuffled and augmented; the others are in file order. Validation
    images are the training images that the recipe holds out.

    Raises:
        UserError: the batch size is not a multiple of the ranks or exceeds the split, or no training image is left.
    """
    training = split == "train"
    file = manifest.splits["test" if split == "test" else "train"]
    indices = split_indices(split, file.images, recipe.validation)
    if training:
        check_training(manifest, recipe, file.images if indices is None else len(indices), rank_info.world_size)
    mean, std = normalization(manifest, recipe)
    options = StreamOptions(
        mean=mean,
        std=std,
        batch_size=recipe.batch_size if training else EVALUATION_BATCH[rank_info.device.type],
        rank=rank_info.rank,
        world_size=rank_info.world_size,
        device=rank_info.device,
        training=training,
        drop_last=training and recipe.drop_last,
        augment=recipe.augment,
        resize=recipe.resize,
        image_size=manifest.image_shape[:2],
        classes=len(manifest.classes),
        seed=seed,
        dtype=rank_info.dtype,
    )
    path = data / file.file
    if rank_info.loader_for(manifest, file)[0] == "resident":
        images, labels = beton_reader.read_split(path, file, manifest)
        if indices is not None:
            images, labels = images[indices], labels[indices]
        return ResidentBatches(images, labels, options)
    from runner.data.streaming import StreamingBatches

    labels = beton_reader.read_labels(path, file, manifest)
    return StreamingBatches(path, labels if indices is None else labels[indices], options, indices, rank_info.workers)


def check_training(manifest: Manifest, recipe: Recipe, images: int, world_size: int) -> None:
    """Raises UserError if `images` training images cannot be batched and cropped as the recipe requires."""
    if recipe.batch_size % world_size:
        raise UserError(
            f"batch size {recipe.batch_size}: expected a multiple of the {world_size} ranks; "
            "change --recipe.batch-size or --num_processes"
        )
    if recipe.batch_size > images:
        held_out = f"; --recipe.validation holds out {recipe.validation:,}" if recipe.validation else ""
        raise UserError(
            f"--recipe.batch-size {recipe.batch_size}: expected at most the {images:,} training images{held_out}"
        )
    if recipe.accumulate > recipe.batch_size // world_size:
        local = recipe.batch_size // world_size
        raise UserError(f"--recipe.accumulate {recipe.accumulate}: expected at most {local}, the batch of a rank")
    remainder = images % recipe.batch_size
    if not recipe.drop_last and 0 < remainder < world_size:
        raise UserError(f"the last batch has {remainder} images for {world_size} ranks; use --recipe.drop-last")
    side, padding = min(manifest.image_shape[:2]), recipe.augment.crop_padding
    if padding >= side:
        raise UserError(f"--recipe.augment.crop-padding {padding}: expected less than the images' side of {side}")
    if recipe.augment.random_resized_crop and recipe.resize:
        side = recipe.resize
    if recipe.augment.cutout > side:
        raise UserError(f"--recipe.augment.cutout {recipe.augment.cutout}: expected at most the images' side of {side}")


def split_indices(split: SplitName, images: int, held_out: int) -> np.ndarray | None:
    """Returns the indices of a split within its file, in ascending order, (n,) int64; None for all.

    Every run holds out the same images, so that runs with different seeds are comparable.

    Raises:
        UserError: no image is left for training.
    """
    if split == "test" or not held_out:
        return None
    if held_out >= images:
        raise UserError(f"--recipe.validation {held_out}: expected fewer than the {images} training images")
    order = epoch_order(images, HELD_OUT_SEED, 0)
    return np.sort(order[:held_out] if split == "validation" else order[held_out:])


def open_manifest(data: Path) -> Manifest:
    """Reads `dataset.json` and checks every file beside it against its hash."""
    manifest = manifests.read(data)
    manifests.check_files(data, manifest)
    return manifest


def open_split_of_run(
    config: RunConfig, data: Path | None, split: SplitName, device: torch.device, dtype: torch.dtype = torch.float32
) -> BatchStream:
    """Opens a split that a run was trained or evaluated on.

    Args:
        config: the contents of the run's run.json.
        data: the prepared dataset; None for the folder stored in run.json.
        split: the split; training batches have one image, so use `BatchStream.clean_images`.
        device: the device of the batches.
        dtype: float type of the images in a batch.

    Raises:
        UserError: the dataset is missing, damaged, or not the dataset of the run.
    """
    folder = data or Path(config.dataset.folder)
    manifest = open_manifest(folder)
    if manifest.fingerprint != config.dataset.fingerprint:
        raise UserError(
            f"--data {folder}: expected the dataset of the run, {config.dataset.name} "
            f"{config.dataset.fingerprint}, found {manifest.name} {manifest.fingerprint}; pass the dataset of the run"
        )
    recipe = replace(config.recipe, batch_size=1, accumulate=1)  # any batch size will do
    return open_split(folder, manifest, split, recipe, RankInfo(device, dtype=dtype))
