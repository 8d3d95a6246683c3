"""Reads run folders for a report, and separates damaged ones."""

import os

import msgspec

from runner.common.errors import UserError
from runner.common.text import printable
from runner.report.compare import run_row
from runner.report.run_record import RunRecord, Unreadable, disambiguate_names
from runner.run.folder import Run
from runner.run.metrics import read_metrics
from runner.run.results import current_latency, current_parity


def read_all(runs: list[Run]) -> tuple[list[RunRecord], list[Unreadable]]:
    """Reads every run folder; returns damaged ones separately, so that they do not hide the others."""
    records, unreadable = [], []
    for run in runs:
        try:
            records.append(read(run))
        except UserError as error:
            reason = str(error).removeprefix(f"{run.folder}{os.sep}").removeprefix(f"{run.folder}: ")
            reason = " ".join(reason.split())
            unreadable.append(Unreadable(printable(run.folder), printable(reason)))
    return disambiguate_names(records), unreadable


def read(run: Run) -> RunRecord:
    """Reads one run folder, finished or not.

    Raises:
        UserError: a file in the folder is damaged, or is a link that leads out of the folder.
    """
    try:
        run.check_links()
        state = run.state()
        ending = run.read_ending() if state in ("stopped", "failed") else None
        record = RunRecord(
            run=run,
            config=run.config(),
            summary=run.read_summary(),
            metrics=read_metrics(run),
            parity=current_parity(run),
            engines=run.read_engines(),
            latency=current_latency(run),
            mistakes=run.read_mistakes(),
            state=state,
            reason=ending.reason if ending else "",
        )
        run_row(record)  # raises if a value cannot be shown
        run.check_pictures()
    except (OSError, msgspec.ValidationError) as error:
        raise UserError(f"{run.folder}: damaged ({error}); restore or remove it") from None
    if record.summary is not None:
        rows, count = record.summary.confusion, len(record.config.dataset.classes)
        if {len(rows), *map(len, rows)} != {count}:
            raise UserError(f"{run.summary}: confusion: expected {count} × {count} counts; restore or remove it")
    return record
