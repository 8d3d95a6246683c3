"""Two deep networks with few of their layers, because the time of an export grows with the layers.

Imports torch only to build a network, because `conftest.py` reads the names.
"""

from dataclasses import replace
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


def _shallow(like: str, factory: str, resize: int = 0) -> Experiment:
    experiment = experiments.get(like)
    recipe = replace(experiment.recipe, resize=resize)
    return replace(experiment, architecture=Architecture(f"{__name__}:{factory}"), recipe=recipe, paper="tests")


EXPERIMENTS = {
    "shallow-vit": _shallow("vit-tiny-4", "vit"),
    "shallow-mobilenetv2": _shallow("podeti-mobilenetv2", "mobilenet_v2", resize=48),
}
