"""AlexNet for 32×32 images (Krizhevsky et al. 2012, with torchvision's channel counts)."""

import torch
from torch import nn

from runner.common.errors import UserError


class AlexNet(nn.Module):
    """Five 3×3 convolutions, the first with stride 2, 2×2 pooling, and three linear layers.

    The last feature map is 2×2 for 32×32 images. Maps images (N, 3, *image_size) to logits (N, classes).
    """

    def __init__(self, dropout: float, classes: int = 10, image_size: tuple[int, int] = (32, 32)) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        height, width = ((side + 1) // 2 // 2 // 2 // 2 for side in image_size)
        if not height * width:
            raise UserError(f"AlexNet: expected images of at least 15×15, found {image_size[0]}×{image_size[1]}")
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(256 * height * width, 4096), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(4096, 4096), nn.ReLU(),
            nn.Linear(4096, classes),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images).flatten(1))
