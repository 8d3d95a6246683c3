"""Verifies the engines of a run, loads them on the GPU, and calls them with torch tensors."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

from runner.common.errors import UserError
from runner.common.files import sha256_of
from runner.deploy.engine_library import Log, create_runtime, import_library
from runner.deploy.onnx import OnnxFile
from runner.run.folder import Run
from runner.run.schema import EngineSidecar
from runner.system import environment


def incompatibility(sidecar: EngineSidecar) -> str | None:
    """Returns why this machine's GPU does not run an engine; None if it does, or if there is no GPU to judge by.

    An engine of an earlier version, whose sidecar does not name its GPUs, is not judged either.
    """
    gpu, capabilities = environment.first_gpu(), sidecar.compute_capabilities
    if gpu is None or not capabilities or gpu.capability in capabilities:
        return None
    return f"{sidecar.engine}: not for this GPU: expected compute capability {' or '.join(capabilities)}, found {gpu}"


def sidecar_of(engine: Path) -> Path:
    """The path of an engine's sidecar."""
    return engine.with_name(f"{engine.name}.json")


def verified_engines(run: Run, file: OnnxFile) -> list[EngineSidecar]:
    """Verifies and returns the sidecars of the engines built from an ONNX file. Raises UserError like `verify`."""
    sidecars = [
        sidecar
        for sidecar in run.read_engines()
        if sidecar.onnx_sha256 == file.sha256 and (run.folder / sidecar.engine).is_file()
    ]
    for sidecar in sidecars:
        verify(run, sidecar)
    return sidecars


def verify(run: Run, sidecar: EngineSidecar) -> None:
    """Checks an engine and its ONNX file against the hashes in the sidecar.

    An engine can contain code that TensorRT executes: verify it before deserializing it.

    Raises:
        UserError: one of the files is missing or outside the run's folder, or its hash differs.
    """
    for name, expected in ((sidecar.engine, sidecar.sha256), (sidecar.onnx, sidecar.onnx_sha256)):
        file = run.folder / name
        if not file.resolve().is_relative_to(run.folder.resolve()):
            raise UserError(f"{run.folder}: expected an engine of this folder, found {name!r}; remove its sidecar")
        actual = sha256_of(file) if file.is_file() else ""
        if actual != expected:
            raise UserError(
                f"{file}: expected SHA-256 {expected[:12]}… from {sidecar.engine}.json, found "
                f"{f'{actual[:12]}…' if actual else 'no file'}; build the engine again: runner engine {run.folder}"
            )


def runs_on(sidecar: EngineSidecar, version: str) -> bool:
    """Returns whether a version of the library runs an engine: the one that built it.

    An engine that was built to be compatible also runs on later versions with the same major number.
    """
    if not sidecar.version_compatible or sidecar.version == version:
        return sidecar.version == version
    built, installed = ([int(part) for part in re.findall(r"\d+", text)[:4]] for text in (sidecar.version, version))
    return built[:1] == installed[:1] != [] and built <= installed


class LoadedEngine:
    """An engine loaded on the GPU and called with torch tensors.

    Args:
        run: the run that the engine belongs to.
        sidecar: the engine's sidecar, which `verify` must have checked just before.

    Raises:
        UserError: the engine is for other GPUs, was built by another version of the library, or does not load.
    """

    def __init__(self, run: Run, sidecar: EngineSidecar) -> None:
        import torch

        if problem := incompatibility(sidecar):
            raise UserError(f"{problem}; build one: runner engine {run.folder}")
        trt = import_library(sidecar.backend)
        if not runs_on(sidecar, trt.__version__):
            raise UserError(
                f"{sidecar.engine}: built by {sidecar.provider}, but {trt.__version__} is installed; build it again: "
                f"runner engine {run.folder}"
            )
        self.torch = torch
        self.torch_dtypes = {"FLOAT": torch.float32, "HALF": torch.float16, "UINT8": torch.uint8}
        self.sidecar = sidecar
        self.log = Log(trt)
        self.runtime = create_runtime(trt, self.log, sidecar.version_compatible)
        self.engine = self.runtime.deserialize_cuda_engine((run.folder / sidecar.engine).read_bytes())
        if self.engine is None:
            raise UserError(f"{sidecar.engine}: does not load on this GPU: {self.log.last_errors()}")
        self.context = self._create_context(trt)
        if self.context is None:
            raise UserError(f"{sidecar.engine}: does not run on this GPU: {self.log.last_errors()}")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        modes = {name: self.engine.get_tensor_mode(name) for name in names}
        self.input_name = next(name for name in names if modes[name] == trt.TensorIOMode.INPUT)
        self.output_name = next(name for name in names if modes[name] == trt.TensorIOMode.OUTPUT)

    def _create_context(self, trt: ModuleType) -> Any:
        """Creates the execution context, in which TensorRT for RTX compiles the kernels for a new shape immediately.

        By default, it compiles them in the background and runs fallback kernels meanwhile, which a CUDA graph captured
        then would keep.
        """
        if self.sidecar.backend != "tensorrt-rtx":
            return self.engine.create_execution_context()
        config = self.engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return self.engine.create_execution_context(config)

    def __call__(self, images: Any) -> Any:
        """Computes logits on torch's current stream.

        Args:
            images: (n, …) on the GPU, with the shape and type that the engine's front end expects.

        Returns:
            (n, classes) float32 on the GPU.

        Raises:
            UserError: the engine was not built for this batch size or shape.
        """
        images = self.set_input(images)
        shape = tuple(self.context.get_tensor_shape(self.output_name))
        logits = self.torch.empty(shape, dtype=self.torch.float32, device=images.device)
        self.enqueue(images, logits)
        return logits

    def run_in_batches(self, images: Any) -> Any:
        """Like `__call__`, but for any number of images: splits them into batches, and pads the last one if needed."""
        limits = self.sidecar.batch
        logits = []
        for batch in images.split(limits.max):
            missing = max(0, limits.min - len(batch))
            padded = self.torch.cat([batch, batch[:1].expand(missing, *batch.shape[1:])]) if missing else batch
            logits.append(self(padded)[: len(batch)])
        return self.torch.cat(logits)

    def set_input(self, images: Any) -> Any:
        """Sets the context's input shape and returns the images, made contiguous. Raises UserError like `__call__`."""
        limits, (_, shape, dtype) = self.sidecar.batch, self.sidecar.inputs[0]
        if list(images.shape[1:]) != list(shape[1:]) or images.dtype != self.torch_dtypes.get(dtype):
            raise UserError(
                f"{self.sidecar.engine}: expected images of {list(shape[1:])} in {dtype}, found "
                f"{list(images.shape[1:])} in {images.dtype}"
            )
        if not limits.min <= len(images) <= limits.max:
            raise UserError(
                f"{self.sidecar.engine}: expected {limits.min} to {limits.max} images, found {len(images)}; build it "
                "for other batches: runner engine --batch"
            )
        images = images.contiguous()
        self.context.set_input_shape(self.input_name, tuple(images.shape))
        return images

    def enqueue(self, images: Any, logits: Any) -> None:
        """Computes `logits` on torch's current stream without synchronizing, so that CUDA graphs can capture it."""
        self.context.set_tensor_address(self.input_name, images.data_ptr())
        self.context.set_tensor_address(self.output_name, logits.data_ptr())
        if not self.context.execute_async_v3(self.torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"the engine did not run: {self.log.last_errors()}")
