"""Measures, on the CPU, what deployment gains and what `runner export` costs, for runs that passed `runner parity`.

Compares every backend with eager torch by its median latency on one thread, for each batch size. Also compares
`runner export`, which includes hashes and a quick check, with a bare export, which loads the weights, runs torch's
exporter and saves the file. All candidates take turns.

    python -m runner.benchmarks.deploy runs/podeti-resnet18/seed-0 runs/podeti-mobilenetv2/seed-0 --json deploy.json
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tyro

from runner.benchmarks import measure, program
from runner.commands.options import Code, open_run
from runner.common.console import new_table, print_table
from runner.common.errors import UserError
from runner.config.recipe import Count
from runner.config.trust import TrustedCode
from runner.run.folder import WEIGHTS, Run
from runner.run.schema import Precision

SECONDS, CALLS = 0.5, 7  # minimum duration and number of calls of a measurement, which is their median
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8-cpu")  # of the ONNX files
GOALS = {"podeti-resnet18": "≤ 0.5", "podeti-mobilenetv2": "≤ 0.8"}  # for the ratio of int8 to fp32
Backend = Literal["eager", "compiled", "aotinductor", "onnxruntime"]


class BackendRow(msgspec.Struct, kw_only=True):
    """The latency of a backend, relative to that of eager torch in fp32 at the same batch size.

    Attributes:
        epochs: epochs that the run was trained for.
        ratio: latency ÷ eager torch's latency, taken round by round.
        fastest: whether it has the lowest median latency of all backends and precisions at this batch size.
    """

    experiment: str
    seed: int
    epochs: float
    dataset: str
    backend: Backend
    precision: Precision
    batch: int
    ratio: measure.Spread
    fastest: bool


@dataclass(frozen=True)
class DeployBenchmark:
    """Compare backends with eager torch, int8 with fp32, and `runner export` with torch's exporter, in turn."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
    """Run folders, exported in fp32 and int8-cpu and scored by `runner parity` on this CPU; they are not modified."""
    batch: tuple[Count, ...] = (1, 8, 32)
    """Batch sizes, among them 1."""
    backend: tuple[Backend, ...] = ("eager", "onnxruntime")
    """Backends to compare, among them eager and onnxruntime; aotinductor needs `runner export --aot-inductor cpu` and
    `runner parity --backend aotinductor`."""
    code: Code = TrustedCode()
    rounds: measure.Rounds = measure.MIN_ROUNDS
    """Number of measurements per candidate."""
    json: Path | None = None
    """File for the ratios, with hardware and versions."""

    def __call__(self) -> None:
        if 1 not in self.batch or len(set(self.batch)) < len(self.batch):
            raise UserError(f"--batch {' '.join(map(str, self.batch))}: expected 1 among them, and each once")
        if not {"eager", "onnxruntime"} <= set(self.backend):
            raise UserError(f"--backend {' '.join(self.backend)}: expected eager and onnxruntime among them")
        experiments = [open_run(folder, self.code).config().experiment for folder in self.runs]
        if len(set(experiments)) < len(experiments):
            raise UserError(f"RUNS: expected one run of each experiment, found {', '.join(experiments)}")
        ratios: dict[str, measure.Spread] = {}
        goals: dict[str, str] = {}
        rows: list[BackendRow] = []
        for folder in self.runs:
            run = open_run(folder, self.code)
            experiment = run.config().experiment
            name = experiment.replace("-", "_")
            for batch in self.batch:
                times = self.measure_backends(run, batch)
                rows += backend_rows(run, batch, times)
                if batch == 1:
                    fp32, int8 = times["onnxruntime", "fp32"], times["onnxruntime", "int8-cpu"]
                    eager = times["eager", "fp32"]
                    ratios[f"ratio_onnxruntime_to_eager_{name}"] = measure.ratio(fp32, eager)
                    ratios[f"ratio_int8_to_fp32_{name}"] = measure.ratio(int8, fp32)
            with tempfile.TemporaryDirectory() as scratch:
                exports = measure.interleaved(_exporters(run, Path(scratch)), self.rounds, f"export {folder}")
            ratios[f"ratio_export_to_bare_{name}"] = measure.ratio(exports["export"], exports["bare"])
            goals[f"ratio_onnxruntime_to_eager_{name}"] = "≤ 0.6"
            goals[f"ratio_export_to_bare_{name}"] = "≤ 1.2"
            if goal := GOALS.get(experiment):
                goals[f"ratio_int8_to_fp32_{name}"] = goal
        show(rows)
        settings = {"threads": 1, "seconds": SECONDS, "calls": CALLS}
        measure.report_ratios(
            "deployment on the CPU", ratios, goals, {"backends": rows, "settings": settings}, self.json
        )

    def measure_backends(self, run: Run, batch: int) -> dict[tuple[Backend, Precision], list[float]]:
        """Returns the median latencies of each backend and precision in milliseconds, one per round.

        Raises:
            UserError: a backend cannot run here, or the gate refuses it.
        """
        import numpy as np
        import torch

        from runner.deploy import latency, onnx
        from runner.system import cpu

        cpu.prepare()
        torch.set_num_threads(1)
        options = latency.BenchOptions((batch,), PRECISIONS, self.backend, SECONDS, CALLS, threads=1)
        files = [onnx.exported(run, precision) for precision in PRECISIONS]
        shape = (batch, *run.config().input.shape)
        images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        calls: dict[tuple[Any, Precision], dict[str, Callable[[], Any]]] = {}
        with torch.inference_mode():
            for target in latency.open_targets(run, files, options, "cpu"):
                if target.row.not_measured:
                    raise UserError(target.row.not_measured)
                calls[target.row.backend, target.row.precision] = target.prepare(images).steps

            def p50_ms(steps: dict[str, Callable[[], Any]]) -> float:
                return float(latency.measure(steps, batch, SECONDS, CALLS, "cpu")["p50_ms"])

            timers: dict[tuple[Backend, Precision], Callable[[], float]] = {
                key: partial(p50_ms, steps) for key, steps in calls.items()
            }
            return measure.interleaved(timers, self.rounds, f"{run.folder}, batch {batch}")


def backend_rows(run: Run, batch: int, times: dict[tuple[Backend, Precision], list[float]]) -> list[BackendRow]:
    """Returns a row for each backend and precision from their latencies, one per round."""
    summary = run.read_summary()
    if summary is None:
        raise UserError(f"{run.folder}: expected a finished run")
    fastest = min(times, key=lambda key: measure.spread(times[key]).median)
    return [
        BackendRow(
            experiment=summary.experiment, seed=summary.seed, epochs=summary.epochs, dataset=summary.dataset,
            backend=backend, precision=precision, batch=batch, fastest=(backend, precision) == fastest,
            ratio=measure.ratio(latencies, times["eager", "fp32"]),
        )
        for (backend, precision), latencies in times.items()
    ]  # fmt: skip


def show(rows: list[BackendRow]) -> None:
    """Prints the rows as a table."""
    table = new_table("experiment", "batch", "backend", "precision", "÷ eager", "min", "max", "")
    for row in rows:
        figures = [f"{figure:.3g}" for figure in (row.ratio.median, row.ratio.min, row.ratio.max)]
        table.add_row(
            row.experiment, str(row.batch), row.backend, row.precision, *figures, "fastest" if row.fastest else ""
        )
    print_table(table)


def copy_of(run: Run, scratch: Path) -> Run:
    """Returns a copy of a run in the folder `scratch`, which can be exported and leaves the run as it is."""
    copy = Run(scratch / run.folder.name, run.trusted_code)
    copy.folder.mkdir()
    shutil.copy(run.run_json, copy.run_json)
    shutil.copytree(run.checkpoints, copy.checkpoints)
    return copy


def _exporters(run: Run, scratch: Path) -> dict[str, Callable[[], float]]:
    """Returns functions that export once and return the seconds; exports go to a copy of the run in `scratch`."""
    from onnx import save_model
    from safetensors.torch import load_file

    from runner.deploy import onnx
    from runner.training import checkpoint

    config, copy = run.config(), copy_of(run, scratch)

    def bare_export() -> float:
        start = time.perf_counter()
        model = config.architecture.build(len(config.dataset.classes), (config.input.shape[1], config.input.shape[2]))
        model.load_state_dict(load_file(checkpoint.latest(run) / WEIGHTS))
        proto = onnx.to_proto(model.eval(), config.input.shape)
        with tempfile.TemporaryDirectory() as folder:
            save_model(proto, Path(folder) / "model.onnx")
        return time.perf_counter() - start

    def runner_export() -> float:
        start = time.perf_counter()
        onnx.export(copy)
        return time.perf_counter() - start

    return {"bare": bare_export, "export": runner_export}


if __name__ == "__main__":
    program.run(DeployBenchmark, "deploy")
