"""`runner export`: exports a run to ONNX files."""

import dataclasses
import json as json_format
import shlex
from collections.abc import MutableMapping
from pathlib import Path

from runner.commands.options import Calibration, Code, Flag, Precision, RunFolder, open_run
from runner.commands.output import note_unfinished
from runner.common.console import track
from runner.common.errors import UserError
from runner.config.recipe import Count
from runner.config.trust import TrustedCode

FOR_INT8 = ("data", "calibration", "calibration_method")


@dataclasses.dataclass(frozen=True)
class Export:
    """Export a run to ONNX, one file per precision, with a quick check against the model."""

    run: RunFolder
    """Folder of the run."""
    precision: tuple[Precision, ...] = ("fp32",)
    """Precisions to export: fp32; fp16; int8, with symmetric Q/DQ pairs for TensorRT; int8-cpu, for onnxruntime on the
    CPU. The others are converted from fp32, which is exported first if it is missing or its weights are outdated."""
    raw: Flag = False
    """Also write files that take uint8 pixels (batch, H, W, 3) and normalize them inside the graph."""
    calibration: Count = 512
    """Number of training images for estimating the activation ranges of int8 files."""
    calibration_method: Calibration = "minmax"
    """How the activation ranges of int8 files are estimated."""
    data: Path | None = None
    """Prepared dataset for calibration; by default the one that the run was trained on."""
    code: Code = TrustedCode()
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        from runner.deploy import onnx, precision

        run = open_run(self.run, self.code)
        if not any(kind.startswith("int8") for kind in self.precision):
            for field in dataclasses.fields(self):
                if field.name in FOR_INT8 and (value := getattr(self, field.name)) != field.default:
                    option = f"--{field.name.replace('_', '-')} {value}"
                    raise UserError(f"{option}: expected with --precision int8, which is calibrated on images")
        note_unfinished(run)
        files = []
        if "fp32" in self.precision or not onnx.is_current(run, "fp32"):
            files.append(onnx.export(run))
        lower = [kind for kind in self.precision if kind != "fp32"]
        quantized = any(kind.startswith("int8") for kind in lower)
        images = precision.calibration_images(run, self.data, self.calibration) if quantized else None
        files += [
            precision.convert(run, kind, images, self.calibration_method)
            for kind in track(lower, "convert", len(lower))
        ]
        if self.raw:
            files += [precision.add_raw_front_end(run, kind) for kind in self.precision]
        sizes = [file.path.stat().st_size for file in files]
        if self.json:
            rows = [
                {"onnx": str(file.path), "name": file.name, "sha256": file.sha256, "bytes": size}
                for file, size in zip(files, sizes, strict=True)
            ]
            print(json_format.dumps(rows))
            return
        for file, size in zip(files, sizes, strict=True):
            print(f"{file.path}: {size:,} bytes")
        print(f"next, the gate: runner parity {shlex.quote(str(self.run))}")
