"""Builds a TensorRT engine from a run's ONNX file: by TensorRT 10.12+ or 11, or by TensorRT for RTX.

They share one API. Networks are always strongly typed: the precision is the graph's, and a flag cannot turn a
request for one precision into an engine of another. TensorRT for RTX builds ahead of time without a GPU.
"""

import importlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from data_prep.console import UserError, sha256_of
from runner import environment
from runner.deploy import onnx
from runner.deploy.onnx import Exported
from runner.runs import Run, read_json, write_atomically, write_json

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
TIMING_CACHE = "timing.cache"  # of the builder's measurements, beside the engines
LOWER = {"fp16": "HALF", "int8": "INT8"}  # what the arithmetic of a precision must be, and none of it FLOAT
ARITHMETIC = ("CONVOLUTION", "MATRIX_MULTIPLY", "DECONVOLUTION")
MOVES = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE")  # layers that compute nothing; the builder takes pairs across them
WIDTH = {"FLOAT": 32, "HALF": 16, "BF16": 16, "INT8": 8, "FP8": 8}  # bits; a layer computes in its widest input's
# How the inspector words the types of an engine's tensors, among much else.
INSPECTED = {"FLOAT": r"\bFP32\b|\bFloat\b", "HALF": r"\bFP16\b|\bHalf\b", "INT8": r"\bI(?:nt|NT)8\b"}
SIDECAR_KEYS = ("engine", "sha256", "onnx", "onnx_sha256", "precision", "front_end", "backend", "version", "batch",
                "inputs")  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """How an engine is to be built.

    Attributes:
        backend: "tensorrt", "tensorrt-rtx" or "auto".
        batch: smallest, best served and largest batch.
        targets: compute capabilities like "SM89" to build for (TensorRT for RTX); none for the GPU that is here,
            or, without one, an engine that runs from Ampere on.
        optimization_level: 0 to 5, how long the builder looks for the fastest kernels; None for its default.
        timing_cache: keep what the builder measures, and begin with what it measured before (TensorRT).
    """

    backend: str = "auto"
    batch: tuple[int, int, int] = (1, 128, 512)
    targets: tuple[str, ...] = ()
    optimization_level: int | None = None
    timing_cache: bool = True


def build(run: Run, file: Exported, wish: Wish) -> dict[str, Any]:
    """Writes `deploy/model.<kind>.<backend>.engine` and its sidecar, `….engine.json`.

    Args:
        run: whose.
        file: its ONNX file in the precision wanted.
        wish: how.

    Returns:
        The sidecar.

    Raises:
        UserError: a backend, batch or target that cannot be had here; the parser or the builder refused the graph,
            with what they said; or the parsed network does not have the precision of the file.
    """
    smallest, best, largest = wish.batch
    if not 1 <= smallest <= best <= largest <= onnx.LARGEST_BATCH:
        raise UserError(
            f"--batch {smallest} {best} {largest}: expected 1 ≤ MIN ≤ OPT ≤ MAX ≤ {onnx.LARGEST_BATCH}, rising"
        )
    if wish.optimization_level is not None and not 0 <= wish.optimization_level <= 5:
        raise UserError(f"--optimization-level {wish.optimization_level}: expected 0 to 5")
    if file.precision == "int8-cpu":
        raise UserError("--precision int8-cpu: its graph is for the CPU; engines are built of int8")
    backend, trt = load(wish.backend)
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    # TensorRT 11 knows no other kind of network, and ignores the flag.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(file.path.read_bytes()):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise UserError(f"{file.path}: {backend}'s parser refused it: {errors}")
    precisions = layer_precisions(network)
    check_precision(file, precisions)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector
    images = network.get_input(0)
    profile = builder.create_optimization_profile()
    profile.set_shape(images.name, *[(size, *images.shape[1:]) for size in wish.batch])
    config.add_optimization_profile(profile)
    if wish.optimization_level is not None:
        config.builder_optimization_level = wish.optimization_level
    if wish.targets:
        _set_targets(trt, config, backend, wish.targets)
    if file.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    if backend == "tensorrt-rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # what a CUDA graph of it needs
    cache = run.deploy / TIMING_CACHE
    timed = wish.timing_cache and backend == "tensorrt"  # RTX measures when an engine is first run, not before
    if timed:
        kept = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
        if kept is None or not config.set_timing_cache(kept, ignore_mismatch=False):  # of another GPU or version
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"{file.path}: {backend} could not build an engine: {log.last_errors()}")
    if timed:
        write_atomically(cache, bytes(config.get_timing_cache().serialize()))
    plan = bytes(plan)
    inspected = _inspected(trt, log, plan, images.name, best) if environment.count_gpus() else None
    if inspected:
        check_inspected(file, inspected)
    engine = run.deploy / f"model.{file.name}.{backend}.engine"
    write_atomically(engine, plan)
    sidecar = {
        "engine": str(engine.relative_to(run.folder)),
        "sha256": sha256_of(engine),
        "bytes": engine.stat().st_size,
        "onnx": str(file.path.relative_to(run.folder)),
        "onnx_sha256": file.sha256,
        "precision": file.precision,
        "front_end": "raw" if file.raw else "normalised",
        "dataset": run.config()["dataset"]["name"],
        "backend": backend,
        "version": trt.__version__,
        "target": ", ".join(wish.targets)
        or ("this GPU" if backend == "tensorrt" else "portable, Ampere and later"),
        "batch": {"min": smallest, "opt": best, "max": largest},
        "inputs": [[images.name, list(images.shape), str(images.dtype).removeprefix("DataType.")]],
        "layers": network.num_layers,
        "layer_precisions": precisions,
        "layer_precisions_from": "the parsed network; it is strongly typed, so the engine keeps them",
        "inspected_layers": inspected,
        "inspected_precisions": inspected and inspected_precisions(inspected),
        "weights_bytes": weights_bytes(log.lines),
        "optimization_level": config.builder_optimization_level,
        "timing_cache": timed,
        "hardware": environment.hardware(),
        "versions": environment.versions("tensorrt", "tensorrt-rtx"),
        "log": log.lines[-50:],
    }
    write_json(sidecar_of(engine), sidecar)
    return sidecar


def layer_precisions(network: Any) -> dict[str, dict[str, int]]:
    """Of a parsed network, layer type to type of its arithmetic to number of layers: {"CONVOLUTION": {"HALF": 20}}.

    The type is that of the layer's widest input, so of a residual sum FLOAT where one of its two is; where an input
    comes from a DQ layer, or from one that only moves its values, it is what was dequantised, for the builder fuses
    the pair into a kernel of that type.
    """
    quantised = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if _kind(layer) == "DEQUANTIZE":
            quantised[layer.get_output(0).name] = _dtype(layer.get_input(0))
        elif _kind(layer) in MOVES and layer.get_input(0).name in quantised:
            quantised[layer.get_output(0).name] = quantised[layer.get_input(0).name]
    counts: dict[str, Counter[str]] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        tensors = [layer.get_input(place) for place in range(layer.num_inputs)] or [layer.get_output(0)]
        types = [quantised.get(tensor.name, _dtype(tensor)) for tensor in tensors if tensor is not None]
        if types:
            widest = max(types, key=lambda name: WIDTH.get(name, 0))
            counts.setdefault(_kind(layer), Counter())[widest] += 1
    return {kind: dict(types) for kind, types in sorted(counts.items())}


def weights_bytes(log: list[str]) -> int | None:
    """What an engine's weights take, as its builder told: half of fp32's in fp16, a quarter in int8 or less."""
    found = [re.search(r"Total Weights Memory: (\d+) bytes", line) for line in log]
    return next((int(match[1]) for match in reversed(found) if match), None)


def check_precision(file: Exported, precisions: dict[str, dict[str, int]]) -> None:
    """Raises UserError where a network's arithmetic is not of the precision that its file is called by."""
    wanted = LOWER.get(file.precision, "FLOAT")
    found = Counter()
    for kind in ARITHMETIC:
        found.update(precisions.get(kind, {}))
    if not found[wanted] or (wanted != "INT8" and set(found) != {wanted}):
        told = f"expected {wanted} arithmetic for {file.precision}, found {dict(found)}"
        raise UserError(f"{file.path}: {told}; export it again")


def inspected_precisions(layers: list[Any]) -> dict[str, int]:
    """Of an engine itself, type to number of the tensors between its layers, as far as the inspector tells them."""
    tensors = [tensor for layer in layers if isinstance(layer, dict) for tensor in layer.get("Outputs", ())]
    told = [str(tensor.get("Format/Datatype", "")) for tensor in tensors if isinstance(tensor, dict)]
    counts = {kind: sum(bool(re.search(words, line)) for line in told) for kind, words in INSPECTED.items()}
    return {kind: count for kind, count in counts.items() if count}


def check_inspected(file: Exported, layers: list[Any]) -> None:
    """Raises UserError where an engine tells the types of its tensors, and none is that of its file's precision."""
    found, wanted = inspected_precisions(layers), LOWER.get(file.precision, "FLOAT")
    if found and wanted not in found:
        raise UserError(f"{file.path}: expected {wanted} in the engine for {file.precision}, found {found}")


def _kind(layer: Any) -> str:
    return str(layer.type).removeprefix("LayerType.")


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("DataType.")


def _inspected(trt: ModuleType, log: "_Log", plan: bytes, name: str, batch: int) -> list[Any] | None:
    """What the engine itself says of its layers, for one batch; None where this GPU does not load it."""
    import json

    runtime = trt.Runtime(log.logger)
    loaded = runtime.deserialize_cuda_engine(plan)
    if loaded is None:
        return None
    inspector, context = loaded.create_engine_inspector(), loaded.create_execution_context()
    context.set_input_shape(name, (batch, *loaded.get_tensor_shape(name)[1:]))
    inspector.execution_context = context  # without a shape it tells no types
    return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON)).get("Layers")


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


def smallest(backend: str) -> int:
    """Builds an engine of one layer, and returns its size in bytes. Raises as `load` does, and RuntimeError."""
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
    """Where the sidecar of an engine lies."""
    return engine.with_name(f"{engine.name}.json")


def sidecars(run: Run) -> list[Path]:
    """The sidecar of every engine of a run."""
    return sorted(sidecar_of(path) for path in run.deploy.glob("model.*.engine"))


def built(run: Run, file: Exported) -> list[dict[str, Any]]:
    """The checked sidecars of the engines that were built of a file."""
    there = [path for path in sidecars(run) if path.is_file()]
    ours = [path for path in there if read_json(path).get("onnx_sha256", file.sha256) == file.sha256]
    return [check_sidecar(run, path) for path in ours]


def check_sidecar(run: Run, path: Path) -> dict[str, Any]:
    """A sidecar, when its engine and ONNX file are still the ones it speaks of.

    NVIDIA treats engines as executable: nothing may deserialize one before this.

    Raises:
        UserError: none, a damaged one, or one of another engine or ONNX file.
    """
    remedy = f"build it again: runner engine {run.folder}"
    if not path.is_file():
        raise UserError(f"{path}: expected an engine's sidecar, found none; {remedy}")
    sidecar = read_json(path)
    if missing := [key for key in SIDECAR_KEYS if key not in sidecar]:
        raise UserError(f"{path}: expected an engine's sidecar, found no {', '.join(missing)}; {remedy}")
    for kind, key in (("engine", "sha256"), ("onnx", "onnx_sha256")):
        file = run.folder / sidecar[kind]
        if not file.is_file() or sha256_of(file) != sidecar[key]:
            raise UserError(f"{file}: not the file that {path.name} speaks of; {remedy}")
    return sidecar


def provider(sidecar: dict[str, Any]) -> str:
    """What runs an engine, as the gate and latencies tell it: "tensorrt-rtx 1.2"."""
    return f"{sidecar['backend']} {sidecar['version']}"


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
                f"{trt.__version__}; build it again: runner engine {run.folder}"
            )
        self.torch = torch
        self.sidecar = sidecar
        self.provider = provider(sidecar)
        self.log = _Log(trt)
        self.runtime = trt.Runtime(self.log.logger)
        self.engine = self.runtime.deserialize_cuda_engine((run.folder / sidecar["engine"]).read_bytes())
        if self.engine is None:
            raise UserError(f"{sidecar['engine']}: does not load on this GPU: {self.log.last_errors()}")
        self.context = self._context(trt)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        modes = {name: self.engine.get_tensor_mode(name) for name in names}
        self.input = next(name for name in names if modes[name] == trt.TensorIOMode.INPUT)
        self.output = next(name for name in names if modes[name] == trt.TensorIOMode.OUTPUT)

    def _context(self, trt: ModuleType) -> Any:
        """RTX compiles kernels for a shape when it is first seen; without being told it goes on with others till
        then, and a graph captured meanwhile would hold those for good."""
        if self.sidecar["backend"] != "tensorrt-rtx":
            return self.engine.create_execution_context()
        config = self.engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return self.engine.create_execution_context(config)

    def __call__(self, images: Any) -> Any:
        """images, as the engine's front end wants them, on the GPU, to logits (n, classes) float32 there, on
        torch's stream.

        Raises:
            UserError: a batch or shape that the engine was not built for.
        """
        images = self.accepted(images)
        shape = tuple(self.context.get_tensor_shape(self.output))
        logits = self.torch.empty(shape, dtype=self.torch.float32, device=images.device)
        self.enqueue(images, logits)
        return logits

    def in_pieces(self, images: Any) -> Any:
        """As `__call__`, for any number of images; a last piece that is too small is filled up."""
        limits = self.sidecar["batch"]
        pieces = []
        for piece in images.split(limits["max"]):
            missing = max(0, limits["min"] - len(piece))
            filled = self.torch.cat([piece, piece[:1].expand(missing, *piece.shape[1:])]) if missing else piece
            pieces.append(self(filled)[: len(piece)])
        return self.torch.cat(pieces)

    def accepted(self, images: Any) -> Any:
        """The images, contiguous, with the context set to their shape. Raises as `__call__`."""
        limits, shape = self.sidecar["batch"], list(self.sidecar["inputs"][0][1])
        if list(images.shape[1:]) != shape[1:] or not limits["min"] <= len(images) <= limits["max"]:
            raise UserError(
                f"{self.sidecar['engine']}: expected {limits['min']} to {limits['max']} images of {shape[1:]}, "
                f"found {list(images.shape)}; build it for more: runner engine --batch"
            )
        images = images.contiguous()
        self.context.set_input_shape(self.input, tuple(images.shape))
        return images

    def enqueue(self, images: Any, logits: Any) -> None:
        """Runs the engine from one tensor to another, on torch's current stream; a CUDA graph can hold it."""
        self.context.set_tensor_address(self.input, images.data_ptr())
        self.context.set_tensor_address(self.output, logits.data_ptr())
        if not self.context.execute_async_v3(self.torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"the engine did not run: {self.log.last_errors()}")


def _set_targets(trt: ModuleType, config: Any, backend: str, targets: tuple[str, ...]) -> None:
    known = [name for name in dir(getattr(trt, "ComputeCapability", None)) if name.startswith("SM")]
    for target in targets:
        if target not in known:
            names = ", ".join(known) or "none: it builds for the GPU that is here"
            raise UserError(f"--target {target}: expected one that {backend} builds for ({names})")
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target), index)


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
