"""Reads run folders into the values that a report shows."""

import json
import statistics
from dataclasses import dataclass
from typing import Any

from data_prep.console import UserError
from runner.runs import Run, State, read_json, read_metrics

PORTABLE = ("eager", "compiled", "onnxruntime")  # backends; any other is an engine's
PARITY_KEYS = (
    "precision", "front_end", "provider", "images", "accuracy", "accuracy_change", "agreement",
    "largest_logit_difference", "limit", "passed", "culprit",
)  # fmt: skip
LATENCY_KEYS = (
    "backend", "provider", "precision", "batch", "p50_ms", "p90_ms", "p99_ms", "images_per_second", "calls",
)  # fmt: skip
UNMEASURED_KEYS = ("backend", "precision", "not_measured")
GATE_KEYS = ("onnx_sha256", "engine_sha256", "provider")  # which tell what a row of the gate or a latency is of
SIDECAR_KEYS = ("precision", "backend", "version", "bytes", "target", "batch")
MISTAKE_KEYS = ("sample", "label", "predicted", "probability")
LEAST_OF_GRID = 4  # runs that a heat map wants


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
    mistakes: dict[str, Any] | None
    state: State
    told: str

    @property
    def name(self) -> str:
        """`experiment/run`, the label of curves."""
        return f"{self.config['experiment']}/{self.config['run']}"

    @property
    def dataset(self) -> str:
        """The label of the dataset, on every figure."""
        return self.config["dataset"]["name"]


@dataclass(frozen=True)
class Unreadable:
    """A run folder whose files are damaged, and what is wrong with them."""

    run: Run
    told: str


def read_all(runs: list[Run]) -> tuple[list[RunRecord], list[Unreadable]]:
    """Reads every run folder; one that is damaged keeps no other from being shown."""
    records, unreadable = [], []
    for run in runs:
        try:
            record = read(run)
            row(record)
            _check_rows(record)
            records.append(record)
        except UserError as error:
            unreadable.append(Unreadable(run, str(error)))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            told = f"not of this version's form ({type(error).__name__}: {error})"
            unreadable.append(Unreadable(run, told))
    return records, unreadable


def _check_rows(record: RunRecord) -> None:
    """Raises KeyError where a row lacks what the page shows of it."""
    kinds = (
        ((record.parity or {}).get("rows", []), PARITY_KEYS),
        ([part for part in (record.latency or {}).get("rows", []) if "p50_ms" in part], LATENCY_KEYS),
        ([part for part in (record.latency or {}).get("rows", []) if "p50_ms" not in part], UNMEASURED_KEYS),
        (record.engines, SIDECAR_KEYS),
        ((record.mistakes or {}).get("mistakes", []), MISTAKE_KEYS),
    )
    for rows, keys in kinds:
        for part in rows:
            for key in keys:
                part[key]


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
        mistakes=optional("figures/mistakes.json"),
        state=(state := run.state()),
        told=read_json(run.ended)["told"] if state in ("stopped", "failed") else "",
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
            | {"gate": gate((record.parity or {}).get("rows", []), part)}
            for part in (record.latency or {}).get("rows", [])
            if "p50_ms" in part
        ],
    }


def of_cifar10(dataset: str) -> bool:
    """Whether a dataset of this name is CIFAR-10, or a copy of it that its name tells of."""
    return dataset == "CIFAR-10" or dataset.startswith("CIFAR-10 ")


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
        comparable = comparable and alone and not first["overrides"] and of_cifar10(first["dataset"])
        entry["difference"] = entry["reproduced"] - reported["accuracy"] if comparable else None
        found.append(entry)
    return found


def best_of_architectures(records: list[RunRecord]) -> list[int]:
    """Of every architecture and dataset the position of the finished run with the highest accuracy."""
    best: dict[tuple[str, str], tuple[float, int]] = {}
    for position, record in enumerate(records):
        if record.summary is not None:
            key = (record.config["architecture"]["factory"], record.dataset)
            best[key] = max(best.get(key, (-1.0, 0)), (record.summary["test_accuracy"], position))
    return sorted(position for _, position in best.values())


def grids(records: list[RunRecord]) -> list[dict[str, Any]]:
    """Finished runs of one grid or paper that differ in two or more ways, for heat maps of their accuracy.

    Returns:
        For each: its name; `factors`, by dotted name the values that occur, those first that move the accuracy
        most; and `cells`, a row for each run with the value of every factor, as shown, and its accuracy.
    """
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        if record.summary is not None:
            experiment = record.config["experiment"]
            name = experiment.partition("/")[0] if "/" in experiment else record.config["paper"]
            groups.setdefault((name, record.dataset), []).append(record)
    found = []
    for (name, dataset), members in groups.items():
        leaves = [
            _leaves("", {key: record.config[key] for key in ("architecture", "recipe")}) for record in members
        ]
        keys = list(dict.fromkeys(key for one in leaves for key in one))
        cells = [{key: _told(one.get(key)) for key in keys} for one in leaves]
        varying = [key for key in keys if len({cell[key] for cell in cells}) > 1]
        if len(members) < LEAST_OF_GRID or len(varying) < 2:
            continue
        accuracies = [record.summary["test_accuracy"] for record in members if record.summary]
        effects = {key: _effect([cell[key] for cell in cells], accuracies) for key in varying}
        varying.sort(key=lambda key: -effects[key])
        found.append(
            {
                "name": name,
                "dataset": dataset,
                "factors": {key: sorted({cell[key] for cell in cells}, key=_by_number) for key in varying},
                "cells": [
                    {key: cell[key] for key in varying} | {"accuracy": accuracy, "run": record.name}
                    for cell, accuracy, record in zip(cells, accuracies, members, strict=True)
                ],
            }
        )
    return found


def _leaves(prefix: str, value: Any) -> dict[str, Any]:
    """The leaves of nested dicts by dotted name; the module of a factory is left out."""
    if not isinstance(value, dict):
        return {prefix: value.rpartition(":")[2] if prefix.endswith(".factory") else value}
    parts = [_leaves(f"{prefix}.{key}" if prefix else key, part) for key, part in value.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}


def _told(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _by_number(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def _effect(values: list[str], accuracies: list[float]) -> float:
    """How far apart the mean accuracies of a factor's values lie."""
    means = [
        statistics.mean(a for v, a in zip(values, accuracies, strict=True) if v == value) for value in set(values)
    ]
    return max(means) - min(means)


def agreement(record: RunRecord) -> float | None:
    """Top-1 agreement of the fp32 ONNX file with the model, where it was scored."""
    rows = (record.parity or {}).get("rows", [])
    found = [row["agreement"] for row in rows if (row["precision"], row["front_end"]) == ("fp32", "normalised")]
    return found[0] if found else None


def gate(parity_rows: list[dict[str, Any]], latency_row: dict[str, Any]) -> dict[str, Any] | None:
    """The gate's figures of what a latency is of: the same file, engine and provider; None of torch itself."""
    of = [latency_row.get(key) for key in GATE_KEYS]
    for row in parity_rows:
        if of[0] is not None and [row.get(key) for key in GATE_KEYS] == of:
            return {key: row[key] for key in ("accuracy_change", "agreement", "passed")}
    return None


def p50(record_row: dict[str, Any], backend: str, batch: int = 1, precision: str = "fp32") -> float | None:
    """The median latency in milliseconds of a backend in a row, where it was measured."""
    wanted = (backend, batch, precision)
    found = [
        part["p50_ms"]
        for part in record_row["latency"]
        if (part["backend"], part["batch"], part["precision"]) == wanted
    ]
    return found[0] if found else None
