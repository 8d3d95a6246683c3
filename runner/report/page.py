"""Writes the comparison as one HTML file that needs nothing but itself."""

import base64
import json
from importlib import resources
from pathlib import Path
from typing import Any

from data_prep.console import UserError
from runner.environment import described
from runner.report import collect, figures
from runner.report.collect import RunRecord
from runner.runs import write_atomically


def write(records: list[RunRecord], out: Path) -> None:
    """Writes the page to `out`.

    Raises:
        UserError: it cannot be written there.
    """
    page = render(records)
    try:
        write_atomically(out, page.encode())
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror}); choose another place") from None


def render(records: list[RunRecord]) -> str:
    """The page as text; everything it shows is inside it."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs = [_shown(record, position) for position, record in enumerate(records)]
    charts = [
        figures.accuracy_against_latency(records),
        figures.curves(records, "loss"),
        figures.curves(records, "accuracy"),
        *(run["confusion"] for run in runs if run["confusion"]),
    ]
    return environment.get_template("page.html.j2").render(
        runs=runs,
        experiments=collect.experiments(records),
        datasets=sorted({record.dataset for record in records}),
        hardware=sorted({described(record.config["hardware"]) for record in records}),
        # In a script element, "<" could end it; JSON may spell it otherwise.
        charts=json.dumps(charts).replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
    )


def _shown(record: RunRecord, position: int) -> dict[str, Any]:
    """What the template needs of one run."""
    row = collect.row(record)
    stopped = row["steps"] is not None and row["epochs"] < row["recipe_epochs"] - 1e-9
    samples = record.run.figures / "samples.png"
    return {
        **row,
        "position": position,
        "finished": record.summary is not None,
        "stopped_early": stopped,
        "comparable": not (stopped or row["overrides"] or row["teacher"] or row["started_from"])
        and record.dataset.startswith("CIFAR-10"),
        "eager_ms": collect.p50(row, "eager"),
        "onnx_ms": collect.p50(row, "onnxruntime"),
        "confusion": figures.confusion(record, position),
        "samples": base64.b64encode(samples.read_bytes()).decode() if samples.is_file() else None,
        "config": record.config,
        "hardware": described(record.config["hardware"]),
        "parity_rows": (record.parity or {}).get("rows", []),
        "latency_rows": (record.latency or {}).get("rows", []),
        "latency_hardware": described(record.latency["hardware"]) if record.latency else None,
        "engine_sidecars": record.engines,
    }
