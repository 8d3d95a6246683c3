"""The stored study of a search: `journal.log` in `RUNS/searches/NAME`, written by Optuna.

```
journal.log    the definition of the search, and its trials (optuna.storages.JournalStorage)
lock           held while the journal is read and written
trials/N       lock files, each held by the worker that trains trial N
logs/          output of each trial
```

Optuna's other tools read the journal as well. A trial is RUNNING from its first epoch until it is complete or has
failed, also while it is paused, because Optuna changes no other trial.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from runner.common.errors import UserError
from runner.common.files import is_file, read_bytes
from runner.common.text import first_line
from runner.run import lock
from runner.run.folder import paths_below
from runner.search.halving import Pruner, Rungs
from runner.search.space import Domain, parse_domain

FOLDER = "searches"  # in the folder of runs
JOURNAL = "journal.log"
RUN = re.compile(r"[^/\0]+(/[^/\0]+)*/[A-Za-z0-9][A-Za-z0-9._-]*")  # experiment/run
CLAIM_SECONDS = 5.0  # for a reader that only looks whether a trial is held
Objective = Literal["accuracy", "parameters", "macs", "latency"]
Sampler = Literal["tpe", "random"]
TrialState = Literal["open", "complete", "failed"]


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """What a search optimizes, which is the same in all calls.

    Attributes:
        names: the experiments.
        space: the ranges, by option of `runner train`.
        options: the other options of `runner train`.
        objectives: what is optimized; accuracy is that on the validation images after the last epoch.
        sampler, seed: how parameters are sampled.
        pruner, rungs, reduction: see `Rungs`; the rungs are those of the first bracket.
        train_seed: seed of every trial.
        ranks: processes that train a trial.
        dataset: fingerprint of the dataset.
        device: "cpu" or "cuda", so that CPUs and GPUs, which train in other precisions, do not share a study; "" if the
            first worker is to choose, and in studies of earlier versions.
    """

    names: tuple[str, ...]
    space: dict[str, str]
    options: tuple[str, ...]
    objectives: tuple[Objective, ...]
    sampler: Sampler
    seed: int
    pruner: Pruner
    rungs: Annotated[tuple[Annotated[int, msgspec.Meta(ge=1)], ...], msgspec.Meta(min_length=1)]
    reduction: Annotated[int, msgspec.Meta(ge=2)]
    train_seed: int
    ranks: int
    dataset: str
    device: str = ""

    @property
    def domains(self) -> dict[str, Domain]:
        """The ranges, parsed."""
        domains = {option: parse_domain(option, word) for option, word in self.space.items()}
        return {option: domain for option, domain in domains.items() if domain is not None}

    @property
    def schedule(self) -> Rungs:
        """The rungs of all brackets."""
        return Rungs.of(self.pruner, self.rungs[-1], self.rungs[0], self.reduction)


class StudyTrial(msgspec.Struct, frozen=True, kw_only=True):
    """A trial of a search.

    Attributes:
        number: number in the study, from 0.
        run: its run, `experiment/run`, in the folder of runs.
        parameters: its values, as words of the command line, by option.
        values: the same as numbers or words, as Optuna has them.
        target: the epoch up to which it is to be trained.
        accuracy: validation accuracy in 0..1, by epoch, up to the rungs that it reached.
        spent: epochs that all trials had been trained when it reached a rung, by the rung's epoch.
        objectives: the value of each objective of a complete trial.
        attempts: how often its training has failed.
        state: whether it is complete, failed, or neither.
        reason: why it failed.
    """

    number: int
    run: str
    parameters: dict[str, str]
    values: dict[str, Any]
    target: int
    accuracy: dict[int, float] = {}
    spent: dict[int, int] = {}
    objectives: tuple[float, ...] = ()
    attempts: int = 0
    state: TrialState = "open"
    reason: str = ""

    @property
    def finished(self) -> bool:
        """Whether it is complete or failed."""
        return self.state != "open"

    @property
    def epochs(self) -> int:
        """Epochs up to the last rung that it reached."""
        return max(self.accuracy, default=0)

    @property
    def last_accuracy(self) -> float:
        """Validation accuracy at the last rung that it reached; 0 if it has reached none."""
        return self.accuracy.get(self.epochs, 0.0)


class Study:
    """The study in a folder. Every method reads the journal anew, because other workers write to it.

    Attributes:
        folder: `RUNS/searches/NAME`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def journal(self) -> Path:
        """Path of the journal."""
        return self.folder / JOURNAL

    @contextlib.contextmanager
    def locked(self, timeout: float = math.inf) -> Iterator[None]:
        """Locks the study until the context exits; all that writes needs it.

        Raises:
            LockedError: another worker still has the lock after so many seconds.
            UserError: the folder cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock.locked(self.folder / "lock", timeout))
                self._remove_partial_line()
            except OSError as error:
                raise UserError(f"{self.folder}: cannot write there ({error.strerror})") from None
            yield

    def _remove_partial_line(self) -> None:
        """Removes a last line without an end, which a process that was killed wrote, as Optuna could not go on."""
        if not is_file(self.journal):
            return
        content = read_bytes(self.journal)
        if content and not content.endswith(b"\n"):
            os.truncate(self.journal, content.rfind(b"\n") + 1)

    def claim(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which this process holds a trial. Raises UserError if another one does."""
        path = self._claim(number)
        path.parent.mkdir(exist_ok=True)
        return lock.locked(path, CLAIM_SECONDS)

    def held(self, trials: Sequence[StudyTrial]) -> frozenset[int]:
        """Returns the numbers of the trials that a living worker holds."""
        return frozenset(t.number for t in trials if not t.finished and lock.is_locked(self._claim(t.number)))

    def _claim(self, number: int) -> Path:
        return self.folder / "trials" / str(number)

    def read(self) -> tuple[Definition | None, list[StudyTrial]]:
        """Reads the definition, which is None for a new study, and all trials. Raises UserError for damaged files."""
        if not os.path.lexists(self.journal):
            return None, []
        if not is_file(self.journal) or self.journal.is_symlink():
            raise UserError(f"{self.journal}: expected a file, found a link, pipe or folder; remove it")
        try:
            storage, study = self._open()
            if study is None:
                return None, []
            encoded = storage.get_study_user_attrs(study).get("definition")
            definition = msgspec.convert(encoded, Definition) if encoded else None
            if definition is not None:
                _ = definition.domains, definition.schedule  # raises if they are invalid
            return definition, [_trial(trial) for trial in storage.get_all_trials(study)]
        except OSError as error:
            raise UserError(f"{self.journal}: cannot be read ({error.strerror})") from None
        except Exception as error:  # of Optuna, for anything but its own lines
            raise UserError(f"{self.journal}: damaged ({first_line(error)}); restore or remove it") from None

    def define(self, definition: Definition) -> None:
        """Stores the definition of a study without trials, which replaces an earlier one."""
        from optuna.study import StudyDirection

        self.journal.unlink(missing_ok=True)
        storage, _ = self._open()
        directions = [StudyDirection[direction(objective).upper()] for objective in definition.objectives]
        study = storage.create_new_study(directions, self.folder.name)
        storage.set_study_user_attr(study, "definition", msgspec.to_builtins(definition))

    def add(self, trial: StudyTrial, space: Mapping[str, Domain]) -> None:
        """Adds a sampled trial, whose number is the next one."""
        from optuna.trial import TrialState as State
        from optuna.trial import create_trial

        storage, study = self._open()
        template = create_trial(
            state=State.RUNNING,
            params=trial.values,
            distributions={option: domain.distribution() for option, domain in space.items()},
            user_attrs={"run": trial.run, "target": trial.target, "parameters": trial.parameters},
        )
        storage.create_new_trial(study, template)

    def set_target(self, number: int, target: int) -> None:
        """Stores the epoch up to which a trial is to be trained."""
        storage, study = self._open()
        storage.set_trial_user_attr(_id(storage, study, number), "target", target)

    def report(self, number: int, accuracy: Mapping[int, float]) -> None:
        """Stores the validation accuracies of a trial by epoch, up to the rung that it has reached."""
        if not accuracy:
            return
        storage, study = self._open()
        trials = [_trial(trial) for trial in storage.get_all_trials(study)]
        known, reached = trials[number].accuracy, max(accuracy)
        if reached in known:
            return
        spent = sum(trial.epochs for trial in trials) + reached - trials[number].epochs
        trial_id = _id(storage, study, number)
        storage.set_trial_user_attr(trial_id, "spent", {**trials[number].spent, reached: spent})
        for epoch in sorted(accuracy.keys() - known.keys()):  # the rung itself last: it marks the trial as paused
            storage.set_trial_intermediate_value(trial_id, epoch, accuracy[epoch])

    def complete(self, number: int, objectives: Sequence[float]) -> None:
        """Stores the objectives of a trial that is complete."""
        from optuna.trial import TrialState as State

        storage, study = self._open()
        storage.set_trial_state_values(_id(storage, study, number), State.COMPLETE, list(objectives))

    def fail(self, number: int, reason: str, final: bool) -> int:
        """Stores that the training of a trial has failed, and whether it is final; returns how often it has failed."""
        storage, study = self._open()
        trial_id = _id(storage, study, number)
        attempts = storage.get_trial_user_attrs(trial_id).get("attempts", 0) + 1
        storage.set_trial_user_attr(trial_id, "attempts", attempts)
        storage.set_trial_user_attr(trial_id, "reason", reason)
        if final:
            self.give_up(number)
        return attempts

    def give_up(self, number: int) -> None:
        """Stores that a trial is not tried again."""
        from optuna.trial import TrialState as State

        storage, study = self._open()
        storage.set_trial_state_values(_id(storage, study, number), State.FAIL)

    def _open(self) -> tuple[Any, Any]:
        """Returns Optuna's storage, and the id of the study; None if it does not exist yet."""
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        no_lock: Any = _AlreadyLocked()
        storage = JournalStorage(JournalFileBackend(str(self.journal), no_lock))
        studies = storage.get_all_studies()
        return storage, studies[0]._study_id if studies else None


class _AlreadyLocked:
    """In place of Optuna's own lock, which would remain if its owner is killed: `Study.locked` is held meanwhile."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def direction(objective: Objective) -> Literal["maximize", "minimize"]:
    """Returns the direction in which an objective is optimized, as Optuna names it."""
    return "maximize" if objective == "accuracy" else "minimize"


def _id(storage: Any, study: int, number: int) -> int:
    return storage.get_trial_id_from_study_id_trial_number(study, number)


def _trial(frozen: Any) -> StudyTrial:
    """Converts a trial of Optuna. Raises ValueError for one that a search has not written."""
    attributes = frozen.user_attrs
    fields = {
        "number": frozen.number,
        "run": attributes["run"],
        "parameters": attributes["parameters"],
        "values": dict(frozen.params),
        "target": attributes["target"],
        "accuracy": dict(sorted(frozen.intermediate_values.items())),
        "spent": {int(epoch): spent for epoch, spent in attributes.get("spent", {}).items()},
        "objectives": tuple(frozen.values or ()),
        "attempts": attributes.get("attempts", 0),
        "state": {"COMPLETE": "complete", "FAIL": "failed"}.get(frozen.state.name, "open"),
        "reason": attributes.get("reason", ""),
    }
    trial = msgspec.convert(fields, StudyTrial)
    if not RUN.fullmatch(trial.run) or ".." in trial.run.split("/"):
        raise ValueError(f"{trial.run!r} is no run")
    return trial


def find_studies(folders: Sequence[Path]) -> list[Study]:
    """Returns the studies in or below folders, sorted within each, without duplicates."""
    found = {
        journal.parent.resolve(): Study(journal.parent)
        for folder in folders
        for journal in paths_below(folder, JOURNAL)
        if journal.parent.parent.name == FOLDER
    }
    return list(found.values())
