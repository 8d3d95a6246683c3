"""Writes run folders without training; they have every file of a real run, and the same content for the same count."""

import itertools
import random
from pathlib import Path

from runner import experiments
from runner.common.files import write_json as write_file
from runner.config.recipe import Experiment
from runner.run.folder import Run
from runner.run.metrics import encode_row
from runner.run.schema import (
    FrontEnd,
    GateResult,
    Hardware,
    LatencyReport,
    LatencyRow,
    Method,
    MetricRow,
    ParityReport,
    ParityRow,
    Summary,
)
from tests.support.configs import config_of

HARDWARE = Hardware(cpu="No Processor", cores=2, memory_gib=1.0)
BACKENDS = (("eager", "fp32", 1.2), ("onnxruntime", "fp32", 0.7), ("onnxruntime", "int8-cpu", 0.3))


def write(folder: Path, count: int) -> None:
    """Writes `count` finished runs: of podeti-grid, then of every experiment, then of further seeds."""
    rng = random.Random(0)
    known = [*experiments.load_grids()["podeti-grid"].items(), *experiments.load().items()]
    seeds: dict[str, int] = {}
    for number, (name, experiment) in enumerate(itertools.islice(itertools.cycle(known), count)):
        seed = seeds[name] = seeds.get(name, -1) + 1
        write_run(Run(folder / name / f"seed-{seed}"), name, experiment, seed, f"run{number:05d}", rng)


def write_run(run: Run, name: str, experiment: Experiment, seed: int, wandb_id: str, rng: random.Random) -> None:
    """Writes one finished run with random accuracy and latencies."""
    accuracy, epochs = round(0.5 + 0.4 * rng.random(), 4), experiment.recipe.epochs
    config = config_of(
        experiment=name, run=run.folder.name, paper=experiment.paper, seed=seed, architecture=experiment.architecture,
        recipe=experiment.recipe, reported=experiment.reported, parameters=experiment.parameters or 10**6,
        macs=experiment.macs or 10**8, dataset="CIFAR-10", hardware=HARDWARE, wandb_id=wandb_id, group=experiment.paper,
    )  # fmt: skip
    summary = Summary(
        experiment=name, run=str(run.folder), dataset="CIFAR-10", seed=seed, epochs=float(epochs), steps=390 * epochs,
        test_accuracy=accuracy, test_loss=1.0, test_top5=0.99, test_calibration_error=0.05, test_images=10_000,
        best_epoch=float(epochs), best_test_accuracy=accuracy, validation_accuracy=accuracy,
        best_validation_accuracy=accuracy, test_accuracy_of_best_validation=accuracy, class_accuracy=[accuracy] * 10,
        confusion=[[1000 if row == column else 0 for column in range(10)] for row in range(10)],
    )  # fmt: skip
    rows = [
        MetricRow(
            global_step=390 * epoch, epoch=epoch, train_loss=2.3 - 1.5 * epoch / epochs,
            train_accuracy=accuracy * epoch / epochs, test_loss=2.2 - 1.4 * epoch / epochs,
            test_accuracy=accuracy * (1 - 0.5 / epoch), lr=0.1, images_per_second=1000.0,
        )
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip
    gate = GateResult(accuracy_change=0.0, agreement=1.0, passed=True)
    latencies = [
        LatencyRow(
            backend=backend, provider="CPU", precision=precision, batch=1, calls=300,
            onnx_sha256=None if backend == "eager" else precision, gate=None if backend == "eager" else gate,
            p50_ms=round(factor * (1 + 20 * rng.random()), 3), p90_ms=50.0, p99_ms=60.0, images_per_second=500.0,
        )
        for backend, precision, factor in BACKENDS
    ]  # fmt: skip
    parities = [
        ParityRow(
            backend="onnxruntime", onnx=f"deploy/model.{precision}.onnx", onnx_sha256=precision, precision=precision,
            front_end=FrontEnd.NORMALIZED, provider="CPU", images=10_000, accuracy=accuracy, accuracy_change=0.0,
            agreement=1.0, class_change=[0.0] * 10, largest_logit_difference=1e-5, limit="agreement ≥ 99.99 %",
            passed=True,
        )
        for precision in ("fp32", "int8-cpu")
    ]  # fmt: skip
    parity = ParityReport(
        run=str(run.folder), dataset="CIFAR-10", images=10_000, eager_accuracy=accuracy, hardware=HARDWARE,
        versions={"torch": "0"}, rows=parities,
    )  # fmt: skip
    latency = LatencyReport(
        run=str(run.folder), weights="0", dataset="CIFAR-10", device="cpu", hardware=HARDWARE, versions={"torch": "0"},
        method=Method(warmup_seconds=1.0, seconds=3.0, repeats=100), rows=latencies,
    )  # fmt: skip
    for path, content in (
        (run.run_json, config), (run.summary, summary), (run.parity, parity), (run.latency, latency),
    ):  # fmt: skip
        write_file(path, content)
    run.metrics.write_bytes(b"".join(map(encode_row, rows)))
