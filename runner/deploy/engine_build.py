"""Builds TensorRT engines from a run's ONNX files.

Networks are always strongly typed, so an engine has the precision of its graph regardless of the builder's flags.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from runner.common.errors import UserError
from runner.common.files import read_bytes, sha256_of, write_atomically, write_json
from runner.deploy import onnx
from runner.deploy.engine_library import (
    LIBRARIES,
    Log,
    create_network,
    create_runtime,
    resolve_targets,
    select_library,
    set_targets,
)
from runner.deploy.engine_run import sidecar_of
from runner.deploy.onnx import OnnxFile
from runner.run.folder import Run
from runner.run.schema import BatchRange, EngineSidecar
from runner.system import environment

# NVIDIA's matrix of TensorRT for RTX has int8 only for the weights of matrix products, but a Q/DQ graph quantizes the
# activations as well.
OUTSIDE_RTX_MATRIX = {
    "CONVOLUTION": "int8 convolutions",
    "DECONVOLUTION": "int8 transposed convolutions",
    "MATRIX_MULTIPLY": "int8 matrix products of quantized activations",
}
TIMING_CACHE = "timing.cache"  # kernel timings from earlier builds, stored next to the engines
COMPUTE_DTYPE = {"fp16": "HALF", "int8": "INT8"}  # data type that each precision computes in; FLOAT for others
ARITHMETIC = ("CONVOLUTION", "MATRIX_MULTIPLY", "DECONVOLUTION")
DATA_MOVEMENT_LAYERS = (
    "SHUFFLE",
    "SQUEEZE",
    "UNSQUEEZE",
)  # layers that only move data; the builder fuses Q/DQ pairs across them
DTYPE_BITS = {"FLOAT": 32, "HALF": 16, "BF16": 16, "INT8": 8, "FP8": 8}  # bits
# Patterns for a tensor's data type in the longer format description that the inspector reports.
DTYPE_PATTERNS = {"FLOAT": r"\bFP32\b|\bFloat\b", "HALF": r"\bFP16\b|\bHalf\b", "INT8": r"\bI(?:nt|NT)8\b"}


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
        version_compatible: whether later versions of TensorRT can run the engine, which may be slower (TensorRT only).
        build_route: settings of the compiler found by TensorRT's global performance tuner; None for the default route
            (TensorRT 11.1 or later only).
    """

    backend: str = "auto"
    batch: tuple[int, int, int] = (1, 128, 512)
    targets: tuple[str, ...] = ()
    optimization_level: int | None = None
    timing_cache: bool = True
    version_compatible: bool = False
    build_route: str | None = None


@dataclass(frozen=True)
class Plan:
    """An engine in memory, and what the builder reported.

    Attributes:
        content: the serialized engine.
        targets: the targets that were set in the builder.
        capabilities: compute capabilities of the GPUs that run it.
        image_name, image_shape, image_dtype: its input tensor.
        layers: number of layers of the network.
        precisions: the network's layers by type and data type.
        inspected: the engine's layers as the inspector reports them; None if it is for another GPU.
        optimization_level: the builder's.
        log: lines of the builder's log.
    """

    content: bytes
    targets: tuple[str, ...]
    capabilities: tuple[str, ...]
    image_name: str
    image_shape: tuple[int, ...]
    image_dtype: str
    layers: int
    precisions: dict[str, dict[str, int]]
    inspected: list[Any] | None
    optimization_level: int
    log: list[str]


def build(run: Run, file: OnnxFile, options: EngineOptions) -> EngineSidecar:
    """Builds the engine `deploy/model.<precision>[.raw].<backend>.engine` from an ONNX file, and its sidecar `….json`.

    Returns:
        The sidecar.

    Raises:
        UserError: the backend, batch size or target is not available here, the parser or builder rejects the graph,
            the precision of the network differs from the file's, or the engine does not load on the GPU that it is for.
    """
    check_options(file, options)
    backend, trt = select_library(options.backend, options.targets)
    for option, value in (
        ("--version-compatible", options.version_compatible),
        ("--build-route", options.build_route),
        ("--no-timing-cache", not options.timing_cache),
    ):
        if value and backend != "tensorrt":
            raise UserError(f"{option}: expected TensorRT, which needs a GPU that it covers, found {backend}")
    cache = run.deploy / TIMING_CACHE if options.timing_cache and backend == "tensorrt" else None
    plan = _build_plan(trt, backend, file, options, cache)
    engine = run.deploy / f"model.{file.name}.{backend}.engine"
    write_atomically(engine, plan.content)
    smallest, optimal, largest = options.batch
    built_for = "portable" if LIBRARIES[backend].portable_capabilities else "this GPU"
    sidecar = EngineSidecar(
        engine=str(engine.relative_to(run.folder)),
        sha256=sha256_of(engine),
        bytes=len(plan.content),
        onnx=str(file.path.relative_to(run.folder)),
        onnx_sha256=file.sha256,
        precision=file.precision,
        front_end=file.front_end,
        dataset=run.config().dataset.name,
        backend=backend,
        version=trt.__version__,
        version_compatible=options.version_compatible,
        build_route=options.build_route,
        target=", ".join(plan.targets) or f"{built_for} ({', '.join(plan.capabilities)})",
        compute_capabilities=list(plan.capabilities),
        outside_matrix=outside_matrix(backend, plan.precisions),
        batch=BatchRange(min=smallest, opt=optimal, max=largest),
        inputs=[(plan.image_name, list(plan.image_shape), plan.image_dtype)],
        layers=plan.layers,
        layer_precisions=plan.precisions,
        layer_precisions_from="the parsed network; it is strongly typed, so the engine keeps them",
        inspected_layers=plan.inspected,
        inspected_precisions=inspected_precisions(plan.inspected) if plan.inspected else None,
        weights_bytes=weights_bytes(plan.log),
        optimization_level=plan.optimization_level,
        timing_cache=cache is not None,
        hardware=environment.describe_hardware(),
        versions=environment.package_versions(*environment.TENSORRT_PACKAGES),
        log=plan.log[-50:],
    )
    write_json(sidecar_of(engine), sidecar)
    return sidecar


def _build_plan(trt: ModuleType, backend: str, file: OnnxFile, options: EngineOptions, cache: Path | None) -> Plan:
    """Builds an engine in memory, checks its precision, and updates the timing cache. Raises UserError like `build`."""
    gpu = environment.first_gpu()
    targets, capabilities = resolve_targets(backend, options.targets, gpu)
    log = Log(trt)
    builder = trt.Builder(log.logger)
    network = create_network(trt, builder)
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(file.path.read_bytes()):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise UserError(f"{file.path}: the parser of {backend} rejected it: {errors}")
    precisions = layer_precisions(network)
    check_precision(file, precisions)
    config = _builder_config(trt, builder, network, backend, file, options, targets)
    if cache:
        _load_timing_cache(config, cache)
    content = builder.build_serialized_network(network, config)
    if content is None:
        raise UserError(f"{file.path}: {backend} could not build an engine: {log.last_errors()}")
    if cache:
        write_atomically(cache, bytes(config.get_timing_cache().serialize()))
    content, images, inspected = bytes(content), network.get_input(0), None
    if gpu and gpu.capability in capabilities:
        inspected = _inspect(trt, log, content, images.name, options, f"{file.path}: {backend}'s engine")
    if inspected:
        check_inspected(file, inspected)
    return Plan(
        content, targets, capabilities, images.name, tuple(images.shape), _dtype(images), network.num_layers,
        precisions, inspected, config.builder_optimization_level, log.lines,
    )  # fmt: skip


def check_options(file: OnnxFile, options: EngineOptions) -> None:
    """Raises UserError if the options are invalid, or an engine cannot be built from the file at all."""
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
        set_targets(trt, config, targets)
    if file.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 must not become TF32
    if options.build_route:
        if not hasattr(config, "build_route"):
            raise UserError(f"--build-route: expected TensorRT 11.1 or later, found {trt.__version__}")
        config.build_route = options.build_route
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if backend == "tensorrt-rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # for CUDA graphs
    return config


def _load_timing_cache(config: Any, path: Path) -> None:
    """Loads the stored timing cache into the builder, or an empty one if it is for another GPU or version."""
    cache = config.create_timing_cache(read_bytes(path) if path.is_file() else b"")
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
        if _layer_type(layer) == "DEQUANTIZE":
            quantized[layer.get_output(0).name] = _dtype(layer.get_input(0))
        elif _layer_type(layer) in DATA_MOVEMENT_LAYERS and layer.get_input(0).name in quantized:
            quantized[layer.get_output(0).name] = quantized[layer.get_input(0).name]
    counts: dict[str, Counter[str]] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        tensors = [layer.get_input(i) for i in range(layer.num_inputs)] or [layer.get_output(0)]
        types = [quantized.get(tensor.name, _dtype(tensor)) for tensor in tensors if tensor is not None]
        if types:
            widest = max(types, key=lambda name: DTYPE_BITS.get(name, 0))
            counts.setdefault(_layer_type(layer), Counter())[widest] += 1
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
    expected = COMPUTE_DTYPE.get(file.precision, "FLOAT")
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
    counts = {kind: sum(bool(re.search(pattern, line)) for line in formats) for kind, pattern in DTYPE_PATTERNS.items()}
    return {kind: count for kind, count in counts.items() if count}


def check_inspected(file: OnnxFile, layers: list[Any]) -> None:
    """Raises UserError if the inspector reports an engine's data types and none matches the file's precision."""
    counts, expected = inspected_precisions(layers), COMPUTE_DTYPE.get(file.precision, "FLOAT")
    if counts and expected not in counts:
        raise UserError(f"{file.path}: expected {expected} in the engine for {file.precision}, found {counts}")


def _layer_type(layer: Any) -> str:
    return str(layer.type).removeprefix("LayerType.")


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("DataType.")


def _inspect(trt: ModuleType, log: Log, plan: bytes, name: str, options: EngineOptions, what: str) -> list[Any] | None:
    """Loads an engine on this GPU and describes its layers at the optimal batch size with the inspector.

    Args:
        trt, log: the library and its log.
        plan: the engine.
        name: name of the input tensor.
        options: how it was built.
        what: names the engine in messages.

    Returns:
        The layers; None, with a warning on standard error and in the log, if the inspector does not report them.

    Raises:
        UserError: the engine does not load.
    """
    runtime = create_runtime(trt, log, options.version_compatible)
    loaded = runtime.deserialize_cuda_engine(plan)
    context = None if loaded is None else loaded.create_execution_context()
    if context is None:
        raise UserError(f"{what} does not load on this GPU: {log.last_errors()}")
    context.set_input_shape(name, (options.batch[1], *loaded.get_tensor_shape(name)[1:]))
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
