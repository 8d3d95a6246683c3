"""The comparison as Markdown tables, for a README or a pull request."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from runner.report import compare
from runner.report.run_record import RunRecord, Unreadable, format_counts
from runner.report.searches import SearchRecord

OUTCOME_TITLES = (
    "experiment", "parameters", "dataset", "epochs", "seeds", "test accuracy", "reported", "reproduced", "difference",
)  # fmt: skip
MAX_NAMED = 5  # most runs that a line of the overview names
MARKUP = re.compile(r"[\\`*_~\[\]]")
LATENCY_TITLES = (
    "run", "backend", "precision", "batch", "p50 ms", "p90 ms", "p99 ms", "calls", "accuracy change", "agreement",
    "gate", "note",
)  # fmt: skip


def render(
    records: list[RunRecord], unreadable: Sequence[Unreadable] = (), searches: Sequence[SearchRecord] = ()
) -> str:
    """Renders accuracies, searches, latencies by hardware with the parity of each file, and what was not read."""
    parts = [overview(records), accuracies(records), *map(search_results, searches), latencies(records)]
    return "\n\n".join(filter(None, [*parts, not_read(unreadable)])) + "\n"


def overview(records: list[RunRecord]) -> str:
    """Renders the best run on each dataset, the results of the gate, and which runs have a problem, as a list."""
    found = compare.summarize_runs(records)

    def named(positions: Sequence[int]) -> str:
        names = ", ".join(code(records[position].name) for position in positions[:MAX_NAMED])
        return names + (f" and {len(positions) - MAX_NAMED} more" if len(positions) > MAX_NAMED else "")

    lines = []
    for dataset, position in found.best.items():
        record = records[position]
        accuracy = percent(record.summary.test_accuracy if record.summary else None, None)
        lines.append(
            f"Best on {plain(dataset)}: {named([position])}, **{accuracy}**"
            + (", incomplete: no run on this dataset ran all epochs" if record.shortened else "")
        )
    if found.gate:
        counts = ", ".join(f"{len(positions)} {result}" for result, positions in sorted(found.gate.items()))
        failed = f" ({named(found.gate['failed'])})" if "failed" in found.gate else ""
        lines.append(f"Gate: {counts}{failed}")
    for title, positions in (
        ("Models that predict one class for every image, so that passing the gate means little", found.one_class),
        ("Incomplete, after fewer epochs than the recipe has", found.incomplete),
        ("Unfinished", found.unfinished),
    ):
        if positions:
            lines.append(f"{title}: {len(positions)} ({named(positions)})")
    return "\n".join(f"- {line}" for line in lines)


def not_read(unreadable: Sequence[Unreadable]) -> str:
    """Renders the table of folders that could not be read; empty if there are none."""
    reasons = [(plain(entry.folder), plain(entry.reason)) for entry in unreadable]
    return f"Not read:\n\n{table(('folder', 'reason'), reasons)}" if reasons else ""


def accuracies(records: list[RunRecord]) -> str:
    """Renders the table of reported and reproduced accuracies, with one row per outcome, and its caption."""
    datasets = ", ".join(sorted({record.dataset for record in records}))
    hardware = ", ".join(sorted({str(record.config.hardware) for record in records}))
    rows = []
    for outcome in compare.outcomes(records):
        reported = outcome.reported
        rows.append(
            (
                code(str(outcome.label)),
                f"{outcome.parameters:,}" if outcome.parameters else "–",
                plain(outcome.dataset),
                f"{outcome.epochs:.2f} of {outcome.recipe_epochs}",
                outcome.seed_count,
                percent(outcome.test_accuracy, outcome.test_accuracy_std),
                f"{reported.accuracy:.2%} ({reported.on}, {plain(reported.epoch)})" if reported else "–",
                percent(outcome.reproduced, outcome.reproduced_std),
                "–" if outcome.difference is None else f"{100 * outcome.difference:+.2f}",
            )
        )
    best = ", or the best one with early stopping" if any(record.config.recipe.patience for record in records) else ""
    caption = (
        f"{format_counts(records)}, on {plain(datasets)}; trained on {plain(hardware)}. Accuracies are measured "
        f"on the test set after the last epoch{best}: means over seeds ± standard deviation."
    )
    return f"{caption}\n\n{table(OUTCOME_TITLES, rows)}"


def search_results(search: SearchRecord) -> str:
    """Renders the best trials of a search, or its Pareto front, and its caption."""
    states = ", ".join(f"{count} {state}" for state, count in search.states.items())
    trained, total = search.epochs
    caption = (
        f"Search {code(search.name)}: {len(search.trials)} trials ({states}); {trained:,} of {total:,} "
        "epochs trained. Accuracies are measured on held-out training images."
    )
    if importance := search.importance:
        shares = ", ".join(f"{plain(option)} {share:.0%}" for option, share in importance.items())
        caption += f" Share of the differences in accuracy that each option explains: {shares}."
    rows = [(code(trial.run), *map(plain, search.cells(trial))) for trial in search.best]
    return f"{caption}\n\n{table(list(map(plain, search.titles)), rows)}"


def latencies(records: list[RunRecord]) -> str:
    """Renders a table of latencies per machine, with the parity of each file; empty if none were measured."""
    by_hardware: dict[str, list[Sequence[str]]] = {}
    for record in records:
        if record.latency and (rows := list(latency_rows(record))):
            by_hardware.setdefault(str(record.latency.hardware), []).extend(rows)
    parts = [
        f"Latency on {plain(hardware)}:\n\n{table(LATENCY_TITLES, rows)}" for hardware, rows in by_hardware.items()
    ]
    machines, compared = compare.latencies_by_machine(records)
    if compared:
        titles = ["run", "backend", "precision", "batch", *(f"{plain(machine)}, p50 ms" for machine in machines)]
        cells = [
            (
                code(row.run), plain(row.backend), row.precision, str(row.batch),
                *("–" if figure is None else f"{figure:.2f}" for figure in row.p50_ms),
            )
            for row in compared
        ]  # fmt: skip
        parts.append(f"Latency of several machines:\n\n{table(titles, cells)}")
    return "\n\n".join(parts)


def latency_rows(record: RunRecord) -> Iterable[Sequence[str]]:
    """Yields the cells of each measured latency of a run."""
    for cell in compare.run_row(record).latency:
        yield (
            code(record.name),
            plain(cell.label),
            cell.precision,
            str(cell.batch),
            *(f"{figure:.2f}" for figure in (cell.p50_ms, cell.p90_ms, cell.p99_ms)),
            "–" if cell.calls is None else str(cell.calls),
            f"{100 * cell.gate.accuracy_change:+.2f}" if cell.gate else "–",
            f"{cell.gate.agreement:.3%}" if cell.gate else "–",
            ("passed" if cell.gate.passed else "failed") if cell.gate else "–",
            plain(cell.warning or ""),
        )


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Formats a Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    """Formats a name as inline code; replaces backticks and line breaks, which would end it."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def plain(text: str) -> str:
    """Escapes Markdown and HTML in text from a run folder, and removes line breaks."""
    return MARKUP.sub(r"\\\g<0>", " ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")


def percent(value: float | None, std: float | None) -> str:
    """Formats a fraction in 0..1 as `93.21 ± 0.15%`; a dash for None."""
    if value is None:
        return "–"
    return f"{100 * value:.2f}" + (f" ± {100 * std:.2f}" if std is not None else "") + "%"
