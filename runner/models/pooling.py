"""Pooling to a fixed size whose gradient is deterministic on a GPU, unlike that of torch's adaptive pooling."""

import torch
import torch.nn.functional as F
from torch import nn


class AveragePool(nn.Module):
    """Averages (N, C, H, W) over equal windows to (N, C, size, size).

    Equal to nn.AdaptiveAvgPool2d, whose windows overlap if `size` does not divide the sides; only then is that used,
    and --deterministic is refused on a GPU.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        if height % self.size or width % self.size:
            return F.adaptive_avg_pool2d(x, self.size)
        return F.avg_pool2d(x, (height // self.size, width // self.size))


class GlobalMaxPool(nn.Module):
    """The maximum of each channel: (N, C, H, W) to (N, C, 1, 1).

    Not `amax`: compiled in bf16, its backward pass compares rounded maxima with values that are not rounded, finds none
    that is equal, and divides by zero.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, (x.shape[2], x.shape[3]))
