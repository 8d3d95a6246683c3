"""The README's tables, made from the committed results. A cell without a result says so.

python -m runner.benchmarks.tables --write
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from data_prep.console import UserError, run_command
from runner import experiments
from runner.environment import described

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent.parent / "README.md"
MISSING = "not measured"


@dataclass(frozen=True)
class Tables:
    """Print the README's tables, or write them into it."""

    write: bool = False
    """Put them into README.md, each between its marks."""

    def __call__(self) -> None:
        if not self.write:
            for name, make in TABLES.items():
                print(f"## {name}\n\n{make()}\n")
            return
        README.write_text(filled(README.read_text()))
        print(f"{README}: {len(TABLES)} tables")


def filled(text: str) -> str:
    """The README with every table put between its marks.

    Raises:
        UserError: a table's marks are missing.
    """
    for name, make in TABLES.items():
        first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if text.count(first) != 1 or text.count(last) != 1:
            raise UserError(f"README.md: expected {first} and {last} once each")
        before, rest = text.split(first)
        text = f"{before}{first}\n{make()}\n{last}{rest.split(last)[1]}"
    return text


def result(name: str) -> dict[str, Any] | None:
    """A committed result; None where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def papers() -> str:
    """Every experiment: reported, and what was reproduced on the CPU and on a GPU."""
    found = {place: _by_name(result(f"papers-{place}")) for place in ("cpu", "gpu")}
    rows = []
    for name, experiment in experiments.load().items():
        reported = experiment.reported
        rows.append(
            [
                f"`{name}`",
                f"{experiment.parameters:,}",
                f"{experiment.macs / 1e6:,.0f}",
                f"{reported.accuracy:.2%} ({reported.on}, {reported.epoch})" if reported else "–",
                *(_accuracy(found[place].get(name)) for place in ("cpu", "gpu")),
            ]
        )
    titles = ["experiment", "parameters", "M MACs", "reported", "ours, CPU", "ours, GPU"]
    told = "; ".join(_hardware(entry) for entry in _distinct([*found["cpu"].values(), *found["gpu"].values()]))
    return f"{_table(titles, rows)}\n\nMeasured on: {told or MISSING}."


def loaders() -> str:
    """The ratios of the loader, overhead, scaling and deployment benchmarks."""
    rows = []
    for name in [
        f"{name}-{place}" for place in ("cpu", "gpu") for name in ("loader", "overhead", "scaling", "deploy")
    ]:
        measured = result(name)
        if measured is None:
            rows.append([name, MISSING, "", ""])
            continue
        place = described(measured["hardware"])
        for key, ratio in measured.items():
            if isinstance(ratio, dict) and "median" in ratio:
                spread = (
                    f"{ratio['median']:.3g} ({ratio['min']:.3g} to {ratio['max']:.3g}, {ratio['rounds']} rounds)"
                )
                rows.append([key.replace("_", " "), spread, measured["goals"].get(key, "–"), place])
    return _table(["ratio", "median (spread)", "goal", "hardware"], rows)


TABLES = {"papers": papers, "loaders": loaders}


def _by_name(measured: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The unchanged experiments of a result by name; one entry each."""
    entries = [] if measured is None else measured["experiments"]
    entries = [e for e in entries if not e["overrides"].keys() - {"recipe.epochs"} and not e["teacher"]]
    names = [entry["experiment"] for entry in entries]
    if len(set(names)) < len(names):
        raise UserError(f"results: expected one entry for each experiment, found {sorted(names)}")
    return dict(zip(names, entries, strict=True))


def _accuracy(entry: dict[str, Any] | None) -> str:
    """Our figure with data source, epochs and seeds."""
    if entry is None:
        return MISSING
    figure = entry["test_accuracy"] if entry["reproduced"] is None else entry["reproduced"]
    deviation = entry["test_accuracy_std"] if entry["reproduced"] is None else entry["reproduced_std"]
    shown = f"{100 * figure:.2f}" + (f" ± {100 * deviation:.2f}" if deviation is not None else "") + " %"
    if entry["difference"] is not None:
        shown += f" ({100 * entry['difference']:+.2f})"
    epochs = f"{entry['epochs']:g} of {entry['recipe_epochs']} epochs"
    seeds = f"seed{'s' if entry['runs'] > 1 else ''} {', '.join(map(str, entry['seeds']))}"
    return f"{shown}, {entry['dataset']}, {epochs}, {seeds}, {entry['precision']}"


def _distinct(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({_hardware(entry): entry for entry in entries}.values())


def _hardware(entry: dict[str, Any]) -> str:
    return f"{described(entry['hardware'])}, torch {entry['versions']['torch']}"


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Entry point of `python -m runner.benchmarks.tables`."""
    run_command(lambda: tyro.cli(Tables, prog="python -m runner.benchmarks.tables"), "tables")


if __name__ == "__main__":
    main()
