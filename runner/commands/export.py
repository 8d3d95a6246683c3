"""`runner export`: exports a run to ONNX files."""

import dataclasses
import json as json_format
import shlex
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from runner.commands.options import (
    Calibration,
    Code,
    Flag,
    NoneByDefault,
    Precision,
    RunFolder,
    open_run,
    refuse_ignored_precisions,
)
from runner.commands.output import note_unfinished
from runner.common.console import track
from runner.common.errors import UserError
from runner.config.recipe import Count
from runner.config.trust import TrustedCode
from runner.run.folder import Run

FOR_INT8 = ("data", "calibration", "calibration_method", "keep", "search_precision", "drop")


@dataclasses.dataclass(frozen=True)
class Export:
    """Export a run to ONNX, one file per precision, and check each on 64 images."""

    run: RunFolder
    """Folder of the run."""
    precision: tuple[Precision, ...] = ("fp32",)
    """Precisions to export: fp32; fp16; int8, with symmetric Q/DQ pairs for TensorRT; int8-cpu, for onnxruntime on the
    CPU. The others are converted from fp32, which is exported first if it is missing or its weights are outdated."""
    raw: Flag = False
    """Also write files that take uint8 pixels (batch, H, W, 3) and normalize them inside the graph."""
    aot_inductor: Annotated[tuple[Literal["cpu", "cuda"], ...], NoneByDefault] = ()
    """Also compile the fp32 model with AOTInductor into packages for these devices of this machine, which torch runs
    without this project."""
    calibration: Count = 512
    """Number of training images for estimating the activation ranges of int8 files."""
    calibration_method: Calibration = "minmax"
    """How the activation ranges of int8 files are estimated."""
    data: Path | None = None
    """Prepared dataset for calibration; by default the one that the run was trained on."""
    keep: Annotated[tuple[str, ...], NoneByDefault] = ()
    """Operators of int8 files that stay in fp32, by their names in the ONNX file; a failed gate proposes some."""
    search_precision: Flag = False
    """Find the least operators that must stay in fp32 for the int8 files to keep their accuracy on validation images,
    or on training images where the recipe holds out none."""
    drop: Annotated[float, Meta(ge=0, le=100)] = 0.5
    """With --search-precision: largest drop in accuracy, in percentage points; by default the gate's limit."""
    code: Code = TrustedCode()
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        from runner.deploy import onnx, package, precision

        run = open_run(self.run, self.code)
        self.check()
        for device in self.aot_inductor:
            package.require_device(device)
        if self.raw:
            onnx.check_raw_input(run.config())
        note_unfinished(run)
        lower = [kind for kind in self.precision if kind != "fp32"]
        quantized = any(kind.startswith("int8") for kind in lower)
        images = precision.calibration_images(run, self.data, self.calibration) if quantized else None
        files = []
        if "fp32" in self.precision or not onnx.is_current(run, "fp32"):
            files.append(onnx.export(run))
        kept = dict.fromkeys(lower, self.keep)
        if self.search_precision:
            kept |= {kind: self.search(run, kind) for kind in lower if kind.startswith("int8")}
        files += [
            precision.convert(run, kind, images, self.calibration_method, kept[kind])
            for kind in track(lower, "convert", len(lower))
        ]
        if self.raw:
            files += [precision.add_raw_front_end(run, kind) for kind in self.precision]
        files += [package.compile_package(run, device) for device in self.aot_inductor]
        sizes = [file.path.stat().st_size for file in files]
        if self.json:
            rows = [
                {
                    "onnx": str(file.path),
                    "name": file.path.name.removeprefix("model.").removesuffix(".onnx"),
                    "sha256": file.sha256,
                    "bytes": size,
                }
                for file, size in zip(files, sizes, strict=True)
            ]
            print(json_format.dumps(rows))
            return
        for file, size in zip(files, sizes, strict=True):
            print(f"{file.path}: {size:,} bytes")
        for target in self.aot_inductor or ("",):
            named = f" --device {target} --backend onnxruntime aotinductor" if target else ""
            print(f"next, the gate: runner parity {shlex.quote(str(self.run))}{named}")

    def check(self) -> None:
        """Raises UserError for options that would be ignored."""
        refuse_ignored_precisions(self.precision)
        if not any(kind.startswith("int8") for kind in self.precision):
            for field in dataclasses.fields(self):
                if field.name in FOR_INT8 and (value := getattr(self, field.name)) != field.default:
                    words = "" if value is True else " ".join(value) if isinstance(value, tuple) else value
                    option = f"--{field.name.replace('_', '-')} {words}".strip()
                    raise UserError(f"{option}: expected with --precision int8 or int8-cpu")
        if len(set(self.aot_inductor)) < len(self.aot_inductor):
            raise UserError(f"--aot-inductor {' '.join(self.aot_inductor)}: expected each device once")
        if self.keep and self.search_precision:
            raise UserError("--keep and --search-precision: expected one of them")
        if not self.search_precision and self.drop != type(self).drop:
            raise UserError(f"--drop {self.drop:g}: expected with --search-precision, found none")

    def search(self, run: Run, kind: Precision) -> tuple[str, ...]:
        """Returns the operators that must stay in fp32."""
        from runner.deploy import precision_search

        def report(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        limit = self.drop / 100
        found = precision_search.search(
            run, kind, self.data, self.calibration, self.calibration_method, limit, report
        )  # fmt: skip
        report(
            f"{kind}: {len(found.kept)} of {found.operators} operators stay in fp32: drop {100 * found.drop:.2f} "
            f"points on {found.images}; with all in int8 {100 * found.drop_of_all:.2f}, limit {self.drop:g}"
        )
        for name, drop in found.drop_without.items():
            report(f"  {name}: {100 * drop:.2f} points if it is in int8 too")
        return tuple(found.kept)
