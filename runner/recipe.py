"""What an experiment is: an architecture, a recipe, and what was reported of it. Values, and nothing else.

Standard library only. Hardware never enters here: ranks, devices and precision belong to the launch.
"""

import importlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

Argument = int | float | bool | str


@dataclass(frozen=True)
class Architecture:
    """A model, by the name of the function or class that makes it.

    Naming it keeps an experiment a value: it can be listed without torch, written to `run.json`, and built
    again from there.
    """

    factory: str
    """`module:name` of a callable that returns an nn.Module mapping (N, 3, H, W) to logits (N, classes)."""
    arguments: dict[str, Argument] = field(default_factory=dict)
    """Keyword arguments of the factory; each can be overridden on the command line."""

    def build(self) -> Any:
        """Imports the factory and makes the model, with weights initialised from torch's generator."""
        module, _, name = self.factory.partition(":")
        return getattr(importlib.import_module(module), name)(**self.arguments)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum (torch.optim.SGD)."""

    lr: float
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum factor."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient."""


@dataclass(frozen=True)
class Adam:
    """Adam (torch.optim.Adam)."""

    lr: float
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient (not decoupled)."""


@dataclass(frozen=True)
class Constant:
    """The peak learning rate throughout, after a linear warm-up."""

    warmup: float = 0.0
    """Share of all steps over which the rate rises linearly to its peak."""


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the peak to `final` times the peak, after a linear warm-up."""

    warmup: float = 0.0
    """Share of all steps over which the rate rises linearly to its peak."""
    final: float = 0.0
    """Share of the peak that is left at the last step."""


@dataclass(frozen=True)
class Augment:
    """Random changes to training images, in this order; each a pure function of (seed, epoch, sample)."""

    crop_padding: int = 0
    """Pixels of padding on each side before a random crop back to the image's size; 0 for none."""
    crop_fill: Literal["zero", "reflect"] = "zero"
    """What the padding holds: black, or the image mirrored at its edge."""
    flip: Literal["none", "random", "alternating"] = "none"
    """Mirror left to right: with probability one half, or one half of the images in even epochs and the others in
    odd ones."""
    brightness: float = 0.0
    """Colour jitter, per image and in random order: multiply by a factor within 1 ± this."""
    contrast: float = 0.0
    """Likewise, the distance from the image's mean grey."""
    saturation: float = 0.0
    """Likewise, the distance from each pixel's grey."""
    hue: float = 0.0
    """Turn by a share of the colour circle within ± this, at most 0.5."""
    cutout: int = 0
    """Side in pixels of a square anywhere in the image that is set to the mean; 0 for none."""
    mixup: float = 0.0
    """Alpha of the Beta distribution that mixes each image of a batch, and its target, with another; 0 for none."""
    cutmix: float = 0.0
    """Alpha of the Beta distribution for the share of a box that each image takes from another; 0 for none. With
    mixup as well, a coin decides for each batch."""

    @property
    def colours(self) -> tuple[float, float, float, float]:
        """Strengths of the jitter."""
        return self.brightness, self.contrast, self.saturation, self.hue


@dataclass(frozen=True)
class Recipe:
    """How an architecture is trained."""

    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images per optimizer step, over all ranks."""
    optimizer: SGD | Adam
    """Optimizer and its settings."""
    schedule: Constant | Cosine = Constant()
    """Learning rate as a function of the step."""
    augment: Augment = Augment()
    """Random changes to training images."""
    normalize: Literal["dataset", "half", "imagenet"] = "dataset"
    """Mean and deviation subtracted and divided by: the training set's own per channel, 0.5 for all, or those that
    torchvision's ImageNet weights expect."""
    resize: int = 0
    """Side in pixels that images are brought to on the device, bilinear, for training and evaluation; 0 leaves them
    as they are."""
    drop_last: bool = True
    """Leave the last partial batch of an epoch out; every step then has the same shape."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""


@dataclass(frozen=True)
class Reported:
    """A figure that a paper gives, to be put beside ours."""

    accuracy: float
    """Top-1, in 0..1."""
    on: Literal["test", "validation"]
    """What it was measured on."""
    epoch: str
    """Which epoch: "last", "best" (chosen on the set it is measured on), or "best validation"."""
    source: str
    """File and place of the text."""


@dataclass(frozen=True)
class Experiment:
    """One row of a paper. `parameters` and `macs` are facts of the architecture; a test counts them."""

    architecture: Architecture
    recipe: Recipe
    paper: str
    """Short name of the paper, also the group of its runs."""
    reported: Reported | None = None
    parameters: int | None = None
    """Trainable parameters."""
    macs: int | None = None
    """Multiply-accumulates of convolutions and matrix products for one image of 32×32."""


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """The leaves in which two dataclasses differ, by dotted name: {"recipe.epochs": (10, 1)}."""
    before, after = dict(_leaves("", asdict(old))), dict(_leaves("", asdict(new)))
    names = sorted(before.keys() | after.keys())
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else key, part)
    else:
        yield prefix, value


KINDS = {kind.__name__: kind for kind in (SGD, Adam, Constant, Cosine)}


def to_json(value: Any) -> Any:
    """A recipe or part of one as plain dicts; where a field has a choice of classes, `kind` names the one."""
    if is_dataclass(value):
        named = {"kind": type(value).__name__} if type(value).__name__ in KINDS else {}
        return named | {part.name: to_json(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, dict):
        return {key: to_json(part) for key, part in value.items()}
    return list(value) if isinstance(value, tuple) else value


def recipe_from_json(value: dict[str, Any]) -> Recipe:
    """The inverse of `to_json` for a Recipe."""

    def chosen(part: dict[str, Any]) -> Any:
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in part.items() if key != "kind"}
        return KINDS[part["kind"]](**values)

    return Recipe(
        **{
            **value,
            "optimizer": chosen(value["optimizer"]),
            "schedule": chosen(value["schedule"]),
            "augment": Augment(**value["augment"]),
        }
    )
