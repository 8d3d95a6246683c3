"""Writes the comparison as one HTML file that needs nothing but itself."""

import base64
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from data_prep.console import UserError
from runner.environment import described
from runner.report import collect, figures
from runner.report.collect import RunRecord, Unreadable
from runner.runs import write_atomically

OVERLAID = 10  # runs whose curves are drawn at first
# Of each run, what the page's script draws.
DRAWN = (
    "position", "name", "experiment", "test_accuracy", "eager_ms", "onnx_ms", "engine_ms", "parameters", "macs",
    "confusion",
)  # fmt: skip


def write(records: list[RunRecord], out: Path, unreadable: Sequence[Unreadable] = ()) -> None:
    """Writes the page to `out`.

    Raises:
        UserError: it cannot be written there.
    """
    page = render(records, unreadable)
    try:
        write_atomically(out, page.encode())
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror}); choose another place") from None


def render(records: list[RunRecord], unreadable: Sequence[Unreadable] = ()) -> str:
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
    pictured = collect.best_of_architectures(records)
    overlaid = pictured[:OVERLAID] if len(records) > OVERLAID else range(len(records))
    runs = [
        _shown(record, position, position in pictured) | {"overlaid": position in overlaid}
        for position, record in enumerate(records)
    ]
    experiments = collect.experiments(records)
    charts = [figures.curves(records, "loss"), figures.curves(records, "accuracy"), figures.reported(experiments)]
    data = {
        "charts": [chart for chart in charts if chart],
        "runs": [{key: run[key] for key in DRAWN} for run in runs],
        "grids": collect.grids(records),
        "palette": figures.PALETTE,
    }
    hardware = sorted({run["hardware"] for run in runs})
    return environment.get_template("page.html.j2").render(
        runs=runs,
        unreadable=unreadable,
        experiments=experiments,
        grids=data["grids"],
        reported_chart=figures.reported(experiments),
        deployments=_deployments(runs),
        datasets=sorted({record.dataset for record in records}),
        papers=sorted({run["paper"] for run in runs}),
        provenance=_provenance(records),
        hardware=hardware,
        # What every figure stands on, in its caption.
        basis=f"{', '.join(sorted({record.dataset for record in records}))}; trained on {', '.join(hardware)}",
        # In a script element, "<" could end it; JSON may spell it otherwise.
        data=json.dumps(data).replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
    )


def _shown(record: RunRecord, position: int, pictured: bool) -> dict[str, Any]:
    """What the template needs of one run; with its pictures or, to keep the page light, without."""
    row = collect.row(record)
    stopped = row["steps"] is not None and row["epochs"] < row["recipe_epochs"] - 1e-9
    samples, mistakes = record.run.figures / "samples.png", record.run.figures / "mistakes.png"
    classes = record.config["dataset"]["classes"]
    engines = [part["p50_ms"] for part in row["latency"] if part["backend"] not in collect.PORTABLE]
    return {
        **row,
        "position": position,
        "state": record.state,
        "told": record.told,
        "finished": record.summary is not None,
        "stopped_early": stopped,
        "comparable": not (stopped or row["overrides"] or row["teacher"] or row["started_from"])
        and collect.of_cifar10(record.dataset),
        "eager_ms": collect.p50(row, "eager"),
        "onnx_ms": collect.p50(row, "onnxruntime"),
        "engine_ms": min(engines) if engines else None,
        "confusion": figures.confusion(record, position),
        "samples": _inlined(samples) if pictured else None,
        "mistakes_image": _inlined(mistakes) if pictured else None,
        "mistakes": [
            {
                "label": classes[mistake["label"]],
                "predicted": classes[mistake["predicted"]],
                "probability": mistake["probability"],
                "sample": mistake["sample"],
            }
            for mistake in (record.mistakes or {}).get("mistakes", [])
        ],
        "config": record.config,
        "hardware": described(record.config["hardware"]),
        "parity_rows": (record.parity or {}).get("rows", []),
        "latency_rows": (record.latency or {}).get("rows", []),
        "latency_hardware": described(record.latency["hardware"]) if record.latency else None,
        "engine_sidecars": record.engines,
    }


def _inlined(picture: Path) -> str | None:
    return base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else None


def _deployments(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Latencies at batch 1 of all runs beside what the gate says of them, by the hardware they were measured on."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for part in run["latency"]:
            if part["batch"] == 1:
                entry = {**part, "run": run["name"], "position": run["position"]}
                found.setdefault(run["latency_hardware"], []).append(entry)
    return found


def _provenance(records: list[RunRecord]) -> list[dict[str, Any]]:
    """Every dataset once: what it is made of."""
    found = {record.config["dataset"]["fingerprint"]: record.config["dataset"] for record in records}
    return list(found.values())
