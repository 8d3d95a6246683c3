"""The gate's results and latencies of a run that are still valid: of the files, engines and weights that it has now."""

from collections.abc import Callable

import msgspec

from runner.run.folder import Run
from runner.run.schema import LatencyReport, LatencyRow, ParityReport, ParityRow


def current_parity(run: Run) -> ParityReport | None:
    """Returns the gate's results for the files, engines and weights that the run has now; None if there are none."""
    report = run.read_parity()
    if report is None:
        return None
    is_current = _current_rows(run)
    return msgspec.structs.replace(report, rows=[row for row in report.rows if is_current(row)])


def current_latency(run: Run) -> LatencyReport | None:
    """Returns the latencies of the files, engines and weights that the run has now; None if there are none."""
    report = run.read_latency()
    if report is None or run.weights_sha256() not in (None, report.weights):
        return None
    is_current = _current_rows(run)
    return msgspec.structs.replace(report, rows=[row for row in report.rows if is_current(row)])


def _current_rows(run: Run) -> Callable[[ParityRow | LatencyRow], bool]:
    """Returns a function that says whether a row is of a file or engine that the run has now."""
    exports, weights = run.read_exports(), run.weights_sha256()
    files = {export.sha256 for export in exports.values() if weights in (None, export.weights)}
    engines = {sidecar.sha256 for sidecar in run.read_engines()}

    def is_current(row: ParityRow | LatencyRow) -> bool:
        exported = not exports or row.onnx_sha256 is None or row.onnx_sha256 in files  # earlier versions: no exports
        return exported and (row.engine_sha256 is None or row.engine_sha256 in engines)

    return is_current
