"""An onnxruntime session that raises an error if onnxruntime cannot use the requested provider."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from runner.common.errors import UserError
from runner.system import environment

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
INPUT_TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}


class ProviderError(UserError):
    """onnxruntime cannot use the requested provider."""


class OnnxSession:
    """Runs an ONNX file with one input.

    Args:
        file: path or contents of the ONNX file.
        device: "cpu", "cuda" or "tensorrt", a key of PROVIDERS. Operators that the provider of a GPU lacks run with the
            next one: TensorRT, CUDA, CPU.
        threads: number of CPU threads; None for all usable cores.
        optimize: whether onnxruntime optimizes the graph, or runs it as written.
        fp16: whether the graph has fp16 operators. Such a graph is optimized in a single pass, because repeated
            attention fusion crashes onnxruntime.
        spinning: whether threads spin between operators, which slows down other processes.

    Raises:
        ProviderError: the requested provider is not available.
        UserError: onnxruntime rejects the graph.
    """

    def __init__(
        self,
        file: Path | bytes,
        device: str = "cpu",
        threads: int | None = None,
        optimize: bool = True,
        fp16: bool = False,
        spinning: bool = True,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or environment.usable_cores()
        options.log_severity_level = 4  # fatal: other errors are raised
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.add_session_config_entry("session.set_denormal_as_zero", "1")  # see cpu.prepare
        if fp16:
            options.add_session_config_entry("session.graph_optimizations_loop_level", "0")
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        requested = PROVIDERS[device]
        providers: list[Any] = [requested]
        if device != "cpu":
            load_cuda_libraries()
            providers = [(PROVIDERS["cuda"], {"use_tf32": "0"}), PROVIDERS["cpu"]]  # fp32 must not become TF32
        if device == "tensorrt":
            providers.insert(0, requested)
        content = file if isinstance(file, bytes) else str(file)
        self.name = "the graph" if isinstance(file, bytes) else str(file)
        captured: contextlib.AbstractContextManager[list[str]] = contextlib.nullcontext([])
        if device != "cpu":
            captured = _captured_output()
        with self._errors_for_users(), captured as output:
            self.session = onnxruntime.InferenceSession(content, options, providers=providers)
        self.session.disable_fallback()  # on an error of CUDA, it would go on with the CPU
        self.provider = self.session.get_providers()[0]
        if self.provider != requested:
            reason = next((f" (failed{line.partition('Failed')[2][:300]})" for line in output if "Failed" in line), "")
            raise ProviderError(
                f"asked onnxruntime for {requested}, got {self.provider}{reason}; see what works here: runner doctor"
            )
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            raise UserError(f"{self.name}: expected a graph with one input, found {len(inputs)}")
        (model_input,) = inputs
        self.input_name, self.input_shape, self.input_type = model_input.name, model_input.shape, model_input.type

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Computes logits.

        Args:
            images: (n, 3, H, W) float32, or (n, H, W, 3) uint8 for a raw front end.

        Returns:
            (n, classes) float32.

        Raises:
            UserError: the graph takes images of another shape or type, or fails to run.
        """
        return self._run(images)[0]

    def run_all_outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Returns every output by name. Raises UserError like `__call__`."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self._run(images), strict=True))

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        """Returns every output, in order."""
        sizes = zip(images.shape, self.input_shape, strict=False)
        fits = len(images.shape) == len(self.input_shape)
        fits = fits and all(expected in (size, None) or isinstance(expected, str) for size, expected in sizes)
        if not fits or images.dtype != INPUT_TYPES.get(self.input_type):
            raise UserError(
                f"{self.name}: takes {self.input_name} {self.input_type} of {self.input_shape}, "
                f"found {images.dtype} of {list(images.shape)}"
            )
        with self._errors_for_users():
            return self.session.run(None, {self.input_name: np.ascontiguousarray(images)})

    @contextlib.contextmanager
    def _errors_for_users(self) -> Iterator[None]:
        """Turns onnxruntime's exceptions into UserError."""
        try:
            yield
        except Exception as error:  # they have no common base class
            if not type(error).__module__.startswith("onnxruntime") and not isinstance(
                error, ValueError | RuntimeError
            ):
                raise
            raise UserError(f"{self.name}: onnxruntime cannot run it: {str(error).strip()[:300]}") from None

    def bind(self, images: Any, logits: Any) -> Callable[[], None]:
        """Returns a function that computes logits from images, both float32 CUDA tensors, without copies."""
        binding = self.session.io_binding()
        tensors = ((binding.bind_input, self.input_name, images),
                   (binding.bind_output, self.session.get_outputs()[0].name, logits))  # fmt: skip
        for bind, name, tensor in tensors:
            bind(name, "cuda", tensor.device.index or 0, np.float32, tuple(tensor.shape), tensor.data_ptr())

        def call(_keep_alive: Any = (images, logits)) -> None:
            with self._errors_for_users():
                self.session.run_with_iobinding(binding)
                binding.synchronize_outputs()

        return call


def load_cuda_libraries() -> None:
    """Loads the CUDA provider's dependencies from the NVIDIA Python packages, which the linker does not search."""
    with _captured_output():  # hides errors about missing libraries; the session then raises ProviderError
        onnxruntime.preload_dlls()


def usable_providers() -> list[str]:
    """Returns the execution providers that work here; onnxruntime itself lists all that it was built with."""
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "one", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if environment.first_gpu():
        load_cuda_libraries()
    usable = []
    for provider in onnxruntime.get_available_providers():
        try:
            with _captured_output():
                actual = onnxruntime.InferenceSession(model, options, providers=[provider]).get_providers()
        except Exception:  # they have no common base class
            continue
        usable += [provider] if actual[0] == provider else []
    return usable


def _flush() -> None:
    """Writes what Python has buffered, so that it goes where it was printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


@contextlib.contextmanager
def _captured_output() -> Iterator[list[str]]:
    """Captures the standard output and error of native code, where providers report failures.

    Yields:
        A list, which contains the captured lines once the context has ended.
    """
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        _flush()
        saved = [os.dup(1), os.dup(2)]
        try:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
            yield lines
        finally:
            _flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
