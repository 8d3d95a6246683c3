"""Residual networks for 32×32 images (He et al. 2015, arXiv:1512.03385, basic blocks)."""

from collections.abc import Sequence

import torch
from torch import nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, and a shortcut: the identity, or a 1×1 convolution if shapes differ.

    Maps (N, channels_in, H, W) to (N, channels, H / stride, W / stride).
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return self.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A 3×3 stem, stages of basic blocks with stride 2 between stages, average pooling, one linear layer.

    Maps images (N, 3, H, W) to logits (N, classes).
    """

    def __init__(self, blocks: Sequence[int], channels: Sequence[int], classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()
        )
        stages: list[nn.Module] = []
        channels_in = channels[0]
        for stage, (count, width) in enumerate(zip(blocks, channels, strict=True)):
            for block in range(count):
                stages.append(BasicBlock(channels_in, width, 2 if stage > 0 and block == 0 else 1))
                channels_in = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels_in, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.pool(self.stages(self.stem(images)))
        return self.classifier(features.flatten(1))


def merabishvili(classes: int = 10) -> ResNet:
    """Three stages of 3, 4 and 3 blocks with 66, 132 and 264 channels (merabishvili.txt, Figure 1)."""
    return ResNet(blocks=(3, 4, 3), channels=(66, 132, 264), classes=classes)
