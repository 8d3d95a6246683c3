"""Collects the parity gate's reports, and the searches for precisions, of trained runs into one file.

The README's tables are generated from it.

python -m runner.benchmarks.parity runs --json runner/benchmarks/results/parity-cpu.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import tyro

from runner.benchmarks import measure, program
from runner.common.errors import UserError
from runner.run.folder import find_runs
from runner.run.results import current_parity
from runner.run.schema import ParityReport, PrecisionSearch, Summary


@dataclass(frozen=True)
class CollectParity:
    """Collect the reports of `runner parity`, and the searches of `runner export`, from trained runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
    """Run folders, or folders that contain run folders at any depth."""
    json: Path | None = None
    """JSON file to write."""

    def __call__(self) -> None:
        scored = [
            (summary, report, run.read_precision_searches())
            for run in find_runs(list(self.runs))
            if (summary := run.read_summary()) and (report := current_parity(run)) and report.rows
        ]
        if not scored:
            raise UserError(f"{self.runs[0]}: expected a finished run that `runner parity` has scored, found none")
        machines = {f"{report.hardware}, {report.versions}" for _, report, _ in scored}
        if len(machines) > 1:
            raise UserError(
                f"RUNS: expected runs scored on one machine with the same versions, found {' and '.join(machines)}"
            )
        first = scored[0][1]
        shared = {"hardware": msgspec.to_builtins(first.hardware), "versions": first.versions}
        measure.write({**shared, "runs": [_entry(*of_run) for of_run in scored]}, self.json)
        if self.json is not None:
            print(f"{self.json}: {len(scored)} runs")


def _entry(summary: Summary, report: ParityReport, searches: list[PrecisionSearch]) -> dict[str, Any]:
    """Returns the fields of one run that the tables need."""
    trained = {key: getattr(summary, key) for key in ("experiment", "seed", "epochs", "steps", "dataset")}
    scores = msgspec.to_builtins(report) | {"searches": msgspec.to_builtins(searches)}
    return trained | {key: value for key, value in scores.items() if key not in ("run", "hardware", "versions")}


if __name__ == "__main__":
    program.run(CollectParity, "parity")
