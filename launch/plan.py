"""Which command trains an experiment on the hardware that is there: pure functions, from values to values."""

from dataclasses import dataclass, replace
from pathlib import Path

from runner.recipe import Experiment

ROOT = Path(__file__).parent.parent
# Multiply-accumulates, times images, that a quick look may cost for each CPU core: about a minute.
QUICK_MACS_PER_CORE = 1.2e12
FP32_SHARE = 0.4  # of the speed, where the cores do not multiply bf16
# Depthwise convolutions are bound by memory: they take twice as long as their MACs tell and more.
DEPTHWISE = ("mobilenet", "efficientnet")
DEPTHWISE_COST = 2


@dataclass(frozen=True)
class Hardware:
    """GPUs of this node, usable CPU cores, and whether these multiply bf16 in hardware."""

    gpus: int
    cores: int
    bf16: bool = False


@dataclass(frozen=True)
class Job:
    """How one experiment is trained here.

    Attributes:
        name: of the run; tells how much of the recipe is done.
        launcher: arguments of `accelerate launch`, without the program.
        options: arguments of `runner train NAME`, without data and runs.
        told: the plan in words.
    """

    name: str
    launcher: tuple[str, ...]
    options: tuple[str, ...]
    told: str


def quick_job(experiment: Experiment, hardware: Hardware, epochs: int | None, training_images: int) -> Job:
    """Plans one experiment of the quickstart.

    On GPUs: all of them, and the whole recipe. On the CPU: one epoch, or as many steps of it as fit into
    about a minute, judged by the architecture's MACs.

    Args:
        experiment: what to train.
        hardware: what there is.
        epochs: the user's wish, which wins; None for the rule above.
        training_images: in the dataset.
    """
    recipe = experiment.recipe
    # Every rank has the same share of a batch; GPUs that it does not divide among stay idle.
    gpus = max((n for n in range(1, hardware.gpus + 1) if recipe.batch_size % n == 0), default=0)
    launcher = launcher_for(replace(hardware, gpus=gpus))
    # A set much smaller than CIFAR-10 has not as many images to hold out as the recipe says.
    held_out, options = recipe.validation, _on(hardware)
    if 2 * held_out > training_images:
        held_out = training_images // 10
        options = ("--recipe.validation", str(held_out), *options)
    if epochs is not None or hardware.gpus:
        count = epochs or recipe.epochs
        changed = ("--recipe.epochs", str(count)) if count != recipe.epochs else ()
        told = f"{count} of {recipe.epochs} epochs"
        if gpus < hardware.gpus:
            told += f" on {gpus} of {hardware.gpus} GPUs, among which batches of {recipe.batch_size} divide"
        return Job(f"{count}-epochs", launcher, changed + options, told)
    whole = max(1, (training_images - held_out) // recipe.batch_size)
    named = f"{experiment.architecture.factory} {experiment.architecture.arguments}"
    depthwise = any(name in named for name in DEPTHWISE)
    cost = (experiment.macs or 1e9) * (DEPTHWISE_COST if depthwise else 1) * recipe.batch_size
    speed = 1 if hardware.bf16 else FP32_SHARE
    steps = int(QUICK_MACS_PER_CORE * speed * hardware.cores / cost)
    steps = max(1, min(steps, whole))
    options = ("--recipe.epochs", "1", "--max-steps", str(steps), *options)
    told = "1 epoch" if steps == whole else f"{steps} of the {whole} steps of an epoch"
    return Job(
        f"{steps}-steps",
        launcher,
        options,
        f"{told}, of a recipe of {recipe.epochs} epochs",
    )


def launcher_for(hardware: Hardware) -> tuple[str, ...]:
    """Arguments of `accelerate launch` that use all of the hardware."""
    if hardware.gpus == 0:
        # One process with all cores: on the CPU, ranks only share them.
        return ("--config_file", "launch/cpu.yaml", "--num_processes", "1")
    if hardware.gpus == 1:
        return ("--config_file", "launch/one_process.yaml")
    return ("--config_file", "launch/one_node.yaml", "--num_processes", str(hardware.gpus))


def training_command(launcher: tuple[str, ...], threads: int) -> list[str]:
    """Python's arguments that start training under `accelerate launch`, from any folder; those of `runner train`
    follow.

    Args:
        launcher: of `launcher_for`.
        threads: of each process, which the launcher would otherwise warn of.
    """
    absolute = [str(ROOT / part) if part.startswith("launch/") else part for part in launcher]
    words = ["-m", "accelerate.commands.launch", *absolute, "--num_cpu_threads_per_process", str(threads)]
    return [*words, "-m", "runner", "train"]


def _on(hardware: Hardware) -> tuple[str, ...]:
    if hardware.gpus:
        return ()  # the launcher's configuration says bf16
    return ("--device", "cpu", "--precision", "bf16" if hardware.bf16 else "fp32")
