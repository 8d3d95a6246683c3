"""`runner serve-repo`: writes a model repository for Triton Inference Server."""

import dataclasses
import re
import shlex
from collections.abc import MutableMapping
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from runner.commands.options import Precision, RunFolder
from runner.commands.predict import Predict
from runner.common.errors import UserError
from runner.config.recipe import Count
from runner.run.folder import Run


@dataclasses.dataclass(frozen=True)
class ServeRepo:
    """Write a model that passed the gate into a repository of Triton's server."""

    run: RunFolder
    """Run folder, RUNS/NAME/RUN, exported with --raw, so that the server takes decoded pixels."""
    out: Path
    """Model repository; it may contain other models."""
    name: str | None = None
    """Name of the model on the server; by default the experiment and the run, such as soni-2-seed-0."""
    precision: Precision = "fp32"
    """Precision of the exported file."""
    backend: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    """Backend of the server: onnxruntime for the ONNX file, tensorrt for the engine that was built from it."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device that the server runs onnxruntime on; the file must have passed the gate on it."""
    batch: Count = 64
    """Largest batch that the server forms from waiting requests."""
    delay_us: Annotated[int, Meta(ge=0, le=10**6)] = 500
    """How long the server waits for more requests to fill a batch, in microseconds."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        from runner.common.text import printable
        from runner.deploy import triton

        if self.backend == "tensorrt" and self.precision == "int8-cpu":
            raise UserError("--precision int8-cpu: expected --backend onnxruntime; no engine is built from it")
        if self.backend == "tensorrt" and self.device == "cuda":
            raise UserError("--device cuda: expected with --backend onnxruntime, because engines always run on a GPU")
        run = Run(self.run)
        name = re.sub(r"[^A-Za-z0-9._-]", "-", run.config().name) if self.name is None else self.name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            hint = "; choose a --name" if self.name is None else ""
            raise UserError(
                f"--name {name!r}: expected letters, digits, '.', '_' and '-', at most 100 characters{hint}"
            )
        options = triton.ServeOptions(name, self.precision, self.backend, self.device, self.batch, self.delay_us)
        folder, sidecar = triton.write_repository(run, self.out, options)
        compatible = (
            " --backend-config=tensorrt,version-compatible=true" if sidecar and sidecar.version_compatible else ""
        )
        # In the gate, onnxruntime computes fp32 without TF32, which a server would use.
        tf32 = "-e NVIDIA_TF32_OVERRIDE=0 " if self.backend == "onnxruntime" else ""
        gpus = "" if options.on_cpu else f"--gpus all {tf32}"
        volume = shlex.quote(f"{self.out.resolve()}:/models:ro")
        print(printable(folder))
        print(
            f"serve: docker run --rm {gpus}-p 8000:8000 -v {volume} {triton.IMAGE} tritonserver "
            f"--model-repository=/models{compatible}"
        )
        batch = f" --batch {self.batch}" if self.batch < Predict.batch else ""
        print(f"use: runner predict {name} IMAGES --server http://localhost:8000{batch}")
        if sidecar:
            needed = f"TensorRT {sidecar.version}{' or later' if sidecar.version_compatible else ''}"
            print(f"needs: {needed} in the container, and a GPU of compute capability {sidecar.capabilities_text}")
