"""Builds and checks the arguments of `runner train` for jobs, trials and W&B agents.

Jobs and trials run them unchanged, except that slurm/train.sbatch or the local pool appends `--stop-file FILE` when
training starts, because the file's name contains the number of the job or process. An agent adds the seed and the name
of its run, and selects the device.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, get_args, get_type_hints

from data_prep.manifest import Manifest
from runner import cli
from runner.common.command_line import CommandLine, ParsedOption, options_of, parse_words
from runner.common.errors import UserError
from runner.config.train_config import TrainConfig
from runner.run.folder import Run, finished_run
from runner.system import environment

SET_BY_JOBS = {
    "--resume": "jobs and sweeps set --resume auto, which continues an interrupted run; leave it out",
    "--stop-file": "jobs and sweeps set their own, and stop with a checkpoint on scancel or Ctrl-C; leave it out",
    "--pause-after": "jobs and sweeps train to the end; leave it out",
}
SET_BY_AGENTS = {
    "--resume": "an agent starts each of its runs once; leave it out",
    "--stop-file": "the stop file of an agent's run is `stop` in its folder; leave it out",
}
PATHS = [
    f"--{name.replace('_', '-')}"
    for name, hint in get_type_hints(TrainConfig).items()
    if hint is Path or Path in get_args(hint)
]
WEIGHTS = "--architecture.arguments.weights"


def train_options(data: Path, runs: Path, options: Sequence[str], resume: bool) -> list[str]:
    """Returns the options of `runner train` for jobs, which resume, or for agents, which do not.

    Args:
        data, runs: folders, made absolute, because a job starts in another folder.
        options: options that the user gave; their paths are made absolute as well.
        resume: True for jobs, which get `--resume auto`; False for agents.

    Raises:
        UserError: the user's options contain one that jobs set or that agents do not allow.
    """
    reject_options(options, SET_BY_JOBS if resume else SET_BY_AGENTS)
    own = ["--data", str(data.absolute()), "--runs", str(runs.absolute()), *(["--resume", "auto"] if resume else [])]
    return [*own, *absolute_paths(options)]


def with_stop_file(arguments: Iterable[str], stop_file: Path) -> list[str]:
    """Appends the stop file to the arguments of a job, as slurm/train.sbatch does."""
    return [*arguments, "--stop-file", str(stop_file.absolute())]


def job_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a job, which starts in the checkout but can import modules from the current folder."""
    given = filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = [str(Path.cwd()), *(str(Path(folder).absolute()) for folder in given)]
    return {**environ, "PYTHONPATH": os.pathsep.join(paths)}


def parse_job(arguments: Sequence[str]) -> TrainConfig:
    """Parses and checks the arguments of a job, with a placeholder for the stop file, which is appended later.

    Raises:
        UserError: the arguments are invalid.
    """
    config = cli.parse_train(with_stop_file(arguments, Path(os.devnull)))
    config.check()
    return config


def reject_options(options: Sequence[str], reasons: Mapping[str, str]) -> None:
    """Raises UserError if `options` contains a reserved option; `reasons` maps each to the explanation."""
    for name, option in _parse(options).options.items():
        if name in reasons:
            raise UserError(f"{' '.join([name, *option.values])}: expected no {name}; {reasons[name]}")


def absolute_paths(options: Sequence[str]) -> list[str]:
    """Makes the paths in options of `runner train` absolute, because a job starts in another folder."""
    line = _parse(options)
    for name, option in line.options.items():
        if name in PATHS:
            option.values = [str(Path(value).absolute()) for value in option.values]
        elif name == WEIGHTS:  # of a model outside the package, it may name something else than a file
            option.values = [str(Path(value).absolute()) if Path(value).is_file() else value for value in option.values]
    return line.words()


def resolve_device(options: Sequence[str]) -> list[str]:
    """Replaces `--device auto`, given or by default, with `--device cpu` on a machine without GPUs.

    Raises:
        UserError: the options require a GPU, and there is none, or its driver does not work.
    """
    line = _parse(options)
    device = line.options.get("--device", ParsedOption("--device", ["auto"]))
    if device.values == ["cpu"]:
        return list(options)
    gpus = environment.count_gpus()
    if device.values == ["cuda"] and not gpus:
        raise UserError("--device cuda: expected a GPU, found none on this machine; use --device cpu")
    if device.values != ["auto"] or gpus:
        return list(options)
    line.options["--device"] = ParsedOption("--device", ["cpu"])
    return line.words()


def check_dataset(config: TrainConfig, manifest: Manifest, ranks: int) -> None:
    """Checks the batch size for the dataset and ranks, and that --teacher and --start-from are finished runs.

    Raises:
        UserError: `runner train` would refuse the arguments; it calls the same functions.
    """
    from runner.data.open import check_training, split_indices  # imported here, because it imports torch

    images = manifest.splits["train"].images
    records = split_indices("train", images, config.recipe.validation)
    check_training(manifest, config.recipe, images if records is None else len(records), ranks)
    for option, folder in (("--teacher", config.teacher), ("--start-from", config.start_from)):
        if folder:
            finished_run(option, folder, config.trusted_code)


def check_models(config: TrainConfig, manifest: Manifest) -> None:
    """Builds the model and the teacher on the CPU, and checks that they accept the dataset's images and classes.

    Uses one thread, because this may be a login node, and because OpenMP can hang in a child that is forked from a
    process with OpenMP threads.

    Raises:
        UserError: `runner train` would refuse the arguments; it calls the same functions.
    """
    import torch  # imported here, because this and the following imports are slow

    from runner.data.open import model_input
    from runner.training.model import build_for, build_model
    from runner.training.session import load_teacher

    channels, height, width = model_input(manifest, config.recipe).shape
    classes, shape = len(manifest.classes), (channels, height, width)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if config.start_from:
            start = Run(config.start_from, config.trusted_code)
            build_model(config.architecture, config.recipe, 0, _no_images, start, classes, shape)
        else:
            build_for(config.architecture, classes, shape)
        if config.teacher:
            load_teacher(config, manifest)
    finally:
        torch.set_num_threads(threads)


def _no_images(count: int) -> NoReturn:
    raise AssertionError("weights of another run are not initialized from images")


def _parse(options: Sequence[str]) -> CommandLine:
    return parse_words(options, options_of(TrainConfig))
