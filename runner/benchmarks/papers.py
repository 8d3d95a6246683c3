"""Collects runs of the papers' experiments into the file from which the README's accuracy table is generated.

python -m runner.benchmarks.papers runs --json runner/benchmarks/results/papers-gpu.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import tyro
from msgspec import UNSET

from runner import experiments
from runner.benchmarks import measure, program
from runner.common.errors import UserError
from runner.config.recipe import Experiment, differences, to_json
from runner.report import collect, compare
from runner.report.compare import Outcome
from runner.report.run_record import RunRecord
from runner.run.folder import Run, find_runs
from runner.run.schema import Hardware


class PaperOutcome(Outcome, kw_only=True):
    """The outcome of an experiment, compared with the experiment as it is registered now.

    Attributes:
        epochs_test_accuracy: for each seed the test accuracy after every epoch, in 0..1.
        test_accuracy_augmented: for each run the test accuracy with test-time augmentation; None without it.
        fingerprint: fingerprint of the dataset.
    """

    epochs_test_accuracy: dict[int, list[float]]
    test_accuracy_augmented: list[float | None]
    precision: str
    world_size: int
    hardware: Hardware
    versions: dict[str, str]
    fingerprint: str


@dataclass(frozen=True)
class Papers:
    """Collect finished runs: accuracy of every epoch, reported and reproduced, data, seeds, hardware, versions."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
    """Run folders, or folders that contain run folders at any depth."""
    json: Path | None = None
    """JSON file to write."""

    def __call__(self) -> None:
        outcomes = collect_outcomes(find_runs(list(self.runs)))
        if not outcomes:
            raise UserError(f"{self.runs[0]}: expected a finished run, found none")
        measure.write({"experiments": to_json(outcomes)}, self.json)
        if self.json is not None:
            print(f"{self.json}: {len(outcomes)} experiments")


def collect_outcomes(runs: list[Run]) -> list[PaperOutcome]:
    """Returns the outcome of each experiment that has finished runs."""
    return [paper_outcome(group) for group in compare.group_by_training([collect.read(run) for run in runs])]


def paper_outcome(group: list[RunRecord]) -> PaperOutcome:
    """Returns the outcome of finished runs that differ only in their seed."""
    config = group[0].config
    outcome = PaperOutcome(
        **msgspec.structs.asdict(compare.outcome_of(group)) | {"folders": UNSET},
        epochs_test_accuracy={
            record.config.seed: [row.test_accuracy for row in record.metrics if row.test_accuracy is not None]
            for record in group
        },
        test_accuracy_augmented=[compare.run_row(record).test_accuracy_augmented for record in group],
        precision=config.precision,
        world_size=config.world_size,
        hardware=config.hardware,
        versions=config.versions,
        fingerprint=config.dataset.fingerprint,
    )
    registered = experiments.load().get(config.experiment)
    if registered is not None:
        trained = Experiment(config.architecture, config.recipe, registered.paper)
        compare_with_registered(outcome, trained, registered)
    return outcome


def compare_with_registered(outcome: PaperOutcome, trained: Experiment, registered: Experiment) -> None:
    """Sets the overrides and difference of an outcome relative to the experiment as it is registered now."""
    registered_setup = Experiment(registered.architecture, registered.recipe, registered.paper)
    outcome.overrides = differences(registered_setup, trained)
    outcome.recipe_epochs = registered.recipe.epochs
    outcome.difference = None
    if (
        outcome.unchanged
        and not outcome.incomplete
        and outcome.reproduced is not None
        and registered.reported is not None
    ):
        outcome.difference = outcome.reproduced - registered.reported.accuracy


if __name__ == "__main__":
    program.run(Papers, "papers")
