"""`runner compare`: prints in what runs differ, and their results side by side."""

import dataclasses
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

import msgspec

from runner.commands.options import Flag, RunFolders
from runner.common.console import new_table, output_console, print_table
from runner.common.errors import UserError
from runner.run.folder import find_runs
from runner.run.metrics import latest_metrics, median_speed

if TYPE_CHECKING:
    from runner.report.run_record import RunRecord

WIDEST = 16  # most columns that are left to the values of a run, which are wrapped if they are longer
LONGEST_VALUE = 24
NONE = "–"
HASH_DIGITS = 10
# Results by title: a format, for what the attributes of a run's row and its metrics hold.
FORMATS = {
    "test accuracy": "{:.2%}",
    "with augmentation": "{:.2%}",
    "validation accuracy": "{:.2%}",
    "test loss": "{:.4f}",
    "top-5 accuracy": "{:.2%}",
    "calibration error": "{:.4f}",
    "epochs": "{:.4g}",
    "steps": "{:,}",
    "parameters": "{:,}",
    "MACs": "{:,}",
    "images/s": "{:,.0f}",
    "peak memory, GB": "{:.2f}",
    "FLOPs utilization": "{:.1%}",
    "latency, batch 1": "{:.3g} ms",
}


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare runs in the terminal: the settings that differ, and the results."""

    runs: RunFolders
    """Run folders, or folders that contain run folders at any depth."""
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        from runner.report import collect, compare
        from runner.report.run_record import disambiguate_names

        records = disambiguate_names([collect.read(run) for run in find_runs(list(self.runs))])
        if len(records) < 2:
            raise UserError(f"RUNS: expected at least two runs, found {len(records)}")
        differences = compare.setting_differences(records)
        if self.json:
            runs = [compare.run_row(record) for record in records]
            print(msgspec.json.encode({"runs": runs, "differences": differences}).decode())
            return
        show(records, differences)


def show(records: "list[RunRecord]", differences: dict[str, list[Any]]) -> None:
    """Prints the names of the runs, then settings and results with a numbered column for each run."""
    from runner.report.compare import setting_text

    names = new_table("", "run", "state")
    for number, record in enumerate(records, 1):
        names.add_row(str(number), record.name, record.state)
    print_table(names)
    results = [results_of(record) for record in records]
    rows = {
        "settings that differ": {
            name: [shorten(name, setting_text(name, value)) for value in values] for name, values in differences.items()
        },
        "results": {
            title: [form.format(value) if (value := result[title]) is not None else NONE for result in results]
            for title, form in FORMATS.items()
            if any(result[title] is not None for result in results)
        },
    }
    for title, cells in rows.items():
        if not cells:
            print(f"\n{title}: none")
            continue
        for columns in blocks(cells):
            table = new_table(title, *(str(column + 1) for column in columns))
            for name, texts in cells.items():
                if any(texts[column] != NONE for column in columns):
                    table.add_row(name, *(texts[column] for column in columns))
            print()
            print_table(table)


def blocks(cells: dict[str, list[str]]) -> Iterator[range]:
    """Yields the columns of each table: as many as fit beside each other, and at least one."""
    widths = [min(WIDEST, max(map(len, column))) + 1 for column in zip(*cells.values(), strict=True)]
    left = output_console().width - max(map(len, [*cells, "settings that differ"])) - 1
    start = 0
    while start < len(widths):
        stop = start + 1
        while stop < len(widths) and sum(widths[start : stop + 1]) <= left:
            stop += 1
        yield range(start, stop)
        start = stop


def shorten(name: str, text: str) -> str:
    """Cuts a long value, and a hash to its first digits."""
    if name.endswith(("fingerprint", "commit", "sha256")):
        return text[:HASH_DIGITS]
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def results_of(record: "RunRecord") -> dict[str, Any]:
    """Returns the results of a run by their titles in FORMATS; of an unfinished run, the latest so far."""
    from runner.report.compare import best_gated, run_row

    row, latest = run_row(record), latest_metrics(record.metrics)
    fastest = best_gated(row)
    return {
        "test accuracy": latest.get("test_accuracy") if row.test_accuracy is None else row.test_accuracy,
        "with augmentation": row.test_accuracy_augmented,
        "validation accuracy": latest.get("validation_accuracy")
        if row.validation_accuracy is None
        else row.validation_accuracy,
        "test loss": latest.get("test_loss") if row.test_loss is None else row.test_loss,
        "top-5 accuracy": row.test_top5,
        "calibration error": row.test_calibration_error,
        "epochs": latest.get("epoch"),
        "steps": latest.get("global_step"),
        "parameters": row.parameters,
        "MACs": row.macs,
        "images/s": median_speed(record.metrics),
        "peak memory, GB": latest.get("memory_gb"),
        "FLOPs utilization": latest.get("flops_utilization"),
        "latency, batch 1": fastest.p50_ms if fastest else None,
    }
