"""Reads finished searches."""

from pathlib import Path

from runner.run.folder import Run
from runner.run.metrics import read_metrics
from runner.search.study import StudyTrial, find_studies
from runner.search.summary import describe_state


def trials_of(runs: Path) -> list[StudyTrial]:
    (study,) = find_studies([runs])
    return study.read()[1]


def assert_trained_once(runs: Path, count: int) -> list[StudyTrial]:
    """Asserts that a search has ended, with all trials, each of whose epochs is in its metrics once."""
    trials = trials_of(runs)
    assert [trial.number for trial in trials] == list(range(count))
    assert len({trial.run for trial in trials}) == len({tuple(trial.parameters.items()) for trial in trials}) == count
    folders = {f"{run.parent.parent.name}/{run.parent.name}" for run in runs.glob("*/*/run.json")}
    assert folders == {trial.run for trial in trials}
    assert {describe_state(trial, frozenset()) for trial in trials} <= {"complete", "paused"}
    for trial in trials:
        epochs = [row.epoch for row in read_metrics(Run(runs / trial.run)) if row.validation_accuracy is not None]
        assert epochs == list(range(1, trial.epochs + 1)), trial.run
    return trials
