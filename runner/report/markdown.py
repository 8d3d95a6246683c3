"""The comparison as Markdown tables, for a README or a pull request."""

from collections.abc import Iterable, Sequence
from typing import Any

from runner.environment import described
from runner.report import collect
from runner.report.collect import RunRecord

TITLES = ("run", "backend", "precision", "batch", "p50 ms", "p90 ms", "p99 ms", "accuracy change", "agreement")


def render(records: list[RunRecord]) -> str:
    """Reported and reproduced accuracies, and latencies by hardware with what the gate says of each file."""
    return "\n\n".join(filter(None, (accuracies(records), latencies(records)))) + "\n"


def accuracies(records: list[RunRecord]) -> str:
    """Reported and reproduced accuracies, a line for each experiment."""
    datasets = ", ".join(sorted({record.dataset for record in records}))
    trained = ", ".join(sorted({described(record.config["hardware"]) for record in records}))
    rows = []
    parameters = {record.config["experiment"]: record.config["parameters"] for record in records}
    for entry in collect.experiments(records):
        reported = entry["reported"]
        count = parameters[entry["experiment"]]
        rows.append(
            (
                f"`{entry['experiment']}`" + (" (changed)" if entry["overrides"] else ""),
                f"{count:,}" if count else "–",
                entry["dataset"],
                f"{entry['epochs']:.2f} of {entry['recipe_epochs']}",
                ", ".join(map(str, entry["seeds"])),
                _percent(entry["test_accuracy"], entry["test_accuracy_std"]),
                f"{reported['accuracy']:.2%} ({reported['on']}, {reported['epoch']})" if reported else "–",
                _percent(entry["reproduced"], entry["reproduced_std"]),
            )
        )
    titles = ("experiment", "parameters", "dataset", "epochs", "seeds", "test accuracy", "reported", "reproduced")
    told = (
        f"{len(records)} runs on {datasets}; trained on {trained}. Accuracies are of the last epoch on the test "
        "set, means over seeds ± deviation."
    )
    return f"{told}\n\n{table(titles, rows)}"


def latencies(records: list[RunRecord]) -> str:
    """Latencies by hardware with what the gate says of each file; empty where none were measured."""
    by_hardware: dict[str, list[Sequence[str]]] = {}
    for record in records:
        if record.latency:
            place = described(record.latency["hardware"])
            by_hardware.setdefault(place, []).extend(_latencies(record))
    return "\n\n".join(f"Latency on {place}:\n\n{table(TITLES, rows)}" for place, rows in by_hardware.items())


def _latencies(record: RunRecord) -> Iterable[Sequence[str]]:
    row = collect.row(record)
    for part in row["latency"]:
        gate = part["gate"]
        yield (
            f"`{record.name}`",
            part["backend"],
            part["precision"],
            str(part["batch"]),
            *(f"{part[key]:.2f}" for key in ("p50_ms", "p90_ms", "p99_ms")),
            f"{100 * gate['accuracy_change']:+.2f}" if gate else "–",
            f"{gate['agreement']:.3%}" if gate else "–",
        )


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _percent(value: float | None, deviation: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f}" + (f" ± {100 * deviation:.2f}" if deviation is not None else "") + " %"
