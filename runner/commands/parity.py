"""`runner parity`: compares exported files with the model on the test set."""

import dataclasses
import shlex
import sys
from collections.abc import MutableMapping
from pathlib import Path

import msgspec

from runner.commands.options import (
    Code,
    Device,
    Flag,
    Precision,
    RunFolder,
    open_run,
    refuse_ignored_precisions,
)
from runner.config.trust import TrustedCode
from runner.run.schema import ScoredBackend
from runner.system import environment, launcher


@dataclasses.dataclass(frozen=True)
class Parity:
    """Compare a run's ONNX files with the model on the whole test set; exit code 1 if one exceeds its limit."""

    run: RunFolder
    """Folder of the run."""
    precision: tuple[Precision, ...] = ()
    """Precisions of the files to score; by default all that were exported. Files with a raw front end are included."""
    data: Path | None = None
    """Prepared dataset; by default the one that the run was trained on."""
    device: Device = "auto"
    """Device to compute on; on a GPU, engines are scored as well."""
    backend: tuple[ScoredBackend, ...] = ()
    """Backends that must run the files; by default onnxruntime and, on a GPU, engines, where they work."""
    code: Code = TrustedCode()
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        from runner.deploy import onnx, parity

        run = open_run(self.run, self.code)
        refuse_ignored_precisions(self.precision, self.backend)
        for kind in self.precision or ("fp32",):
            onnx.exported(run, kind)
        files = [file for file in onnx.all_exported(run) if not self.precision or file.precision in self.precision]
        launch = launcher.read(environ)
        device, message = launcher.select_device(self.device, launch, environment.count_gpus())
        print(message, file=sys.stderr)
        report, rows = parity.score(run, files, self.data, device, self.backend)
        if self.json:
            print(msgspec.json.encode(report).decode())
        for row in rows:
            line = f"{self.run / row.onnx} on {row.provider}: {row}, {row.images:,} images"
            if not row.passed or row.classes_predicted == 1:
                print(f"runner: {line}", file=sys.stderr)
                if row.proposed:
                    export = f"runner export {shlex.quote(str(self.run))} --precision {row.precision}"
                    print(
                        f"runner: next: {export} --search-precision, or --keep {' '.join(row.proposed)}",
                        file=sys.stderr,
                    )
            elif not self.json:
                print(line)
        for entry in report.not_scored:
            print(f"runner: {entry.onnx} by {entry.backend}: not scored: {entry.reason}", file=sys.stderr)
        if device == "cuda":
            for scores in report.torch:
                print(f"runner: {self.run} in torch, {scores.precision}: {scores}", file=sys.stderr)
        if not rows or not all(row.passed for row in rows):
            raise SystemExit(1)
