"""Builds engines from a run's ONNX files with TensorRT 10.12+ or 11, or with TensorRT for RTX, and runs them.

The libraries share one API. Networks are always strongly typed, so an engine has the precision of its graph regardless
of the builder's flags. TensorRT for RTX builds without a GPU, but only for RTX cards: LIBRARIES has the GPUs that each
library covers.
"""

import importlib
import json
import re
import sys
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
from runner.system.environment import Gpu


@dataclass(frozen=True)
class Library:
    """A TensorRT library, and the GPUs that it covers according to NVIDIA's support matrix.

    Attributes:
        module: name of its Python module.
        package: name of the package that installs it.
        capabilities: compute capabilities that it covers.
        and_later: whether it covers all later ones as well.
        portable: compute capabilities of the GPUs that run an engine built for no GPU in particular; empty if it builds
            engines only for the GPU of this machine.
    """

    module: str
    package: str
    capabilities: tuple[str, ...]
    and_later: bool = False
    portable: tuple[str, ...] = ()

    def covers(self, capability: str) -> bool:
        """Returns whether it covers a compute capability, such as "9.0"."""
        later = self.and_later and _version(capability) > _version(self.capabilities[-1])
        return later or capability in self.capabilities

    @property
    def targets(self) -> tuple[str, ...]:
        """Names that `--target` accepts, such as "SM89"; none if it builds only for the GPU of this machine."""
        return tuple(map(target_of, self.capabilities)) if self.portable else ()

    def __str__(self) -> str:
        return ", ".join(self.capabilities) + (" and later" if self.and_later else "")


LIBRARIES = {  # in the order in which `--backend auto` tries them
    "tensorrt": Library("tensorrt", "tensorrt-cu13", ("7.5",), and_later=True),
    "tensorrt-rtx": Library(
        "tensorrt_rtx", "tensorrt-rtx", ("7.5", "8.6", "8.9", "12.0", "12.1"), portable=("8.6", "8.9", "12.0")
    ),
}
# NVIDIA's matrix of TensorRT for RTX has int8 only for the weights of matrix products, but a Q/DQ graph quantizes the
# activations as well.
OUTSIDE_RTX_MATRIX = {
    "CONVOLUTION": "int8 convolutions",
    "DECONVOLUTION": "int8 transposed convolutions",
    "MATRIX_MULTIPLY": "int8 matrix products of quantized activations",
}
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
        targets: compute capabilities to build for, such as "SM89" (TensorRT for RTX only). If empty, TensorRT builds
            for this machine's GPU, and TensorRT for RTX a portable engine, or one for this machine's GPU if no
            portable one runs on it.
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
            the precision of the network differs from the file's, or the engine does not load on the GPU that it is for.
    """
    _check_options(file, options)
    backend, trt = choose(options.backend, options.targets)
    gpu = environment.first_gpu()
    targets, capabilities = _built_for(backend, options.targets, gpu)
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
    config = _builder_config(trt, builder, network, backend, file, options, targets)
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
    inspected = None
    if gpu and gpu.capability in capabilities:
        inspected = _inspect(trt, log, plan, images.name, optimal, f"{file.path}: {backend}'s engine")
    if inspected:
        check_inspected(file, inspected)
    engine = run.deploy / f"model.{file.name}.{backend}.engine"
    write_atomically(engine, plan)
    default_target = f"{'portable' if LIBRARIES[backend].portable else 'this GPU'} ({', '.join(capabilities)})"
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
        target=", ".join(targets) or default_target,
        compute_capabilities=list(capabilities),
        outside_matrix=outside_matrix(backend, precisions),
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
        versions=environment.package_versions(*environment.TENSORRT_PACKAGES),
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
    trt: ModuleType,
    builder: Any,
    network: Any,
    backend: str,
    file: OnnxFile,
    options: EngineOptions,
    targets: tuple[str, ...],
) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector
    images = network.get_input(0)
    profile = builder.create_optimization_profile()
    profile.set_shape(images.name, *[(size, *images.shape[1:]) for size in options.batch])
    config.add_optimization_profile(profile)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if targets:
        _set_targets(trt, config, targets)
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


def outside_matrix(backend: str, precisions: dict[str, dict[str, int]]) -> list[str]:
    """Names the arithmetic of a network that is not in NVIDIA's support matrix of a backend.

    Args:
        backend: "tensorrt" or "tensorrt-rtx".
        precisions: the layers by type and data type, as `layer_precisions` counts them.
    """
    if backend != "tensorrt-rtx":
        return []
    return [name for kind, name in OUTSIDE_RTX_MATRIX.items() if precisions.get(kind, {}).get("INT8")]


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
    tensors = [tensor for layer in layers if isinstance(layer, dict) for tensor in layer.get("Outputs") or ()]
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


def _inspect(trt: ModuleType, log: "_Log", plan: bytes, name: str, batch: int, what: str) -> list[Any] | None:
    """Loads an engine on this GPU and describes its layers at a batch size with the inspector.

    Args:
        trt, log: the library and its log.
        plan: the engine.
        name: name of the input tensor.
        batch: the batch size.
        what: names the engine in messages.

    Returns:
        The layers; None, with a warning on standard error and in the log, if the inspector does not report them.

    Raises:
        UserError: the engine does not load.
    """
    runtime = trt.Runtime(log.logger)
    loaded = runtime.deserialize_cuda_engine(plan)
    context = None if loaded is None else loaded.create_execution_context()
    if context is None:
        raise UserError(f"{what} does not load on this GPU: {log.last_errors()}")
    context.set_input_shape(name, (batch, *loaded.get_tensor_shape(name)[1:]))
    inspector = loaded.create_engine_inspector()
    inspector.execution_context = context  # types are reported only for a known shape
    layers, problem = parse_inspected(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    if problem:
        line = f"{what}: the inspector {problem}, so the types of its tensors are not checked"
        log.lines.append(f"WARNING: {line}")
        print(f"runner: {line}", file=sys.stderr)
    return layers


def parse_inspected(text: str) -> tuple[list[Any] | None, str | None]:
    """Reads the layers from the inspector's JSON; if there are none, returns None and what is wrong."""
    try:
        description = json.loads(text)
    except (ValueError, TypeError) as error:
        return None, f"returned no valid JSON ({error})"
    layers = description.get("Layers") if isinstance(description, dict) else None
    return (layers, None) if isinstance(layers, list) else (None, "listed no layers")


def choose(backend: str, targets: tuple[str, ...] = ()) -> tuple[str, ModuleType]:
    """Selects the library to build with, and imports it.

    "auto" selects the first one that loads and whose engine runs on this machine's GPU; without a GPU, TensorRT for
    RTX.

    Args:
        backend: "tensorrt", "tensorrt-rtx" or "auto".
        targets: compute capabilities to build for, such as "SM89"; if empty, this machine's GPU or a portable engine.

    Returns:
        The backend's name, with "auto" resolved, and its module.

    Raises:
        UserError: the library does not load, or cannot build for this GPU or these targets; for "auto", none can.
    """
    gpu = environment.first_gpu()
    if backend != "auto":
        _check_targets(backend, targets)
        if problem := _why_not(backend, targets, gpu):
            remedy = "--backend tensorrt, or other GPUs by --target" if LIBRARIES[backend].portable else "another GPU"
            found, remedy = (gpu, remedy) if gpu else ("none", "--backend tensorrt-rtx")
            raise UserError(f"--backend {backend}: {problem}, found {found}; use {remedy}")
        return backend, load(backend)
    _check_targets("tensorrt-rtx", targets)
    if gpu and targets and target_of(gpu.capability) not in targets:
        raise UserError(
            f"--target {' '.join(targets)}: expected to include {target_of(gpu.capability)} for {gpu}; to build for "
            "other GPUs only, add --backend tensorrt-rtx"
        )
    problems: list[str] = []
    packages: list[str] = []
    for name, library in LIBRARIES.items():
        problem = _why_not(name, targets, gpu)
        if problem is None:
            try:
                return name, _import(name)
            except ImportError as error:
                problem, packages = str(error), [*packages, library.package]
        problems.append(f"{name} {problem}")
    where = f"for {gpu}" if gpu else "without a GPU"
    remedy = f"install it: pip install {packages[0]}" if packages else "use another GPU"
    raise UserError(f"--backend auto: no library here builds an engine {where}: {', '.join(problems)}; {remedy}")


def load(backend: str) -> ModuleType:
    """Imports a backend's library. Raises UserError if it does not load."""
    try:
        return _import(backend)
    except ImportError as error:
        remedy = f"pip install {LIBRARIES[backend].package}"
        raise UserError(f"--backend {backend}: {error}; install it: {remedy}") from None


def _import(backend: str) -> ModuleType:
    """Like `load`, but raises ImportError with a reason of one line."""
    try:
        return importlib.import_module(LIBRARIES[backend].module)
    except (ImportError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ImportError(f"does not load ({reason})") from None


def _why_not(backend: str, targets: tuple[str, ...], gpu: Gpu | None) -> str | None:
    """Returns why a library cannot build for this GPU, or for the targets if there are any; None if it can."""
    library = LIBRARIES[backend]
    if not library.portable and (targets or gpu is None):
        return "builds only for the GPU of this machine"
    if gpu and not targets and not library.covers(gpu.capability):
        return f"covers only compute capability {library}"
    return None


def _version(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def target_of(capability: str) -> str:
    """The name by which `--target` takes a compute capability: "SM89" for "8.9"."""
    return f"SM{capability.replace('.', '')}"


@dataclass(frozen=True)
class Trial:
    """What `try_out` has shown of a library.

    Attributes:
        bytes: size of the engine that it built.
        capabilities: compute capabilities that the engine is for.
        gpu: the GPU that loaded and ran it; None if it was only built.
    """

    bytes: int
    capabilities: tuple[str, ...]
    gpu: Gpu | None


def try_out(backend: str) -> Trial:
    """Builds a one-layer engine; with a GPU, also loads and runs it, and compares its output with torch's.

    Raises:
        UserError: as in `choose`.
        RuntimeError: the engine is not built, does not load or run, or its output is wrong.
    """
    _, trt = choose(backend)
    gpu = environment.first_gpu()
    targets, capabilities = _built_for(backend, (), gpu)
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    images = network.add_input("images", trt.float32, (1, 8))
    network.mark_output(network.add_activation(images, trt.ActivationType.RELU).get_output(0))
    config = builder.create_builder_config()
    if targets:
        _set_targets(trt, config, targets)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"does not build an engine: {log.last_errors()}")
    plan = bytes(plan)
    if gpu:
        _run_relu(trt, log, plan)
    return Trial(len(plan), capabilities, gpu)


def _run_relu(trt: ModuleType, log: "_Log", plan: bytes) -> None:
    """Runs the engine of `try_out`. Raises RuntimeError if it does not load or run, or if its output is wrong."""
    import torch

    runtime = trt.Runtime(log.logger)
    loaded = runtime.deserialize_cuda_engine(plan)
    context = None if loaded is None else loaded.create_execution_context()
    if context is None:
        raise RuntimeError(f"builds an engine that does not load on this GPU: {log.last_errors()}")
    images = torch.arange(-4.0, 4.0, device="cuda").reshape(1, 8)
    output = torch.full_like(images, -1.0)
    for index in range(loaded.num_io_tensors):
        name = loaded.get_tensor_name(index)
        is_input = loaded.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        context.set_tensor_address(name, (images if is_input else output).data_ptr())
    if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
        raise RuntimeError(f"builds an engine that does not run on this GPU: {log.last_errors()}")
    torch.cuda.synchronize()
    if not torch.equal(output, images.relu()):
        raise RuntimeError(f"builds an engine whose output on this GPU is wrong: {output.tolist()}")


def why_not_here(sidecar: EngineSidecar) -> str | None:
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
        UserError: one of the files is missing or outside the run's folder, or its hash differs.
    """
    for name, expected in ((sidecar.engine, sidecar.sha256), (sidecar.onnx, sidecar.onnx_sha256)):
        file = run.folder / name
        if not file.resolve().is_relative_to(run.folder.resolve()):
            raise UserError(f"{run.folder}: expected an engine of this folder, found {name!r}; remove its description")
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
        UserError: the engine is for other GPUs, was built by another version of the library, or does not load.
    """

    def __init__(self, run: Run, sidecar: EngineSidecar) -> None:
        import torch

        if problem := why_not_here(sidecar):
            raise UserError(f"{problem}; build one: runner engine {run.folder}")
        trt = load(sidecar.backend)
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
        if self.context is None:
            raise UserError(f"{sidecar.engine}: does not run on this GPU: {self.log.last_errors()}")
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


def _check_targets(backend: str, targets: tuple[str, ...]) -> None:
    """Raises UserError if a library does not build for a target."""
    known = LIBRARIES[backend].targets
    if len(set(targets)) < len(targets):
        raise UserError(f"--target {' '.join(targets)}: expected each target once")
    for target in targets:
        if target not in known:
            names = ", ".join(known) or "none: it builds for this machine's GPU"
            raise UserError(f"--target {target}: expected one that {backend} builds for ({names})")


def _built_for(backend: str, targets: tuple[str, ...], gpu: Gpu | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the targets to set in the builder, and the compute capabilities of the GPUs that will run the engine."""
    library = LIBRARIES[backend]
    if not library.portable:
        return (), (gpu.capability,) if gpu else ()
    if gpu and not targets and gpu.capability not in library.portable:
        targets = (target_of(gpu.capability),)
    if not targets:
        return (), library.portable
    return targets, tuple(capability for capability in library.capabilities if target_of(capability) in targets)


def _set_targets(trt: ModuleType, config: Any, targets: tuple[str, ...]) -> None:
    for target in targets:
        if not hasattr(trt.ComputeCapability, target):
            raise UserError(f"--target {target}: unknown to the installed version {trt.__version__}; update it")
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
