"""Colour jitter on whole batches, each image with its own factors and its own order of operations.

The arithmetic is torchvision's on uint8 images (torchvision.transforms.v2.functional), and a test holds each image
against it. Every step is one correctly rounded operation on each value, and the only sum is of integers; so an
image's pixels do not depend on the batch or the rank that it is in.
"""

from collections.abc import Callable

import torch

GREY = (0.2989, 0.587, 0.114)  # luma of red, green and blue (ITU-R BT.601), as torchvision rounds them


def jitter(images: torch.Tensor, factors: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Changes brightness, contrast, saturation and hue.

    Args:
        images: (n, H, W, 3) uint8.
        factors: (n, 4) float32: brightness, contrast and saturation multiply (1 changes nothing); hue is shifted by
            a share of the circle (0 changes nothing).
        turns: (n, 4) int64, for turn 0 to 3 which of the four it is that is done.

    Returns:
        (n, H, W, 3) uint8.
    """
    operations: tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...]
    operations = (brightness, contrast, saturation, hue)
    for turn in range(4):
        # Every operation on all images, and each image takes the one whose turn it is: a choice of images for
        # each operation would make a GPU wait for the host.
        changed = images
        for k, operation in enumerate(operations):
            chosen = (turns[:, turn] == k)[:, None, None, None]
            changed = torch.where(chosen, operation(images, factors[:, k, None, None, None]), changed)
        images = changed
    return images


def brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Each pixel times the factor; (n, H, W, 3) uint8 and (n, 1, 1, 1) float32, as for the next three."""
    return (images * factor).clamp(0, 255).to(torch.uint8)


def contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Between the image's mean grey, at 0, and the image, at 1, and beyond."""
    grey = _grey(images).to(torch.int64)
    mean = grey.sum((1, 2, 3), keepdim=True).float() / grey[0].numel()
    return _blend(images, mean, factor)


def saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Between each pixel's grey, at 0, and the pixel, at 1, and beyond."""
    return _blend(images, _grey(images), factor)


def hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turns the hue of each pixel by a share of the circle, through HSV."""
    rgb = images.float() * (1 / 255)
    value, smallest = rgb.amax(-1), rgb.amin(-1)
    spread = value - smallest
    one = torch.ones_like(value)
    flat = spread == 0
    saturated = spread / torch.where(flat, one, value)
    red, green, blue = ((value[..., None] - rgb) / torch.where(flat, one, spread)[..., None]).unbind(-1)
    is_red, is_green = rgb[..., 0] == value, rgb[..., 1] == value
    sector = torch.where(is_red, blue - green, torch.where(is_green, red + 2.0 - blue, green + 4.0 - red))
    turned = ((sector * (1 / 6) + 1.0).fmod(1.0) + shift[..., 0]).remainder(1.0) * 6
    whole = turned.floor()
    part = saturated * (turned - whole)
    falling = ((1.0 - part) * value).clamp(0, 1)
    rising = ((part + (1.0 - saturated)) * value).clamp(0, 1)
    low = ((1.0 - saturated) * value).clamp(0, 1)
    # Red, green and blue in each sixth of the circle; written out, for a table of indices would be gathered from
    # memory once for every pixel.
    sixth = whole.to(torch.int32).remainder(6)[..., None]
    made = torch.zeros_like(rgb)
    for k, colours in enumerate(
        (
            (value, rising, low),
            (falling, value, low),
            (low, value, rising),
            (low, falling, value),
            (rising, low, value),
            (value, low, falling),
        )
    ):
        made = torch.where(sixth == k, torch.stack(colours, -1), made)
    return (made * (256 - 1e-3)).to(torch.uint8)


def _grey(images: torch.Tensor) -> torch.Tensor:
    red, green, blue = (images[..., k, None].float() * weight for k, weight in enumerate(GREY))
    return (red + green + blue).floor()


def _blend(images: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (images * factor + other * (1 - factor)).clamp(0, 255).to(torch.uint8)
