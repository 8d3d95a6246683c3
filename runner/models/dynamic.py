"""Dynamic convolutions: parallel filters with weights computed from the whole image (soni.txt, Methods).

From the family of Y. Chen et al. 2020, "Dynamic Convolution: Attention over Convolution Kernels", arXiv:1912.03458.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

GATES = {"softmax": nn.Softmax(dim=1), "sigmoid": nn.Sigmoid(), "relu": nn.ReLU()}


class DynamicBlock(nn.Module):
    """ReLU(BN(Σ_k a_k · conv_k(x) + shortcut(x))) with a = gate(linear(mean of x over the image)).

    The sum of K convolutions of x, each weighted by a_k, is computed as one convolution over the concatenated
    channels of a_k · x. The shortcut is the identity, or a 1×1 convolution with batch norm if channels change.

    Maps (N, channels_in, H, W) to (N, channels, H, W).
    """

    def __init__(self, channels_in: int, channels: int, branches: int, gate: str) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels_in, branches), GATES[gate]
        )
        self.convolutions = nn.Conv2d(branches * channels_in, channels, 3, padding=1, bias=False)
        # He initialization of each branch separately.
        nn.init.normal_(self.convolutions.weight, std=math.sqrt(2 / (9 * channels_in)))
        self.shortcut = nn.Sequential()
        if channels_in != channels:
            projection = nn.Conv2d(channels_in, channels, 1, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))
            nn.init.kaiming_normal_(projection.weight)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.attention(x)[..., None, None, None].unbind(1)  # K of (N, 1, 1, 1)
        # One tensor for each branch, because a product of five dimensions loses the memory format of x.
        scaled = torch.cat([weight * x for weight in weights], dim=1)  # (N, K · channels_in, H, W)
        return self.relu(self.norm(self.convolutions(scaled) + self.shortcut(x)))


class DynamicNet(nn.Module):
    """Dynamic blocks, 2×2 max pooling, global average pooling, dropout, one linear layer.

    Maps images (N, 3, H, W) to logits (N, classes).
    """

    def __init__(
        self,
        channels: Sequence[int],
        dropout: float,
        branches: int = 3,
        gate: Literal["softmax", "sigmoid", "relu"] = "softmax",
        classes: int = 10,
    ) -> None:
        super().__init__()
        widths = [3, *channels]
        self.blocks = nn.Sequential(*(DynamicBlock(a, b, branches, gate) for a, b in pairwise(widths)))
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout))
        self.classifier = nn.Linear(channels[-1], classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.head(self.blocks(images)))


def soni_2(gate: Literal["softmax", "sigmoid", "relu"] = "softmax", classes: int = 10) -> DynamicNet:
    """Two blocks of 64 channels (soni.txt, Model 1)."""
    return DynamicNet((64, 64), dropout=0.0, gate=gate, classes=classes)


def soni_4(dropout: float, gate: Literal["softmax", "sigmoid", "relu"] = "softmax", classes: int = 10) -> DynamicNet:
    """Four blocks of 64, 64, 128 and 128 channels, with dropout before the last layer (soni.txt, Model 2)."""
    return DynamicNet((64, 64, 128, 128), dropout, gate=gate, classes=classes)
