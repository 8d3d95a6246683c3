"""Color jitter on whole batches, each image with its own factors and its own order of operations.

The arithmetic is torchvision's for uint8 images (torchvision.transforms.v2.functional); a test compares the two.
Every step is one correctly rounded operation per value, and the only sum is over integers, so an image's pixels do
not depend on its batch or rank.
"""

import functools
from collections.abc import Callable

import torch

GRAY = (0.2989, 0.587, 0.114)  # luma of red, green and blue (ITU-R BT.601), rounded as in torchvision


def jitter(images: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Changes brightness, contrast, saturation and hue: a compiled loop on the CPU, one kernel on a GPU.

    Args:
        images: (n, H, W, 3) uint8.
        factors: (n, 4) float32. Brightness, contrast and saturation are multiplied (1 changes nothing); hue is
            shifted by a fraction of the color circle (0 changes nothing).
        order: (n, 4) int64, the order in which the four operations are applied.

    Returns:
        (n, H, W, 3) uint8.
    """
    implementation = {"cpu": jitter_numba, "cuda": jitter_triton}.get(images.device.type, jitter_torch)
    return implementation(images, factors, order)


def jitter_numba(images: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`jitter` as a compiled loop on the CPU, with as many threads as torch uses."""
    from runner.data.kernels import color_cpu
    from runner.system import cpu

    load_loop()
    images = images.clone(memory_format=torch.contiguous_format)
    with cpu.preserve_torch_num_threads():
        threads = cpu.sync_numba_num_threads()
        color_cpu.jitter(images.numpy(), factors.contiguous().numpy(), order.contiguous().numpy(), threads)
    return images


@functools.cache
def load_loop() -> None:
    """Compiles the CPU loop, or loads it from the cache; once per process, and before FFCV creates a Loader.

    See `kernels.crop.load_loop`.
    """
    import numba

    from runner.data.kernels import color_cpu, crop
    from runner.system import cpu

    cpu.choose_openmp()
    images, factors = torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.zeros(1, 4)
    example = (images.numpy(), factors.numpy(), factors.long().numpy(), 1)
    crop.compile_loop(color_cpu.jitter, tuple(map(numba.typeof, example)))


def jitter_triton(images: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`jitter` as one Triton kernel on a GPU."""
    from runner.data.kernels import color_gpu

    images = images.clone(memory_format=torch.contiguous_format)
    color_gpu.jitter(images, factors, order)
    return images


def jitter_torch(images: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`jitter` in torch operations, on any device: the reference implementation."""
    operations: tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...]
    operations = (brightness, contrast, saturation, hue)
    for turn in range(4):
        # Every operation runs on all images, and each image keeps the result of the one that is due: indexing the
        # images of each operation would make a GPU wait for the host.
        jittered = images
        for k, operation in enumerate(operations):
            due = (order[:, turn] == k)[:, None, None, None]
            jittered = torch.where(due, operation(images, factors[:, k, None, None, None]), jittered)
        images = jittered
    return images


def brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiplies each pixel by the factor.

    Args:
        images: (n, H, W, 3) uint8, as for `contrast`, `saturation` and `hue`.
        factor: (n, 1, 1, 1) float32, likewise.
    """
    return (images * factor).clamp(0, 255).to(torch.uint8)


def contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blends the image's mean gray (factor 0) with the image (factor 1)."""
    gray = _gray(images).to(torch.int64)
    total = gray.sum((1, 2, 3), keepdim=True).float()
    mean = total / torch.full_like(total, gray[0].numel())  # a GPU would multiply by the inverse of a Python number
    return _blend(images, mean, factor)


def saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blends each pixel's gray (factor 0) with the pixel (factor 1)."""
    return _blend(images, _gray(images), factor)


def hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Shifts the hue of each pixel in HSV space by a fraction of the color circle."""
    rgb = images.float() * (1 / 255)
    value, minimum = rgb.amax(-1), rgb.amin(-1)
    chroma = value - minimum
    one = torch.ones_like(value)
    gray = chroma == 0
    saturated = chroma / torch.where(gray, one, value)
    red, green, blue = ((value[..., None] - rgb) / torch.where(gray, one, chroma)[..., None]).unbind(-1)
    is_red, is_green = rgb[..., 0] == value, rgb[..., 1] == value
    sector = torch.where(is_red, blue - green, torch.where(is_green, red + 2.0 - blue, green + 4.0 - red))
    shifted = ((sector * (1 / 6) + 1.0).fmod(1.0) + shift[..., 0]).remainder(1.0) * 6
    floor = shifted.floor()
    fraction = saturated * (shifted - floor)
    falling = ((1.0 - fraction) * value).clamp(0, 1)
    rising = ((fraction + (1.0 - saturated)) * value).clamp(0, 1)
    low = ((1.0 - saturated) * value).clamp(0, 1)
    # Red, green and blue in each sixth of the circle. A lookup table would be a gather per pixel.
    sixth = floor.to(torch.int32).remainder(6)[..., None]
    result = torch.zeros_like(rgb)
    for k, channels in enumerate(
        (
            (value, rising, low),
            (falling, value, low),
            (low, value, rising),
            (low, falling, value),
            (rising, low, value),
            (value, low, falling),
        )
    ):
        result = torch.where(sixth == k, torch.stack(channels, -1), result)
    return (result * (256 - 1e-3)).to(torch.uint8)


def _gray(images: torch.Tensor) -> torch.Tensor:
    """The luma of each pixel, (n, H, W, 1) float32, rounded down."""
    red, green, blue = (images[..., k, None].float() * weight for k, weight in enumerate(GRAY))
    return (red + green + blue).floor()


def _blend(images: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (images * factor + other * (1 - factor)).clamp(0, 255).to(torch.uint8)
