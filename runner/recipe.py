"""What an experiment is: an architecture, a recipe, and what was reported of it. Values, and nothing else.

Standard library only. Hardware never enters here: ranks, devices and precision belong to the launch.
"""

import importlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args

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
class AdamW:
    """Adam with decoupled weight decay (torch.optim.AdamW)."""

    lr: float
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments."""
    weight_decay: float = 0.01
    """Share of each weight, times the learning rate, that is taken off it in a step."""
    decay_vectors: bool = False
    """Apply weight decay to biases and normalisation as well, not to matrices and filters alone."""


@dataclass(frozen=True)
class RMSprop:
    """RMSprop (torch.optim.RMSprop)."""

    lr: float
    """Peak learning rate."""
    alpha: float = 0.99
    """Decay rate of the mean square."""
    momentum: float = 0.0
    """Momentum factor."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient."""


@dataclass(frozen=True)
class Muon:
    """Muon for filters and matrices, SGD with Nesterov momentum for all else and for the last layer.

    K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """

    lr: float
    """Peak learning rate of filters and matrices; an update has singular values near 1."""
    momentum: float = 0.95
    """Momentum of filters and matrices (Nesterov)."""
    weight_decay: float = 0.0
    """Share of each filter or matrix, times the learning rate, that is taken off it in a step."""
    unit_rows: bool = False
    """Keep each filter bank's norm at the square root of its rows, where batch norm follows and only the direction
    counts."""
    other_lr: float = 0.05
    """Peak learning rate of biases, normalisation and the last layer."""
    other_momentum: float = 0.9
    """Momentum of these."""
    other_weight_decay: float = 0.0
    """L2 penalty added to the gradient of these."""


@dataclass(frozen=True)
class Constant:
    """The peak learning rate throughout, after a linear warm-up."""

    warmup: float = 0.0
    """Share of all steps over which the rate rises linearly to its peak."""


@dataclass(frozen=True)
class Step:
    """The peak, multiplied by `factor` at each milestone, after a linear warm-up."""

    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of all steps at which the rate falls."""
    factor: float = 0.1
    """What it is multiplied by."""
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
class Linear:
    """A straight line from the peak to `final` times the peak, after a linear warm-up."""

    warmup: float = 0.0
    """Share of all steps over which the rate rises linearly to its peak."""
    final: float = 0.0
    """Share of the peak that is left at the last step."""


@dataclass(frozen=True)
class OneCycle:
    """Half a cosine from `initial` times the peak up to it, then half a cosine down to `final` times the peak.

    L. Smith and N. Topin, arXiv:1708.07120, in the form of torch.optim.lr_scheduler.OneCycleLR.
    """

    warmup: float = 0.3
    """Share of all steps over which the rate rises."""
    initial: float = 0.04
    """Share of the peak at the first step."""
    final: float = 4e-6
    """Share of the peak at the last step."""


Optimizer = SGD | Adam | AdamW | RMSprop | Muon
Schedule = Constant | Step | Cosine | Linear | OneCycle


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
    optimizer: Optimizer
    """Optimizer and its settings."""
    schedule: Schedule = Constant()
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
    validation: int = 0
    """Training images held out, always the same ones; the best epoch is chosen on them and never on the test
    set."""
    clip_gradient: float = 0.0
    """Largest norm of the whole gradient; 0 for no limit."""
    accumulate: int = 1
    """Passes that make up one optimizer step, for a batch that does not fit; the gradient is the whole batch's, but
    batch norm sees each part by itself."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of the weights, which is then what is evaluated and kept; 0
    for none."""
    sync_batch_norm: bool = False
    """Batch norm over the batches of all ranks together, and not over each rank's own."""
    channels_last: bool = True
    """Weights in channels_last memory, the layout that convolutions want on GPUs and on the CPU."""
    compile: bool = False
    """Compile the forward and backward pass by torch.compile."""
    test_augmentation: Literal["none", "flip", "flip-shift"] = "none"
    """Score every test image also as the mean over itself and its mirror image, or over both of these shifted by a
    pixel to two sides as well; reported apart."""
    teacher_weight: float = 0.9
    """With --teacher: share of the loss that is the distance from the teacher; the rest is the labels'."""
    teacher_temperature: float = 4.0
    """With --teacher: what both models' logits are divided by before they are compared."""
    prune: float = 0.0
    """Share of all convolution and linear weights, the smallest of all, that is 0 from the first step on; for
    fine-tuning a run given by --start-from."""


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
    """Multiply-accumulates of convolutions and matrix products for one image of the size that the recipe gives."""


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


KINDS = {kind.__name__: kind for kind in (*get_args(Optimizer), *get_args(Schedule))}


# Where a number, or each number of several, must lie, by its dotted name: intervals as mathematics writes them.
LIMITS: dict[str, str] = {
    "epochs": "[1, inf)",
    "batch_size": "[1, inf)",
    "optimizer.lr": "(0, inf)",
    "optimizer.momentum": "[0, 1)",
    "optimizer.weight_decay": "[0, inf)",
    "optimizer.betas": "[0, 1)",
    "optimizer.alpha": "[0, 1)",
    "optimizer.other_lr": "(0, inf)",
    "optimizer.other_momentum": "[0, 1)",
    "optimizer.other_weight_decay": "[0, inf)",
    "schedule.warmup": "[0, 1]",
    "schedule.milestones": "[0, 1]",
    "schedule.factor": "[0, inf)",
    "schedule.initial": "[0, 1]",
    "schedule.final": "[0, 1]",
    "augment.crop_padding": "[0, inf)",
    "augment.brightness": "[0, inf)",
    "augment.contrast": "[0, inf)",
    "augment.saturation": "[0, inf)",
    "augment.hue": "[0, 0.5]",
    "augment.cutout": "[0, inf)",
    "augment.mixup": "[0, inf)",
    "augment.cutmix": "[0, inf)",
    "resize": "[0, inf)",
    "label_smoothing": "[0, 1]",
    "validation": "[0, inf)",
    "clip_gradient": "[0, inf)",
    "accumulate": "[1, inf)",
    "ema": "[0, 1)",
    "teacher_weight": "[0, 1]",
    "teacher_temperature": "(0, inf)",
    "prune": "[0, 1)",
}


def first_mistake(recipe: Recipe) -> str | None:
    """A line about the first number of a recipe that lies outside its limits, or about two settings that do not
    go together; None where all is well."""
    for name, value in _leaves("", asdict(recipe)):
        if name in LIMITS and not all(
            _within(LIMITS[name], v) for v in (value if isinstance(value, tuple) else [value])
        ):
            return f"--recipe.{name.replace('_', '-')} {value}: expected a number in {LIMITS[name]}"
    optimizer = recipe.optimizer
    if isinstance(optimizer, SGD) and optimizer.nesterov and not optimizer.momentum:
        return "--recipe.optimizer.nesterov: expected --recipe.optimizer.momentum above 0 with it"
    if recipe.ema and recipe.prune:
        return "--recipe.ema and --recipe.prune: expected one of them; torch cannot copy a model that it prunes"
    return None


def _within(interval: str, value: float) -> bool:
    least, most = map(float, interval[1:-1].split(","))
    above = value >= least if interval[0] == "[" else value > least
    return above and (value <= most if interval[-1] == "]" else value < most)


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
