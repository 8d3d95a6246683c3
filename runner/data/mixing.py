"""Mixup and CutMix: each image of a batch is mixed with its predecessor in the global batch.

The order of samples is random, so the predecessor is a random image, and a rank needs only one image beyond its own
slice. The parameters apply to the whole batch and are a function of (seed, epoch, step).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runner.config.recipe import Augment
from runner.data import order


@dataclass(frozen=True)
class MixParams:
    """The random parameters of one batch.

    Attributes:
        weight: weight of an image's own label in its target; that of its predecessor's label is 1 - weight.
        box: (top, left, bottom, right) of the box that CutMix pastes from the predecessor; None for mixup.
    """

    weight: float
    box: tuple[int, int, int, int] | None


def sample_params(augment: Augment, image_size: tuple[int, int], seed: int, epoch: int, step: int) -> MixParams:
    """Samples how global batch `step` of images of size `image_size` (H, W) is mixed.

    With mixup and CutMix both enabled, a coin flip selects one of them for each batch. Mixup: Zhang et al.,
    arXiv:1710.09412. CutMix: Yun et al., arXiv:1905.04899, with torchvision's box.
    """
    generator = order.batch_generator(seed, epoch, step)
    coin = generator.random() < 0.5
    use_mixup = augment.mixup and (coin or not augment.cutmix)
    alpha = augment.mixup if use_mixup else augment.cutmix
    weight = float(generator.beta(alpha, alpha))
    if use_mixup:
        return MixParams(weight, None)
    height, width = image_size
    y, x = int(generator.integers(height)), int(generator.integers(width))
    half_height, half_width = (int(0.5 * math.sqrt(1 - weight) * size) for size in image_size)
    top, bottom = max(0, y - half_height), min(height, y + half_height)
    left, right = max(0, x - half_width), min(width, x + half_width)
    return MixParams(1 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))


def mix(
    images: torch.Tensor, labels: torch.Tensor, params: MixParams, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes each image with its predecessor.

    Args:
        images: (1 + n, H, W, 3) float; the first image is only used as a predecessor.
        labels: (1 + n,) int64.
        params: the parameters of the batch.
        classes: number of classes.

    Returns:
        images (n, H, W, 3), and targets (n, classes) float32 whose rows sum to 1.
    """
    current, previous = images[1:], images[:-1]
    if params.box is None:
        mixed = current * params.weight + previous * (1 - params.weight)
    else:
        top, left, bottom, right = params.box
        mixed = current.clone()
        mixed[:, top:bottom, left:right] = previous[:, top:bottom, left:right]
    one_hot = F.one_hot(labels, classes).float()
    return mixed, one_hot[1:] * params.weight + one_hot[:-1] * (1 - params.weight)
