"""Writes the comparison as one HTML file that opens offline."""

import base64
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from runner.common.errors import UserError
from runner.common.files import read_bytes, write_atomically
from runner.report import compare, figures
from runner.report.compare import LatencyCell, RunRow
from runner.report.grids import find_grids
from runner.report.run_record import RunRecord, Unreadable, format_counts
from runner.report.searches import SearchRecord
from runner.run.schema import Dataset

MAX_OVERLAID = 10  # limit on runs whose curves are drawn initially


@dataclass(frozen=True)
class PageRun:
    """A run as the template shows it.

    Attributes:
        position: index among the records; names its HTML anchor and charts.
        record, row: what its folder holds, and its row of figures.
        embeds_pictures: whether the page contains its pictures; not those of all runs, to keep the page small.
        shows_curves: whether its learning curves are drawn initially.
    """

    position: int
    record: RunRecord
    row: RunRow
    embeds_pictures: bool
    shows_curves: bool

    @property
    def changes(self) -> str:
        """The settings that differ from the registered experiment, abbreviated: `lr 0.01, epochs 2`."""
        return compare.format_settings((name, value) for name, (_, value) in self.row.overrides.items())

    @property
    def status(self) -> str:
        """`failed` or `unfinished` without a summary; else the gate's result, and `incomplete` or `one class` if so.

        The gate compares exported files with the model in torch on the whole test set (see runner.deploy.parity).
        """
        record = self.record
        if record.summary is None:
            return "failed" if record.state == "failed" else "unfinished"
        gate = "not scored" if record.gate == "not scored" else f"gate {record.gate}"
        if record.gate == "failed":
            gate += f": {', '.join(record.failed_precisions)}"
        parts = ["incomplete" if record.shortened else "", gate, "one class" if record.predicts_one_class else ""]
        return ", ".join(filter(None, parts))

    @property
    def comparable(self) -> bool:
        """Whether its accuracy may be compared with the paper's."""
        return self.row.unchanged and not self.record.shortened and self.record.config.dataset.is_cifar10

    @property
    def confusion(self) -> figures.Chart | None:
        """The chart of its confusion matrix; None for an unfinished run."""
        return figures.confusion(self.record, self.position)

    @property
    def samples(self) -> str | None:
        """Its picture of test images, in base64."""
        return _picture(self.record.run.figures / "samples.png") if self.embeds_pictures else None

    @property
    def mistakes(self) -> str | None:
        """Its picture of mistakes, in base64."""
        return _picture(self.record.run.figures / "mistakes.png") if self.embeds_pictures else None

    def for_script(self) -> dict[str, Any]:
        """Returns the run's data that the page's script draws."""
        gated = compare.best_gated(self.row)
        engines = [cell.p50_ms for cell in self.row.latency if cell.backend == "engine" and cell.batch == 1]
        return {
            "position": self.position,
            "name": self.row.name,
            "dataset": self.row.dataset,
            "machine": str(self.record.latency.hardware) if self.record.latency else "",
            "incomplete": self.record.shortened,
            "test_accuracy": self.row.test_accuracy,
            "eager_ms": compare.p50_ms(self.row, "eager"),
            "onnx_ms": compare.p50_ms(self.row, "onnxruntime"),
            "gated_ms": gated.p50_ms if gated else None,
            "engine_ms": min(engines, default=None),
            "parameters": self.row.parameters,
            "macs": self.row.macs,
            "confusion": self.confusion,
        }


def write(
    records: list[RunRecord], out: Path, unreadable: Sequence[Unreadable] = (), searches: Sequence[SearchRecord] = ()
) -> None:
    """Writes the page to `out`.

    Raises:
        UserError: the page cannot be written there.
    """
    page = render(records, unreadable, searches)
    try:
        write_atomically(out, page.encode())
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror}); choose another file") from None


def render(
    records: list[RunRecord], unreadable: Sequence[Unreadable] = (), searches: Sequence[SearchRecord] = ()
) -> str:
    """Renders the page as HTML, with its style, scripts, charts and pictures embedded."""
    from plotly.offline import get_plotlyjs

    runs = page_runs(records)
    outcomes, grids = compare.outcomes(records), find_grids(records)
    datasets = sorted({record.dataset for record in records})
    reported = figures.reported(outcomes)
    charts = [figures.curves(records, "loss"), figures.curves(records, "accuracy"), *filter(None, [reported])]
    charts += [search.chart(position) for position, search in enumerate(searches)]
    script_data = {
        "charts": charts,
        "runs": [run.for_script() for run in runs],
        "datasets": datasets,
        "grids": grids,
        "palette": figures.PALETTE,
    }
    hardware = sorted({str(record.config.hardware) for record in records})
    return _template().render(
        runs=runs,
        unreadable=unreadable,
        outcomes=outcomes,
        grids=grids,
        searches=searches,
        positions={run.record.run.folder.resolve(): run.position for run in runs},
        has_reported_chart=reported is not None,
        deployments=latencies_by_hardware(runs),
        machines=compare.latencies_by_machine(records),
        overview=compare.summarize_runs(records),
        counts=format_counts(records, unreadable),
        p50_ms=compare.p50_ms,
        best_gated=compare.best_gated,
        datasets=datasets,
        papers=sorted({record.config.paper for record in records}),
        provenance=_distinct_datasets(records),
        hardware=hardware,
        basis=f"{', '.join(datasets)}; trained on {', '.join(hardware)}",  # in the captions of charts of all runs
        # "<" could end the script element; JSON may escape it.
        data=msgspec.json.encode(script_data).decode().replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
    )


@functools.cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies |= {"json.dumps_function": _to_json, "json.dumps_kwargs": {}}
    return environment.get_template("page.html.j2")


def page_runs(records: list[RunRecord]) -> list[PageRun]:
    """Prepares all runs for the template; only the best one per architecture and dataset keeps its pictures."""
    best = compare.best_of_architectures(records)
    everything = range(len(records))
    overlaid = (best or everything)[:MAX_OVERLAID] if len(records) > MAX_OVERLAID else everything
    return [
        PageRun(position, record, compare.run_row(record), position in best, position in overlaid)
        for position, record in enumerate(records)
    ]


def latencies_by_hardware(runs: Iterable[PageRun]) -> dict[str, list[tuple[PageRun, LatencyCell]]]:
    """Groups the latencies of all runs at batch size 1 by the hardware that they were measured on."""
    by_hardware: dict[str, list[tuple[PageRun, LatencyCell]]] = {}
    for run in runs:
        if run.record.latency:
            entries = [(run, cell) for cell in run.row.latency if cell.batch == 1]
            by_hardware.setdefault(str(run.record.latency.hardware), []).extend(entries)
    return {hardware: entries for hardware, entries in by_hardware.items() if entries}


def _to_json(value: Any, **_: Any) -> str:
    """Encodes a value as JSON on one line, with spaces at which it can be wrapped."""
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


def _picture(path: Path) -> str | None:
    return base64.b64encode(read_bytes(path)).decode() if path.is_file() else None


def _distinct_datasets(records: list[RunRecord]) -> list[Dataset]:
    return list({record.config.dataset.fingerprint: record.config.dataset for record in records}.values())
