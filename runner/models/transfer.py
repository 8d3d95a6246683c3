"""torchvision's ImageNet networks with a new last layer, for transfer learning.

A model is created with random weights, so that a finished run can be loaded without the ImageNet weights; training
calls `initialize` once to load them.
"""

import urllib.error
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torchvision import models

from runner.common.errors import UserError
from runner.common.files import sha256_of
from runner.models.pooling import AveragePool, GlobalMaxPool

WEIGHTS = {
    "mobilenet_v2": models.MobileNet_V2_Weights.IMAGENET1K_V1,
    "resnet18": models.ResNet18_Weights.IMAGENET1K_V1,
}


POOLINGS: dict[str, Callable[[], nn.Module]] = {"average": partial(AveragePool, 1), "max": GlobalMaxPool}


class Pretrained(nn.Module):
    """Features of a torchvision network, one global pooling, dropout, and a linear layer.

    Args:
        name: name of the network, a key of WEIGHTS.
        weights: file with torchvision's ImageNet weights; "" to use torch's cache, or download them.
        pooling: global pooling of the features.
        dropout: dropout probability before the last layer.
        frozen: freeze the features, including batch norm statistics, and train only the last layer.
        classes: number of classes.

    Its weights are random until `initialize` loads the pretrained ones. Maps images (N, 3, H, W), normalized with
    ImageNet's mean and standard deviation, to logits (N, classes).
    """

    def __init__(
        self,
        name: str,
        weights: str = "",
        pooling: Literal["average", "max"] = "average",
        dropout: float = 0.0,
        frozen: bool = False,
        classes: int = 10,
    ) -> None:
        super().__init__()
        for argument, value, known in (("name", name, WEIGHTS), ("pooling", pooling, POOLINGS)):
            if value not in known:
                raise UserError(f"--architecture.arguments.{argument} {value}: expected {' or '.join(known)}")
        self.name, self.weights, self.frozen = name, weights, frozen
        if name == "mobilenet_v2":
            network = models.mobilenet_v2()
            self.features, width = network.features, network.last_channel
        else:
            network = models.resnet18()
            self.features = nn.Sequential(*list(network.children())[:-2])
            width = network.fc.in_features
        self.pool = POOLINGS[pooling]()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, classes)
        self.features.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "Pretrained":
        """Sets the mode of the module; frozen features stay in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.features.eval()
        return self

    def initialize(self, first_images: Callable[[int], torch.Tensor]) -> None:
        """Loads the ImageNet weights of the features; the images are not used.

        Raises:
            UserError: the file is missing, has the wrong hash, or cannot be downloaded.
        """
        state = torch.load(weight_file(self.name, self.weights), map_location="cpu", weights_only=True)
        if self.name == "mobilenet_v2":
            features = {key.removeprefix("features."): value for key, value in state.items() if "features." in key}
        else:
            children = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
            features = {
                f"{children.index(child)}.{name}": state[f"{child}.{name}"]
                for child, _, name in (key.partition(".") for key in state)
                if child in children
            }
        self.features.load_state_dict(features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(self.pool(self.features(images)).flatten(1)))


def weight_file(name: str, file: str) -> Path:
    """Finds or downloads a network's ImageNet weights, and checks them against the SHA-256 in torchvision's file name.

    Args:
        name: name of the network, a key of WEIGHTS.
        file: path of the file; "" to use torch's cache, or download it.

    Raises:
        UserError: see `Pretrained.initialize`.
    """
    url = WEIGHTS[name].url
    file_name = url.rpartition("/")[2]
    expected = file_name.rpartition("-")[2].removesuffix(".pth")
    path = Path(file) if file else Path(torch.hub.get_dir()) / "checkpoints" / file_name
    remedy = f"download {url} elsewhere and pass it as --architecture.arguments.weights FILE"
    if file and not path.is_file():
        raise UserError(f"--architecture.arguments.weights {file}: expected a file, found none; {remedy}")
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=expected, progress=False)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise UserError(
                f"{name}: its ImageNet weights are not in torch's cache ({path}) and cannot be downloaded "
                f"({error}); {remedy}"
            ) from None
    actual = sha256_of(path)
    if not actual.startswith(expected):
        raise UserError(f"{path}: expected SHA-256 {expected}…, found {actual[:12]}…; {remedy}")
    return path
