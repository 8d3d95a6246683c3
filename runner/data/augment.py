"""Random augmentation of training images: all random parameters are sampled before any pixel is touched."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from runner.config.recipe import Augment
from runner.data import color, order, policy

# One stream of random numbers for each use, so that adding a use does not change the others.
CROP_ROW, CROP_COLUMN, FLIP, CUTOUT_ROW, CUTOUT_COLUMN, BRIGHTNESS, CONTRAST, SATURATION, HUE = range(9)
JITTER_ORDER = 9  # streams 9 to 12; 13 is order.RANK
ERASE, ERASE_ROW, ERASE_COLUMN = 14, 15, 16
ERASE_AREA, ERASE_RATIO = 17, 27  # streams 17 to 36, two for each attempt
RESIZED_ROW, RESIZED_COLUMN = 37, 38
RESIZED_AREA, RESIZED_RATIO = 39, 49  # streams 39 to 58, two for each attempt; the next free stream is 59
POLICY = 1000  # streams 1000 to 1299, three for each operation


# Parameters of the crop and of `augment_normalized`; all others are of `augment_pixels`.
NOT_OF_PIXELS = ("row", "column", "flip", "resized_box", "cutout_center", "erase_box")
ATTEMPTS = 10  # to find a rectangle that fits into the image


@dataclass(frozen=True)
class AugmentParams:
    """The random parameters of N images, in the order of the images.

    Attributes:
        row, column: (N,) int64, the corner of the crop relative to that of the unpadded image, in -padding..padding.
        flip: (N,) bool.
        resized_box: (N, 4) int64, top, left, bottom and right of the crop that is resized; None without such crops.
        cutout_center: (N, 2) int64, row and column of the center of the blanked square; None without cutout.
        jitter_factors: (N, 4) float32, factors of brightness, contrast and saturation, and the hue shift; None without
            jitter.
        jitter_order: (N, 4) int64, the permutation in which these four are applied; None without jitter.
        erase_box: (N, 4) int64, top, left, bottom and right of the erased rectangle; None without erasing.
        policy_operations: (N, layers) int64, see `policy.sample`, as for the following; None without a policy.
        policy_matrices: (N, layers, 2, 3) float32.
        policy_factors: (N, layers) float32.
    """

    row: torch.Tensor
    column: torch.Tensor
    flip: torch.Tensor
    resized_box: torch.Tensor | None = None
    cutout_center: torch.Tensor | None = None
    jitter_factors: torch.Tensor | None = None
    jitter_order: torch.Tensor | None = None
    erase_box: torch.Tensor | None = None
    policy_operations: torch.Tensor | None = None
    policy_matrices: torch.Tensor | None = None
    policy_factors: torch.Tensor | None = None

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
    augment: Augment | None,
    samples: np.ndarray,
    image_size: tuple[int, int],
    seed: int,
    epoch: int,
    resized: tuple[int, int] | None = None,
) -> AugmentParams:
    """Samples the augmentation of images `samples` (N,) of `image_size` (H, W) in an epoch; for None, changes nothing.

    A random resized crop changes their size to `resized`, by default the same, before all other augmentations.

    For repeated augmentation, `order.copy_keys` identifies the copies of a sample.

    An alternating flip mirrors half of the images in even epochs and the other half in odd ones, so that two
    consecutive epochs show every image both ways (K. Jordan, arXiv:2404.00498, section 3.6).
    """
    if augment is None:
        zeros = torch.zeros(len(samples), dtype=torch.int64)
        return AugmentParams(zeros, zeros, zeros.bool())

    def below(bound: int, stream: int, epoch: int = epoch) -> np.ndarray:
        return order.random_below(bound, samples, seed, epoch, stream)

    optional: dict[str, np.ndarray] = {}
    if augment.random_resized_crop:
        optional["resized_box"] = _sample_resized_box(augment.random_resized_crop, samples, image_size, seed, epoch)
        image_size = resized or image_size
    padding, flip = augment.crop_padding, np.zeros(len(samples), dtype=bool)
    if augment.flip == "random":
        flip = below(2, FLIP) == 1
    elif augment.flip == "alternating":
        flip = below(2, FLIP, epoch=0) == epoch % 2
    if augment.cutout:
        optional["cutout_center"] = np.stack([below(image_size[0], CUTOUT_ROW), below(image_size[1], CUTOUT_COLUMN)], 1)
    if any(augment.jitter):
        optional["jitter_factors"], optional["jitter_order"] = _sample_jitter(augment, samples, seed, epoch)
    if augment.erase:
        optional["erase_box"] = _sample_erase_box(augment.erase, samples, image_size, seed, epoch)
    if augment.policy != "none":
        names = ("policy_operations", "policy_matrices", "policy_factors")
        sampled = policy.sample(augment, samples, image_size, seed, epoch, POLICY)
        optional |= dict(zip(names, sampled, strict=True))
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


def _sample_erase_box(
    probability: float, samples: np.ndarray, image_size: tuple[int, int], seed: int, epoch: int
) -> np.ndarray:
    """Samples the boxes (N, 4) int64 of random erasing (Z. Zhong et al., arXiv:1708.04896); all zero for none.

    The distribution is torchvision's: an area of 2 to 33 percent of the image and a ratio of height to width of 0.3 to
    3.3, drawn up to ten times, until the box is smaller than the image.
    """

    def below(bound: int | np.ndarray, stream: int) -> np.ndarray:
        return order.random_below(bound, samples, seed, epoch, stream)

    def between(low: float, high: float, stream: int) -> np.ndarray:
        return order.random_between(low, high, samples, seed, epoch, stream).astype(np.float64)

    def attempt(number: int) -> tuple[np.ndarray, np.ndarray]:
        area = between(0.02, 0.33, ERASE_AREA + number)
        return area, between(math.log(0.3), math.log(3.3), ERASE_RATIO + number)

    largest = image_size[0] - 1, image_size[1] - 1
    height, width = _sides_that_fit(attempt, image_size, largest)
    top, left = below(image_size[0] - height + 1, ERASE_ROW), below(image_size[1] - width + 1, ERASE_COLUMN)
    erased = below(2**32, ERASE) < probability * 2**32
    return np.stack([top, left, top + height, left + width], 1) * erased[:, None]


def _sample_resized_box(
    smallest: float, samples: np.ndarray, image_size: tuple[int, int], seed: int, epoch: int
) -> np.ndarray:
    """Samples the boxes (N, 4) int64 of random resized crops (C. Szegedy et al., arXiv:1409.4842).

    The distribution is torchvision's: an area of `smallest` to all of the image and a ratio of the sides of 3/4 to 4/3,
    drawn up to ten times, until the box fits into the image; if none does, the largest one in the center.
    """

    def between(low: float, high: float, stream: int) -> np.ndarray:
        return order.random_between(low, high, samples, seed, epoch, stream).astype(np.float64)

    def attempt(number: int) -> tuple[np.ndarray, np.ndarray]:
        area = between(smallest, 1.0, RESIZED_AREA + number)
        return area, between(math.log(3 / 4), math.log(4 / 3), RESIZED_RATIO + number)

    def first(size: int, side: np.ndarray, stream: int) -> np.ndarray:
        drawn = order.random_below(size - side + 1, samples, seed, epoch, stream)
        return np.where(found, drawn, (size - side) // 2)

    height, width = _sides_that_fit(attempt, image_size, image_size)
    found = height + width > 0
    whole = (min(side, round(other * 4 / 3)) for side, other in zip(image_size, image_size[::-1], strict=True))
    height, width = (
        np.where(found, np.maximum(side, 1), most) for side, most in zip((height, width), whole, strict=True)
    )
    top, left = first(image_size[0], height, RESIZED_ROW), first(image_size[1], width, RESIZED_COLUMN)
    return np.stack([top, left, top + height, left + width], 1)


def _sides_that_fit(
    attempt: Callable[[int], tuple[np.ndarray, np.ndarray]], image_size: tuple[int, int], largest: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the height and width (N,) int64 of each image's first attempt of at most `largest`; zero if none is.

    `attempt` returns, for the number of an attempt, the fraction of the area of `image_size`, and the logarithm of
    height / width, (N,) float64 each.
    """
    height = width = np.zeros((), np.int64)
    for number in range(ATTEMPTS):
        fraction, log_ratio = attempt(number)
        area, ratio = image_size[0] * image_size[1] * fraction, np.exp(log_ratio)
        sides = np.sqrt(area * ratio).round().astype(np.int64), np.sqrt(area / ratio).round().astype(np.int64)
        fits = (height + width == 0) & (sides[0] <= largest[0]) & (sides[1] <= largest[1])
        height, width = np.where(fits, sides[0], height), np.where(fits, sides[1], width)
    return height, width


def load_loops(augment: Augment) -> None:
    """Loads the CPU loops that `augment_pixels` needs; see `kernels.crop.load_loop`."""
    if any(augment.jitter):
        color.load_loop()
    if augment.policy != "none":
        policy.load_loop()


def augment_pixels(images: torch.Tensor, params: AugmentParams) -> torch.Tensor:
    """Augments cropped images (n, H, W, 3) uint8."""
    operations, matrices, factors = params.policy_operations, params.policy_matrices, params.policy_factors
    if operations is not None and matrices is not None and factors is not None:
        images = policy.apply(images, operations, matrices, factors)
    if params.jitter_factors is not None and params.jitter_order is not None:
        images = color.jitter(images, params.jitter_factors, params.jitter_order)
    return images


def augment_normalized(images: torch.Tensor, params: AugmentParams, augment: Augment | None) -> torch.Tensor:
    """Augments cropped and normalized images (n, H, W, 3) float32, in place."""
    if params.cutout_center is not None and augment is not None:
        images = cut_out(images, params.cutout_center, augment.cutout)
    if params.erase_box is not None:
        images = erase(images, params.erase_box)
    return images


def cut_out(images: torch.Tensor, center: torch.Tensor, size: int) -> torch.Tensor:
    """Sets a square of each image to 0, the mean of normalized images (DeVries, arXiv:1708.04552).

    The center lies anywhere in the image, so that the square may extend beyond the border.

    Args:
        images: (n, H, W, 3) float, changed in place.
        center: (n, 2) int64, row and column.
        size: side of the square.
    """
    first = center - size // 2
    return erase(images, torch.cat([first, first + size], 1))


def erase(images: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Sets a rectangle of each image to 0, the mean of normalized images.

    Args:
        images: (n, H, W, 3) float, changed in place.
        box: (n, 4) int64, top, left, bottom and right; may extend beyond the border.
    """
    _, height, width, _ = images.shape
    top, left, bottom, right = box[:, :, None].unbind(1)
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    inside = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]
    return images.masked_fill_(inside[..., None], 0.0)
