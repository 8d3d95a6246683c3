"""torchvision's networks for ImageNet, to be trained on from its weights with a new last layer.

A model is built with random weights, so that a finished run can be loaded anywhere; `initialise`, which training
calls once, puts the ImageNet weights in.
"""

import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torchvision import models

from data_prep.console import UserError, sha256_of

WEIGHTS = {
    "mobilenet_v2": models.MobileNet_V2_Weights.IMAGENET1K_V1,
    "resnet18": models.ResNet18_Weights.IMAGENET1K_V1,
}


POOLINGS = {"average": nn.AdaptiveAvgPool2d, "max": nn.AdaptiveMaxPool2d}


class Pretrained(nn.Module):
    """Features of a torchvision network, one global pooling, dropout, and a linear layer.

    Args:
        name: of the network, a key of WEIGHTS.
        weights: a file with torchvision's ImageNet weights; "" for torch's cache, or else the download.
        pooling: of the features over the image.
        dropout: before the last layer.
        frozen: leave the features as they are, batch norm's statistics included, and train the last layer.

    Maps images (N, 3, H, W), normalised as ImageNet's, to logits (N, classes).
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
            whole = models.mobilenet_v2()
            self.features, width = whole.features, whole.last_channel
        else:
            whole = models.resnet18()
            self.features = nn.Sequential(*list(whole.children())[:-2])
            width = whole.fc.in_features
        self.pool = POOLINGS[pooling](1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, classes)
        self.features.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "Pretrained":
        """As nn.Module's; frozen features stay in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.features.eval()
        return self

    def initialise(self, first_images: Callable[[int], torch.Tensor]) -> None:
        """Loads the ImageNet weights of the features; no images are needed for it.

        Raises:
            UserError: the file is not there, is not the one that torchvision names, or cannot be downloaded.
        """
        state = torch.load(weight_file(self.name, self.weights), map_location="cpu", weights_only=True)
        if self.name == "mobilenet_v2":
            wanted = {key.removeprefix("features."): value for key, value in state.items() if "features." in key}
        else:
            places = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
            wanted = {
                f"{places.index(first)}.{rest}": state[f"{first}.{rest}"]
                for first, _, rest in (key.partition(".") for key in state)
                if first in places
            }
        self.features.load_state_dict(wanted)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(self.pool(self.features(images)).flatten(1)))


def weight_file(name: str, given: str) -> Path:
    """The file with a network's ImageNet weights, checked against the SHA-256 in the name that torchvision gives
    it.

    Raises:
        UserError: see Pretrained.initialise.
    """
    url = WEIGHTS[name].url
    file_name = url.rpartition("/")[2]
    expected = file_name.rpartition("-")[2].removesuffix(".pth")
    path = Path(given) if given else Path(torch.hub.get_dir()) / "checkpoints" / file_name
    remedy = f"download {url} elsewhere and give it by --architecture.arguments.weights FILE"
    if given and not path.is_file():
        raise UserError(f"--architecture.arguments.weights {given}: expected a file, found none; {remedy}")
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=expected, progress=False)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise UserError(
                f"{name}: its ImageNet weights are not in torch's cache ({path}) and cannot be downloaded "
                f"({error}); {remedy}"
            ) from None
    found = sha256_of(path)
    if not found.startswith(expected):
        raise UserError(f"{path}: expected SHA-256 {expected}…, found {found[:12]}…; {remedy}")
    return path
