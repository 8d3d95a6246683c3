"""Chooses the command that trains an experiment on the available hardware. All functions are pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from runner.config.recipe import Experiment, Recipe

ROOT = Path(__file__).parent.parent
QUICK_SECONDS = 60  # for training and evaluating one experiment on the CPU
STEP_COST = 3  # cost of a training step, in forward passes


@dataclass(frozen=True)
class Resources:
    """GPUs of this node, usable CPU cores, and whether the cores support bf16 natively."""

    gpus: int
    cores: int
    bf16: bool = False


@dataclass(frozen=True)
class TrainingPlan:
    """How one experiment is trained here.

    Attributes:
        name: name of the run, which states its length: `5-steps` or `3-epochs`.
        launcher: arguments of `accelerate launch`, without the program.
        options: arguments of `runner train NAME`, except data and runs.
        description: the plan, for the user.
    """

    name: str
    launcher: tuple[str, ...]
    options: tuple[str, ...]
    description: str


def plan_training(
    experiment: Experiment,
    resources: Resources,
    epochs: int | None,
    training_images: int,
    test_images: int,
    speeds: Mapping[str, float],
) -> TrainingPlan:
    """Plans the training of one experiment of the quickstart.

    With GPUs, trains the whole recipe on all of them. On the CPU, trains one epoch, or as many of its steps as fit
    into about a minute together with the evaluation, in the faster precision, and holds out no images: there is only
    one epoch to choose from.

    Args:
        experiment: what to train.
        resources: the available hardware.
        epochs: number of epochs; None for the rule above.
        training_images, test_images: number of images in the splits.
        speeds: measured images per second in training on the CPU, by precision; used for the rule above.
    """
    is_whole = epochs is not None or resources.gpus > 0
    recipe, changes = experiment.recipe, ""
    options: tuple[str, ...] = ()
    if not is_whole and recipe.validation:
        options, changes = ("--recipe.validation", "0"), f"; holds out no images, not {recipe.validation:,}"
        recipe = replace(recipe, validation=0)
    recipe, more_options, more_changes = _shrink_to_dataset(training_images, recipe)
    options, changes = (*options, *more_options, *_device_options(resources)), changes + more_changes
    experiment = replace(experiment, recipe=recipe)
    if is_whole:
        plan = _plan_of_epochs(experiment, resources, epochs or recipe.epochs, options)
        return replace(plan, description=plan.description + changes)
    precision = max(speeds, key=lambda name: speeds[name])
    images = QUICK_SECONDS * speeds[precision] - test_images / STEP_COST
    batches = training_images / recipe.batch_size
    steps_per_epoch = max(1, math.floor(batches) if recipe.drop_last else math.ceil(batches))
    steps = max(1, min(int(images / recipe.batch_size), steps_per_epoch))
    options = (*options[: options.index("--precision") + 1], precision)
    planned = "1 epoch" if steps == steps_per_epoch else f"{steps} of the {steps_per_epoch} steps of an epoch"
    return TrainingPlan(
        f"{steps}-steps",
        launcher_for(resources),
        ("--recipe.epochs", "1", "--max-steps", str(steps), *options),
        f"{planned}; the recipe has {recipe.epochs} epochs{changes}",
    )


def _shrink_to_dataset(training_images: int, recipe: Recipe) -> tuple[Recipe, tuple[str, ...], str]:
    """Reduces the validation split and the batch size for a dataset much smaller than CIFAR-10.

    Returns:
        The recipe, the options that change it, and a description of the changes.
    """
    options: tuple[str, ...] = ()
    changes = ""
    if 2 * recipe.validation > training_images:
        validation = training_images // 10
        options += ("--recipe.validation", str(validation))
        changes += f"; holds out {validation} images, not {recipe.validation:,}"
        recipe = replace(recipe, validation=validation)
    rest = training_images - recipe.validation
    if recipe.batch_size > rest:
        batch = 2 ** (rest.bit_length() - 1)
        options += ("--recipe.batch-size", str(batch))
        changes += f"; batches of {batch} images, not {recipe.batch_size}"
        recipe = replace(recipe, batch_size=batch)
    return recipe, options, changes


def _plan_of_epochs(
    experiment: Experiment, resources: Resources, epochs: int, options: tuple[str, ...]
) -> TrainingPlan:
    """Plans whole epochs, on the largest number of GPUs that divides the batch size; the other GPUs stay idle."""
    recipe = experiment.recipe
    gpus = max((n for n in range(1, resources.gpus + 1) if recipe.batch_size % n == 0), default=0)
    description = f"{epochs} of {recipe.epochs} epochs"
    if gpus < resources.gpus:
        description += f" on {gpus} of {resources.gpus} GPUs, which divide batches of {recipe.batch_size}"
    if epochs != recipe.epochs:
        options = ("--recipe.epochs", str(epochs), *options)
    return TrainingPlan(f"{epochs}-epochs", launcher_for(replace(resources, gpus=gpus)), options, description)


def launcher_for(resources: Resources) -> tuple[str, ...]:
    """Returns the arguments of `accelerate launch` that use all of the hardware."""
    if resources.gpus == 0:
        # One process that uses all cores, because several ranks would only share them.
        return ("--config_file", "launch/cpu.yaml", "--num_processes", "1")
    if resources.gpus == 1:
        return ("--config_file", "launch/one_process.yaml")
    return ("--config_file", "launch/one_node.yaml", "--num_processes", str(resources.gpus))


def training_command(launcher: tuple[str, ...], threads: int) -> list[str]:
    """Returns the arguments of Python that start `runner train` under `accelerate launch`, from any folder.

    The caller appends the arguments of `runner train`.

    Args:
        launcher: see `launcher_for`.
        threads: threads per process; accelerate warns if the number is not given.
    """
    absolute = [str(ROOT / word) if word.startswith("launch/") else word for word in launcher]
    # Quiet, so that accelerate prints no traceback after the runner's error message; with several ranks it still does.
    argv = ["-m", "accelerate.commands.launch", "--quiet", *absolute, "--num_cpu_threads_per_process", str(threads)]
    return [*argv, "-m", "runner", "train"]


def _device_options(resources: Resources) -> tuple[str, ...]:
    if resources.gpus:
        return ()  # the launcher's configuration sets bf16
    return ("--device", "cpu", "--precision", "bf16" if resources.bf16 else "fp32")
