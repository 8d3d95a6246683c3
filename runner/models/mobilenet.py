"""torchvision's MobileNetV2 with smaller strides for 32×32 images (Sandler et al. 2018, arXiv:1801.04381)."""

from torch import nn
from torchvision import models


def mobilenet_v2(dropout: float, classes: int = 10) -> nn.Module:
    """MobileNetV2 with stride 1 in the stem and in the first strided stage; the last feature map is 4×4.

    Maps images (N, 3, 32, 32) to logits (N, classes).
    """
    model = models.mobilenet_v2(num_classes=classes, dropout=dropout)
    stem, first_strided = model.features[0][0], model.features[2].conv[1][0]
    stem.stride = first_strided.stride = (1, 1)
    return model
