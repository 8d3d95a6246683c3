"""torchvision's residual networks with a stem for 32×32 images: a 3×3 convolution with stride 1, without pooling."""

from torch import nn
from torchvision import models


def resnet18(dropout: float = 0.0, classes: int = 10) -> nn.Module:
    """ResNet-18 (He et al. 2015, arXiv:1512.03385). Maps images (N, 3, 32, 32) to logits (N, classes)."""
    return _for_small_images(models.resnet18(num_classes=classes), dropout)


def resnet50(dropout: float = 0.0, classes: int = 10) -> nn.Module:
    """ResNet-50, bottleneck blocks. Maps images (N, 3, 32, 32) to logits (N, classes)."""
    return _for_small_images(models.resnet50(num_classes=classes), dropout)


def _for_small_images(model: models.ResNet, dropout: float) -> nn.Module:
    """Replaces the stem of a ResNet, and adds dropout before its last layer."""
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    if dropout:
        model.fc = nn.Sequential(nn.Dropout(dropout), model.fc)
    return model
