"""The comparison as Markdown tables, for a README or a pull request."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from runner.report import compare
from runner.report.run_record import RunRecord, Unreadable, format_counts
from runner.report.searches import SearchRecord

OUTCOME_TITLES = ("experiment", "parameters", "dataset", "epochs", "seeds", "test accuracy", "reported", "reproduced")
MARKUP = re.compile(r"[\\`*_~\[\]]")
LATENCY_TITLES = (
    "run", "backend", "precision", "batch", "p50 ms", "p90 ms", "p99 ms", "calls", "accuracy change", "agreement",
    "gate", "note",
)  # fmt: skip


def render(
    records: list[RunRecord], unreadable: Sequence[Unreadable] = (), searches: Sequence[SearchRecord] = ()
) -> str:
    """Renders accuracies, searches, latencies by hardware with the parity of each file, and what was not read."""
    parts = [accuracies(records), *map(search_results, searches), latencies(records)]
    if unreadable:
        reasons = ((plain(entry.folder), plain(entry.reason)) for entry in unreadable)
        parts.append(f"Not read:\n\n{table(('folder', 'reason'), reasons)}")
    return "\n\n".join(filter(None, parts)) + "\n"


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
            )
        )
    best = ", or the best one with early stopping" if any(record.config.recipe.patience for record in records) else ""
    caption = (
        f"{format_counts(records)}, on {plain(datasets)}; trained on {plain(hardware)}. Accuracies are measured "
        f"on the test set after the last epoch{best}: means over seeds ± standard deviation."
    )
    if one_class := [code(record.name) for record in records if record.predicts_one_class]:
        names = ", ".join(one_class)
        caption += f" Models that predict one class for every image, so that passing the gate means little: {names}."
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
    return "\n\n".join(
        f"Latency on {plain(hardware)}:\n\n{table(LATENCY_TITLES, rows)}" for hardware, rows in by_hardware.items()
    )


def latency_rows(record: RunRecord) -> Iterable[Sequence[str]]:
    """Yields the cells of each measured latency of a run."""
    for cell in compare.run_row(record).latency:
        yield (
            code(record.name),
            plain(cell.backend),
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
