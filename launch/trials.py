"""The trials of a sweep: which runs a grid means, where each lies, and how far each is. Values, but for reading."""

import fnmatch
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_prep.console import UserError
from runner import experiments
from runner.recipe import differences, to_json
from runner.request import TrainRequest
from runner.runs import Run, State


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        words: the arguments of `runner train` that are its own; plain words, which no shell changes.
        request: what `runner train` makes of these and the sweep's.
        run: where it lies.
    """

    words: tuple[str, ...]
    request: TrainRequest
    run: Run

    @property
    def id(self) -> str:
        """`experiment/run`: the same for the same training, whoever asks and whenever."""
        return f"{self.request.experiment}/{self.run.folder.name}"

    def state(self) -> State:
        """How far it is, by its folder alone."""
        return self.run.state()


def expand(
    names: Sequence[str],
    seeds: Sequence[int],
    name: str | None,
    read: Callable[[Sequence[str]], TrainRequest],
    modules: tuple[str, ...] = (),
) -> list[Trial]:
    """The trials that experiments, grids and papers by name mean, one for each seed.

    A run is called `seed-N` where the recipe is the experiment's own, and else `<digest>-seed-N`, the digest being
    that of what was changed; with `name` it is `<name>-seed-N`. So trainings that differ never share a folder, and
    two sweeps that mean the same training share its run.

    Args:
        names: experiments, grids, trials of grids, papers, or patterns of names (`podeti-grid/alexnet-*`).
        seeds: of each.
        name: the user's, or None.
        read: makes a request of a trial's words; knows the words of the sweep.
        modules: of `--experiments-from`.

    Raises:
        UserError: no names, an unknown one, one that stands twice, or options that are mistaken.
    """
    if not names:
        raise UserError("NAMES: expected experiments, grids or papers (runner list, runner list --grids)")
    trials = []
    for experiment in dict.fromkeys(part for given in names for part in _meant(given, modules)):
        for seed in seeds:
            words = (experiment, "--seeds", str(seed))
            request = read(words)
            registered = request.check()
            given = replace(registered, architecture=request.architecture, recipe=request.recipe)
            changed = differences(registered, given)
            changed |= {f"--{option}": value for option, value in _beside_the_recipe(request).items() if value}
            digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
            prefix = name or (digest if changed else None)
            run = f"{prefix}-seed-{seed}" if prefix else f"seed-{seed}"
            named = replace(request, name=run)
            named.check()
            trials.append(Trial((*words, "--name", run), named, Run(request.runs / experiment / run)))
    return trials


def _beside_the_recipe(request: TrainRequest) -> dict[str, Any]:
    """The options of training that change its outcome and are no part of the recipe; None as by default."""
    return {
        "max-steps": request.max_steps,
        "teacher": request.teacher and str(request.teacher.absolute()),
        "start-from": request.start_from and str(request.start_from.absolute()),
        "precision": None if request.precision == "launch" else request.precision,
        "deterministic": request.deterministic or None,
    }


def _meant(name: str, modules: tuple[str, ...]) -> list[str]:
    """The experiments that one name means."""
    grids, known = experiments.load_grids(modules), experiments.load(modules)
    if name in known:
        return [name]
    if name in grids:
        return list(grids[name])
    if any(sign in name for sign in "*?["):
        every = [*known, *(trial for grid in grids.values() for trial in grid)]
        if found := fnmatch.filter(every, name):
            return found
        raise UserError(
            f"{name!r}: matches no experiment and no trial of a grid (runner list, runner list --grids)"
        )
    of_paper = [found for found, experiment in known.items() if experiment.paper == name]
    if of_paper:
        return of_paper
    experiments.get(name, modules)  # a trial of a grid, or an error with the nearest names
    return [name]


def check_same(trial: Trial, fingerprint: str) -> None:
    """Raises UserError where the trial's folder holds another training than the one that is meant."""
    if not trial.run.record.is_file():
        return
    config, request = trial.run.config(), trial.request
    meant = {
        "seed": request.seeds[0],
        "recipe": json.loads(json.dumps(to_json(request.recipe))),
        "architecture": json.loads(json.dumps(to_json(request.architecture))),
        "dataset": fingerprint,
    }
    found = {key: config[key] for key in meant} | {"dataset": config["dataset"]["fingerprint"]}
    options = _beside_the_recipe(request)
    for option, key in (("teacher", "teacher"), ("start-from", "started_from")):
        meant[option], found[option] = options[option], config[key] and config[key]["folder"]
    for option in ("precision", "deterministic"):
        if options[option]:
            meant[option], found[option] = options[option], config.get(option)
    if other := [key for key in meant if meant[key] != found[key]]:
        raise UserError(f"{trial.run.folder}: holds a training with another {', '.join(other)}; choose a --name")
