"""The plain convolutional networks of ghasemi.txt: the listed `Net`, generalized to the depths of its table."""

from itertools import pairwise

import torch
from torch import nn

from runner.models.pooling import AveragePool

WIDTHS = (32, 64, 128, 256, 512)
HIDDEN = (512, 256, 128)


def repeats(convolutions: int) -> list[int]:
    """The number of convolutions of each width: distributed evenly, with the remainder at the largest widths.

    5 yields one of each width, the listed network; 8 yields 1, 1, 2, 2, 2, as in VGG-11.
    """
    minimum, remainder = divmod(convolutions, len(WIDTHS))
    return [minimum + (k >= len(WIDTHS) - remainder) for k in range(len(WIDTHS))]


class Net(nn.Module):
    """3×3 convolutions, each followed by ReLU and batch norm, 2×2 average pooling, and linear layers with ReLU.

    The first convolution of width 64 has stride 2, and dropout precedes the first one of width 512. Without batch
    norm, convolutions and hidden layers use the initialization of He et al., arXiv:1502.01852.

    Maps images (N, 3, H, W) to logits (N, classes).
    """

    def __init__(self, convolutions: int, linears: int, norm: bool, dropout: float, classes: int = 10) -> None:
        super().__init__()
        if not 1 <= linears <= len(HIDDEN) + 1 or convolutions < 1:
            raise ValueError(f"{convolutions}-{linears}: expected 1 or more convolutions and 1 to 4 linear layers")
        layers: list[nn.Module] = []
        channels_in = 3
        for width, count in zip(WIDTHS, repeats(convolutions), strict=True):
            if width == WIDTHS[-1] and dropout:
                layers.append(nn.Dropout(dropout))
            for k in range(count):
                stride = 2 if width == 64 and k == 0 else 1
                layers += [nn.Conv2d(channels_in, width, 3, stride, padding=1), nn.ReLU()]
                layers += [nn.BatchNorm2d(width)] if norm else []
                channels_in = width
        self.features = nn.Sequential(*layers)
        self.pool = AveragePool(2)
        sizes = [4 * WIDTHS[-1], *HIDDEN[: linears - 1]]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.classifier = nn.Sequential(*hidden, nn.Linear(sizes[-1], classes))
        if not norm:
            for module in [*self.features, *hidden]:
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    assert module.bias is not None
                    nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.pool(self.features(images)).flatten(1))
