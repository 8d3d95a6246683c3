"""Experiments as plain values: an architecture, a recipe, and the reported accuracy. Does not import torch.

The type of each number states its limits. Recipes are independent of hardware: ranks, devices and precision belong
to the launch.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
import tyro
from msgspec import Meta

from runner.common.errors import UserError

LARGEST = sys.float_info.max  # excludes infinity
Argument = int | float | bool | str
Count = Annotated[int, Meta(ge=1, le=10**9)]
Size = Annotated[int, Meta(ge=0, le=10**9)]
Positive = Annotated[float, Meta(gt=0, le=LARGEST)]
NonNegative = Annotated[float, Meta(ge=0, le=LARGEST)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Decay = Annotated[float, Meta(ge=0, lt=1)]

# Short names of the options that are overridden most often.
EPOCHS, BATCH_SIZE = tyro.conf.arg(aliases=["--epochs"]), tyro.conf.arg(aliases=["--batch-size"])
LR, WEIGHT_DECAY = tyro.conf.arg(aliases=["--lr"]), tyro.conf.arg(aliases=["--weight-decay"])


class Choice(msgspec.Struct, frozen=True, tag_field="kind", tag=True):
    """Base class of the alternatives for a field; in JSON, `kind` identifies the class."""


@dataclass(frozen=True)
class Architecture:
    """A model, specified by the name of the function or class that creates it.

    Because of the name, an experiment is a plain value: it can be listed without torch, written to `run.json`, and
    rebuilt from that file.
    """

    factory: str
    """`module:name` of a callable that returns an nn.Module mapping (N, 3, H, W) to logits (N, classes). If it has
    keyword arguments `classes` and `image_size`, they are set to those of the dataset."""
    arguments: dict[str, Argument] = field(default_factory=dict)
    """Keyword arguments of the factory; each can be overridden on the command line."""

    def build(self, classes: int = 10, image_size: tuple[int, int] = (32, 32)) -> Any:
        """Imports the factory and creates the model, initialized with torch's random generator.

        Args:
            classes: number of classes; by default that of CIFAR-10.
            image_size: height and width of the images after the recipe's resize; by default those of CIFAR-10.

        Raises:
            UserError: the factory does not exist, or rejects its arguments.
        """
        module, _, name = self.factory.partition(":")
        try:
            factory = getattr(importlib.import_module(module), name)
            of_dataset = {"classes": classes, "image_size": image_size}
            accepted = inspect.signature(factory).parameters.keys() & of_dataset.keys()
        except (Exception, SystemExit) as error:  # importing a user's module may raise anything
            raise UserError(f"--architecture.factory {self.factory}: expected module:callable ({error})") from None
        try:
            return factory(**{name: of_dataset[name] for name in accepted} | self.arguments)
        except UserError:
            raise
        except Exception as error:  # includes checks in torchvision, which raise AssertionError
            raise UserError(f"--architecture.arguments {self.arguments}: {error!r}") from None


class SGD(Choice, frozen=True):
    """Stochastic gradient descent with momentum (torch.optim.SGD)."""

    lr: Annotated[Positive, LR]
    """Peak learning rate."""
    momentum: Decay = 0.9
    """Momentum factor."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: Annotated[NonNegative, WEIGHT_DECAY] = 0.0
    """L2 penalty added to the gradient."""
    decay_vectors: bool = True
    """Apply weight decay to biases and normalization layers too, not only to matrices and filters."""


class Adam(Choice, frozen=True):
    """Adam (torch.optim.Adam)."""

    lr: Annotated[Positive, LR]
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the two moments."""
    weight_decay: Annotated[NonNegative, WEIGHT_DECAY] = 0.0
    """L2 penalty added to the gradient (not decoupled)."""
    decay_vectors: bool = True
    """Apply weight decay to biases and normalization layers too, not only to matrices and filters."""


class AdamW(Choice, frozen=True):
    """Adam with decoupled weight decay (torch.optim.AdamW)."""

    lr: Annotated[Positive, LR]
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the two moments."""
    weight_decay: Annotated[NonNegative, WEIGHT_DECAY] = 0.01
    """Decoupled weight decay: each step multiplies the weights by 1 - learning rate × weight decay."""
    decay_vectors: bool = False
    """Apply weight decay to biases and normalization layers too, not only to matrices and filters."""


class RMSprop(Choice, frozen=True):
    """RMSprop (torch.optim.RMSprop)."""

    lr: Annotated[Positive, LR]
    """Peak learning rate."""
    alpha: Decay = 0.99
    """Decay rate of the mean square."""
    momentum: Decay = 0.0
    """Momentum factor."""
    weight_decay: Annotated[NonNegative, WEIGHT_DECAY] = 0.0
    """L2 penalty added to the gradient."""
    decay_vectors: bool = True
    """Apply weight decay to biases and normalization layers too, not only to matrices and filters."""


class Muon(Choice, frozen=True):
    """Muon for filters and matrices, SGD with Nesterov momentum for the last layer and all other parameters.

    K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """

    lr: Annotated[Positive, LR]
    """Peak learning rate of filters and matrices; the singular values of an update are near 1."""
    momentum: Decay = 0.95
    """Momentum of filters and matrices (Nesterov)."""
    weight_decay: Annotated[NonNegative, WEIGHT_DECAY] = 0.0
    """Decoupled weight decay of filters and matrices: each step multiplies them by 1 - learning rate × weight decay."""
    iterations: Count = 5
    """Newton-Schulz iterations that orthogonalize an update."""
    unit_rows: bool = False
    """Scale each weight tensor to a norm equal to the square root of its number of rows; for layers followed by batch
    norm, where only the direction of the weights matters."""
    other_lr: Positive = 0.05
    """Peak learning rate of SGD, which updates biases, normalization layers and the last layer."""
    other_momentum: Decay = 0.9
    """Nesterov momentum of SGD."""
    other_weight_decay: NonNegative = 0.0
    """L2 penalty of SGD, added to the gradient."""


class Constant(Choice, frozen=True):
    """Constant learning rate after a linear warmup."""

    warmup: Fraction = 0.0
    """Fraction of all steps over which the learning rate rises linearly to its peak."""


class Step(Choice, frozen=True):
    """Learning rate multiplied by `factor` at each milestone, after a linear warmup."""

    milestones: tuple[Fraction, ...] = (0.5, 0.75)
    """Fractions of all steps at which the learning rate drops."""
    factor: NonNegative = 0.1
    """Factor by which the learning rate is multiplied at each milestone."""
    warmup: Fraction = 0.0
    """Fraction of all steps over which the learning rate rises linearly to its peak."""


class Cosine(Choice, frozen=True):
    """Cosine decay to `final` times the peak, after a linear warmup."""

    warmup: Fraction = 0.0
    """Fraction of all steps over which the learning rate rises linearly to its peak."""
    final: Fraction = 0.0
    """Learning rate that the schedule reaches after the last step, as a fraction of the peak."""


class Linear(Choice, frozen=True):
    """Linear decay to `final` times the peak, after a linear warmup."""

    warmup: Fraction = 0.0
    """Fraction of all steps over which the learning rate rises linearly to its peak."""
    final: Fraction = 0.0
    """Learning rate that the schedule reaches after the last step, as a fraction of the peak."""


class OneCycle(Choice, frozen=True):
    """Cosine increase from `initial` times the peak, then cosine decay to `final` times the peak.

    L. Smith and N. Topin, arXiv:1708.07120, as in torch.optim.lr_scheduler.OneCycleLR.
    """

    warmup: Fraction = 0.3
    """Fraction of all steps over which the learning rate rises."""
    initial: Fraction = 0.04
    """Learning rate at the first step, as a fraction of the peak."""
    final: Fraction = 4e-6
    """Learning rate that the schedule reaches after the last step, as a fraction of the peak."""


CompileMode = Literal["none", "default", "reduce-overhead", "max-autotune"]
# These have `lr`, `weight_decay` and `decay_vectors`, and any of their parameters may form a group.
ElementwiseOptimizer = SGD | Adam | AdamW | RMSprop
Optimizer = ElementwiseOptimizer | Muon
Schedule = Constant | Step | Cosine | Linear | OneCycle


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random augmentations of training images, applied in this order; each is a function of (seed, epoch, sample)."""

    random_resized_crop: Fraction = 0.0
    """Smallest fraction of the image's area in a random crop with sides in a ratio of 3/4 to 4/3, which is resized to
    the model's size, bilinear without antialiasing; 0 for none."""
    crop_padding: Size = 0
    """Pixels of padding on each side before a random crop back to the image's size; 0 for none."""
    crop_fill: Literal["zero", "reflect"] = "zero"
    """Content of the padding: black, or the image reflected at its edges."""
    flip: Literal["none", "random", "alternating"] = "none"
    """Horizontal flip: with probability 0.5, or half of the images in even epochs and the other half in odd ones."""
    policy: Literal["none", "rand", "trivial"] = "none"
    """RandAugment, or TrivialAugmentWide: random operations per image, with torchvision's magnitudes."""
    rand_ops: Annotated[int, Meta(ge=1, le=100)] = 2
    """RandAugment: number of operations applied to each image, one after another."""
    rand_magnitude: Annotated[int, Meta(ge=0, le=30)] = 9
    """RandAugment: magnitude of all operations, 0 to 30."""
    brightness: NonNegative = 0.0
    """Color jitter, per image and in random order: maximum deviation of the brightness factor from 1."""
    contrast: NonNegative = 0.0
    """Color jitter: maximum deviation from 1 of the factor that scales the difference from the image's mean gray."""
    saturation: NonNegative = 0.0
    """Color jitter: maximum deviation from 1 of the factor that scales the difference from each pixel's gray."""
    hue: Annotated[float, Meta(ge=0, le=0.5)] = 0.0
    """Color jitter: maximum shift of the hue in either direction, as a fraction of the color circle, at most 0.5."""
    cutout: Size = 0
    """Side in pixels of a random square that is set to the mean; 0 for none."""
    erase: Fraction = 0.0
    """Probability with which a random rectangle of an image is set to the mean (random erasing)."""
    mixup: NonNegative = 0.0
    """Alpha of the Beta distribution that weights each image and its target against another image; 0 for none."""
    cutmix: NonNegative = 0.0
    """Alpha of the Beta distribution of the area of the box pasted from another image; 0 for none. With mixup
    enabled too, each batch uses one of them at random."""
    repeats: Count = 1
    """Repeated augmentation: each epoch shows a random 1/N of the images N times, each time augmented differently, in
    the same batch; the number of steps stays. 1 for none."""

    @property
    def jitter(self) -> tuple[float, float, float, float]:
        """Strengths of color jitter: brightness, contrast, saturation, hue."""
        return self.brightness, self.contrast, self.saturation, self.hue


@dataclass(frozen=True)
class Recipe:
    """All settings for training an architecture."""

    epochs: Annotated[Count, EPOCHS]
    """Passes over the training images."""
    batch_size: Annotated[Count, BATCH_SIZE]
    """Images per optimizer step, over all ranks."""
    optimizer: Optimizer
    """Optimizer and its settings."""
    schedule: Schedule = Constant()
    """Learning rate schedule."""
    augment: Augment = Augment()
    """Random augmentation of training images."""
    normalize: Literal["dataset", "half", "imagenet"] = "dataset"
    """Mean and standard deviation of the normalization: those of the training set, 0.5 for every channel, or those
    expected by torchvision's ImageNet weights."""
    resize: Size = 0
    """Side, in pixels, to which images are resized on the device with bilinear interpolation, for training and
    evaluation; 0 keeps their size."""
    drop_last: bool = True
    """Drop the last partial batch of an epoch, so that all steps have the same shape."""
    label_smoothing: Fraction = 0.0
    """Fraction of the target distributed evenly over all classes."""
    validation: Size = 0
    """Number of training images held out, the same for every run; the best epoch is selected on them, never on the
    test set."""
    patience: Size = 0
    """Early stopping: end after this many epochs without a better validation accuracy; 0 for none. Weights and results
    are those of the best epoch, even if training does not end early."""
    layer_decay: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Factor of the learning rate from each layer to the one before it, for fine-tuning; 1 for the same in all."""
    clip_gradient: NonNegative = 0.0
    """Maximum norm of the gradient of all parameters; 0 for no limit."""
    accumulate: Count = 1
    """Micro-batches per optimizer step, for batches that do not fit in memory; gradients equal those of the full batch,
    but batch norm statistics are computed per micro-batch."""
    ema: Decay = 0.0
    """Decay per step of an exponential moving average of the weights. The average is evaluated and saved instead of
    the weights; 0 for none."""
    sync_batch_norm: bool = False
    """Compute batch norm statistics over all ranks instead of per rank."""
    channels_last: bool = True
    """Store weights in the channels_last memory format, which is faster for convolutions on GPUs and CPUs."""
    compile: CompileMode = "none"
    """Compile the forward and backward pass with torch.compile in this mode; reduce-overhead replays CUDA graphs."""
    test_augmentation: Literal["none", "flip", "flip-shift"] = "none"
    """Also evaluate with logits averaged over the image and its mirror image, or over both and their shifts by one
    pixel in two directions; reported separately."""
    teacher_weight: Fraction = 0.9
    """With --teacher: weight of the distillation loss; the loss on the labels has the remaining weight."""
    teacher_temperature: Positive = 4.0
    """With --teacher: temperature by which both models' logits are divided."""
    prune: Decay = 0.0
    """Fraction of the convolution and linear weights to prune: those with the smallest magnitude are set to 0 before
    the first step; for fine-tuning a run with --start-from."""


@dataclass(frozen=True)
class Reported:
    """The accuracy reported in a paper, for comparison."""

    accuracy: Fraction
    """Top-1 accuracy, in 0..1."""
    on: Literal["test", "validation"]
    """Split on which the accuracy was measured."""
    epoch: str
    """Epoch of the accuracy: "last", "best" (selected on the same split), or "best validation"."""
    source: str
    """File and section of the paper's text."""


@dataclass(frozen=True)
class Experiment:
    """An experiment from a paper. `parameters` and `macs` follow from the architecture; a test checks them."""

    architecture: Architecture
    recipe: Recipe
    paper: str
    """Short name of the paper, which is also the group of its runs."""
    reported: Reported | None = None
    parameters: int | None = None
    """Trainable parameters."""
    macs: int | None = None
    """Multiply-accumulates of convolutions and matrix products for one image of the recipe's size."""


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the leaves in which two values differ, by dotted name, such as {"recipe.epochs": (10, 1)}."""
    before, after = flatten(old), flatten(new)
    names = sorted(before.keys() | after.keys())
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def flatten(value: Any) -> dict[str, Any]:
    """Returns the leaves of a dataclass, struct or nested dict, by dotted name."""
    return dict(_leaves("", msgspec.to_builtins(value)))


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else key, child)
    else:
        yield prefix, value


def check_recipe(recipe: Recipe) -> None:
    """Raises UserError if settings of a recipe are incompatible with each other."""
    optimizer = recipe.optimizer
    if isinstance(optimizer, SGD) and optimizer.nesterov and not optimizer.momentum:
        raise UserError("--recipe.optimizer.nesterov: expected --recipe.optimizer.momentum above 0")
    if isinstance(optimizer, Muon) and optimizer.unit_rows and optimizer.weight_decay:
        raise UserError(
            f"--recipe.optimizer.weight-decay {optimizer.weight_decay}: expected 0 with "
            "--recipe.optimizer.unit-rows, which sets the norm of the weights"
        )
    if isinstance(optimizer, Muon) and recipe.layer_decay != 1:
        raise UserError(
            f"--recipe.layer-decay {recipe.layer_decay}: expected 1 with Muon, whose layers share a step size"
        )
    if recipe.patience and not recipe.validation:
        raise UserError(
            f"--recipe.patience {recipe.patience}: expected --recipe.validation above 0, found 0; early stopping never "
            "looks at test images"
        )
    if recipe.patience and recipe.prune:
        raise UserError("--recipe.patience and --recipe.prune: expected one of them; torch cannot copy a pruned model")
    if recipe.ema and recipe.prune:
        raise UserError("--recipe.ema and --recipe.prune: expected one of them; torch cannot copy a pruned model")
    augment, default = recipe.augment, Augment()
    for name in ("rand_ops", "rand_magnitude"):
        value = getattr(augment, name)
        if augment.policy != "rand" and value != getattr(default, name):
            option = f"--recipe.augment.{name.replace('_', '-')}"
            raise UserError(f"{option} {value}: expected with --recipe.augment.policy rand, found {augment.policy}")
    if augment.random_resized_crop and augment.crop_padding:
        raise UserError(
            f"--recipe.augment.random-resized-crop {augment.random_resized_crop}: expected with "
            f"--recipe.augment.crop-padding 0, found {augment.crop_padding}; only one of them can crop"
        )
    if augment.repeats > recipe.batch_size:
        raise UserError(
            f"--recipe.augment.repeats {augment.repeats}: expected at most the batch size of {recipe.batch_size}"
        )


def to_json(value: Any) -> Any:
    """Converts a dataclass or struct to the plain dicts and lists of its JSON form."""
    return msgspec.json.decode(msgspec.json.encode(value))
