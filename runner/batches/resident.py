"""The whole split on the device as uint8, and each batch made from it in one pass: gather, crop, flip, normalise.

CIFAR-10's training split is 154 MB. On the CPU the pass is one compiled loop over the batch (numba, cached on
disk); on a GPU it is a few torch operations.
"""

from collections.abc import Iterator

import numpy as np
import torch

from runner.batches import augment as augments
from runner.batches import order
from runner.recipe import Augment


class ResidentBatches:
    """Batches of one split, for one rank. Implements `runner.batches.Batches`.

    Args:
        images: (N, H, W, 3) uint8.
        labels: (N,) int64.
        mean, std: per channel, in 0..255.
        batch_size: over all ranks.
        rank, world_size: which slice of each global batch is ours.
        device: where batches are made and left.
        dtype: of the images in a batch.
        training: shuffle, augment and drop the last partial batch; otherwise file order and every image.
        augment: what is done to training images.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        images: np.ndarray,
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
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self.images = torch.from_numpy(images).to(self.device)
        self.labels = torch.from_numpy(labels).to(self.device)
        # (x - mean) / std as one multiplication and one addition for each channel.
        self.scale = torch.tensor([1 / s for s in std], dtype=torch.float32, device=self.device)
        self.shift = torch.tensor(
            [-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32, device=self.device
        )
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.dtype, self.training, self.augment, self.seed = dtype, training, augment, seed

    @property
    def samples(self) -> int:
        """Images in the split."""
        return len(self.labels)

    def __len__(self) -> int:
        """Global batches in an epoch."""
        whole, rest = divmod(self.samples, self.batch_size)
        return whole if self.training or rest == 0 else whole + 1

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's slices of the global batches of an epoch, from `start_step` on.

        Yields:
            images (n, 3, H, W) in channels_last memory, of `dtype`, and labels (n,) int64.
        """
        samples = np.arange(self.samples)
        placement = augments.placement(self.augment if self.training else None, samples, self.seed, epoch)
        if self.training:
            samples = order.epoch_order(self.samples, self.seed, epoch)
        pick = torch.from_numpy(samples).to(self.device)
        row, column, flip = (
            torch.from_numpy(part).to(self.device) for part in (placement.row, placement.column, placement.flip)
        )
        for step in range(start_step, len(self)):
            chosen = pick[self.slice_of(step)]
            yield self._make(chosen, row[chosen], column[chosen], flip[chosen]), self.labels[chosen]

    def slice_of(self, step: int) -> slice:
        """Where this rank's share of global batch `step` lies in the epoch's order."""
        start = step * self.batch_size
        size = min(self.batch_size, self.samples - start)
        return slice(start + size * self.rank // self.world_size, start + size * (self.rank + 1) // self.world_size)

    def _make(
        self, chosen: torch.Tensor, row: torch.Tensor, column: torch.Tensor, flip: torch.Tensor
    ) -> torch.Tensor:
        make = _make_cpu if self.device.type == "cpu" else _make_torch
        pixels = make(self.images, chosen, row, column, flip, self.scale, self.shift)
        return pixels.to(self.dtype).permute(0, 3, 1, 2)


def _make_torch(
    images: torch.Tensor,
    chosen: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    flip: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> torch.Tensor:
    """Gathers, crops, flips and normalises by torch operations: (n, H, W, 3) float32. Also the tests' yardstick."""
    _, height, width, _ = images.shape
    y = torch.arange(height, device=images.device) + row[:, None]
    x = torch.arange(width, device=images.device)
    x = torch.where(flip[:, None], width - 1 - x, x) + column[:, None]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    pixels = images[chosen[:, None, None], y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]]
    pixels = pixels * inside[..., None]
    return pixels.float() * scale + shift


def _make_cpu(
    images: torch.Tensor,
    chosen: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    flip: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> torch.Tensor:
    """The same in one compiled pass."""
    import numba

    from runner.batches.kernel import make

    out = torch.empty((len(chosen), *images.shape[1:]), dtype=torch.float32)
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    make(*(part.numpy() for part in (images, chosen, row, column, flip, scale, shift, out)))
    return out
