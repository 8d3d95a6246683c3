"""`runner bench`: measures latencies."""

import dataclasses
from collections.abc import MutableMapping

import msgspec

from runner.commands.options import Code, Device, Flag, Precision, RunFolders, open_run, refuse_ignored_precisions
from runner.common.errors import UserError
from runner.common.text import printable
from runner.config.recipe import Count, Positive
from runner.config.trust import TrustedCode
from runner.run.schema import MeasuredBackend
from runner.system.environment import usable_cores


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure the latency of runs in torch, onnxruntime and, on a GPU, TensorRT."""

    runs: RunFolders
    """Folders of runs that have been exported and have passed `runner parity`."""
    batch: tuple[Count, ...] = (1, 8, 32)
    """Batch sizes to measure."""
    precision: tuple[Precision, ...] = ("fp32",)
    """Precisions of the ONNX files and engines to measure."""
    backend: tuple[MeasuredBackend, ...] = ("eager", "onnxruntime", "engine")
    """Backends that run the model; compiled takes about a minute to compile, aotinductor runs the compiled package, and
    onnxruntime-tensorrt is onnxruntime's TensorRT provider."""
    seconds: Positive = 3.0
    """Minimum duration of each measurement."""
    repeats: Count = 100
    """Minimum number of calls per measurement."""
    threads: Count | None = None
    """On the CPU: number of threads; by default all usable cores."""
    device: Device = "auto"
    """Device to compute on; auto selects a GPU if there is one."""
    code: Code = TrustedCode()
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        from runner.deploy import latency

        cores = usable_cores()
        if self.threads is not None and self.threads > cores:
            raise UserError(f"--threads {self.threads}: expected at most the {cores} usable cores")
        refuse_ignored_precisions(self.precision, self.backend)
        if len(set(self.batch)) < len(self.batch):
            raise UserError(f"--batch {' '.join(map(str, self.batch))}: expected each batch size once")
        if self.precision != type(self).precision and not set(self.backend) - {"eager", "compiled"}:
            raise UserError(
                f"--precision {' '.join(self.precision)}: expected with a backend that runs exported files; eager and "
                "compiled measure fp32 and, on a GPU, fp16"
            )
        options = latency.BenchOptions(
            self.batch, self.precision, self.backend, self.seconds, self.repeats, self.threads
        )
        reports, failures = [], []
        for run in self.runs:
            try:
                reports.append(latency.bench(open_run(run, self.code), options, self.device, environ))
            except UserError as error:  # the other runs are measured nevertheless
                failures.append(error)
        if not reports:
            raise UserError("; ".join(map(str, failures)))
        if self.json:
            print(msgspec.json.encode(reports).decode())
        else:
            latency.show(reports)
        refused = [row.not_measured for report in reports for row in report.rows if row.refused]
        if refused or failures:
            reasons = [*refused, *map(str, failures)]
            raise SystemExit("\n".join(f"runner: not measured: {printable(reason)}" for reason in reasons))
