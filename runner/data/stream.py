"""The stream of batches that all loaders share: selects, orders and augments the images for each rank."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F

from runner.config.recipe import Augment
from runner.data import augment, mixing, order
from runner.data.augment import AugmentParams
from runner.data.kernels import crop
from runner.data.kernels.crop import Crops, Output


@dataclass(frozen=True)
class StreamOptions:
    """How the batches of a split are made.

    Attributes:
        mean, std: mean and standard deviation per channel, in 0..255.
        batch_size: global batch size, summed over ranks.
        rank, world_size: select this rank's slice of each global batch.
        device: device on which batches are returned.
        training: shuffle and augment; otherwise file order without augmentation.
        drop_last: drop the last partial batch of an epoch.
        augment: random augmentation of training images.
        resize: side in pixels of the images in a batch, bilinear; 0 keeps their size.
        image_size: height and width in pixels of the images in the split.
        classes: number of classes in the split.
        seed: random seed of order and augmentation.
        dtype: float type of the images in a batch; computed in float32, then rounded.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"
    training: bool = False
    drop_last: bool = False
    augment: Augment | None = None
    resize: int = 0
    image_size: tuple[int, int] = (32, 32)
    classes: int = 10
    seed: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def augmented_size(self) -> tuple[int, int]:
        """Height and width of the images while they are augmented: a random resized crop also resizes to `resize`."""
        crops = self.training and self.augment is not None and self.augment.random_resized_crop
        return (self.resize, self.resize) if crops and self.resize else self.image_size


class BatchStream(ABC):
    """Batches of one split for one rank. Implements `runner.data.Batches`; subclasses read the pixels.

    Args:
        labels: (N,) int64.
        options: how the batches are made.
    """

    def __init__(self, labels: np.ndarray, options: StreamOptions) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.labels = torch.from_numpy(labels).to(self.device)
        self.augment = options.augment if options.training else None
        self.repeats = self.augment.repeats if self.augment else 1
        self.slots = order.repeated_slots(len(labels), self.repeats, options.batch_size)
        self.mixes = self.augment is not None and bool(self.augment.mixup or self.augment.cutmix)
        reflect = self.augment is not None and self.augment.crop_fill == "reflect"
        # (x - mean) / std as one multiplication and one addition for each channel.
        scale = torch.tensor([1 / s for s in options.std], dtype=torch.float32, device=self.device)
        shift = [-m / s for m, s in zip(options.mean, options.std, strict=True)]
        self.normalized_output = Output(reflect, scale, torch.tensor(shift, dtype=torch.float32, device=self.device))
        ones, zeros = torch.ones(3, device=self.device), torch.zeros(3, device=self.device)
        self.raw_output = Output(reflect, ones, zeros, torch.uint8)

    def with_seed(self, seed: int) -> Self:
        """Returns a stream over the same split with the order and augmentation of another seed."""
        other = copy.copy(self)
        other.options = replace(self.options, seed=seed)
        return other

    @property
    def num_images(self) -> int:
        """The number of images in the split."""
        return len(self.labels)

    def __len__(self) -> int:
        full, remainder = divmod(self.num_images, self.options.batch_size)
        return full if self.options.drop_last or remainder == 0 else full + 1

    def size_of(self, step: int) -> int:
        """The number of images in global batch `step`, over all ranks."""
        return min(self.options.batch_size, self.num_images - step * self.options.batch_size)

    def slice_of(self, step: int) -> slice:
        """Returns the positions of this rank's part of global batch `step` in the epoch's order."""
        start, size = step * self.options.batch_size, self.size_of(step)
        rank, world_size = self.options.rank, self.options.world_size
        return slice(start + size * rank // world_size, start + size * (rank + 1) // world_size)

    def order_of(self, epoch: int) -> np.ndarray:
        """Returns the order of the samples in an epoch, (N,) int64: shuffled for training, otherwise file order."""
        if self.options.training:
            shuffled = order.epoch_order(self.num_images, self.options.seed, epoch)
            return shuffled if self.repeats == 1 else shuffled[self.slots // self.repeats]
        return np.arange(self.num_images)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields this rank's images (n, 3, H, W) and targets of each global batch; see Batches."""
        # Rounded by the kernel that normalizes, unless the images still change after it.
        kernel_dtype = torch.float32 if self.mixes or self.options.resize else self.options.dtype
        options, steps = self.options, range(start_step, len(self))
        local_positions = [self._positions(step) for step in steps]
        sizes = [len(positions) for positions in local_positions]
        positions = np.concatenate([self.slots[:0], *local_positions])
        samples, copies = self.order_of(epoch)[positions], self.slots[positions] % self.repeats
        # Augmentation is sampled and copied to the device once per epoch; each batch only takes a slice.
        keys = order.copy_keys(samples, copies)
        params = augment.sample_params(
            self.augment, keys, options.image_size, options.seed, epoch, options.augmented_size
        ).to(self.device)
        labels = self.labels[torch.from_numpy(samples).to(self.device)]
        stop = 0
        for step, size, (images, index) in zip(steps, sizes, self.read(samples, sizes), strict=True):
            batch, stop = slice(stop, stop + size), stop + size
            images, targets = self._transform(images, index, params[batch], kernel_dtype), labels[batch]
            if self.mixes and self.augment:
                mix_params = mixing.sample_params(self.augment, options.augmented_size, options.seed, epoch, step)
                images, targets = mixing.mix(images, targets, mix_params, options.classes)
            yield self._to_model_input(images).to(options.dtype), targets

    def first_images(self, count: int) -> torch.Tensor:
        """Returns the first `count` images of the split as in evaluation, (count, 3, H, W) float32."""
        return self.clean_images(np.arange(min(count, self.num_images)))

    def clean_images(self, samples: np.ndarray) -> torch.Tensor:
        """Returns images `samples` (n,) as in evaluation, without augmentation: (n, 3, H, W) float32, normalized."""
        params = augment.sample_params(None, samples, self.options.image_size, self.options.seed, 0).to(self.device)
        ((images, index),) = self.read(samples, [len(samples)])
        return self._to_model_input(self._transform(images, index, params))

    def _positions(self, step: int) -> np.ndarray:
        """The positions in the epoch's order that this rank reads for global batch `step`.

        Mixing also needs the predecessor of the rank's first image. The batch is circular: its first
        image is mixed with its last.
        """
        local_slice = self.slice_of(step)
        if not self.mixes:
            return np.arange(local_slice.start, local_slice.stop)
        start, size = step * self.options.batch_size, self.size_of(step)
        return start + np.arange(local_slice.start - start - 1, local_slice.stop - start) % size

    def _transform(
        self, images: torch.Tensor, index: torch.Tensor, params: AugmentParams, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Gathers images[index], augments them with `params`, and normalizes: (n, H, W, 3) of `dtype`."""
        crops = Crops(index, params.row, params.column, params.flip)
        resizes, changes = params.resized_box is not None, params.changes_pixels
        if params.resized_box is not None:
            resized_dtype = torch.uint8 if changes else torch.float32
            size = self.options.augmented_size
            images = crop.make_resized_batch(images, crops, params.resized_box, size, resized_dtype)
        else:
            normalized = self.normalized_output._replace(dtype=dtype)
            images = crop.make_batch(images, crops, self.raw_output if changes else normalized)
        if resizes or changes:
            images = augment.augment_pixels(images, params)
            images = (images * self.normalized_output.scale + self.normalized_output.shift).to(dtype)
        return augment.augment_normalized(images, params, self.augment)

    def _to_model_input(self, images: torch.Tensor) -> torch.Tensor:
        """Permutes (n, H, W, 3) to (n, 3, H, W) in channels_last memory, and resizes."""
        images, size = images.permute(0, 3, 1, 2), (self.options.resize, self.options.resize)
        if self.options.resize and images.shape[2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        return images

    @abstractmethod
    def read(self, samples: np.ndarray, sizes: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Reads the pixels of consecutive batches.

        Args:
            samples: (M,) int64, the samples of all batches, concatenated.
            sizes: number of samples in each batch; they sum to M.

        Yields:
            For each batch: images (K, H, W, 3) uint8, and the indices (n,) int64 of the batch's images among them,
            both on the device.
        """
