"""The stream of batches that every loader shares: which images, in which order, changed how, for which rank."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from runner.batches import augment as augments
from runner.batches import colour, mix, order, pixels
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
        resize: side that images are brought to at the end, bilinear; 0 for as they are.
        side: height and width of the images in the split.
        classes: in the split.
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
        resize: int = 0,
        side: tuple[int, int] = (32, 32),
        classes: int = 10,
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
        self.resize, self.side, self.classes = resize, side, classes
        self.mixes = self.augment is not None and bool(self.augment.mixup or self.augment.cutmix)
        self.reflect = self.augment is not None and self.augment.crop_fill == "reflect"
        self.as_is = torch.ones(3, device=self.device), torch.zeros(3, device=self.device)
        # A GPU writes the training dtype at once, if nothing follows that needs more precision.
        follows = self.mixes or resize
        self.direct = dtype if self.device.type == "cuda" and not follows else torch.float32

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

    def order_of(self, epoch: int) -> np.ndarray:
        """The order in which an epoch takes the samples, (N,) int64: shuffled for training, else that of the
        file."""
        return order.epoch_order(self.samples, self.seed, epoch) if self.training else np.arange(self.samples)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's slices of the global batches of an epoch, from `start_step` on.

        Yields:
            images (n, 3, H, W) in channels_last memory, of `dtype`, and labels (n,) int64; where batches are mixed,
            targets (n, classes) float32 in their place.
        """
        order, steps = self.order_of(epoch), range(start_step, len(self))
        ours = [order[self._wanted(step)] for step in steps]
        sizes, samples = [len(batch) for batch in ours], np.concatenate([order[:0], *ours])
        # Everything is drawn and moved once an epoch, for this rank's images alone; a batch only takes slices.
        draws = augments.draw(self.augment, samples, self.side, self.seed, epoch).to(self.device)
        labels = self.labels[torch.from_numpy(samples).to(self.device)]
        end = 0
        for step, size, (source, index) in zip(steps, sizes, self.read(samples, sizes), strict=True):
            batch, end = slice(end, end + size), end + size
            images, targets = self._make(source, index, draws[batch]), labels[batch]
            if self.mixes:
                mixed = mix.draw(self.augment, self.side, self.seed, epoch, step)
                images, targets = mix.apply(mixed, images, targets, self.classes)
            yield self._finish(images).to(self.dtype), targets

    def first(self, count: int) -> torch.Tensor:
        """The first images of the split, as `plain`."""
        return self.plain(np.arange(min(count, self.samples)))

    def plain(self, samples: np.ndarray) -> torch.Tensor:
        """The images of these samples as evaluation sees them: (n, 3, H, W) float32, normalised, on the device."""
        draws = augments.draw(None, samples, self.side, self.seed, 0).to(self.device)
        ((source, index),) = self.read(samples, [len(samples)])
        return self._finish(self._make(source, index, draws))

    def _finish(self, images: torch.Tensor) -> torch.Tensor:
        """(n, H, W, 3) to (n, 3, H, W) in channels_last memory, resized."""
        images = images.permute(0, 3, 1, 2)
        if self.resize:
            images = F.interpolate(images, size=(self.resize, self.resize), mode="bilinear", antialias=True)
        return images

    def _wanted(self, step: int) -> slice | np.ndarray:
        """Which places of the epoch's order this rank needs for global batch `step`."""
        ours = self.slice_of(step)
        if not self.mixes:
            return ours
        start, size = step * self.batch_size, self.size_of(step)
        return start + np.arange(ours.start - start - 1, ours.stop - start) % size  # also the one before ours

    def _make(self, source: torch.Tensor, index: torch.Tensor, draws: augments.Draws) -> torch.Tensor:
        """The images of a batch, (n, H, W, 3), cropped, flipped, coloured, normalised and cut out."""
        place = draws.row, draws.column, draws.flip, self.reflect
        if draws.factors is None:
            images = pixels.make(source, index, *place, self.scale, self.shift, self.direct)
        else:
            raw = pixels.make(source, index, *place, self.as_is[0], self.as_is[1], torch.uint8)
            images = colour.jitter(raw, draws.factors, draws.turns) * self.scale + self.shift
        if draws.hole is not None:
            augments.cut_out(images, draws.hole, self.augment.cutout)
        return images

    @abstractmethod
    def read(self, samples: np.ndarray, sizes: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Finds the pixels of each batch.

        Args:
            samples: (M,) int64, those of all batches one after the other.
            sizes: of the batches; they add up to M.

        Yields:
            For each batch: images (K, H, W, 3) uint8 on the device, and where in them its own are, (n,) int64 on
            the device.
        """
