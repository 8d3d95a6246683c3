"""A worker of a search: claims trials of the study, and stores what they reach. It keeps nothing that others need."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.manifest import Manifest
from launch.local_pool import Job
from launch.train_arguments import check_dataset, check_models
from launch.trials import Trial, check_same_training, expand
from runner.common.errors import UserError
from runner.common.files import TransientReadError, is_file
from runner.report import collect, compare
from runner.run.lock import LockedError
from runner.run.metrics import read_metrics
from runner.search import halving
from runner.search.sampler import sample
from runner.search.space import EXPERIMENT, Space, words_of
from runner.search.study import Definition, Objective, Study, StudyTrial

MAX_ATTEMPTS = 3  # per trial
MAX_FAILURES = 3  # of different trials in a row, after which a worker gives up
POLL_SECONDS = 1.0  # while other workers train what the next step depends on
LOCK_SECONDS = 2.0  # for a free slot; it looks again later, so that signals are handled meanwhile


@dataclass(frozen=True)
class Plan:
    """What the trials of a search are built from.

    Attributes:
        definition: the definition of the study.
        space: its ranges, by option.
        arguments: the arguments of `runner train` that all trials share.
        experiments_from: modules with further experiments.
        name: name of the search.
        manifest: the dataset.
    """

    definition: Definition
    space: Space
    arguments: tuple[str, ...]
    experiments_from: tuple[str, ...]
    name: str
    manifest: Manifest

    @property
    def first_words(self) -> dict[str, str]:
        """The first value of each range."""
        return {option: domain.samples[0] for option, domain in self.space.items()}

    def trial(self, words: Mapping[str, str], number: int = 0) -> Trial:
        """Returns the trial with these values. Raises UserError if `runner train` would refuse them."""
        own = [f"{option}={word}" for option, word in words.items() if option != EXPERIMENT]
        names, seeds = [self.experiment_of(words)], (self.definition.train_seed,)
        (trial,) = expand(names, seeds, self.prefix(number), [*self.arguments, *own], self.experiments_from)
        return trial

    def experiment_of(self, words: Mapping[str, str]) -> str:
        """Returns the experiment of a trial."""
        return words.get(EXPERIMENT, self.definition.names[0])

    def prefix(self, number: int) -> str:
        """Returns the name of a trial's run, without the seed."""
        return f"{self.name}-{number:03d}"

    def check_values(self) -> None:
        """Checks the ends of each range and all choices, one at a time, for each experiment.

        Raises:
            UserError: `runner train` would refuse a trial.
        """
        changes: list[dict[str, str]] = [{}]
        for option, domain in self.space.items():
            changes += [{option: word} for word in domain.samples[1:] if option != EXPERIMENT]
        for name in self.definition.names:
            for change in changes:
                words = self.first_words | ({EXPERIMENT: name} if EXPERIMENT in self.space else {}) | change
                try:
                    trial = self.trial(words)
                    check_dataset(trial.config, self.manifest, self.definition.ranks)
                    if not change or any(option.startswith("--architecture") for option in change):
                        check_models(trial.config, self.manifest)
                except UserError as error:
                    raise UserError(
                        f"{' '.join(f'{option} {word}' for option, word in words.items())}: {error}"
                    ) from None


class StudySource:
    """Source of the trials of a study, some of which are continued."""

    def __init__(self, plan: Plan, study: Study, limit: int) -> None:
        self.plan, self.study, self.limit = plan, study, limit
        self.definition = plan.definition
        self.claims: dict[str, tuple[int, int, contextlib.ExitStack]] = {}  # number, target and lock, by id
        self.failed: set[int] = set()  # trials that failed since one succeeded
        self.look_again = 0.0
        self.closed = self.done = False
        self.gave_up = False  # set when several trials in a row have failed

    def next(self) -> Job | None:
        """Returns the next job; None if there is none at present.

        Raises:
            UserError: the study is damaged, or is another one now.
        """
        if self.closed or self.done or time.monotonic() < self.look_again:
            return None
        self.look_again = time.monotonic() + POLL_SECONDS
        try:
            with self.study.locked(LOCK_SECONDS):
                job = self._next()
        except LockedError:
            return None
        if job is not None:
            self.look_again = 0.0
        return job

    def _next(self) -> Job | None:
        while True:
            definition, trials = self.study.read()
            if definition != self.definition:
                raise UserError(f"{self.study.folder}: holds another search now; choose another --name")
            held = self.study.held(trials) | {number for number, _, _ in self.claims.values()}
            step = halving.next_step(trials, held, self.definition.schedule, self.limit)
            if step == "new":
                if not self._add(trials):
                    self.limit = len(trials)  # the space has no other
            elif not isinstance(step, halving.Train):
                self.done = step == "done"
                return None
            elif job := self._start(trials[step.number], step.target):
                return job

    def _add(self, trials: Sequence[StudyTrial]) -> bool:
        """Samples a trial; returns False if the space has no other."""
        values = sample(self.definition, self.plan.space, trials)
        if values is None:
            return False
        number, words = len(trials), words_of(self.plan.space, values)
        run = f"{self.plan.experiment_of(words)}/{self.plan.prefix(number)}-seed-{self.definition.train_seed}"
        target = self.definition.schedule.of_trial(number)[0]
        trial = StudyTrial(number=number, run=run, parameters=words, values=values, target=target)
        self.study.add(trial, self.plan.space)
        return True

    def _start(self, stored: StudyTrial, target: int) -> Job | None:
        """Claims a trial and returns its job; returns None if there is nothing to do for it any more.

        Raises:
            UserError: its folder holds another training, or cannot be read now.
        """
        if stored.target != target:
            self.study.set_target(stored.number, target)
        try:
            trial = self.plan.trial(stored.parameters, stored.number)
            if is_file(trial.run.run_json):
                trial.run.config()
        except TransientReadError:
            raise
        except UserError as error:  # a combination that cannot be trained, or a damaged run
            self.study.fail(stored.number, str(error), final=True)
            return None
        check_same_training(trial.run, trial.config.all_seeds[0], trial.config, self.plan.manifest.fingerprint)
        try:
            if self._record(stored.number, target, trial):
                return None
        except TransientReadError:
            raise
        except UserError as error:  # a damaged summary, or one without an objective
            self.study.fail(stored.number, str(error), final=True)
            return None
        claim = contextlib.ExitStack()
        claim.enter_context(self.study.claim(stored.number))
        self.claims[trial.id] = (stored.number, target, claim)
        is_last = target == self.definition.rungs[-1]
        commands = self._measurements(trial) if is_last else ()
        if trial.state() == "complete":
            return Job(trial, None, commands)
        return Job(trial, (*trial.arguments, *(() if is_last else ("--pause-after", str(target)))), commands)

    def _measurements(self, trial: Trial) -> tuple[tuple[str, ...], ...]:
        """Returns the commands that measure the latency of a complete run, if it is an objective."""
        if "latency" not in self.definition.objectives:
            return ()
        folder = str(trial.run.folder.absolute())
        modules = [f"--experiments-from={module}" for module in self.plan.experiments_from]
        device = ["--device", trial.config.device]
        commands = (["export", "--precision", "fp32"], ["parity", *device], ["bench", "--batch", "1", *device])
        return tuple(("-m", "runner", command[0], folder, *command[1:], *modules) for command in commands)

    def ended(self, job: Job, failure: str) -> str:
        """Stores what a trial has reached, and releases it; returns that in one line."""
        number, target, claim = self.claims.pop(job.trial.id)
        with claim, self.study.locked():
            try:
                reached = self._record(number, target, job.trial)
                ending = job.trial.run.read_ending()
            except UserError as error:
                return self._fail(number, str(error))
            if reached:
                self.failed.clear()
                return reached
            if ending and ending.diverged:
                self.study.fail(number, ending.reason, final=True)  # which says something about its parameters only
                return f"failed: {ending.reason}"
            if ending and not ending.stopped:
                return self._fail(number, ending.reason)
            if ending or self.closed:
                return f"stopped: {ending.reason if ending else failure}"
            return self._fail(number, failure)

    def _fail(self, number: int, reason: str) -> str:
        """Stores a failure that another attempt may not have."""
        if self.study.fail(number, reason, final=False) >= MAX_ATTEMPTS:
            self.study.give_up(number)
        self.failed.add(number)
        self.gave_up = self.gave_up or len(self.failed) >= MAX_FAILURES
        self.closed = self.closed or self.gave_up
        return f"failed: {reason}"

    def _record(self, number: int, target: int, trial: Trial) -> str:
        """Stores the accuracies of a trial that has reached its target; returns "" for one that is not done.

        Raises:
            UserError: a file of the run is damaged, or does not have an objective.
        """
        rows = [row for row in read_metrics(trial.run) if row.validation_accuracy is not None]
        accuracy = {int(row.epoch): row.validation_accuracy or 0.0 for row in rows if row.epoch == int(row.epoch)}
        state = trial.state()
        if state == "complete" and (summary := trial.run.read_summary()):
            objectives = self._objectives(trial, summary.validation_accuracy or 0.0)
            if objectives is None:
                return ""
            self.study.report(number, accuracy)
            self.study.complete(number, objectives)
            return f"{summary.validation_accuracy:.2%} validation accuracy"
        if target == self.definition.rungs[-1]:  # ended after its last checkpoint: its results are still to be written
            return ""
        steps = [row.global_step for row in rows if row.epoch == target]
        if not steps or max(trial.run.checkpoint_steps(), default=-1) < steps[0] or state == "running":
            return ""
        self.study.report(number, {epoch: value for epoch, value in accuracy.items() if epoch <= target})
        return f"{accuracy[target]:.2%} validation accuracy after {target} epoch{'s' if target > 1 else ''}"

    def _objectives(self, trial: Trial, accuracy: float) -> list[float] | None:
        """Returns the objectives of a complete run; None if its latency is not measured."""
        values = []
        for objective in self.definition.objectives:
            value = accuracy if objective == "accuracy" else _measured(trial, objective)
            if value is None and objective == "latency":
                return None
            if value is None:
                raise UserError(f"{trial.run.folder}: its {objective} are not known; choose other --objectives")
            values.append(value)
        return values

    def is_empty(self) -> bool:
        """Returns whether the search has ended, or this worker gives up."""
        return self.done or self.closed

    def close(self) -> None:
        """Starts no more trials."""
        self.closed = True

    def describe(self, done: int) -> str:
        """Returns how much is done, in a few words."""
        return f"{done} trials trained by this worker; the search has up to {self.limit}"


def _measured(trial: Trial, objective: Objective) -> float | None:
    """Returns an objective that is not an accuracy; None if it is not known."""
    if objective == "latency":
        best = compare.best_gated(compare.run_row(collect.read(trial.run)))
        return best.p50_ms if best else None
    config = trial.run.config()
    value = config.parameters if objective == "parameters" else config.macs
    return None if value is None else float(value)
