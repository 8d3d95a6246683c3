"""`runner engine`: builds TensorRT engines from exported files."""

import dataclasses
from collections.abc import MutableMapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from runner.commands.options import Flag, NoneByDefault, Precision, RunFolder, refuse_ignored_precisions
from runner.common.console import track
from runner.config.recipe import Count
from runner.run.folder import Run


@dataclasses.dataclass(frozen=True)
class Engine:
    """Build TensorRT engines from a run's ONNX files, each with a JSON sidecar."""

    run: RunFolder
    """Folder of the run."""
    precision: tuple[Precision, ...] = ("fp32",)
    """Precisions of the ONNX files to build from; an engine has the precision of its graph."""
    raw: Flag = False
    """Build from the files with the raw front end."""
    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    """TensorRT; or TensorRT for RTX, which also builds without a GPU, but only for RTX cards; auto selects one that
    loads and whose engine runs on this machine's GPU, or TensorRT for RTX if there is none."""
    batch: tuple[Count, Count, Count] = (1, 128, 512)
    """Minimum, optimal and maximum batch size."""
    target: Annotated[tuple[str, ...], NoneByDefault] = ()
    """Compute capabilities to build for, e.g. SM89 SM120 (tensorrt-rtx only); by default a portable engine for SM86,
    SM89 and SM120, or one for this machine's GPU if that is an RTX card of another kind."""
    optimization_level: Annotated[int, Meta(ge=0, le=5)] | None = None
    """0 to 5; higher levels search longer for fast kernels; by default TensorRT decides."""
    no_timing_cache: Flag = False
    """Neither reuse nor store the builder's kernel timings (tensorrt only)."""
    version_compatible: Flag = False
    """Build an engine that later versions of TensorRT can run as well; it may be slower (tensorrt only)."""
    build_route: str | None = None
    """Build with these settings of the compiler, which TensorRT's global performance tuner finds (tensorrt only)."""
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        from runner.deploy import engine_build, onnx

        run = Run(self.run)
        options = engine_build.EngineOptions(
            backend=self.backend, batch=self.batch, targets=self.target, optimization_level=self.optimization_level,
            timing_cache=not self.no_timing_cache, version_compatible=self.version_compatible,
            build_route=self.build_route,
        )  # fmt: skip
        refuse_ignored_precisions(self.precision)
        files = [onnx.exported(run, kind, self.raw) for kind in self.precision]
        for file in files:  # all of them, before the first is built
            engine_build.check_options(file, options)
        sidecars = [engine_build.build(run, file, options) for file in track(files, "build", len(files))]
        if self.json:
            print(msgspec.json.encode(sidecars).decode())
            return
        for sidecar in sidecars:
            what = f"{sidecar.provider}, {sidecar.precision}, {sidecar.bytes:,} bytes, target {sidecar.target}"
            print(f"{run.folder / sidecar.engine}: {what}{f', {sidecar.caveat}' if sidecar.caveat else ''}")
