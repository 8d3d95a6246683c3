"""What is done to each training image, as arrays of numbers computed before any pixel is touched."""

from dataclasses import dataclass

import numpy as np
import torch

from runner.batches import order
from runner.recipe import Augment


@dataclass(frozen=True)
class Draws:
    """The numbers that decide what happens to each image. N of them, in the order of the samples they are for.

    row, column: (N,) int64, where the crop begins, from the unpadded image's corner: -padding..padding.
    flip: (N,) bool.
    hole: (N, 2) int64, row and column of the middle of the square that cutout blanks; None without cutout.
    factors: (N, 4) float32, of brightness, contrast, saturation, and the shift of hue; None without jitter.
    turns: (N, 4) int64, in which turn each of these four comes; None without jitter.
    """

    row: torch.Tensor
    column: torch.Tensor
    flip: torch.Tensor
    hole: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    turns: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Draws":
        """The same on a device."""
        return Draws(*(part if part is None else part.to(device) for part in self._parts()))

    def __getitem__(self, which: slice | np.ndarray) -> "Draws":
        return Draws(*(part if part is None else part[which] for part in self._parts()))

    def _parts(self) -> tuple[torch.Tensor | None, ...]:
        return self.row, self.column, self.flip, self.hole, self.factors, self.turns


def draw(augment: Augment | None, samples: np.ndarray, side: tuple[int, int], seed: int, epoch: int) -> Draws:
    """What happens to each of `samples` (N,) of H×W `side` in an epoch; with None, nothing.

    An alternating flip mirrors half of the images in even epochs and the others in odd ones, so that two
    epochs show every image both ways (K. Jordan, arXiv:2404.00498, section 3.6).
    """
    if augment is None:
        still = torch.zeros(len(samples), dtype=torch.int64)
        return Draws(still, still, still.bool())

    def below(bound: int, stream: int, at: int = epoch) -> np.ndarray:
        return order.random_below(bound, samples, seed, at, stream)

    padding, flip = augment.crop_padding, np.zeros(len(samples), dtype=bool)
    if augment.flip == "random":
        flip = below(2, order.FLIP) == 1
    elif augment.flip == "alternating":
        flip = below(2, order.FLIP, at=0) == epoch % 2
    hole = factors = turns = None
    if augment.cutout:
        hole = np.stack([below(side[0], order.HOLE_ROW), below(side[1], order.HOLE_COLUMN)], 1)
    if any(augment.colours):
        factors = np.empty((len(samples), 4), np.float32)
        for k, (strength, stream) in enumerate(
            zip(augment.colours, (order.BRIGHTNESS, order.CONTRAST, order.SATURATION, order.HUE), strict=True)
        ):
            low, high = (-strength, strength) if k == 3 else (max(0.0, 1 - strength), 1 + strength)
            factors[:, k] = order.random_between(low, high, samples, seed, epoch, stream)
        # The ranks of four random numbers are a random permutation.
        keys = [order.random_bits(samples, seed, epoch, order.COLOUR_ORDER + k) for k in range(4)]
        turns = np.stack(keys, 1).argsort(1)
    drawn = (
        below(2 * padding + 1, order.CROP_ROW) - padding,
        below(2 * padding + 1, order.CROP_COLUMN) - padding,
        flip,
        hole,
        factors,
        turns,
    )
    return Draws(*(part if part is None else torch.from_numpy(part) for part in drawn))


def cut_out(images: torch.Tensor, hole: torch.Tensor, size: int) -> torch.Tensor:
    """Blanks a square of each image with 0, the mean where images are normalised (DeVries, arXiv:1708.04552).

    The square's middle lies anywhere in the image, so that parts of the square may fall outside.

    Args:
        images: (n, H, W, 3) float, changed in place.
        hole: (n, 2) int64, row and column of the middle.
        size: side of the square.
    """
    _, height, width, _ = images.shape
    first = hole - size // 2
    y = torch.arange(height, device=images.device) - first[:, :1]
    x = torch.arange(width, device=images.device) - first[:, 1:]
    inside = ((y >= 0) & (y < size))[:, :, None] & ((x >= 0) & (x < size))[:, None, :]
    return images.masked_fill_(inside[..., None], 0.0)
