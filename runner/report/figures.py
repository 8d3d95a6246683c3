"""The charts of the page, as plotly specifications: plain dictionaries that the page's script draws."""

import math
from typing import Any

from runner.report import collect
from runner.report.collect import RunRecord

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


def accuracy_against_latency(records: list[RunRecord]) -> Chart:
    """One point for each run: onnxruntime's p50 at batch 1 against test accuracy, its area the parameters."""
    data = []
    for index, record in enumerate(records):
        row = collect.row(record)
        latency = collect.p50(row, "onnxruntime")
        if latency is None or row["test_accuracy"] is None:
            continue
        size = 14 if not row["parameters"] else 10 + 8 * (row["parameters"] / 1e6) ** 0.5
        parameters = f"{row['parameters']:,}" if row["parameters"] else "not counted"
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": [latency],
                "y": [100 * row["test_accuracy"]],
                "text": [record.name],
                "textposition": "top center",
                "marker": {"size": size, "color": _colour(index), "opacity": 0.85},
                "hovertemplate": f"{record.name}<br>{row['test_accuracy']:.2%}, %{{x:.2f}} ms<br>{parameters} "
                "parameters<extra></extra>",
                "showlegend": False,
            }
        )
    latencies = [point["x"][0] for point in data] or [1]
    room = [math.log10(min(latencies)) - 0.3, math.log10(max(latencies)) + 0.3]  # for the names beside the points
    layout = {
        "xaxis": {"title": {"text": "onnxruntime p50 at batch 1, ms (log)"}, "type": "log", "range": room},
        "yaxis": {"title": {"text": "test accuracy, %"}},
    }
    return {"id": "tradeoff", "data": data, "layout": layout}


def curves(records: list[RunRecord], metric: str) -> Chart:
    """Training (line) and test (points) of `metric`, "loss" or "accuracy", over epochs, for every run."""
    data = []
    scale = 100 if metric == "accuracy" else 1
    for index, record in enumerate(records):
        for split, mode, width in (("train", "lines", 1.2), ("test", "lines+markers", 2)):
            points = [
                (row["epoch"], scale * row[key]) for row in record.metrics if (key := f"{split}/{metric}") in row
            ]
            if points:
                x, y = zip(*points, strict=True)
                data.append(
                    {
                        "type": "scatter",
                        "mode": mode,
                        "x": list(x),
                        "y": list(y),
                        "name": f"{record.name} {split}",
                        "legendgroup": record.name,
                        "line": {"color": _colour(index), "width": width},
                        "marker": {"size": 9},
                        "opacity": 0.7 if split == "train" else 1,
                    }
                )
    unit = ", %" if metric == "accuracy" else ", nats"
    layout = {"xaxis": {"title": {"text": "epoch"}}, "yaxis": {"title": {"text": metric + unit}}}
    return {"id": f"curve-{metric}", "data": data, "layout": layout}


def confusion(record: RunRecord, position: int) -> Chart | None:
    """Shares of each label's images by predicted class."""
    if record.summary is None:
        return None
    counts = record.summary["confusion"]
    classes = record.config["dataset"]["classes"]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    data = {
        "type": "heatmap",
        "z": shares,
        "x": classes,
        "y": classes,
        "text": counts,
        "texttemplate": "%{text}",
        "hovertemplate": "%{text} images of %{y} taken for %{x}<extra></extra>",
        "zmin": 0,
        "zmax": 1,
        "showscale": False,
    }
    layout = {
        "xaxis": {"title": {"text": "predicted"}, "tickangle": -45, "automargin": True},
        "yaxis": {"title": {"text": "label"}, "autorange": "reversed", "automargin": True},
        "height": 480,
    }
    return {"id": f"confusion-{position}", "data": [data], "layout": layout}


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]
