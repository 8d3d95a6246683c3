"""The charts of the page, as plotly specifications: plain dictionaries that the page's script draws."""

from typing import Any

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
                        "run": index,
                        "line": {"color": _colour(index), "width": width},
                        "marker": {"size": 9},
                        "opacity": 0.7 if split == "train" else 1,
                    }
                )
    unit = ", %" if metric == "accuracy" else ", nats"
    layout = {"xaxis": {"title": {"text": "epoch"}}, "yaxis": {"title": {"text": metric + unit}}}
    return {"id": f"curve-{metric}", "data": data, "layout": layout}


def reported(entries: list[dict[str, Any]]) -> Chart | None:
    """Reported accuracies beside ours, an experiment a line; deviations over seeds as bars. None without any."""
    entries = [entry for entry in entries if entry["reported"] and entry["reproduced"] is not None]
    if not entries:
        return None
    names = [f"{entry['experiment']} ({', '.join(map(str, entry['seeds']))})" for entry in entries]
    deviations = [100 * (entry["reproduced_std"] or 0) for entry in entries]
    ours = {
        "type": "scatter",
        "mode": "markers",
        "name": "ours, mean over seeds",
        "x": [100 * entry["reproduced"] for entry in entries],
        "y": names,
        "error_x": {"type": "data", "array": deviations},
        "marker": {
            "size": 10,
            "color": PALETTE[0],
            "symbol": ["circle" if entry["difference"] is not None else "circle-open" for entry in entries],
        },
        "hovertemplate": "%{y}<br>ours %{x:.2f} %<extra></extra>",
    }
    theirs = {
        "type": "scatter",
        "mode": "markers",
        "name": "reported",
        "x": [100 * entry["reported"]["accuracy"] for entry in entries],
        "y": names,
        "marker": {"size": 11, "symbol": "diamond-open", "color": PALETTE[2], "line": {"width": 2}},
        "hovertemplate": "%{y}<br>reported %{x:.2f} %<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "accuracy, %"}},
        "yaxis": {"automargin": True, "autorange": "reversed"},
        "height": 160 + 26 * len(entries),
    }
    return {"id": "reported", "data": [theirs, ours], "layout": layout}


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
