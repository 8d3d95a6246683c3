"""metrics.jsonl: every metric of a run, one row a line."""

import hashlib
import os
from typing import TypedDict

import msgspec

from runner.common.errors import UserError
from runner.common.files import write_atomically
from runner.run.folder import Run
from runner.run.schema import MetricRow, decode


def line_of(row: MetricRow) -> bytes:
    """A row as it is written."""
    return msgspec.json.encode(row) + b"\n"


def read_metrics(run: Run) -> list[MetricRow]:
    """The rows; a last line that was cut short by a kill is left out.

    Raises:
        UserError: another line is damaged.
    """
    if not run.metrics.is_file():
        return []
    lines = run.metrics.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(decode(line, MetricRow))
        except ValueError as error:
            if number == len(lines):  # without a line end
                break
            raise UserError(f"{run.metrics}: line {number}: damaged ({error}); remove the line") from None
    return rows


class Mark(TypedDict):
    """The size and SHA-256 of metrics.jsonl at a checkpoint, which has them in its training state."""

    bytes: int
    sha256: str


def sync_metrics(run: Run) -> Mark:
    """Writes all rows to the disk, as a checkpoint of their step is about to be; returns what is there."""
    if not run.metrics.is_file():
        return Mark(bytes=0, sha256=hashlib.sha256().hexdigest())
    with run.metrics.open("rb") as file:
        os.fsync(file.fileno())
        content = file.read()
    return Mark(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def keep_metrics(run: Run, step: int, mark: Mark | None, anyway: bool) -> None:
    """Removes the rows after a checkpoint: a resumed run writes them again.

    Args:
        run: the run folder.
        step: of the checkpoint; 0 for none.
        mark: of the checkpoint; None for none, and for one of an earlier version.
        anyway: go on without the rows that are missing.

    Raises:
        UserError: rows from before the checkpoint are missing or damaged.
    """
    content = run.metrics.read_bytes() if run.metrics.is_file() else b""
    if mark is not None and hashlib.sha256(content[: mark["bytes"]]).hexdigest() == mark["sha256"]:
        content = content[: mark["bytes"]]
    elif mark is not None and not anyway:
        raise UserError(
            f"{run.metrics}: expected the {mark['bytes']} bytes of rows up to step {step}, found {len(content)} or "
            "others; restore the file, or go on without them with --resume-anyway"
        )
    else:
        content = b"".join(line_of(row) for row in read_metrics(run) if row.global_step <= step)
    if content or run.metrics.is_file():
        write_atomically(run.metrics, content)
