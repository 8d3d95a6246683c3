"""Random augmentation of training images: all random parameters are sampled before any pixel is touched."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from runner.config.recipe import Augment
from runner.data import color, order

# One stream of random numbers for each use, so that adding a use does not change the others.
CROP_ROW, CROP_COLUMN, FLIP, CUTOUT_ROW, CUTOUT_COLUMN, BRIGHTNESS, CONTRAST, SATURATION, HUE = range(9)
JITTER_ORDER = 9  # streams 9 to 12; 13 is order.RANK; the next free stream is 14


# Parameters of the crop and of `augment_normalized`; all others are of `augment_pixels`.
NOT_OF_PIXELS = ("row", "column", "flip", "cutout_center")


@dataclass(frozen=True)
class AugmentParams:
    """The random parameters of N images, in the order of the images.

    Attributes:
        row, column: (N,) int64, the corner of the crop relative to that of the unpadded image, in -padding..padding.
        flip: (N,) bool.
        cutout_center: (N, 2) int64, row and column of the center of the blanked square; None without cutout.
        jitter_factors: (N, 4) float32, factors of brightness, contrast and saturation, and the hue shift; None without
            jitter.
        jitter_order: (N, 4) int64, the permutation in which these four are applied; None without jitter.
    """

    row: torch.Tensor
    column: torch.Tensor
    flip: torch.Tensor
    cutout_center: torch.Tensor | None = None
    jitter_factors: torch.Tensor | None = None
    jitter_order: torch.Tensor | None = None

    @property
    def changes_pixels(self) -> bool:
        """Whether `augment_pixels` does anything; if not, cropping and normalizing are one pass."""
        return any(getattr(self, field.name) is not None for field in fields(self) if field.name not in NOT_OF_PIXELS)

    def to(self, device: torch.device) -> "AugmentParams":
        """Copies the parameters to a device."""
        return self._map(lambda tensor: tensor.to(device))

    def __getitem__(self, images: slice | np.ndarray) -> "AugmentParams":
        return self._map(lambda tensor: tensor[images])

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "AugmentParams":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return AugmentParams(**{name: function(tensor) for name, tensor in tensors.items() if tensor is not None})


def sample_params(
    augment: Augment | None, samples: np.ndarray, image_size: tuple[int, int], seed: int, epoch: int
) -> AugmentParams:
    """Samples the augmentation of images `samples` (N,) of `image_size` (H, W) in an epoch; for None, changes nothing.

    An alternating flip mirrors half of the images in even epochs and the other half in odd ones, so that two
    consecutive epochs show every image both ways (K. Jordan, arXiv:2404.00498, section 3.6).
    """
    if augment is None:
        zeros = torch.zeros(len(samples), dtype=torch.int64)
        return AugmentParams(zeros, zeros, zeros.bool())

    def below(bound: int, stream: int, epoch: int = epoch) -> np.ndarray:
        return order.random_below(bound, samples, seed, epoch, stream)

    padding, flip = augment.crop_padding, np.zeros(len(samples), dtype=bool)
    if augment.flip == "random":
        flip = below(2, FLIP) == 1
    elif augment.flip == "alternating":
        flip = below(2, FLIP, epoch=0) == epoch % 2
    optional: dict[str, np.ndarray] = {}
    if augment.cutout:
        optional["cutout_center"] = np.stack([below(image_size[0], CUTOUT_ROW), below(image_size[1], CUTOUT_COLUMN)], 1)
    if any(augment.jitter):
        optional["jitter_factors"], optional["jitter_order"] = _sample_jitter(augment, samples, seed, epoch)
    crop = (below(2 * padding + 1, CROP_ROW) - padding, below(2 * padding + 1, CROP_COLUMN) - padding, flip)
    return AugmentParams(
        *(torch.from_numpy(array) for array in crop),
        **{name: torch.from_numpy(array) for name, array in optional.items()},
    )


def _sample_jitter(augment: Augment, samples: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples the factors (N, 4) float32 and the order (N, 4) int64 of color jitter."""
    factors = np.empty((len(samples), 4), np.float32)
    streams = (BRIGHTNESS, CONTRAST, SATURATION, HUE)
    for k, (strength, stream) in enumerate(zip(augment.jitter, streams, strict=True)):
        low, high = (-strength, strength) if stream == HUE else (max(0.0, 1 - strength), 1 + strength)
        factors[:, k] = order.random_between(low, high, samples, seed, epoch, stream)
    # The ranks of four random numbers are a random permutation.
    keys = [order.random_bits(samples, seed, epoch, JITTER_ORDER + k) for k in range(4)]
    return factors, np.stack(keys, 1).argsort(1)


def augment_pixels(images: torch.Tensor, params: AugmentParams) -> torch.Tensor:
    """Augments cropped images (n, H, W, 3) uint8."""
    if params.jitter_factors is not None and params.jitter_order is not None:
        images = color.jitter(images, params.jitter_factors, params.jitter_order)
    return images


def augment_normalized(images: torch.Tensor, params: AugmentParams, augment: Augment | None) -> torch.Tensor:
    """Augments cropped and normalized images (n, H, W, 3) float32, in place."""
    if params.cutout_center is not None and augment is not None:
        images = cut_out(images, params.cutout_center, augment.cutout)
    return images


def cut_out(images: torch.Tensor, center: torch.Tensor, size: int) -> torch.Tensor:
    """Sets a square of each image to 0, the mean of normalized images (DeVries, arXiv:1708.04552).

    The center lies anywhere in the image, so that the square may extend beyond the border.

    Args:
        images: (n, H, W, 3) float, changed in place.
        center: (n, 2) int64, row and column.
        size: side of the square.
    """
    _, height, width, _ = images.shape
    first = center - size // 2
    y = torch.arange(height, device=images.device) - first[:, :1]
    x = torch.arange(width, device=images.device) - first[:, 1:]
    inside = ((y >= 0) & (y < size))[:, :, None] & ((x >= 0) & (x < size))[:, None, :]
    return images.masked_fill_(inside[..., None], 0.0)
