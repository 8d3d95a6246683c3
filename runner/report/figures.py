"""The charts of the page as plotly specifications: plain dicts that the page's script draws."""

import html
from collections.abc import Iterable
from typing import Any, Literal

from runner.report.compare import Outcome
from runner.report.run_record import RunRecord

PALETTE = [
    "#4269d0",
    "#efb118",
    "#ff725c",
    "#3ca951",
    "#a463f2",
    "#6cc5b0",
    "#9c6b4e",
    "#ff8ab7",
    "#97bbf5",
    "#9498a0",
]
Chart = dict[str, Any]


def curves(records: list[RunRecord], metric: Literal["loss", "accuracy"]) -> Chart:
    """Builds the chart of a metric over epochs: training as lines, test as lines with markers, for every run."""
    traces = []
    scale = 100 if metric == "accuracy" else 1
    for index, record in enumerate(records):
        for split, mode, width in (("train", "lines", 1.2), ("test", "lines+markers", 2)):
            points = [(row.epoch, getattr(row, f"{split}_{metric}")) for row in record.metrics]
            points = [(epoch, scale * value) for epoch, value in points if value is not None]
            if points:
                shown = split == "test" or all(getattr(row, f"test_{metric}") is None for row in record.metrics)
                x, y = zip(*points, strict=True)
                traces.append(
                    {
                        "type": "scatter",
                        "mode": mode,
                        "x": x,
                        "y": y,
                        "name": html.escape(record.name if shown else f"{record.name} {split}", quote=False),
                        "legendgroup": record.name,
                        "showlegend": shown,
                        "run": index,
                        "line": {"color": PALETTE[index % len(PALETTE)], "width": width},
                        "marker": {"size": 9},
                        "opacity": 0.7 if split == "train" else 1,
                    }
                )
    unit = ", %" if metric == "accuracy" else ", nats"
    layout = {"xaxis": {"title": {"text": "epoch"}, "rangemode": "tozero"}, "yaxis": {"title": {"text": metric + unit}}}
    return {"id": f"curve-{metric}", "data": traces, "layout": layout}


def reported(outcomes: Iterable[Outcome]) -> Chart | None:
    """Builds the chart of reported and reproduced accuracies, with error bars over seeds; None if there are none."""
    rows = [one for one in outcomes if one.reported and one.reproduced is not None]
    if not rows:
        return None
    several_datasets = len({one.dataset for one in rows}) > 1
    labels = {}
    for one in rows:
        lines = [html.escape(str(one.label), quote=False).replace(" (", "<br>(", 1) + f", {one.seed_count}"]
        labels[id(one)] = "<br>".join([*lines, html.escape(one.dataset, quote=False)] if several_datasets else lines)
    reported_trace = {
        "type": "scatter",
        "mode": "markers",
        "name": "reported",
        "x": [100 * one.reported.accuracy for one in rows if one.reported],
        "y": [labels[id(one)] for one in rows],
        "marker": {"size": 11, "symbol": "diamond-open", "color": PALETTE[2], "line": {"width": 2}},
        "hovertemplate": "%{y}<br>reported %{x:.2f} %<extra></extra>",
    }
    traces = [reported_trace]
    for name, several in (("reproduced", False), ("reproduced, mean over seeds ± deviation", True)):
        group = [one for one in rows if (one.reproduced_std is not None) == several]
        if group:
            traces.append(_measured(name, group, [labels[id(one)] for one in group]))
    layout = {
        "xaxis": {"title": {"text": "accuracy, %"}},
        "yaxis": {"automargin": True, "autorange": "reversed"},
        "height": 170 + (56 if several_datasets else 40) * len(rows),
    }
    return {"id": "reported", "data": traces, "layout": layout}


def _measured(name: str, outcomes: list[Outcome], labels: list[str]) -> Chart:
    """Builds a trace of reproduced accuracies, with their standard deviations as error bars if there are any."""
    deviations = [100 * one.reproduced_std for one in outcomes if one.reproduced_std is not None]
    error = {"error_x": {"type": "data", "array": deviations}} if deviations else {}
    return error | {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [100 * (one.reproduced or 0) for one in outcomes],
        "y": labels,
        "marker": {
            "size": 10,
            "color": PALETTE[0],
            "symbol": ["circle" if one.difference is not None else "circle-open" for one in outcomes],
        },
        "hovertemplate": "%{y}<br>reproduced %{x:.2f} %<extra></extra>",
    }


def confusion(record: RunRecord, position: int) -> Chart | None:
    """Builds a run's confusion matrix, colored by the share of each label's images; None if the run is unfinished."""
    if record.summary is None:
        return None
    counts = record.summary.confusion
    classes = [html.escape(name) for name in record.config.dataset.classes]  # plotly reads names as HTML
    trace = {
        "type": "heatmap",
        "z": [[count / max(1, sum(row)) for count in row] for row in counts],
        "x": classes,
        "y": classes,
        "text": counts,
        "texttemplate": "%{text}",
        "hovertemplate": "%{text} images of %{y} predicted as %{x}<extra></extra>",
        "zmin": 0,
        "zmax": 1,
        "showscale": False,
    }
    layout = {
        # Categorical axes: otherwise, plotly would interpret numeric class names as positions.
        "xaxis": {"type": "category", "title": {"text": "predicted"}, "tickangle": -45, "automargin": True},
        "yaxis": {"type": "category", "title": {"text": "label"}, "autorange": "reversed", "automargin": True},
        "height": 480,
    }
    return {"id": f"confusion-{position}", "data": [trace], "layout": layout}
