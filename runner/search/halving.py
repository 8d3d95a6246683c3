"""Successive halving that continues runs: which trial is trained next, and up to which epoch. All functions are pure.

Asynchronous successive halving (ASHA: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020): a
trial is trained up to the first rung, a number of epochs, and paused there with a checkpoint. As soon as it is among
the best 1/reduction of all trials that reached the rung, it is continued up to the next one. Nothing is ever trained
twice, and no worker waits for the others. Hyperband (Li et al., JMLR 2018) divides the trials among brackets, of which
each starts at a later rung than the one before, in case the first epochs say little about the last.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Pruner = Literal["asha", "hyperband", "none"]


class TrialProgress(Protocol):
    """What the schedule has to know of a trial."""

    @property
    def number(self) -> int:
        """Number of the trial in its study, from 0."""

    @property
    def target(self) -> int:
        """The epoch up to which it is to be trained."""

    @property
    def accuracy(self) -> Mapping[int, float]:
        """Validation accuracy, by epoch, up to the rungs that it reached."""

    @property
    def finished(self) -> bool:
        """Whether it is complete or failed."""


@dataclass(frozen=True)
class Rungs:
    """The epochs at which trials are compared.

    Attributes:
        epochs: the rungs of the first bracket, ascending; the last is the whole recipe.
        reduction: one of so many trials is continued beyond a rung.
        brackets: number of brackets; bracket N leaves out the first N rungs.
    """

    epochs: tuple[int, ...]
    reduction: int
    brackets: int = 1

    @classmethod
    def of(cls, pruner: Pruner, epochs: int, first: int, reduction: int) -> "Rungs":
        """Returns the rungs first, first · reduction, first · reduction², … below `epochs`, and `epochs`."""
        rungs = []
        while pruner != "none" and first < epochs:
            rungs.append(first)
            first *= reduction
        rungs.append(epochs)
        return cls(tuple(rungs), reduction, len(rungs) if pruner == "hyperband" else 1)

    def bracket(self, number: int) -> int:
        """Returns the bracket of a trial; all brackets spend about the same number of epochs."""
        return _brackets(self.brackets, self.reduction, 1 << number.bit_length())[number]

    def of_trial(self, number: int) -> tuple[int, ...]:
        """Returns the rungs of a trial."""
        return self.epochs[self.bracket(number) :]


@functools.cache
def _brackets(brackets: int, reduction: int, count: int) -> tuple[int, ...]:
    """Returns the brackets of the first trials: each time the one that is furthest behind its share of the trials."""
    last = brackets - 1
    shares = [(last + 1) / (later + 1) * reduction**later for later in range(last, -1, -1)]
    counts, sequence = [0] * brackets, []
    for _ in range(count):
        behind = min(range(brackets), key=lambda bracket: (counts[bracket] + 1) / shares[bracket])
        counts[behind] += 1
        sequence.append(behind)
    return tuple(sequence)


@dataclass(frozen=True)
class Train:
    """Train a trial, or continue it, up to an epoch."""

    number: int
    target: int


NextStep = Train | Literal["new", "wait", "done"]


def next_step(trials: Sequence[TrialProgress], held: frozenset[int], rungs: Rungs, limit: int) -> NextStep:
    """Returns what a worker that is free does next.

    First come trials that were interrupted, then those to continue, from the last rung to the first, then new ones. If
    the study would end without a complete trial, because there are too few trials, the best one is continued.

    Args:
        trials: all trials of the study.
        held: numbers of those that a worker is training.
        rungs: the rungs of the study.
        limit: number of trials of the study.

    Returns:
        The trial to train; "new" for one that is to be sampled; "wait" if the next one depends on those that are
        running; "done" if none is left.
    """
    free = [trial for trial in trials if not trial.finished and trial.number not in held]
    for trial in free:
        if trial.target not in trial.accuracy or trial.target == rungs.epochs[-1]:
            return Train(trial.number, trial.target)
    paused = {trial.number for trial in free}
    if promotion := _promotion(trials, paused, rungs):
        return promotion
    if len(trials) < limit:
        return "new"
    if held:
        return "wait"
    whole = rungs.epochs[-1]
    if free and not any(whole in trial.accuracy for trial in trials):
        best = max(free, key=lambda trial: (trial.target, trial.accuracy[trial.target]))  # of equals the first
        return Train(best.number, _next_rung(rungs, best))
    return "done"


def _promotion(trials: Sequence[TrialProgress], paused: set[int], rungs: Rungs) -> Train | None:
    """Returns a paused trial that is among the best 1/reduction of its rung, in the last possible rung."""
    for index in range(len(rungs.epochs) - 2, -1, -1):
        for bracket in range(min(rungs.brackets, index + 1)):
            epoch = rungs.epochs[index]
            reached = [t for t in trials if epoch in t.accuracy and rungs.bracket(t.number) == bracket]
            reached.sort(key=lambda trial: (-trial.accuracy[epoch], trial.number))
            for trial in reached[: len(reached) // rungs.reduction]:
                if trial.number in paused and trial.target == epoch:
                    return Train(trial.number, _next_rung(rungs, trial))
    return None


def _next_rung(rungs: Rungs, trial: TrialProgress) -> int:
    return min((epoch for epoch in rungs.of_trial(trial.number) if epoch > trial.target), default=trial.target)
