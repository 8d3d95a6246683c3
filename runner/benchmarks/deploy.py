"""What does deployment buy, and what does its proof cost? On the CPU, for runs that `runner parity` has scored.

onnxruntime against eager torch, and its int8 graph against its fp32 one: medians of calls with one image on one
thread, in turn. And `runner export`, with its hashes and its quick check, against loading the weights, the bare
exporter, and saving.

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

from data_prep.console import UserError, run_command
from runner.benchmarks import measure
from runner.runs import Run

CALLS = 60  # of which each turn takes the median
GOALS = {"podeti-resnet18": "≤ 0.5", "podeti-mobilenetv2": "≤ 0.8"}  # int8 to fp32


@dataclass(frozen=True)
class DeployBenchmark:
    """Compare onnxruntime with eager, int8 with fp32, and our export with the bare one, in turn."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
    """Run folders, exported in fp32 and int8-cpu, and scored by the gate on this CPU; nothing in them changes."""
    rounds: int = measure.LEAST_ROUNDS
    """Turns that each takes."""
    json: Path | None = None
    """File for the ratios, with hardware and versions."""

    def __call__(self) -> None:
        if self.rounds < measure.LEAST_ROUNDS:
            raise UserError(f"--rounds {self.rounds}: expected {measure.LEAST_ROUNDS} or more, for a spread")
        if not self.runs:
            raise UserError("RUNS: expected at least one run folder")
        ratios, goals = {}, {}
        for folder in self.runs:
            run = Run(folder)
            name = run.config()["experiment"].replace("-", "_")
            with tempfile.TemporaryDirectory() as elsewhere:
                subjects = _subjects(run, Path(elsewhere))
                found = measure.in_turn(subjects, self.rounds, f"measure {folder}")
            ratios |= {
                f"ratio_onnxruntime_to_eager_{name}": measure.ratio(found["onnxruntime"], found["eager"]),
                f"ratio_int8_to_fp32_{name}": measure.ratio(found["int8"], found["onnxruntime"]),
                f"ratio_export_to_bare_{name}": measure.ratio(found["export"], found["bare"]),
            }
            goals[f"ratio_onnxruntime_to_eager_{name}"] = "≤ 0.6"
            goals[f"ratio_export_to_bare_{name}"] = "≤ 1.2"
            if goal := GOALS.get(run.config()["experiment"]):
                goals[f"ratio_int8_to_fp32_{name}"] = goal
        settings = {"batch": 1, "threads": 1, "calls": CALLS}
        measure.conclude("deployment on the CPU", ratios, goals, {"settings": settings}, self.json)


def _subjects(run: Run, elsewhere: Path) -> dict[str, Callable[[], float]]:
    import numpy as np
    import torch
    from onnx import save_model
    from safetensors.torch import load_file

    from runner import checkpoint
    from runner.deploy import onnx, parity
    from runner.deploy.session import PROVIDERS, Session
    from runner.recipe import Architecture

    config = run.config()
    fp32, int8 = files = [onnx.exported(run, kind) for kind in ("fp32", "int8-cpu")]
    for file in files:
        parity.check(run, file, PROVIDERS["cpu"])
    copy = Run(elsewhere / run.folder.name)  # to export into
    copy.folder.mkdir()
    shutil.copy(run.record, copy.record)
    shutil.copytree(run.checkpoints, copy.checkpoints)
    model = checkpoint.load_model(run)
    sessions = {
        name: Session(file.path, threads=1, spinning=False) for name, file in (("fp32", fp32), ("int8", int8))
    }
    image = torch.randn(1, *config["input"]["shape"], generator=torch.Generator().manual_seed(0))
    array, ours = image.numpy(), image.to(memory_format=torch.channels_last)

    def median(call: Callable[[], Any]) -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        times = []
        with torch.inference_mode():
            for _ in range(CALLS):
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
        torch.set_num_threads(threads)
        return float(np.median(times[CALLS // 6 :]))  # the first warm up

    def bare() -> float:
        began = time.perf_counter()
        plain = Architecture(**config["architecture"]).build()
        plain.load_state_dict(load_file(checkpoint.latest(run) / checkpoint.WEIGHTS))
        proto = onnx.bare(plain.eval(), config["input"]["shape"])
        with tempfile.TemporaryDirectory() as folder:
            save_model(proto, Path(folder) / "model.onnx")
        return time.perf_counter() - began

    def ours_whole() -> float:
        began = time.perf_counter()
        onnx.export(copy)
        return time.perf_counter() - began

    return {
        "eager": lambda: median(lambda: model(ours)),
        "onnxruntime": lambda: median(lambda: sessions["fp32"](array)),
        "int8": lambda: median(lambda: sessions["int8"](array)),
        "bare": bare,
        "export": ours_whole,
    }


def main() -> None:
    """Entry point of `python -m runner.benchmarks.deploy`."""
    run_command(lambda: tyro.cli(DeployBenchmark, prog="python -m runner.benchmarks.deploy", config=()), "deploy")


if __name__ == "__main__":
    main()
