"""RandAugment and TrivialAugmentWide on whole batches: each image has its own operation in each layer.

RandAugment: E. Cubuk et al., arXiv:1909.13719. TrivialAugment: S. Müller and F. Hutter, arXiv:2103.10158. Operations,
magnitudes and arithmetic are torchvision's for uint8 images (torchvision.transforms.v2), with nearest interpolation and
black outside of the image; a test compares the two. As in `color`, an image's pixels do not depend on its batch.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from runner.config.recipe import Augment
from runner.data import color, order
from runner.data.policy_operations import (
    AUTO_CONTRAST,
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    EQUALIZE,
    OPERATIONS,
    POSTERIZE,
    ROTATE,
    SHARPNESS,
    SHEAR_X,
    SHEAR_Y,
    SOLARIZE,
    TRANSLATE_X,
    TRANSLATE_Y,
)

BINS = 31  # magnitudes of each operation


@dataclass(frozen=True)
class Magnitudes:
    """The largest magnitudes of a policy; the smallest change nothing."""

    shear: float
    translate: tuple[float, float]  # pixels along y and x
    degrees: float
    factor: float  # deviation from 1, of color, contrast, sharpness and brightness
    bits: int  # bits that posterizing drops


def magnitudes(policy: str, image_size: tuple[int, int]) -> Magnitudes:
    """Returns the magnitudes of a policy, "rand" or "trivial", for images of a size (H, W)."""
    if policy == "rand":
        height, width = image_size
        return Magnitudes(0.3, (150.0 / 331.0 * height, 150.0 / 331.0 * width), 30.0, 0.9, 4)
    return Magnitudes(0.99, (32.0, 32.0), 135.0, 0.99, 6)


@functools.cache
def parameter_tables(policy: str, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the parameters of each operation, magnitude and sign.

    Returns:
        matrices (14, BINS, 2, 2, 3) float32: for x and y, the inverse affine map from the pixels of the result to those
        of the image, in coordinates of half the image's size.
        factors (14, BINS, 2) float32: the factor of a blend or of brightness, the mask of posterize, or the threshold
        of solarize.
    """
    height, width = image_size
    largest = magnitudes(policy, image_size)
    matrices = np.zeros((len(OPERATIONS), BINS, 2, 2, 3))
    matrices[..., 0, 0] = matrices[..., 1, 1] = 1
    factors = np.ones((len(OPERATIONS), BINS, 2))
    for k, sign in enumerate((1, -1)):
        shear = sign * _linspace(largest.shear)
        matrices[SHEAR_X, :, k, 0, 1], matrices[SHEAR_X, :, k, 0, 2] = shear, shear * height / 2
        matrices[SHEAR_Y, :, k, 1, 0], matrices[SHEAR_Y, :, k, 1, 2] = shear, shear * width / 2
        matrices[TRANSLATE_Y, :, k, 1, 2] = -np.trunc(sign * _linspace(largest.translate[0]))
        matrices[TRANSLATE_X, :, k, 0, 2] = -np.trunc(sign * _linspace(largest.translate[1]))
        angle = np.radians(sign * _linspace(largest.degrees))
        matrices[ROTATE, :, k, 0, 0] = matrices[ROTATE, :, k, 1, 1] = np.cos(angle)
        matrices[ROTATE, :, k, 0, 1], matrices[ROTATE, :, k, 1, 0] = -np.sin(angle), np.sin(angle)
        factors[COLOR : BRIGHTNESS + 1, :, k] = 1 + sign * _linspace(largest.factor)
    bits = np.round(np.arange(BINS) / ((BINS - 1) / largest.bits)).astype(int)
    factors[POSTERIZE] = 256 - 2 ** bits[:, None]
    factors[SOLARIZE] = 255 * _linspace(0.0, 1.0)[:, None]
    half = np.array([width, height], np.float32)[:, None] / 2
    return matrices.astype(np.float32) / half, factors.astype(np.float32)


def _linspace(last: float, first: float = 0.0) -> np.ndarray:
    """Returns the float32 values of torch.linspace(first, last, BINS), which torchvision uses, as float64."""
    step, numbers = float((np.float32(last) - np.float32(first)) / np.float32(BINS - 1)), np.arange(BINS)
    from_first, from_last = float(np.float32(first)) + step * numbers, float(np.float32(last)) - step * numbers[::-1]
    return np.where(numbers < BINS // 2, from_first, from_last).astype(np.float32).astype(np.float64)


def sample(
    augment: Augment, samples: np.ndarray, image_size: tuple[int, int], seed: int, epoch: int, first_stream: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples the operations of a policy for images `samples` (N,) in an epoch.

    Args:
        first_stream: the first of the random number streams; each layer uses three.

    Returns:
        operations (N, layers) int64, matrices (N, layers, 2, 3) float32, and factors (N, layers) float32.
    """
    matrices, factors = parameter_tables(augment.policy, image_size)
    drawn = []
    for layer in range(augment.rand_ops if augment.policy == "rand" else 1):
        operation, magnitude, sign = (
            order.random_below(bound, samples, seed, epoch, first_stream + 3 * layer + k)
            for k, bound in enumerate((len(OPERATIONS), BINS, 2))
        )
        if augment.policy == "rand":
            magnitude = np.full_like(operation, augment.rand_magnitude)
        drawn.append((operation, magnitude, sign))
    operation, magnitude, sign = (np.stack(values, 1) for values in zip(*drawn, strict=True))
    return operation, matrices[operation, magnitude, sign], factors[operation, magnitude, sign]


def apply(
    images: torch.Tensor, operations: torch.Tensor, matrices: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """Applies one operation of each layer to each image: a compiled loop on the CPU, batched passes on a GPU.

    Args:
        images: (n, H, W, 3) uint8.
        operations, matrices, factors: see `sample`.

    Returns:
        (n, H, W, 3) uint8.
    """
    implementation = apply_numba if images.device.type == "cpu" else apply_torch
    return implementation(images, operations, matrices, factors)


def apply_numba(
    images: torch.Tensor, operations: torch.Tensor, matrices: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """`apply` as a compiled loop on the CPU, with as many threads as torch uses."""
    from runner.data.kernels import policy_cpu
    from runner.system import cpu

    load_loop()
    images = images.clone(memory_format=torch.contiguous_format)
    arrays = operations.contiguous().numpy(), matrices.contiguous().numpy(), factors.contiguous().numpy()
    with cpu.preserve_torch_num_threads():
        threads = cpu.sync_numba_num_threads()
        policy_cpu.apply(images.numpy(), arrays[0], arrays[1], arrays[2], threads)
    return images


@functools.cache
def load_loop() -> None:
    """Compiles the CPU loop, or loads it from the cache; once per process, and before FFCV creates a Loader.

    See `kernels.crop.load_loop`.
    """
    import numba

    from runner.data.kernels import crop, policy_cpu
    from runner.system import cpu

    cpu.choose_openmp()
    images, operations = np.zeros((1, 1, 1, 3), np.uint8), np.zeros((1, 1), np.int64)
    example = (images, operations, np.zeros((1, 1, 2, 3), np.float32), np.zeros((1, 1), np.float32), 1)
    crop.compile_loop(policy_cpu.apply, tuple(map(numba.typeof, example)))


def apply_torch(
    images: torch.Tensor, operations: torch.Tensor, matrices: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """`apply` in torch operations, on any device: the reference implementation.

    Every pass runs on all images, and changes only those whose operation is due: indexing them would make a GPU wait
    for the host.
    """
    for layer in range(operations.shape[1]):
        operation, factor = (values[:, layer, None, None, None] for values in (operations, factors))
        images = move(images, matrices[:, layer])
        images = blend(images, operation, factor)
        images = look_up(images, lookup_tables(images, operation[:, 0], factor[:, 0]))
    return images


def move(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Shears, translates or rotates images (n, H, W, 3) uint8 by inverse affine maps (n, 2, 3) float32."""
    _, height, width, _ = images.shape
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    column, row = (
        ((x * from_x + y * from_y + constant + 1) * (size / 2) - 0.5).round()
        for (from_x, from_y, constant), size in zip(
            matrices[..., None, None].permute(1, 2, 0, 3, 4).unbind(0), (width, height), strict=True
        )
    )
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
    pixels = images.flatten(1, 2).gather(1, index.flatten(1)[..., None].expand(-1, -1, 3))
    return pixels.view_as(images) * inside[..., None]


def blend(images: torch.Tensor, operation: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Changes color, contrast or sharpness of images (n, H, W, 3) uint8, by factors (n, 1, 1, 1)."""
    for due, change in ((COLOR, color.saturation), (CONTRAST, color.contrast), (SHARPNESS, sharpness)):
        images = torch.where(operation == due, change(images, factor), images)
    return images


def sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blends the smoothed image (factor 0) with the image (factor 1); the pixels at the border stay."""
    _, height, width, _ = images.shape
    pixels = images.int()
    center = pixels[:, 1:-1, 1:-1]
    total = 4 * center
    for y in range(3):
        for x in range(3):
            total = total + pixels[:, y : max(y, height - 2 + y), x : max(x, width - 2 + x)]
    # Thirteenths of the weights 1 and 5, rounded to the nearest; the sum is an integer, so that there are no ties.
    smooth = (2 * total + 13).div(26, rounding_mode="floor")
    sharp = images.clone()
    sharp[:, 1:-1, 1:-1] = (center + (smooth - center) * (1 - factor)).clamp(0, 255).to(torch.uint8)
    return sharp


def lookup_tables(images: torch.Tensor, operation: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Returns tables (n, 3, 256) uint8 that change brightness, posterize, solarize, stretch or equalize.

    Args:
        images: (n, H, W, 3) uint8.
        operation: (n, 1, 1) int64; those without a table get the identity.
        factor: (n, 1, 1) float32.
    """
    levels = torch.arange(256, device=images.device)
    planes = images.flatten(1, 2).transpose(1, 2).contiguous()
    low, high = (bound.float()[..., None] for bound in (planes.amin(-1), planes.amax(-1)))
    flat = low == high
    scale = torch.where(flat, 1.0, (high - low) * (1 / 255))
    # How many of the sorted pixels are below each level: a cumulative histogram whose sums have no order.
    bounds = levels.to(torch.uint8).expand(*planes.shape[:2], 256).contiguous()
    below = torch.searchsorted(planes.sort(-1).values, bounds)
    step = below.gather(2, high.long()).div(255, rounding_mode="floor")  # pixels below the highest level
    equalized = (below + step.div(2, rounding_mode="floor")).div(step.clamp(min=1), rounding_mode="floor")
    tables = levels.expand_as(bounds)
    for due, table in (
        (BRIGHTNESS, levels * factor),
        (POSTERIZE, levels & factor.long()),
        (SOLARIZE, torch.where(levels >= factor, 255 - levels, levels)),
        (AUTO_CONTRAST, (levels - torch.where(flat, 0.0, low)) / scale),
        (EQUALIZE, torch.where(step == 0, levels, equalized)),
    ):
        tables = torch.where(operation == due, table.clamp(0, 255).long(), tables)
    return tables.to(torch.uint8)


def look_up(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Replaces each value of images (n, H, W, 3) uint8 with its entry in the table (n, 3, 256) of its channel."""
    planes = images.flatten(1, 2).transpose(1, 2)
    return tables.gather(2, planes.long()).transpose(1, 2).reshape(images.shape)
