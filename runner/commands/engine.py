"""`runner engine`: builds TensorRT engines of exported files."""

import dataclasses
from collections.abc import MutableMapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from runner.commands.options import Flag, Precision, RunFolder
from runner.common.console import track
from runner.config.recipe import Count
from runner.run.folder import Run


@dataclasses.dataclass(frozen=True)
class Engine:
    """Build TensorRT engines of an exported run, each with a sidecar that describes it."""

    run: RunFolder
    """Run folder."""
    precision: tuple[Precision, ...] = ("fp32",)
    """Which ONNX files; an engine has the precision of its graph."""
    raw: Flag = False
    """Use the files with the raw front end."""
    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    """TensorRT, or TensorRT for RTX, which also builds without a GPU; auto selects TensorRT if its libraries load and
    there is a GPU."""
    batch: tuple[Count, Count, Count] = (1, 128, 512)
    """Smallest, optimal and largest batch."""
    target: tuple[str, ...] = ()
    """Compute capabilities to build for, e.g. SM89 SM120 (tensorrt-rtx only); by default those of this machine's GPU,
    or, without one, all from Ampere on."""
    optimization_level: Annotated[int, Meta(ge=0, le=5)] | None = None
    """0 to 5: how long the builder searches for fast kernels; by default TensorRT decides."""
    no_timing_cache: Flag = False
    """Neither use nor store the builder's measurements of kernels (tensorrt only)."""
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        from runner.deploy import engine, onnx

        run = Run(self.run)
        options = engine.EngineOptions(
            self.backend, self.batch, self.target, self.optimization_level, not self.no_timing_cache
        )
        files = [onnx.exported(run, kind, self.raw) for kind in self.precision]
        sidecars = [engine.build(run, file, options) for file in track(files, "build", len(files))]
        if self.json:
            print(msgspec.json.encode(sidecars).decode())
            return
        for sidecar in sidecars:
            what = f"{sidecar.provider}, {sidecar.precision}, {sidecar.bytes:,} bytes, target {sidecar.target}"
            print(f"{run.folder / sidecar.engine}: {what}")
