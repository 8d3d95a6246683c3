"""Reads run folders into the values that a report shows."""

import json
import statistics
from dataclasses import dataclass
from typing import Any

from runner.runs import Run, read_json, read_metrics


@dataclass(frozen=True)
class RunRecord:
    """Everything that a run folder holds, as it was written. What is missing is None, and said on the page."""

    run: Run
    config: dict[str, Any]
    summary: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    parity: dict[str, Any] | None
    engines: list[dict[str, Any]]
    latency: dict[str, Any] | None

    @property
    def name(self) -> str:
        """`experiment/run`, the label of curves."""
        return f"{self.config['experiment']}/{self.config['run']}"

    @property
    def dataset(self) -> str:
        """The label of the dataset, on every figure."""
        return self.config["dataset"]["name"]


def read(run: Run) -> RunRecord:
    """Reads one run folder, finished or not.

    Raises:
        UserError: a file in it is damaged.
    """

    def optional(name: str) -> dict[str, Any] | None:
        path = run.folder / name
        return read_json(path) if path.is_file() else None

    return RunRecord(
        run=run,
        config=run.config(),
        summary=optional("summary.json"),
        metrics=read_metrics(run),
        parity=optional("deploy/parity.json"),
        engines=[read_json(path) for path in sorted((run.folder / "deploy").glob("model.*.engine.json"))],
        latency=optional("deploy/latency.json"),
    )


def row(record: RunRecord) -> dict[str, Any]:
    """One row of the comparison: figures by name, None where there is none."""
    config, summary = record.config, record.summary or {}
    return {
        "name": record.name,
        "experiment": config["experiment"],
        "paper": config["paper"],
        "dataset": record.dataset,
        "epochs": summary.get("epochs"),
        "recipe_epochs": config["overrides"].get("recipe.epochs", [config["recipe"]["epochs"]])[0],
        "steps": summary.get("steps"),
        "test_accuracy": summary.get("test_accuracy"),
        "test_loss": summary.get("test_loss"),
        "test_top5": summary.get("test_top5"),
        "test_calibration_error": summary.get("test_calibration_error"),
        "test_accuracy_augmented": summary.get("test_accuracy_augmented"),
        "validation_accuracy": summary.get("validation_accuracy"),
        "reproduced": reproduced(record),
        "test_images": summary.get("test_images"),
        "reported": config["reported"],
        "overrides": config["overrides"],
        "teacher": origin(config, "teacher"),
        "started_from": origin(config, "started_from"),
        "seed": config["seed"],
        "precision": config["precision"],
        "world_size": config["world_size"],
        "parameters": config["parameters"],
        "macs": config["macs"],
        "parity": [
            {key: part[key] for key in ("precision", "front_end", "provider", "agreement", "accuracy", "passed")}
            for part in (record.parity or {}).get("rows", [])
        ],
        "onnx_agreement": agreement(record),
        "engines": [
            {key: sidecar[key] for key in ("precision", "backend", "version", "bytes", "target")}
            for sidecar in record.engines
        ],
        "latency": [
            {
                key: part[key]
                for key in ("backend", "precision", "batch", "p50_ms", "p90_ms", "p99_ms", "images_per_second")
            }
            for part in (record.latency or {}).get("rows", [])
            if "p50_ms" in part
        ],
    }


def origin(config: dict[str, Any], kind: str) -> str | None:
    """The experiment whose run a run learned from ("teacher") or went on from ("started_from")."""
    return config[kind] and config[kind]["experiment"]


def reproduced(record: RunRecord) -> float | None:
    """Our accuracy of the kind that the paper reported: on the same set, of the same epoch.

    None where nothing was reported, the run is unfinished, or it held no validation images out.
    """
    reported, summary = record.config["reported"], record.summary
    if reported is None or summary is None:
        return None
    best = "best" in reported["epoch"]
    if reported["on"] == "validation":
        return summary.get("best_validation_accuracy" if best else "validation_accuracy")
    # With validation images held out, the best epoch was chosen on them.
    of_best = summary.get("best_test_accuracy", summary.get("test_accuracy_of_best_validation"))
    return of_best if best else summary["test_accuracy"]


def experiments(records: list[RunRecord]) -> list[dict[str, Any]]:
    """Finished runs that differ in their seed alone, together: means and standard deviations over seeds.

    Deviations are those of a sample (n - 1), and None for a single seed.
    """
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.summary is not None:
            config = record.config
            what = [config["experiment"], config["architecture"], config["recipe"], config["max_steps"]]
            what += [config["teacher"], config["started_from"], config["world_size"]]
            key = json.dumps([*what, config["dataset"]["fingerprint"], config["precision"]], sort_keys=True)
            groups.setdefault(key, []).append(record)
    found: list[dict[str, Any]] = []
    for members in groups.values():
        rows = [row(member) for member in members]
        first, of = rows[0], members[0].config
        entry = {
            key: first[key] for key in ("experiment", "paper", "dataset", "epochs", "recipe_epochs", "reported")
        }
        entry |= {key: first[key] for key in ("teacher", "started_from")}
        entry |= {
            "overrides": first["overrides"],
            "folders": [str(member.run.folder) for member in members],
            "runs": len(rows),
            "seeds": sorted({r["seed"] for r in rows}),
        }
        for name in ("test_accuracy", "reproduced"):
            figures = [r[name] for r in rows if r[name] is not None]
            entry[name] = statistics.mean(figures) if figures else None
            entry[f"{name}_std"] = statistics.stdev(figures) if len(figures) > 1 else None
        reported = entry["reported"]
        comparable = entry["reproduced"] is not None and first["epochs"] >= first["recipe_epochs"] - 1e-9
        alone = of["teacher"] is None and of["started_from"] is None
        comparable = comparable and alone and not first["overrides"] and first["dataset"].startswith("CIFAR-10")
        entry["difference"] = entry["reproduced"] - reported["accuracy"] if comparable else None
        found.append(entry)
    return found


def agreement(record: RunRecord) -> float | None:
    """Top-1 agreement of the fp32 ONNX file with the model, where it was scored."""
    rows = (record.parity or {}).get("rows", [])
    found = [row["agreement"] for row in rows if (row["precision"], row["front_end"]) == ("fp32", "normalised")]
    return found[0] if found else None


def p50(record_row: dict[str, Any], backend: str, batch: int = 1, precision: str = "fp32") -> float | None:
    """The median latency in milliseconds of a backend in a row, where it was measured."""
    wanted = (backend, batch, precision)
    found = [
        part["p50_ms"]
        for part in record_row["latency"]
        if (part["backend"], part["batch"], part["precision"]) == wanted
    ]
    return found[0] if found else None
