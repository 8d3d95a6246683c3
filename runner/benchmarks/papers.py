"""Collects runs of the papers' experiments into a file from which the README's accuracy table is generated.

python -m runner.benchmarks.papers runs --json runner/benchmarks/results/papers-gpu.json
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec
import tyro
from msgspec import UNSET

from runner import experiments
from runner.benchmarks import measure, program
from runner.common.errors import UserError
from runner.config.recipe import differences, to_json
from runner.report import collect, compare
from runner.report.compare import Outcome
from runner.report.run_record import RunRecord
from runner.run.folder import Run, find_runs
from runner.run.schema import Hardware


class PaperOutcome(Outcome, kw_only=True):
    """The outcome of an experiment, compared with the experiment as it is registered now.

    Attributes:
        epochs_test_accuracy: for each seed the test accuracy after every evaluated epoch, in 0..1.
        test_accuracy_augmented: for each seed the test accuracy with test-time augmentation; None without it.
        training_minutes: for each seed the duration of all training steps; empty in results of earlier versions.
        fingerprint: fingerprint of the dataset.
    """

    epochs_test_accuracy: dict[int, list[float]]
    test_accuracy_augmented: list[float | None]
    training_minutes: list[float] = msgspec.field(default_factory=list)
    precision: str
    world_size: int
    hardware: Hardware
    versions: dict[str, str]
    fingerprint: str


@dataclass(frozen=True)
class Papers:
    """Collect the results of finished runs: accuracy per epoch, reported and reproduced, dataset, seeds, hardware."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
    """Run folders, or folders that contain run folders at any depth."""
    json: Path | None = None
    """JSON file to write; by default, prints to standard output."""

    def __call__(self) -> None:
        outcomes = collect_outcomes(find_runs(list(self.runs)))
        if not outcomes:
            raise UserError(f"{self.runs[0]}: expected a finished run, found none")
        measure.write({"experiments": to_json(outcomes)}, self.json)
        if self.json is not None:
            print(f"{self.json}: {len(outcomes)} outcome{'s' if len(outcomes) > 1 else ''}")


def collect_outcomes(runs: list[Run]) -> list[PaperOutcome]:
    """Returns the outcome of each experiment that has finished runs, compared with the experiment as registered now.

    Raises:
        UserError: runs of one experiment have the same seed, or were trained on different machines or versions.
    """
    records = [compared_with_registered(collect.read(run)) for run in runs]
    return [paper_outcome(group) for group in compare.group_by_training(records)]


def compared_with_registered(record: RunRecord) -> RunRecord:
    """Returns the record with the reported accuracy of the experiment as it is registered now, and how it differs."""
    config = record.config
    registered = experiments.load().get(config.experiment)
    if registered is None:
        return record
    overrides = differences(registered, replace(registered, architecture=config.architecture, recipe=config.recipe))
    return replace(
        record, config=msgspec.structs.replace(config, overrides=overrides, reported=registered.reported)
    )  # fmt: skip


def paper_outcome(group: list[RunRecord]) -> PaperOutcome:
    """Returns the outcome of finished runs that differ only in their seed."""
    group = sorted(group, key=lambda record: record.config.seed)
    config = group[0].config
    for previous, record in itertools.pairwise(group):
        if previous.config.seed == record.config.seed:
            raise UserError(f"{previous.run.folder} and {record.run.folder}: expected runs of different seeds")
        if (record.config.hardware, record.config.versions) != (config.hardware, config.versions):
            raise UserError(
                f"{previous.run.folder} and {record.run.folder}: expected runs of one machine and its versions"
            )
    return PaperOutcome(
        **msgspec.structs.asdict(compare.outcome_of(group)) | {"folders": UNSET},  # paths of the machine that trained
        epochs_test_accuracy={
            record.config.seed: [row.test_accuracy for row in record.metrics if row.test_accuracy is not None]
            for record in group
        },
        test_accuracy_augmented=[row.test_accuracy_augmented for row in map(compare.run_row, group)],
        training_minutes=[round(training_seconds(record) / 60, 1) for record in group],
        precision=config.precision,
        world_size=config.world_size,
        hardware=config.hardware,
        versions=config.versions,
        fingerprint=config.dataset.fingerprint,
    )


def training_seconds(record: RunRecord) -> float:
    """Returns the duration of the training steps, without evaluations, from the speeds in metrics.jsonl.

    Steps before a row without a speed have the speed of the next row that has one.
    """
    seconds, step = 0.0, 0
    for row in record.metrics:
        if row.images_per_second:
            seconds += (row.global_step - step) * record.config.recipe.batch_size / row.images_per_second
            step = row.global_step
    return seconds


if __name__ == "__main__":
    program.run(Papers, "papers")
