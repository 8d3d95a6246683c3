"""Builds a TensorRT engine from a run's ONNX file: by TensorRT 10.12+ or 11, or by TensorRT for RTX.

They share one API. Networks are always strongly typed: the precision is the graph's, and a flag cannot turn a
request for one precision into an engine of another. TensorRT for RTX builds ahead of time without a GPU.
"""

import importlib
from collections import Counter
from types import ModuleType
from typing import Any

from data_prep.console import UserError, sha256_of
from runner import environment
from runner.deploy import onnx
from runner.runs import Run, read_json, write_atomically, write_json

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
SIDECAR = "engine.json"


def build(run: Run, backend: str, batch: tuple[int, int, int], target: str | None) -> dict[str, Any]:
    """Writes `deploy/model.<backend>.engine` and its sidecar `deploy/engine.json`.

    Args:
        run: exported.
        backend: "tensorrt", "tensorrt-rtx" or "auto".
        batch: smallest, best served and largest batch of the engine.
        target: compute capability like "SM89" to build for (TensorRT for RTX); None for the GPU that is here,
            or, without one, an engine that runs from Ampere on.

    Returns:
        The sidecar.

    Raises:
        UserError: a backend, batch or target that cannot be had here.
        RuntimeError: the parser or the builder refused the graph; carries what they said.
    """
    smallest, best, largest = batch
    if not 1 <= smallest <= best <= largest <= onnx.LARGEST_BATCH:
        raise UserError(
            f"--batch {smallest} {best} {largest}: expected 1 ≤ MIN ≤ OPT ≤ MAX ≤ {onnx.LARGEST_BATCH}, rising"
        )
    path, sha256 = onnx.exported(run)
    backend, trt = load(backend)
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(path.read_bytes()):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise RuntimeError(f"{path}: {backend}'s parser refused it: {errors}")
    config = builder.create_builder_config()
    images = network.get_input(0)
    profile = builder.create_optimization_profile()
    profile.set_shape(images.name, *[(size, *images.shape[1:]) for size in batch])
    config.add_optimization_profile(profile)
    if target is not None:
        _set_target(trt, config, backend, target)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"{path}: {backend} could not build an engine: {log.last_errors()}")
    engine = run.deploy / f"model.{backend}.engine"
    write_atomically(engine, bytes(plan))
    sidecar = {
        "engine": str(engine.relative_to(run.folder)),
        "sha256": sha256_of(engine),
        "bytes": engine.stat().st_size,
        "onnx": str(path.relative_to(run.folder)),
        "onnx_sha256": sha256,
        "dataset": run.config()["dataset"]["name"],
        "backend": backend,
        "version": trt.__version__,
        "target": target or ("this GPU" if environment.count_gpus() else "portable, Ampere and later"),
        "batch": {"min": smallest, "opt": best, "max": largest},
        "inputs": [[images.name, list(images.shape), str(images.dtype).removeprefix("DataType.")]],
        "layers": network.num_layers,
        # Of the parsed network; strongly typed, so the engine keeps them.
        "layer_output_types": _output_types(network),
        "hardware": environment.hardware(),
        "versions": environment.versions("tensorrt", "tensorrt-rtx"),
        "log": log.lines[-50:],
    }
    write_json(run.deploy / SIDECAR, sidecar)
    return sidecar


def load(backend: str) -> tuple[str, ModuleType]:
    """Imports the library of a backend.

    Returns:
        The backend's name ("auto" resolved) and its module.

    Raises:
        UserError: its libraries do not load, or it needs a GPU and there is none.
    """
    if backend != "auto":
        try:
            module = importlib.import_module(MODULES[backend])
        except (ImportError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--backend {backend}: its libraries do not load ({reason}); install them") from None
        if backend == "tensorrt" and not environment.count_gpus():
            raise UserError("--backend tensorrt: builds on a GPU only, found none; use --backend tensorrt-rtx")
        return backend, module
    for name in MODULES:
        try:
            return load(name)
        except UserError:
            continue
    raise UserError("--backend auto: neither tensorrt nor tensorrt-rtx loads here; install tensorrt-rtx")


def check_sidecar(run: Run) -> dict[str, Any]:
    """The sidecar of a run's engine, when engine and ONNX file are still the ones it speaks of.

    NVIDIA treats engines as executable: nothing may deserialize one before this.

    Raises:
        UserError: none, or one of another engine or ONNX file.
    """
    path = run.deploy / SIDECAR
    remedy = "build it again: runner engine"
    if not path.is_file():
        raise UserError(f"{run.folder}: expected {path.relative_to(run.folder)}, found none; {remedy}")
    sidecar = read_json(path)
    for kind, key in (("engine", "sha256"), ("onnx", "onnx_sha256")):
        file = run.folder / sidecar[kind]
        if not file.is_file() or sha256_of(file) != sidecar[key]:
            raise UserError(f"{file}: not the file that {path.name} speaks of; {remedy}")
    return sidecar


class RunningEngine:
    """A built engine on the GPU, called with torch tensors.

    Args:
        run: whose engine.
        sidecar: as `check_sidecar` returned it just now.

    Raises:
        UserError: the engine is of another version of the library than the one here, or does not load.
    """

    def __init__(self, run: Run, sidecar: dict[str, Any]) -> None:
        import torch

        _, trt = load(sidecar["backend"])
        if sidecar["version"] != trt.__version__:
            raise UserError(
                f"{sidecar['engine']}: built by {sidecar['backend']} {sidecar['version']}, here is "
                f"{trt.__version__}; build it again: runner engine"
            )
        self.torch = torch
        self.log = _Log(trt)
        self.runtime = trt.Runtime(self.log.logger)
        self.engine = self.runtime.deserialize_cuda_engine((run.folder / sidecar["engine"]).read_bytes())
        if self.engine is None:
            raise UserError(f"{sidecar['engine']}: does not load on this GPU: {self.log.last_errors()}")
        self.context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        modes = {name: self.engine.get_tensor_mode(name) for name in names}
        self.input = next(name for name in names if modes[name] == trt.TensorIOMode.INPUT)
        self.output = next(name for name in names if modes[name] == trt.TensorIOMode.OUTPUT)

    def __call__(self, images: Any) -> Any:
        """images (n, 3, H, W) float32 on the GPU to logits (n, classes) float32 there, on torch's stream."""
        self.context.set_input_shape(self.input, tuple(images.shape))
        images = images.contiguous()
        shape = tuple(self.context.get_tensor_shape(self.output))
        logits = self.torch.empty(shape, dtype=self.torch.float32, device=images.device)
        self.context.set_tensor_address(self.input, images.data_ptr())
        self.context.set_tensor_address(self.output, logits.data_ptr())
        if not self.context.execute_async_v3(self.torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"the engine did not run: {self.log.last_errors()}")
        return logits


def _set_target(trt: ModuleType, config: Any, backend: str, target: str) -> None:
    capabilities = [name for name in dir(getattr(trt, "ComputeCapability", None)) if name.startswith("SM")]
    if target not in capabilities:
        names = ", ".join(capabilities) or "none: it builds for the GPU that is here"
        raise UserError(f"--target {target}: expected one that {backend} builds for ({names})")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)


def _output_types(network: Any) -> dict[str, dict[str, int]]:
    """Layer type to output type to number of layers: {"CONVOLUTION": {"FLOAT": 20}}."""
    counts: dict[str, Counter[str]] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = str(layer.type).removeprefix("LayerType.")
        for output in range(layer.num_outputs):
            dtype = str(layer.get_output(output).dtype).removeprefix("DataType.")
            counts.setdefault(kind, Counter())[dtype] += 1
    return {kind: dict(types) for kind, types in sorted(counts.items())}


class _Log:
    """Keeps what the builder says, for the sidecar and for errors."""

    def __init__(self, trt: ModuleType) -> None:
        self.lines: list[str] = []
        lines = self.lines

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                name = str(severity).rpartition(".")[2]
                if name != "VERBOSE":
                    lines.append(f"{name}: {message}")

        self.logger = Logger()

    def last_errors(self) -> str:
        errors = [line for line in self.lines if "ERROR" in line]
        return "; ".join(errors[-3:]) or "no reason given"
