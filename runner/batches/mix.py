"""Mixup and CutMix: each image of a batch is mixed with the one before it in the global batch.

Order is random, so the one before is any other; and a rank needs a single image beyond its own slice for it. What
is drawn concerns the whole batch and is a function of (seed, epoch, step).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runner.batches import order
from runner.recipe import Augment


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed.

    share: of an image itself in its target; the rest is that of the one before it.
    box: for CutMix (top, left, bottom, right) of what is taken from the one before; None for mixup.
    """

    share: float
    box: tuple[int, int, int, int] | None


def draw(augment: Augment, side: tuple[int, int], seed: int, epoch: int, step: int) -> Mix:
    """How global batch `step` of H×W images is mixed; a coin decides where both kinds are wanted.

    Mixup: Zhang et al., arXiv:1710.09412. CutMix: Yun et al., arXiv:1905.04899, the box as in torchvision.
    """
    generator = order.batch_generator(seed, epoch, step)
    coin = generator.random() < 0.5
    alpha = augment.mixup if augment.mixup and (coin or not augment.cutmix) else augment.cutmix
    share = float(generator.beta(alpha, alpha))
    if augment.mixup and (coin or not augment.cutmix):
        return Mix(share, None)
    height, width = side
    y, x = int(generator.integers(height)), int(generator.integers(width))
    half_height, half_width = (int(0.5 * math.sqrt(1 - share) * size) for size in side)
    top, bottom = max(0, y - half_height), min(height, y + half_height)
    left, right = max(0, x - half_width), min(width, x + half_width)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))


def apply(mix: Mix, images: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes each image with the one before it.

    Args:
        mix: how.
        images: (1 + n, H, W, 3) float; the first only serves the second.
        labels: (1 + n,) int64.
        classes: how many.

    Returns:
        images (n, H, W, 3) and targets (n, classes) float32, shares that add up to 1.
    """
    own, before = images[1:], images[:-1]
    if mix.box is None:
        made = own * mix.share + before * (1 - mix.share)
    else:
        top, left, bottom, right = mix.box
        made = own.clone()
        made[:, top:bottom, left:right] = before[:, top:bottom, left:right]
    shares = F.one_hot(labels, classes).float()
    return made, shares[1:] * mix.share + shares[:-1] * (1 - mix.share)
