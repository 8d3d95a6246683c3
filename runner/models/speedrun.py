"""A small network that reaches high accuracy on 32×32 images in few epochs.

It uses a frozen first layer that whitens 2×2 patches of the data (T. Page; K. Jordan, arXiv:2404.00498), batch norm
without scale, GELU, max pooling before the activation, and scaled-down logits.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from runner.models.pooling import GlobalMaxPool

PATCH = 2  # side of the whitened patches
WHITENING_IMAGES = 5_000  # images whose patches are analyzed


class ConvGroup(nn.Module):
    """Convolution, 2×2 max pooling, batch norm, GELU; convolution, batch norm, GELU.

    Maps (N, channels_in, H, W) to (N, channels, H // 2, W // 2).
    """

    def __init__(self, channels_in: int, channels: int, momentum: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = (nn.BatchNorm2d(channels, momentum=momentum) for _ in range(2))
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad_(False)
        # The first channels start as the identity, the others with random filters.
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight[: conv.in_channels])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class SpeedNet(nn.Module):
    """Whitening, three convolution groups, global max pooling, a linear layer.

    Maps images (N, 3, 32, 32) to logits (N, classes). Call `initialize` before training.
    """

    def __init__(
        self,
        first: int = 64,
        second: int = 256,
        third: int = 256,
        momentum: float = 0.4,
        scale: float = 1 / 9,
        classes: int = 10,
    ) -> None:
        super().__init__()
        whitened = 2 * 3 * PATCH**2
        self.whiten = nn.Conv2d(3, whitened, PATCH)
        self.whiten.weight.requires_grad_(False)
        assert self.whiten.bias is not None
        nn.init.zeros_(self.whiten.bias)
        self.groups = nn.Sequential(
            ConvGroup(whitened, first, momentum),
            ConvGroup(first, second, momentum),
            ConvGroup(second, third, momentum),
        )
        self.pool = GlobalMaxPool()
        self.classifier = nn.Linear(third, classes, bias=False)
        self.scale = scale

    @torch.no_grad()
    def initialize(self, first_images: Callable[[int], torch.Tensor]) -> None:
        """Sets the filters of the first layer to the eigenvectors of the covariance of image patches, scaled to unit
        variance, and their negatives.

        Args:
            first_images: returns the first n training images, (n, 3, H, W) float, normalized, without augmentation.
        """
        images = first_images(WHITENING_IMAGES)
        patches = F.unfold(images.float(), PATCH).transpose(1, 2).flatten(0, 1).double()
        covariance = (patches.T @ patches / len(patches)).cpu()  # on a GPU if the images are there
        values, vectors = torch.linalg.eigh(covariance)
        # The offset keeps components with almost no variance from amplifying noise.
        filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).float().view(-1, 3, PATCH, PATCH)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.groups(F.gelu(self.whiten(images)))
        return self.classifier(self.pool(x).flatten(1)) * self.scale
