"""`runner export`: exports a run to ONNX files."""

import dataclasses
import json as json_format
import shlex
from collections.abc import MutableMapping
from pathlib import Path

from runner.commands.options import Calibration, Flag, Precision, RunFolder
from runner.commands.output import note_unfinished
from runner.common.console import track
from runner.common.errors import UserError
from runner.config.recipe import Count
from runner.run.folder import Run

FOR_INT8 = ("data", "calibration", "calibration_method")


@dataclasses.dataclass(frozen=True)
class Export:
    """Export a run to ONNX, one file per precision, with a quick check against the model."""

    run: RunFolder
    """Run folder."""
    precision: tuple[Precision, ...] = ("fp32",)
    """fp32; fp16; int8, symmetric Q/DQ for TensorRT; int8-cpu, for onnxruntime on the CPU. The others are made from
    fp32, which is exported first if it is missing or of earlier weights."""
    raw: Flag = False
    """Also write files that take uint8 pixels (batch, H, W, 3) and normalize inside the graph."""
    calibration: Count = 512
    """Number of training images from which int8 estimates the ranges of activations."""
    calibration_method: Calibration = "minmax"
    """How int8 estimates the ranges."""
    data: Path | None = None
    """Prepared dataset, for calibration; by default the one on which the run was trained."""
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        from runner.deploy import onnx, precision

        run = Run(self.run)
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
