"""The TensorRT libraries: which GPUs each covers, which one to use, and whether it works here.

TensorRT 10.12+ or 11 and TensorRT for RTX share one API. TensorRT for RTX builds without a GPU, but only for RTX cards.
"""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from runner.common.errors import UserError
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
        portable_capabilities: those of the GPUs that run an engine built for no GPU in particular; empty if it builds
            engines only for the GPU of this machine.
    """

    module: str
    package: str
    capabilities: tuple[str, ...]
    and_later: bool = False
    portable_capabilities: tuple[str, ...] = ()

    def covers(self, capability: str) -> bool:
        """Returns whether it covers a compute capability, such as "9.0"."""
        later = self.and_later and _version_of(capability) > _version_of(self.capabilities[-1])
        return later or capability in self.capabilities

    @property
    def targets(self) -> tuple[str, ...]:
        """Names that `--target` accepts, such as "SM89"; none if it builds only for the GPU of this machine."""
        return tuple(map(target_of, self.capabilities)) if self.portable_capabilities else ()

    def __str__(self) -> str:
        return ", ".join(self.capabilities) + (" and later" if self.and_later else "")


LIBRARIES = {  # in the order in which `--backend auto` tries them
    "tensorrt": Library("tensorrt", "tensorrt-cu13", ("7.5",), and_later=True),
    "tensorrt-rtx": Library(
        "tensorrt_rtx",
        "tensorrt-rtx",
        ("7.5", "8.6", "8.9", "12.0", "12.1"),
        portable_capabilities=("8.6", "8.9", "12.0"),
    ),
}


def select_library(backend: str, targets: tuple[str, ...] = ()) -> tuple[str, ModuleType]:
    """Selects the library to build with, and imports it.

    "auto" selects the first one that loads and supports this machine's GPU; without a GPU or with targets, TensorRT for
    RTX.

    Args:
        backend: "tensorrt", "tensorrt-rtx" or "auto".
        targets: names of compute capabilities to build for, such as "SM89"; if empty, this machine's GPU or a portable
            engine.

    Returns:
        The backend's name, with "auto" resolved, and its module.

    Raises:
        UserError: the library does not load, or cannot build for this GPU or these targets; for "auto", none can.
    """
    gpu = environment.first_gpu()
    if backend != "auto":
        _check_targets(backend, targets)
        if problem := _unsupported_reason(backend, targets, gpu):
            portable = LIBRARIES[backend].portable_capabilities
            remedy = "--backend tensorrt, or other GPUs by --target" if portable else "another GPU"
            found, remedy = (gpu, remedy) if gpu else ("none", "--backend tensorrt-rtx")
            raise UserError(f"--backend {backend}: {problem}, found {found}; use {remedy}")
        return backend, import_library(backend)
    _check_targets("tensorrt-rtx", targets)
    if gpu and targets and target_of(gpu.capability) not in targets:
        own = target_of(gpu.capability)
        possible = own in LIBRARIES["tensorrt-rtx"].targets
        expected = (
            f"expected to include {own} for {gpu}" if possible else f"expected none on {gpu}, which has no target"
        )
        raise UserError(
            f"--target {' '.join(targets)}: {expected}; to build for other GPUs only, add --backend tensorrt-rtx"
        )
    problems: list[str] = []
    packages: list[str] = []
    for name, library in LIBRARIES.items():
        problem = _unsupported_reason(name, targets, gpu)
        if problem is None:
            try:
                return name, _import(name)
            except ImportError as error:
                problem, packages = str(error), [*packages, library.package]
        problems.append(f"{name} {problem}")
    where = f"for {gpu}" if gpu else "without a GPU"
    remedy = f"install it: pip install {packages[0]}" if packages else "use another GPU"
    raise UserError(f"--backend auto: no library here builds an engine {where}: {', '.join(problems)}; {remedy}")


def import_library(backend: str) -> ModuleType:
    """Imports a backend's library. Raises UserError if it does not load."""
    try:
        return _import(backend)
    except ImportError as error:
        remedy = f"pip install {LIBRARIES[backend].package}"
        raise UserError(f"--backend {backend}: {error}; install it: {remedy}") from None


def _import(backend: str) -> ModuleType:
    """Like `import_library`, but raises ImportError with a reason of one line."""
    try:
        return importlib.import_module(LIBRARIES[backend].module)
    except (ImportError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ImportError(f"does not load ({reason})") from None


def _unsupported_reason(backend: str, targets: tuple[str, ...], gpu: Gpu | None) -> str | None:
    """Returns why a library cannot build for this GPU, or for the targets if there are any; None if it can."""
    library = LIBRARIES[backend]
    if targets and not library.portable_capabilities:
        return "takes no --target"
    if gpu is None and not library.portable_capabilities:
        return "builds only for the GPU of this machine"
    if gpu and not targets and not library.covers(gpu.capability):
        return f"covers only compute capability {library}"
    return None


def _version_of(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def target_of(capability: str) -> str:
    """The name by which `--target` takes a compute capability: "SM89" for "8.9"."""
    return f"SM{capability.replace('.', '')}"


def _check_targets(backend: str, targets: tuple[str, ...]) -> None:
    """Raises UserError if a library does not build for a target."""
    known = LIBRARIES[backend].targets
    if len(set(targets)) < len(targets):
        raise UserError(f"--target {' '.join(targets)}: expected each target once")
    for target in targets:
        if target not in known:
            names = ", ".join(known) or "none, because it builds for the GPU of this machine"
            raise UserError(f"--target {target}: expected one of {backend}'s targets ({names})")


def resolve_targets(backend: str, targets: tuple[str, ...], gpu: Gpu | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the targets to set in the builder, and the compute capabilities of the GPUs that will run the engine."""
    library = LIBRARIES[backend]
    portable = library.portable_capabilities
    if not portable:
        return (), (gpu.capability,) if gpu else ()
    if gpu and not targets and gpu.capability not in portable:
        targets = (target_of(gpu.capability),)
    if not targets:
        return (), portable
    return targets, tuple(capability for capability in library.capabilities if target_of(capability) in targets)


def set_targets(trt: ModuleType, config: Any, targets: tuple[str, ...]) -> None:
    """Sets the builder's targets. Raises UserError if the installed version does not know one."""
    for target in targets:
        if not hasattr(trt.ComputeCapability, target):
            raise UserError(f"--target {target}: unknown to the installed version {trt.__version__}; update it")
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target), index)


def create_network(trt: ModuleType, builder: Any) -> Any:
    """Creates a strongly typed network. TensorRT 11 has no others and ignores the flag."""
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def create_runtime(trt: ModuleType, log: "Log", version_compatible: bool = False) -> Any:
    """Creates a runtime. Version-compatible engines contain code for the host; only then may it load such code."""
    runtime = trt.Runtime(log.logger)
    if version_compatible:
        runtime.engine_host_code_allowed = True
    return runtime


class Log:
    """Collects TensorRT's log messages, for the engine's JSON file and for errors."""

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
        """Returns the last three errors in one line."""
        errors = [line for line in self.lines if line.startswith(("ERROR:", "INTERNAL_ERROR:"))]
        return "; ".join(errors[-3:]) or "no reason given"


@dataclass(frozen=True)
class SmokeTest:
    """What `smoke_test` has shown of a library.

    Attributes:
        bytes: size of the engine that it built.
        capabilities: compute capabilities that the engine is for.
        gpu: the GPU that loaded and ran it; None if it was only built.
    """

    bytes: int
    capabilities: tuple[str, ...]
    gpu: Gpu | None


def smoke_test(backend: str) -> SmokeTest:
    """Builds a one-layer engine; with a GPU, also loads and runs it, and compares its output with torch's.

    Raises:
        UserError: as in `select_library`.
        RuntimeError: the engine is not built, does not load or run, or its output is wrong.
    """
    backend, trt = select_library(backend)  # "auto" is resolved
    gpu = environment.first_gpu()
    targets, capabilities = resolve_targets(backend, (), gpu)
    log = Log(trt)
    builder = trt.Builder(log.logger)
    network = create_network(trt, builder)
    images = network.add_input("images", trt.float32, (1, 8))
    network.mark_output(network.add_activation(images, trt.ActivationType.RELU).get_output(0))
    config = builder.create_builder_config()
    if targets:
        set_targets(trt, config, targets)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"does not build an engine: {log.last_errors()}")
    plan = bytes(plan)
    if gpu:
        _run_relu(trt, log, plan)
    return SmokeTest(len(plan), capabilities, gpu)


def _run_relu(trt: ModuleType, log: Log, plan: bytes) -> None:
    """Runs the engine of `smoke_test`. Raises RuntimeError if it does not load or run, or if its output is wrong."""
    import torch

    runtime = create_runtime(trt, log)
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
