"""Chooses the command that trains an experiment on the available hardware. Pure functions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from runner.config.recipe import Experiment, Recipe

ROOT = Path(__file__).parent.parent
QUICK_SECONDS = 90  # of training and evaluating one experiment on the CPU
BACKWARD_COST = 3  # of a training step relative to a forward pass


@dataclass(frozen=True)
class Resources:
    """GPUs of this node, usable CPU cores, and whether the cores support bf16 natively."""

    gpus: int
    cores: int
    bf16: bool = False


@dataclass(frozen=True)
class Job:
    """How one experiment is trained here.

    Attributes:
        name: name of the run: how long it is, `5-steps` or `3-epochs`.
        launcher: arguments of `accelerate launch`, without the program.
        options: arguments of `runner train NAME`, except data and runs.
        description: the plan, for the user.
    """

    name: str
    launcher: tuple[str, ...]
    options: tuple[str, ...]
    description: str


def quick_job(
    experiment: Experiment,
    resources: Resources,
    epochs: int | None,
    training_images: int,
    test_images: int,
    speeds: Mapping[str, float],
) -> Job:
    """Plans the training of one experiment of the quickstart.

    With GPUs, trains the whole recipe on all of them. On the CPU, trains one epoch, or as many of its steps as fit
    into about a minute and a half together with the evaluation, in the faster precision.

    Args:
        experiment: what to train.
        resources: the available hardware.
        epochs: number of epochs; None for the rule above.
        training_images, test_images: number of images in the splits.
        speeds: measured images per second in training on the CPU, by precision; used for the rule above.
    """
    recipe, options, changes = _fit_to(training_images, experiment.recipe)
    experiment, options = replace(experiment, recipe=recipe), (*options, *_device_options(resources))
    validation = recipe.validation
    if epochs is not None or resources.gpus:
        job = _job_of_epochs(experiment, resources, epochs or recipe.epochs, options)
        return replace(job, description=job.description + changes)
    precision = max(speeds, key=lambda name: speeds[name])
    images = QUICK_SECONDS * speeds[precision] - (validation + test_images) / BACKWARD_COST
    batches = (training_images - validation) / recipe.batch_size
    steps_per_epoch = max(1, math.floor(batches) if recipe.drop_last else math.ceil(batches))
    steps = max(1, min(int(images / recipe.batch_size), steps_per_epoch))
    options = (*options[: options.index("--precision") + 1], precision)
    planned = "1 epoch" if steps == steps_per_epoch else f"{steps} of the {steps_per_epoch} steps of an epoch"
    return Job(
        f"{steps}-steps",
        launcher_for(resources),
        ("--recipe.epochs", "1", "--max-steps", str(steps), *options),
        f"{planned}; the recipe has {recipe.epochs} epochs{changes}",
    )


def _fit_to(training_images: int, recipe: Recipe) -> tuple[Recipe, tuple[str, ...], str]:
    """Fits the images held out and the batch to a dataset much smaller than CIFAR-10.

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


def _job_of_epochs(experiment: Experiment, resources: Resources, epochs: int, options: tuple[str, ...]) -> Job:
    """Plans a number of whole epochs, on as many GPUs as the batch divides among; the others stay idle."""
    recipe = experiment.recipe
    gpus = max((n for n in range(1, resources.gpus + 1) if recipe.batch_size % n == 0), default=0)
    description = f"{epochs} of {recipe.epochs} epochs"
    if gpus < resources.gpus:
        description += f" on {gpus} of {resources.gpus} GPUs, which divide batches of {recipe.batch_size}"
    if epochs != recipe.epochs:
        options = ("--recipe.epochs", str(epochs), *options)
    return Job(f"{epochs}-epochs", launcher_for(replace(resources, gpus=gpus)), options, description)


def launcher_for(resources: Resources) -> tuple[str, ...]:
    """Returns the arguments of `accelerate launch` that use all of the hardware."""
    if resources.gpus == 0:
        # One process with all cores: on the CPU, ranks would only share them.
        return ("--config_file", "launch/cpu.yaml", "--num_processes", "1")
    if resources.gpus == 1:
        return ("--config_file", "launch/one_process.yaml")
    return ("--config_file", "launch/one_node.yaml", "--num_processes", str(resources.gpus))


def training_command(launcher: tuple[str, ...], threads: int) -> list[str]:
    """Returns Python's arguments that start `runner train` under `accelerate launch`, from any folder.

    The arguments of `runner train` follow.

    Args:
        launcher: see `launcher_for`.
        threads: threads per process; accelerate warns if the number is not given.
    """
    absolute = [str(ROOT / word) if word.startswith("launch/") else word for word in launcher]
    # Quiet, because accelerate's traceback would follow the runner's line; with several ranks it comes all the same.
    argv = ["-m", "accelerate.commands.launch", "--quiet", *absolute, "--num_cpu_threads_per_process", str(threads)]
    return [*argv, "-m", "runner", "train"]


def _device_options(resources: Resources) -> tuple[str, ...]:
    if resources.gpus:
        return ()  # the launcher's configuration sets bf16
    return ("--device", "cpu", "--precision", "bf16" if resources.bf16 else "fp32")
