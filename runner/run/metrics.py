"""Reads and writes metrics.jsonl, which has every metric of a run, one row per line."""

import hashlib
import os
import statistics
from collections.abc import Iterable
from typing import Any, TypedDict

import msgspec

from runner.common.errors import UserError
from runner.common.files import is_file, read_bytes, write_atomically
from runner.run.folder import Run
from runner.run.schema import MetricRow, decode


def encode_row(row: MetricRow) -> bytes:
    """Returns a row encoded as a line of metrics.jsonl."""
    return msgspec.json.encode(row) + b"\n"


def read_metrics(run: Run) -> list[MetricRow]:
    """Reads all rows. A last line that is incomplete because the process was killed is skipped.

    Raises:
        UserError: any other line is damaged.
    """
    if not is_file(run.metrics):
        return []
    lines = read_bytes(run.metrics).split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(decode(line, MetricRow))
        except ValueError as error:
            if number == len(lines):  # incomplete, without a newline
                break
            raise UserError(f"{run.metrics}: line {number}: damaged ({error}); remove the line") from None
    return rows


def latest_metrics(rows: Iterable[MetricRow]) -> dict[str, Any]:
    """Returns the latest value of each metric, by its name in MetricRow."""
    return {name: value for row in rows for name, value in msgspec.structs.asdict(row).items() if value is not None}


def median_speed(rows: Iterable[MetricRow]) -> float | None:
    """Returns the median over the rows of the images per second of training; None if no row has it."""
    speeds = [row.images_per_second for row in rows if row.images_per_second is not None]
    return statistics.median(speeds) if speeds else None


class MetricsChecksum(TypedDict):
    """The size and SHA-256 of metrics.jsonl at the time of a checkpoint, stored in its training state."""

    bytes: int
    sha256: str


def fsync_metrics(run: Run) -> MetricsChecksum:
    """Syncs all rows to disk before the checkpoint of their step is written; returns the size and hash of the file."""
    if not is_file(run.metrics):
        return MetricsChecksum(bytes=0, sha256=hashlib.sha256().hexdigest())
    with run.metrics.open("rb") as file:
        os.fsync(file.fileno())
    content = read_bytes(run.metrics)
    return MetricsChecksum(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def truncate_metrics(run: Run, step: int, checksum: MetricsChecksum | None, allow_missing: bool) -> bool:
    """Removes the rows after a checkpoint, because a resumed run writes them again.

    Args:
        run: the run folder.
        step: step of the checkpoint; 0 if there is none.
        checksum: from the checkpoint; None if there is no checkpoint, or if an earlier version wrote it.
        allow_missing: continue without the missing rows.

    Returns:
        Whether all rows from before the checkpoint are there.

    Raises:
        UserError: rows from before the checkpoint are missing or damaged.
    """
    content = read_bytes(run.metrics) if is_file(run.metrics) else b""
    is_complete = True
    if checksum is not None and hashlib.sha256(content[: checksum["bytes"]]).hexdigest() == checksum["sha256"]:
        content = content[: checksum["bytes"]]
    elif checksum is not None and not allow_missing:
        raise UserError(
            f"{run.metrics}: expected to begin with the {checksum['bytes']} bytes of rows up to step {step}, found "
            "others; restore the file, or continue with --resume-anyway without the rows that are missing"
        )
    else:
        is_complete = checksum is None
        content = b"".join(encode_row(row) for row in read_metrics(run) if row.global_step <= step)
    if content or is_file(run.metrics):
        write_atomically(run.metrics, content)
    return is_complete
