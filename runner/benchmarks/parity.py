"""What export cost trained runs: collects the gate's reports into one file that the README's table is made from.

python -m runner.benchmarks.parity runs --json runner/benchmarks/results/parity-cpu.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_prep.console import UserError, run_command
from runner.benchmarks import measure
from runner.environment import described
from runner.runs import find_runs, read_json


@dataclass(frozen=True)
class Parity:
    """Collect what `runner parity` has written in trained runs: accuracies before and after, agreement, limits."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
    """Run folders, or folders that hold some at any depth."""
    json: Path | None = None
    """File to write."""

    def __call__(self) -> None:
        if not self.runs:
            raise UserError("RUNS: expected at least one run folder or folder of runs")
        entries: list[dict[str, Any]] = []
        for run in find_runs(list(self.runs)):
            path = run.deploy / "parity.json"
            if path.is_file():
                summary, report = read_json(run.summary), read_json(path)
                told = {key: summary[key] for key in ("experiment", "seed", "epochs", "steps", "dataset")}
                entries.append(told | {key: value for key, value in report.items() if key != "run"})
        if not entries:
            raise UserError(f"{self.runs[0]}: expected a run that `runner parity` has scored, found none")
        places = {described(entry["hardware"]) for entry in entries}
        if len(places) > 1:
            raise UserError(f"{self.runs[0]}: expected runs scored on one machine, found {len(places)}")
        shared = {key: entries[0][key] for key in ("hardware", "versions")}
        runs = [{key: value for key, value in entry.items() if key not in shared} for entry in entries]
        measure.write({**shared, "runs": runs}, self.json)
        if self.json is not None:
            print(f"{self.json}: {len(runs)} runs")


def main() -> None:
    """Entry point of `python -m runner.benchmarks.parity`."""
    run_command(lambda: tyro.cli(Parity, prog="python -m runner.benchmarks.parity"), "parity")


if __name__ == "__main__":
    main()
