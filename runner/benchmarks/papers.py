"""What came of the papers' experiments: collects runs into one file that the README's table is made from.

python -m runner.benchmarks.papers runs --json runner/benchmarks/results/papers-gpu.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_prep.console import UserError, run_command
from runner import experiments
from runner.benchmarks import measure
from runner.recipe import Architecture, Experiment, differences, recipe_from_json
from runner.report import collect
from runner.runs import Run, find_runs


@dataclass(frozen=True)
class Papers:
    """Collect finished runs: accuracy of every epoch, reported and reproduced, data, seeds, hardware, versions."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
    """Run folders, or folders that hold some at any depth."""
    json: Path | None = None
    """File to write."""

    def __call__(self) -> None:
        if not self.runs:
            raise UserError("RUNS: expected at least one run folder or folder of runs")
        found = entries(find_runs(list(self.runs)))
        if not found:
            raise UserError(f"{self.runs[0]}: expected a finished run, found none")
        measure.write({"experiments": found}, self.json)
        if self.json is not None:
            print(f"{self.json}: {len(found)} experiments")


def entries(runs: list[Run]) -> list[dict[str, Any]]:
    """An entry for each experiment that whole runs were trained of."""
    records = [collect.read(run) for run in runs]
    found = collect.experiments(records)
    for entry in found:
        of_entry = [record for record in records if str(record.run.folder) in entry["folders"]]
        del entry["folders"]
        entry["epochs_test_accuracy"] = {
            record.config["seed"]: [row["test/accuracy"] for row in record.metrics if "test/accuracy" in row]
            for record in of_entry
        }
        config = of_entry[0].config
        entry |= against_the_experiment(entry, config)
        entry |= {
            "test_accuracy_augmented": [collect.row(record)["test_accuracy_augmented"] for record in of_entry],
            "precision": config["precision"],
            "world_size": config["world_size"],
            "hardware": config["hardware"],
            "versions": config["versions"],
            "fingerprint": config["dataset"]["fingerprint"],
        }
    return found


def against_the_experiment(entry: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """In what a run departs from the experiment as it now stands, and how far a whole run of it is from the
    report."""
    registered = experiments.load().get(entry["experiment"])
    if registered is None:
        return {}
    ran = Experiment(Architecture(**config["architecture"]), recipe_from_json(config["recipe"]), registered.paper)
    now = Experiment(registered.architecture, registered.recipe, registered.paper)
    changed = {name: list(pair) for name, pair in differences(now, ran).items()}
    whole = not changed and entry["epochs"] >= registered.recipe.epochs - 1e-9 and entry["teacher"] is None
    ours = entry["reproduced"] if whole else None
    difference = None if ours is None or registered.reported is None else ours - registered.reported.accuracy
    return {"overrides": changed, "recipe_epochs": registered.recipe.epochs, "difference": difference}


def main() -> None:
    """Entry point of `python -m runner.benchmarks.papers`."""
    run_command(lambda: tyro.cli(Papers, prog="python -m runner.benchmarks.papers"), "papers")


if __name__ == "__main__":
    main()
