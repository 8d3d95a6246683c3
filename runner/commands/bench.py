"""`runner bench`: measures latencies."""

import dataclasses
from collections.abc import MutableMapping
from typing import Literal

import msgspec

from runner.commands.options import Device, Flag, Precision, RunFolders
from runner.common.errors import UserError
from runner.config.recipe import Count, Positive
from runner.run.folder import Run
from runner.system.environment import usable_cores


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure the latency of runs: the model in torch, onnxruntime, and, on a GPU, engines."""

    runs: RunFolders
    """Run folders that are exported and have passed `runner parity`."""
    batch: tuple[Count, ...] = (1, 8, 32)
    """Batch sizes to measure."""
    precision: tuple[Precision, ...] = ("fp32",)
    """Which ONNX files and engines."""
    backend: tuple[Literal["eager", "compiled", "onnxruntime", "engine"], ...] = ("eager", "onnxruntime", "engine")
    """What runs the model; compiled needs about a minute for compilation."""
    seconds: Positive = 3.0
    """Minimum duration of each measurement."""
    repeats: Count = 100
    """Minimum number of calls of each measurement."""
    threads: Count | None = None
    """Number of CPU threads; by default all usable cores."""
    device: Device = "auto"
    """Where to compute; auto selects a GPU if there is one."""
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        from runner.deploy import latency

        if not self.runs:
            raise UserError("RUNS: expected at least one run folder")
        cores = usable_cores()
        if self.threads is not None and self.threads > cores:
            raise UserError(f"--threads {self.threads}: expected at most the {cores} usable cores")
        if len(set(self.batch)) < len(self.batch):
            raise UserError(f"--batch {' '.join(map(str, self.batch))}: expected each batch size once")
        options = latency.BenchOptions(
            self.batch, self.precision, self.backend, self.seconds, self.repeats, self.threads
        )
        reports = [latency.bench(Run(run), options, self.device, environ) for run in self.runs]
        if self.json:
            print(msgspec.json.encode(reports).decode())
        else:
            latency.show(reports)
