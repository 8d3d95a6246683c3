"""An architecture outside the package, added with one entry in EXPERIMENTS."""

import torch
from torch import nn

from runner.config.recipe import SGD, Adam, Architecture, Augment, Constant, Cosine, Experiment, Recipe
from runner.models.pooling import AveragePool


class Tiny(nn.Module):
    """Two convolutions and a linear layer; by default without batch norm, so that ranks exchange only gradients."""

    def __init__(self, channels: int = 8, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.ReLU(),
            AveragePool(4),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32 * channels, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


class TinyInPrecision(Tiny):
    """Tiny that refuses images of another dtype than that of autocast."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        device = images.device.type
        expected = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        assert images.dtype == expected, f"{images.dtype} instead of {expected}"
        return super().forward(images)


def _experiment(lr: float = 0.05, **arguments: float) -> Experiment:
    recipe = Recipe(2, 60, SGD(lr), Constant(), Augment(crop_padding=4, flip="random"))
    return Experiment(Architecture("tests.support.models.tiny:Tiny", arguments), recipe, paper="tests")


EXPERIMENTS = {
    "tiny": _experiment(),
    "tiny-norm": _experiment(norm=True),
    "tiny-in-precision": Experiment(
        Architecture("tests.support.models.tiny:TinyInPrecision", {"norm": True}),
        Recipe(2, 60, SGD(0.05), Constant(), Augment(crop_padding=4, flip="random"), validation=50),
        paper="tests",
    ),
    "tiny-everything": Experiment(
        Architecture("tests.support.models.tiny:Tiny", {"norm": True, "dropout": 0.3}),
        Recipe(
            2,
            60,
            Adam(0.01, weight_decay=1e-3, decay_vectors=False),
            Cosine(warmup=0.2),
            Augment(
                random_resized_crop=0.3, flip="random", policy="trivial", contrast=0.3, erase=0.2, mixup=0.3, repeats=2
            ),
            ema=0.9,
            validation=80,
            layer_decay=0.8,
            patience=16,
            test_augmentation="flip",
        ),
        paper="tests",
    ),
    "tiny-diverging": _experiment(lr=1e30),
    "tiny-wide": Experiment(
        Architecture("tests.support.models.tiny:Tiny", {"channels": 32, "norm": True}),
        Recipe(2, 250, SGD(0.1), Cosine(), Augment(crop_padding=2, flip="random")),
        paper="tests",
    ),
}
