"""`runner parity`: compares exported files with the model on the test set."""

import dataclasses
import shlex
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Annotated

import msgspec

from runner.commands.options import (
    Code,
    Device,
    Flag,
    NoneByDefault,
    Precision,
    RunFolder,
    open_run,
    refuse_ignored_precisions,
)
from runner.common.text import printable
from runner.config.trust import TrustedCode
from runner.run.schema import FrontEnd, ScoredBackend
from runner.system import launcher


@dataclasses.dataclass(frozen=True)
class Parity:
    """Score a run's ONNX files on all test images; exit code 1 if a limit is exceeded."""

    run: RunFolder
    """Folder of the run."""
    precision: Annotated[tuple[Precision, ...], NoneByDefault] = ()
    """Precisions of the files to score; by default all that were exported. Files with a raw front end are included."""
    data: Path | None = None
    """Prepared dataset; by default the one that the run was trained on."""
    device: Device = "auto"
    """Device to compute on; on a GPU, engines are scored as well."""
    backend: Annotated[tuple[ScoredBackend, ...], NoneByDefault] = ()
    """Backends that must run the files; by default onnxruntime and, on a GPU, engines, where they work."""
    code: Code = TrustedCode()
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        import torch

        from runner.deploy import onnx, parity

        run = open_run(self.run, self.code)
        refuse_ignored_precisions(self.precision, self.backend)
        for kind in self.precision or ("fp32",):
            onnx.exported(run, kind)
        files = [file for file in onnx.all_exported(run) if not self.precision or file.precision in self.precision]
        launch = launcher.read(environ)
        device, message = launcher.select_device(self.device, launch, torch.cuda.device_count())
        print(message, file=sys.stderr)
        report, rows = parity.score(run, files, self.data, device, self.backend)
        if self.json:
            print(msgspec.json.encode(report).decode())
        for row in rows:
            line = printable(f"{self.run / row.onnx} on {row.provider}: {row}, {row.images:,} images")
            if not row.passed or row.classes_predicted == 1:
                print(f"runner: {line}", file=sys.stderr)
                if row.proposed:
                    raw = " --raw" if row.front_end == FrontEnd.RAW else ""
                    export = f"runner export {shlex.quote(str(self.run))} --precision {row.precision}{raw}"
                    named = " ".join(shlex.quote(printable(name)) for name in row.proposed)
                    print(f"runner: next: {export} --search-precision, or --keep {named}", file=sys.stderr)
            elif not self.json:
                print(line)
        for entry in report.not_scored:
            print(f"runner: {entry.onnx} by {entry.backend}: not scored: {entry.reason}", file=sys.stderr)
        if device == "cuda":
            for scores in report.torch:
                verdict = "passed" if scores.passed else f"failed the gate (limit: {scores.limit})"
                print(f"runner: {self.run} in torch, {scores.precision}: {verdict}, {scores}", file=sys.stderr)
        if not rows or not all(row.passed for row in rows):
            raise SystemExit(1)
