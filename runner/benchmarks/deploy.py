"""Measures, on the CPU, what deployment gains and what `runner export` costs, for runs that passed `runner parity`.

Compares onnxruntime with eager torch, and int8 with fp32 in onnxruntime, by the median latency of one image on one
thread. Also compares `runner export`, which includes hashes and a quick check, with a bare export, which loads the
weights, runs torch's exporter and saves the file. All candidates take turns.

    python -m runner.benchmarks.deploy runs/podeti-resnet18/seed-0 runs/podeti-mobilenetv2/seed-0 --json deploy.json
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from runner.benchmarks import measure, program
from runner.commands.options import Code, open_run
from runner.config.trust import TrustedCode
from runner.run.folder import WEIGHTS, Run

CALLS = 60  # per measurement, which is their median
GOALS = {"podeti-resnet18": "≤ 0.5", "podeti-mobilenetv2": "≤ 0.8"}  # for the ratio of int8 to fp32


@dataclass(frozen=True)
class DeployBenchmark:
    """Compare onnxruntime with eager torch, int8 with fp32, and `runner export` with torch's exporter, in turn."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
    """Run folders, exported in fp32 and int8-cpu and scored by `runner parity` on this CPU; they are not modified."""
    code: Code = TrustedCode()
    rounds: measure.Rounds = measure.MIN_ROUNDS
    """Number of measurements per candidate."""
    json: Path | None = None
    """File for the ratios, with hardware and versions."""

    def __call__(self) -> None:
        ratios: dict[str, measure.Spread] = {}
        goals: dict[str, str] = {}
        for folder in self.runs:
            run = open_run(folder, self.code)
            experiment = run.config().experiment
            name = experiment.replace("-", "_")
            with tempfile.TemporaryDirectory() as scratch:
                times = measure.in_turn(_timers(run, Path(scratch)), self.rounds, f"measure {folder}")
            ratios |= {
                f"ratio_onnxruntime_to_eager_{name}": measure.ratio(times["onnxruntime"], times["eager"]),
                f"ratio_int8_to_fp32_{name}": measure.ratio(times["int8"], times["onnxruntime"]),
                f"ratio_export_to_bare_{name}": measure.ratio(times["export"], times["bare"]),
            }
            goals[f"ratio_onnxruntime_to_eager_{name}"] = "≤ 0.6"
            goals[f"ratio_export_to_bare_{name}"] = "≤ 1.2"
            if goal := GOALS.get(experiment):
                goals[f"ratio_int8_to_fp32_{name}"] = goal
        settings = {"batch": 1, "threads": 1, "calls": CALLS}
        measure.report_ratios("deployment on the CPU", ratios, goals, {"settings": settings}, self.json)


def copy_of(run: Run, scratch: Path) -> Run:
    """Returns a copy of a run in the folder `scratch`, which can be exported and leaves the run as it is."""
    copy = Run(scratch / run.folder.name, run.trusted_code)
    copy.folder.mkdir()
    shutil.copy(run.run_json, copy.run_json)
    shutil.copytree(run.checkpoints, copy.checkpoints)
    return copy


def _timers(run: Run, scratch: Path) -> dict[str, Callable[[], float]]:
    """Returns functions that take one measurement in seconds, by name; exports go to a copy of the run in `scratch`."""
    import torch
    from onnx import save_model
    from safetensors.torch import load_file

    from runner.deploy import onnx, parity
    from runner.deploy.session import PROVIDERS, OnnxSession
    from runner.training import checkpoint

    config = run.config()
    fp32, int8 = files = [onnx.exported(run, kind) for kind in ("fp32", "int8-cpu")]
    for file in files:
        parity.require_passed(run, file, PROVIDERS["cpu"])
    copy = copy_of(run, scratch)
    model = checkpoint.load_model(run)
    sessions = {
        name: OnnxSession(file.path, threads=1, spinning=False) for name, file in (("fp32", fp32), ("int8", int8))
    }
    image = torch.randn(1, *config.input.shape, generator=torch.Generator().manual_seed(0))
    array, channels_last = image.numpy(), image.to(memory_format=torch.channels_last)

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

    return {
        "eager": lambda: _median_seconds(lambda: model(channels_last)),
        "onnxruntime": lambda: _median_seconds(lambda: sessions["fp32"](array)),
        "int8": lambda: _median_seconds(lambda: sessions["int8"](array)),
        "bare": bare_export,
        "export": runner_export,
    }


def _median_seconds(call: Callable[[], Any]) -> float:
    """Returns the median duration of CALLS calls on one thread; the first sixth is warm-up and does not count."""
    import numpy as np
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    with torch.inference_mode():
        for _ in range(CALLS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return float(np.median(times[CALLS // 6 :]))


if __name__ == "__main__":
    program.run(DeployBenchmark, "deploy")
