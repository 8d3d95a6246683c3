"""A network that asserts a minimum image size, as torchvision's networks do."""

import torch

from tests.support.models.tiny import Tiny


class Picky(Tiny):
    """Accepts only images of at least 64 pixels per side."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[-1] >= 64, "too small"
        return super().forward(images)[:, : self.classes]
