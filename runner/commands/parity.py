"""`runner parity`: scores exported files beside the model."""

import dataclasses
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Literal

import msgspec

from runner.commands.options import Device, Flag, Precision, RunFolder
from runner.run.folder import Run
from runner.system import environment, launcher


@dataclasses.dataclass(frozen=True)
class Parity:
    """Score a run's ONNX files on the whole test set beside the model; exit code 1 if one exceeds its limit."""

    run: RunFolder
    """Run folder."""
    precision: tuple[Precision, ...] = ()
    """Which files; by default all that were exported. Raw front ends are included."""
    data: Path | None = None
    """Prepared dataset; by default the one on which the run was trained."""
    device: Device = "auto"
    """Where to compute; on a GPU engines are scored as well."""
    backend: tuple[Literal["onnxruntime", "engine"], ...] = ()
    """What must run the files; by default all that works here. Engines run only on a GPU."""
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        from runner.deploy import onnx, parity

        run = Run(self.run)
        for kind in self.precision or ("fp32",):
            onnx.exported(run, kind)
        files = [file for file in onnx.all_exported(run) if not self.precision or file.precision in self.precision]
        launch = launcher.read(environ)
        device, message = launcher.device(self.device, launch, environment.count_gpus())
        print(message, file=sys.stderr)
        report = parity.compare(run, files, self.data, device, self.backend)
        names = [str(file.path.relative_to(run.folder)) for file in files]
        rows = [row for row in report.rows if row.onnx in names]
        if self.json:
            print(msgspec.json.encode(report).decode())
        for row in rows:
            line = f"{self.run / row.onnx} on {row.provider}: {row}, {row.images:,} images"
            if not row.passed or row.classes_predicted == 1:
                print(f"runner: {line}", file=sys.stderr)
            elif not self.json:
                print(line)
        for entry in report.not_scored:
            print(f"runner: {entry.onnx} by {entry.backend}: not scored: {entry.reason}", file=sys.stderr)
        if not all(row.passed for row in rows):
            raise SystemExit(1)
