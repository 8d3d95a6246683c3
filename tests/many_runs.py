"""Folders of runs that never ran: of every form that a real one has, the same for the same number."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

from runner import experiments
from runner.recipe import Experiment, to_json

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HARDWARE = {"cpu": "No Processor", "cores": 2, "memory_gib": 1.0}
DATASET = {
    "name": "CIFAR-10", "folder": "/nowhere", "fingerprint": "0123456789abcdef", "classes": CLASSES,
    "image_shape": [32, 32, 3], "mean": [120.0] * 3, "std": [60.0] * 3, "source": {"kind": "none, a test made it"},
}  # fmt: skip
BACKENDS = (("eager", "fp32", 1.2), ("onnxruntime", "fp32", 0.7), ("onnxruntime", "int8-cpu", 0.3))


def write(folder: Path, count: int) -> None:
    """So many finished runs: those of podeti-grid, then every experiment, then second seeds of them."""
    chance = random.Random(0)
    known = [*experiments.load_grids()["podeti-grid"].items(), *experiments.load().items()]
    seeds: dict[str, int] = {}
    for number, (name, experiment) in enumerate(itertools.islice(itertools.cycle(known), count)):
        seed = seeds[name] = seeds.get(name, -1) + 1
        _write_one(folder / name / f"seed-{seed}", name, experiment, seed, f"run{number:05d}", chance)


def _write_one(
    run: Path, name: str, experiment: Experiment, seed: int, wandb_id: str, chance: random.Random
) -> None:
    accuracy, epochs = round(0.5 + 0.4 * chance.random(), 4), experiment.recipe.epochs
    config = {
        "format": 1, "experiment": name, "run": run.name, "paper": experiment.paper, "seed": seed,
        "max_steps": None,
        "architecture": to_json(experiment.architecture), "recipe": to_json(experiment.recipe), "overrides": {},
        "reported": experiment.reported and vars(experiment.reported),
        "parameters": experiment.parameters or 10**6,
        "macs": experiment.macs or 10**8, "teacher": None, "started_from": None, "dataset": DATASET, "input": {},
        "precision": "fp32", "device": "cpu", "world_size": 1, "threads": 2, "loader": "resident",
        "hardware": HARDWARE, "versions": {"torch": "0"}, "git": {}, "wandb_id": wandb_id,
        "group": experiment.paper,
    }  # fmt: skip
    summary = {
        "experiment": name, "run": str(run), "dataset": "CIFAR-10", "seed": seed, "epochs": float(epochs),
        "steps": 390 * epochs, "test_accuracy": accuracy, "test_loss": 1.0, "test_top5": 0.99,
        "test_calibration_error": 0.05, "test_images": 10_000, "best_epoch": float(epochs),
        "best_test_accuracy": accuracy, "validation_accuracy": accuracy, "best_validation_accuracy": accuracy,
        "test_accuracy_of_best_validation": accuracy, "class_accuracy": [accuracy] * 10,
        "confusion": [[1000 if row == column else 0 for column in range(10)] for row in range(10)],
    }  # fmt: skip
    rows = [
        {
            "global_step": 390 * epoch, "epoch": epoch, "train/loss": 2.3 - 1.5 * epoch / epochs,
            "train/accuracy": accuracy * epoch / epochs, "test/loss": 2.2 - 1.4 * epoch / epochs,
            "test/accuracy": accuracy * (1 - 0.5 / epoch), "lr": 0.1, "images_per_second": 1000.0,
        }
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip
    latency = [
        {"backend": backend, "provider": "CPU", "precision": precision, "batch": 1, "calls": 300,
         "onnx_sha256": None if backend == "eager" else precision,
         "p50_ms": round(factor * (1 + 20 * chance.random()), 3), "p90_ms": 50.0, "p99_ms": 60.0,
         "images_per_second": 500.0}
        for backend, precision, factor in BACKENDS
    ]  # fmt: skip
    parity = [
        {"precision": precision, "front_end": "normalised", "provider": "CPU", "images": 10_000,
         "onnx_sha256": precision,
         "accuracy": accuracy, "accuracy_change": 0.0, "agreement": 1.0, "largest_logit_difference": 1e-5,
         "limit": "agreement ≥ 99.99 %", "passed": True, "culprit": None, "onnx": f"deploy/model.{precision}.onnx"}
        for precision in ("fp32", "int8-cpu")
    ]  # fmt: skip
    (run / "deploy").mkdir(parents=True)
    files: dict[str, Any] = {
        "run.json": config, "summary.json": summary, "deploy/parity.json": {"rows": parity},
        "deploy/latency.json": {"hardware": HARDWARE, "rows": latency},
    }  # fmt: skip
    for path, content in files.items():
        (run / path).write_text(json.dumps(content))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
