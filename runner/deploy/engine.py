"""Builds engines from a run's ONNX files with TensorRT 10.12+ or 11, or with TensorRT for RTX, and runs them.

The libraries share one API. Networks are always strongly typed, so an engine has the precision of its graph regardless
of the builder's flags. TensorRT for RTX builds without a GPU.
"""

import importlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from runner.common.errors import UserError
from runner.common.files import sha256_of, write, write_atomically
from runner.deploy import onnx
from runner.deploy.onnx import OnnxFile
from runner.run.folder import Run
from runner.run.schema import BatchRange, EngineSidecar
from runner.system import environment

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
TIMING_CACHE = "timing.cache"  # kernel timings from earlier builds, stored next to the engines
LOW_PRECISION = {"fp16": "HALF", "int8": "INT8"}  # data type that each precision computes in; FLOAT for others
ARITHMETIC = ("CONVOLUTION", "MATRIX_MULTIPLY", "DECONVOLUTION")
DATA_MOVEMENT_LAYERS = (
    "SHUFFLE",
    "SQUEEZE",
    "UNSQUEEZE",
)  # layers that only move data; the builder fuses Q/DQ pairs across them
WIDTH = {"FLOAT": 32, "HALF": 16, "BF16": 16, "INT8": 8, "FP8": 8}  # bits
# Patterns for a tensor's data type in the longer format description that the inspector reports.
INSPECTED = {"FLOAT": r"\bFP32\b|\bFloat\b", "HALF": r"\bFP16\b|\bHalf\b", "INT8": r"\bI(?:nt|NT)8\b"}


@dataclass(frozen=True)
class EngineOptions:
    """How to build an engine.

    Attributes:
        backend: "tensorrt", "tensorrt-rtx" or "auto".
        batch: minimum, optimal and maximum batch size.
        targets: compute capabilities to build for, such as "SM89" (TensorRT for RTX only). If empty, builds for this
            machine's GPU, or for any GPU from Ampere on if there is none.
        optimization_level: 0 to 5; higher levels search longer for fast kernels. None uses the builder's default.
        timing_cache: whether to reuse kernel timings from earlier builds and store new ones (TensorRT only).
    """

    backend: str = "auto"
    batch: tuple[int, int, int] = (1, 128, 512)
    targets: tuple[str, ...] = ()
    optimization_level: int | None = None
    timing_cache: bool = True


def build(run: Run, file: OnnxFile, options: EngineOptions) -> EngineSidecar:
    """Builds the engine `deploy/model.<kind>.<backend>.engine` from an ONNX file, and its sidecar `….engine.json`.

    Returns:
        The sidecar.

    Raises:
        UserError: the backend, batch size or target is not available here, the parser or builder rejects the graph,
            or the precision of the network differs from the file's.
    """
    _check_options(file, options)
    backend, trt = load(options.backend)
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    # TensorRT 11 has only strongly typed networks and ignores the flag.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(file.path.read_bytes()):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise UserError(f"{file.path}: {backend}'s parser rejected it: {errors}")
    precisions = layer_precisions(network)
    check_precision(file, precisions)
    config = _builder_config(trt, builder, network, backend, file, options)
    uses_timing_cache = options.timing_cache and backend == "tensorrt"  # RTX times kernels when an engine first runs
    if uses_timing_cache:
        _load_timing_cache(config, run.deploy / TIMING_CACHE)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"{file.path}: {backend} could not build an engine: {log.last_errors()}")
    if uses_timing_cache:
        write_atomically(run.deploy / TIMING_CACHE, bytes(config.get_timing_cache().serialize()))
    plan = bytes(plan)
    images, (smallest, optimal, largest) = network.get_input(0), options.batch
    inspected = _inspect(trt, log, plan, images.name, optimal) if environment.count_gpus() else None
    if inspected:
        check_inspected(file, inspected)
    engine = run.deploy / f"model.{file.name}.{backend}.engine"
    write_atomically(engine, plan)
    default_target = "this GPU" if backend == "tensorrt" else "portable, Ampere and later"
    sidecar = EngineSidecar(
        engine=str(engine.relative_to(run.folder)),
        sha256=sha256_of(engine),
        bytes=engine.stat().st_size,
        onnx=str(file.path.relative_to(run.folder)),
        onnx_sha256=file.sha256,
        precision=file.precision,
        front_end=file.front_end,
        dataset=run.config().dataset.name,
        backend=backend,
        version=trt.__version__,
        target=", ".join(options.targets) or default_target,
        batch=BatchRange(min=smallest, opt=optimal, max=largest),
        inputs=[(images.name, list(images.shape), _dtype(images))],
        layers=network.num_layers,
        layer_precisions=precisions,
        layer_precisions_from="the parsed network; it is strongly typed, so the engine keeps them",
        inspected_layers=inspected,
        inspected_precisions=inspected_precisions(inspected) if inspected else None,
        weights_bytes=weights_bytes(log.lines),
        optimization_level=config.builder_optimization_level,
        timing_cache=uses_timing_cache,
        hardware=environment.describe_hardware(),
        versions=environment.package_versions("tensorrt", "tensorrt-rtx"),
        log=log.lines[-50:],
    )
    write(sidecar_of(engine), sidecar)
    return sidecar


def _check_options(file: OnnxFile, options: EngineOptions) -> None:
    smallest, optimal, largest = options.batch
    if not 1 <= smallest <= optimal <= largest <= onnx.LARGEST_BATCH:
        raise UserError(f"--batch {smallest} {optimal} {largest}: expected 1 ≤ MIN ≤ OPT ≤ MAX ≤ {onnx.LARGEST_BATCH}")
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise UserError(f"--optimization-level {options.optimization_level}: expected 0 to 5")
    if file.precision == "int8-cpu":
        raise UserError("--precision int8-cpu: its graph is for the CPU; build an engine with --precision int8")


def _builder_config(
    trt: ModuleType, builder: Any, network: Any, backend: str, file: OnnxFile, options: EngineOptions
) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector
    images = network.get_input(0)
    profile = builder.create_optimization_profile()
    profile.set_shape(images.name, *[(size, *images.shape[1:]) for size in options.batch])
    config.add_optimization_profile(profile)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.targets:
        _set_targets(trt, config, backend, options.targets)
    if file.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 must not become TF32
    if backend == "tensorrt-rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # for CUDA graphs
    return config


def _load_timing_cache(config: Any, path: Path) -> None:
    """Loads the stored timing cache into the builder, or an empty one if it is for another GPU or version."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def layer_precisions(network: Any) -> dict[str, dict[str, int]]:
    """Counts a parsed network's layers by layer type and the data type they compute in: {"CONVOLUTION": {"HALF": 20}}.

    A layer computes in the data type of its widest input. If an input comes from a DQ layer, possibly through layers
    that only move data, its type before dequantization counts, because the builder fuses the Q/DQ pair into a kernel
    of that type.
    """
    quantized = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if _kind(layer) == "DEQUANTIZE":
            quantized[layer.get_output(0).name] = _dtype(layer.get_input(0))
        elif _kind(layer) in DATA_MOVEMENT_LAYERS and layer.get_input(0).name in quantized:
            quantized[layer.get_output(0).name] = quantized[layer.get_input(0).name]
    counts: dict[str, Counter[str]] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        tensors = [layer.get_input(i) for i in range(layer.num_inputs)] or [layer.get_output(0)]
        types = [quantized.get(tensor.name, _dtype(tensor)) for tensor in tensors if tensor is not None]
        if types:
            widest = max(types, key=lambda name: WIDTH.get(name, 0))
            counts.setdefault(_kind(layer), Counter())[widest] += 1
    return {kind: dict(types) for kind, types in sorted(counts.items())}


def weights_bytes(log: list[str]) -> int | None:
    """Returns the size of an engine's weights in bytes from the builder's log; None if the log does not report it."""
    matches = [re.search(r"Total Weights Memory: (\d+) bytes", line) for line in log]
    return next((int(match[1]) for match in reversed(matches) if match), None)


def check_precision(file: OnnxFile, precisions: dict[str, dict[str, int]]) -> None:
    """Raises UserError if a network does not compute in the precision of its ONNX file."""
    expected = LOW_PRECISION.get(file.precision, "FLOAT")
    actual: Counter[str] = Counter()
    for kind in ARITHMETIC:
        actual.update(precisions.get(kind, {}))
    if not actual[expected] or (expected != "INT8" and set(actual) != {expected}):
        raise UserError(
            f"{file.path}: expected {expected} arithmetic for {file.precision}, found {dict(actual)}; export it again"
        )


def inspected_precisions(layers: list[Any]) -> dict[str, int]:
    """Counts the tensors between an engine's layers by data type, as far as the inspector reports it."""
    tensors = [tensor for layer in layers if isinstance(layer, dict) for tensor in layer.get("Outputs", ())]
    formats = [str(tensor.get("Format/Datatype", "")) for tensor in tensors if isinstance(tensor, dict)]
    counts = {kind: sum(bool(re.search(pattern, line)) for line in formats) for kind, pattern in INSPECTED.items()}
    return {kind: count for kind, count in counts.items() if count}


def check_inspected(file: OnnxFile, layers: list[Any]) -> None:
    """Raises UserError if the inspector reports an engine's data types and none matches the file's precision."""
    counts, expected = inspected_precisions(layers), LOW_PRECISION.get(file.precision, "FLOAT")
    if counts and expected not in counts:
        raise UserError(f"{file.path}: expected {expected} in the engine for {file.precision}, found {counts}")


def _kind(layer: Any) -> str:
    return str(layer.type).removeprefix("LayerType.")


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("DataType.")


def _inspect(trt: ModuleType, log: "_Log", plan: bytes, name: str, batch: int) -> list[Any] | None:
    """Describes an engine's layers at a batch size with the inspector; returns None if this GPU cannot load the engine.

    `name` is the name of the input tensor.
    """
    runtime = trt.Runtime(log.logger)
    loaded = runtime.deserialize_cuda_engine(plan)
    if loaded is None:
        return None
    inspector, context = loaded.create_engine_inspector(), loaded.create_execution_context()
    context.set_input_shape(name, (batch, *loaded.get_tensor_shape(name)[1:]))
    inspector.execution_context = context  # types are reported only for a known shape
    return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON)).get("Layers")


def load(backend: str) -> tuple[str, ModuleType]:
    """Imports the TensorRT library of a backend.

    Returns:
        The backend's name, with "auto" resolved, and its module.

    Raises:
        UserError: the library does not load, or it needs a GPU and there is none.
    """
    if backend != "auto":
        try:
            module = importlib.import_module(MODULES[backend])
        except (ImportError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--backend {backend}: its libraries do not load ({reason}); install them") from None
        if backend == "tensorrt" and not environment.count_gpus():
            raise UserError("--backend tensorrt: expected a GPU to build on, found none; use --backend tensorrt-rtx")
        return backend, module
    for name in MODULES:
        try:
            return load(name)
        except UserError:
            continue
    raise UserError("--backend auto: neither tensorrt nor tensorrt-rtx loads here; install tensorrt-rtx")


def smallest(backend: str) -> int:
    """Builds a one-layer engine and returns its size in bytes.

    Raises:
        UserError: as in `load`.
        RuntimeError: the build fails.
    """
    _, trt = load(backend)
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    images = network.add_input("images", trt.float32, (1, 8))
    network.mark_output(network.add_activation(images, trt.ActivationType.RELU).get_output(0))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise RuntimeError(log.last_errors())
    return len(bytes(plan))


def sidecar_of(engine: Path) -> Path:
    """The path of an engine's sidecar."""
    return engine.with_name(f"{engine.name}.json")


def built(run: Run, file: OnnxFile) -> list[EngineSidecar]:
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
        UserError: one of the files is missing, or its hash differs.
    """
    for name, expected in ((sidecar.engine, sidecar.sha256), (sidecar.onnx, sidecar.onnx_sha256)):
        file = run.folder / name
        if not file.is_file() or sha256_of(file) != expected:
            raise UserError(
                f"{file}: expected SHA-256 {expected[:12]}… from {sidecar.engine}.json, found another file; build it "
                f"again: runner engine {run.folder}"
            )


class RunningEngine:
    """An engine loaded on the GPU and called with torch tensors.

    Args:
        run: the run that the engine belongs to.
        sidecar: the engine's sidecar, which `verify` must have checked just before.

    Raises:
        UserError: the engine was built by another version of the library, or does not load.
    """

    def __init__(self, run: Run, sidecar: EngineSidecar) -> None:
        import torch

        _, trt = load(sidecar.backend)
        if sidecar.version != trt.__version__:
            raise UserError(
                f"{sidecar.engine}: built by {sidecar.provider}, but {trt.__version__} is installed; build it again: "
                f"runner engine {run.folder}"
            )
        self.torch = torch
        self.sidecar = sidecar
        self.log = _Log(trt)
        self.runtime = trt.Runtime(self.log.logger)
        self.engine = self.runtime.deserialize_cuda_engine((run.folder / sidecar.engine).read_bytes())
        if self.engine is None:
            raise UserError(f"{sidecar.engine}: does not load on this GPU: {self.log.last_errors()}")
        self.context = self._create_context(trt)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        modes = {name: self.engine.get_tensor_mode(name) for name in names}
        self.input = next(name for name in names if modes[name] == trt.TensorIOMode.INPUT)
        self.output = next(name for name in names if modes[name] == trt.TensorIOMode.OUTPUT)

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
        shape = tuple(self.context.get_tensor_shape(self.output))
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
        limits, shape = self.sidecar.batch, list(self.sidecar.inputs[0][1])
        if list(images.shape[1:]) != shape[1:] or not limits.min <= len(images) <= limits.max:
            raise UserError(
                f"{self.sidecar.engine}: expected {limits.min} to {limits.max} images of {shape[1:]}, "
                f"found {list(images.shape)}; build it for more: runner engine --batch"
            )
        images = images.contiguous()
        self.context.set_input_shape(self.input, tuple(images.shape))
        return images

    def enqueue(self, images: Any, logits: Any) -> None:
        """Computes `logits` on torch's current stream without synchronizing, so that CUDA graphs can capture it."""
        self.context.set_tensor_address(self.input, images.data_ptr())
        self.context.set_tensor_address(self.output, logits.data_ptr())
        if not self.context.execute_async_v3(self.torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"the engine did not run: {self.log.last_errors()}")


def _set_targets(trt: ModuleType, config: Any, backend: str, targets: tuple[str, ...]) -> None:
    known = [name for name in dir(getattr(trt, "ComputeCapability", None)) if name.startswith("SM")]
    for target in targets:
        if target not in known:
            names = ", ".join(known) or "none: it builds for this machine's GPU"
            raise UserError(f"--target {target}: expected one that {backend} builds for ({names})")
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target), index)


class _Log:
    """Collects TensorRT's log messages, for the sidecar and for errors."""

    def __init__(self, trt: Any) -> None:
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
