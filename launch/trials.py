"""The trials of a sweep: the runs of a grid, and the folder and state of each."""

import fnmatch
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from launch.train_arguments import parse_job
from runner import experiments
from runner.common.errors import UserError
from runner.common.files import is_file
from runner.config.recipe import differences
from runner.config.train_config import TrainConfig, check_name
from runner.experiments import timm
from runner.run.folder import Run, State

UNNAMED = "unnamed"  # placeholder for the name of a run, which is derived from its other options


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        argv: the arguments of `runner train` that are specific to this trial.
        options: the arguments that all trials of the sweep share.
        config: the training that these arguments describe.
        run: the run folder.
    """

    argv: tuple[str, ...]
    options: tuple[str, ...]
    config: TrainConfig
    run: Run

    @property
    def id(self) -> str:
        """`experiment/run`; the same training always has the same id, unless the sweep has a name."""
        return f"{self.config.experiment}/{self.run.folder.name}"

    @property
    def arguments(self) -> list[str]:
        """The arguments of `runner train`."""
        return [*self.argv, *self.options]

    def state(self) -> State:
        """Returns the state of the run folder."""
        return self.run.state()


def expand(
    names: Sequence[str],
    seeds: Sequence[int],
    name: str | None,
    options: Sequence[str],
    modules: tuple[str, ...] = (),
) -> list[Trial]:
    """Returns the trials of experiments, grids and papers, one per seed.

    A run is called `seed-N` if it trains the experiment's own recipe, and `<digest>-seed-N` otherwise, where the
    digest identifies the changes; with `name` it is `<name>-seed-N`. So without `name`, different trainings
    never share a folder, and two sweeps that include the same training share its run; see also `check_same_training`.

    Args:
        names: experiments, grids, trials of grids, papers, or patterns of names (`podeti-grid/alexnet-*`).
        seeds: seeds of every experiment.
        name: prefix of the runs' names, or None.
        options: the arguments of `runner train` that all trials share.
        modules: values of `--experiments-from`.

    Raises:
        UserError: names are missing or unknown, or options are invalid.
    """
    if not names:
        raise UserError("NAMES: expected experiments, grids or papers (runner list, runner list --grids)")
    selected = dict.fromkeys(experiment for pattern in names for experiment in _matching(pattern, modules))
    return [trial for experiment in selected for trial in _trials(experiment, seeds, name, options)]


def _trials(experiment: str, seeds: Sequence[int], name: str | None, options: Sequence[str]) -> Iterator[Trial]:
    """Yields the trials of an experiment, whose arguments are parsed once: that takes longer than all of the rest."""
    config = parse_job([experiment, "--seeds", str(seeds[0]), "--name", UNNAMED, *options])
    registered = config.check()
    changed = differences(registered, replace(registered, architecture=config.architecture, recipe=config.recipe))
    changed |= {f"--{option}": value for option, value in _other_options(config).items() if value}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
    prefix = name or (digest if changed else None)
    for seed in seeds:
        run = f"{prefix}-seed-{seed}" if prefix else f"seed-{seed}"
        check_name(run)
        argv = (experiment, "--seeds", str(seed), "--name", run)
        folder = Run(config.runs / experiment / run)
        yield Trial(argv, tuple(options), replace(config, seeds=(seed,), name=run), folder)


def _other_options(config: TrainConfig) -> dict[str, Any]:
    """Returns the options outside the recipe that change the outcome of training; None means the default."""
    return {
        "max-steps": config.max_steps,
        "teacher": config.teacher and str(config.teacher.absolute()),
        "start-from": config.start_from and str(config.start_from.absolute()),
        "precision": None if config.precision == "launch" else config.precision,
        "deterministic": config.deterministic or None,
    }


def _matching(name: str, modules: tuple[str, ...]) -> list[str]:
    """Returns the experiments that a name or pattern stands for."""
    grids, known = experiments.load_grids(modules), experiments.load(modules)
    if name in known:
        return [name]
    if name in grids:
        return list(grids[name])
    if name.startswith(timm.PREFIX) and (models := timm.list_models(name.removeprefix(timm.PREFIX))):
        return [timm.PREFIX + model for model in models]
    if any(sign in name for sign in "*?["):
        if matching := fnmatch.filter([*known, *(trial for grid in grids.values() for trial in grid)], name):
            return matching
        raise UserError(f"{name!r}: matches no experiment and no trial of a grid (runner list, runner list --grids)")
    if of_paper := [key for key, experiment in known.items() if experiment.paper == name]:
        return of_paper
    experiments.get(name, modules)  # a trial of a grid; otherwise raises with the most similar names
    return [name]


def check_same_training(run: Run, seed: int, config: TrainConfig, fingerprint: str) -> None:
    """Checks that a run folder is new or holds the same training.

    Args:
        run: the run of the job or trial.
        seed: seed of this run.
        config: the requested training.
        fingerprint: fingerprint of the dataset to train on.

    Raises:
        UserError: the folder holds a different training.
    """
    if not is_file(run.run_json):
        return
    recorded = run.config()
    options = _other_options(config)
    pairs = {
        "seed": (seed, recorded.seed),
        "recipe": (config.recipe, recorded.recipe),
        "architecture": (config.architecture, recorded.architecture),
        "max-steps": (config.max_steps, recorded.max_steps),
        "dataset": (fingerprint, recorded.dataset.fingerprint),
        "teacher": (options["teacher"], recorded.teacher and recorded.teacher.folder),
        "start-from": (options["start-from"], recorded.started_from and recorded.started_from.folder),
    }
    if options["precision"]:
        pairs["precision"] = (options["precision"], recorded.precision)
    if options["deterministic"]:
        pairs["deterministic"] = (True, recorded.deterministic)
    if different := [key for key, (expected, actual) in pairs.items() if _json(expected) != _json(actual)]:
        raise UserError(f"{run.folder}: holds a run with a different {', '.join(different)}; choose a --name")


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value, order="sorted")
