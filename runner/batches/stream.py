"""The stream of batches that every loader shares: which images, in which order, changed how, for which rank."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch

from runner.batches import augment as augments
from runner.batches import order, pixels
from runner.recipe import Augment


class BatchStream(ABC):
    """Batches of one split, for one rank. Implements `runner.batches.Batches`; loaders say where pixels come from.

    Args:
        labels: (N,) int64.
        mean, std: per channel, in 0..255.
        batch_size: over all ranks.
        rank, world_size: which slice of each global batch is ours.
        device: where batches are made and left.
        dtype: of the images in a batch.
        training: shuffle and augment; otherwise file order, every image as it is.
        drop_last: leave the last partial batch of an epoch out.
        augment: what is done to training images.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        training: bool = False,
        drop_last: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self.labels = torch.from_numpy(labels).to(self.device)
        # (x - mean) / std as one multiplication and one addition for each channel.
        self.scale = torch.tensor([1 / s for s in std], dtype=torch.float32, device=self.device)
        self.shift = torch.tensor(
            [-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32, device=self.device
        )
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.dtype, self.training, self.drop_last, self.seed = dtype, training, drop_last, seed
        self.augment = augment if training else None

    @property
    def samples(self) -> int:
        """Images in the split."""
        return len(self.labels)

    def __len__(self) -> int:
        """Global batches in an epoch."""
        whole, rest = divmod(self.samples, self.batch_size)
        return whole if self.drop_last or rest == 0 else whole + 1

    def size_of(self, step: int) -> int:
        """Images in global batch `step`, over all ranks."""
        return min(self.batch_size, self.samples - step * self.batch_size)

    def slice_of(self, step: int) -> slice:
        """Where this rank's share of global batch `step` lies in the epoch's order."""
        start, size = step * self.batch_size, self.size_of(step)
        return slice(start + size * self.rank // self.world_size, start + size * (self.rank + 1) // self.world_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's slices of the global batches of an epoch, from `start_step` on.

        Yields:
            images (n, 3, H, W) in channels_last memory, of `dtype`, and labels (n,) int64.
        """
        samples = np.arange(self.samples)
        if self.training:
            samples = order.epoch_order(self.samples, self.seed, epoch)
        # Everything is drawn and moved once an epoch, in the epoch's order; a batch only takes slices.
        placement = augments.placement(self.augment, samples, self.seed, epoch)
        row, column, flip = (
            torch.from_numpy(part).to(self.device) for part in (placement.row, placement.column, placement.flip)
        )
        labels = self.labels[torch.from_numpy(samples).to(self.device)]
        spans = [self.slice_of(step) for step in range(start_step, len(self))]
        for span, (source, index) in zip(spans, self.read(samples, spans), strict=True):
            made = pixels.make(source, index, row[span], column[span], flip[span], self.scale, self.shift)
            yield made.to(self.dtype).permute(0, 3, 1, 2), labels[span]

    @abstractmethod
    def read(self, samples: np.ndarray, spans: list[slice]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Finds the pixels of each batch.

        Args:
            samples: (N,) int64, the epoch's order.
            spans: for each batch, where its samples lie in the order.

        Yields:
            For each batch: images (M, H, W, 3) uint8 on the device, and where in them the wanted ones are,
            (n,) int64 on the device.
        """
