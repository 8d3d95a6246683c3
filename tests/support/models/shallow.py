"""Deep networks with few of their layers, because the time of an export grows with the layers.

Imports torch only to build a network, because `conftest.py` reads the names.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from runner import experiments
from runner.config.recipe import Architecture, Experiment

if TYPE_CHECKING:
    from torch import nn


def vit() -> "nn.Module":
    """Two of the twelve layers of vit-tiny-4."""
    from torchvision import models

    return models.VisionTransformer(
        image_size=32, patch_size=4, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=10
    )


def mobilenet_v2() -> "nn.Module":
    """MobileNetV2 with four blocks: one without expansion, two with a stride, and one with a shortcut."""
    from torchvision import models

    blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 320, 1, 2]]  # expansion, channels, number and first stride
    return models.mobilenet_v2(num_classes=10, inverted_residual_setting=blocks)


def resnet() -> "nn.Module":
    """A ResNet with one block per stage."""
    from torchvision import models

    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def efficientnet() -> "nn.Module":
    """EfficientNet with three blocks, which have SiLU and squeeze-and-excitation; the last has a shortcut."""
    from torchvision import models

    block = partial(models.efficientnet.MBConvConfig, kernel=3, width_mult=1.0, depth_mult=1.0)
    blocks = [block(1, stride=1, input_channels=32, out_channels=64, num_layers=1),
              block(6, stride=2, input_channels=64, out_channels=192, num_layers=2)]  # fmt: skip
    return models.EfficientNet(blocks, dropout=0.2, num_classes=10)


def _shallow(like: str, factory: str, resize: int = 0) -> Experiment:
    recipe = replace(experiments.get(like).recipe, resize=resize)
    return Experiment(Architecture(f"{__name__}:{factory}"), recipe, paper="tests")


EXPERIMENTS = {
    "shallow-vit": _shallow("vit-tiny-4", "vit"),
    "shallow-mobilenetv2": _shallow("podeti-mobilenetv2", "mobilenet_v2", resize=48),
    "shallow-resnet": _shallow("podeti-resnet18", "resnet"),
    "shallow-efficientnet": _shallow("efficientnet-b0", "efficientnet"),
}
