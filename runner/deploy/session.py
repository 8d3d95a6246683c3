"""An onnxruntime session that runs where it was told to, or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from data_prep.console import UserError
from runner import environment

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


INPUT_TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}


class ProviderError(UserError):
    """onnxruntime did not give the provider that was asked for."""


class Session:
    """Runs a one-input ONNX file.

    Args:
        file: its path, or its contents.
        device: "cpu" or "cuda". onnxruntime falls back to the CPU without a word; here that is an error.
        threads: on the CPU; None for all usable cores.
        plain: run the graph as it is written, without fusing what lies between its outputs.
        fp16: the graph is one of fp16 operators; onnxruntime's repeated optimisation of attention in these ends the
            process, so they are optimised once.
        spinning: keep threads awake between operators, which other processes pay for.

    Raises:
        ProviderError: the session's first provider is another one.
        UserError: onnxruntime refuses the graph.
    """

    def __init__(
        self,
        file: Path | bytes,
        device: str = "cpu",
        threads: int | None = None,
        plain: bool = False,
        fp16: bool = False,
        spinning: bool = True,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.log_severity_level = 4  # what went wrong is raised
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        if fp16:
            options.add_session_config_entry("session.graph_optimizations_loop_level", "0")
        if plain:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        wanted = PROVIDERS[device]
        providers: list[Any] = [wanted]
        if device == "cuda":
            load_cuda_libraries()
            providers = [(wanted, {"use_tf32": "0"}), PROVIDERS["cpu"]]  # fp32 means fp32
        content = file if isinstance(file, bytes) else str(file)
        self.name = "the graph" if isinstance(file, bytes) else str(file)
        with self._in_one_line(), _silent() if device == "cuda" else contextlib.nullcontext([]) as told:
            self.session = onnxruntime.InferenceSession(content, options, providers=providers)
        self.provider = self.session.get_providers()[0]
        if self.provider != wanted:
            reason = next(
                (f" (failed{line.partition('Failed')[2][:300]})" for line in told if "Failed" in line), ""
            )
            got = f"asked onnxruntime for {wanted}, got {self.provider}{reason}"
            raise ProviderError(f"{got}; `runner doctor` tells what works here")
        given = self.session.get_inputs()[0]
        self.input, self.shape, self.type = given.name, given.shape, given.type

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """images (n, 3, H, W) float32, or (n, H, W, 3) uint8 for a raw front end, to logits (n, classes)
        float32.

        Raises:
            UserError: images of another shape or type than the graph takes, or that it cannot compute.
        """
        return self._run(images)[0]

    def all(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every output by its name. Raises as `__call__`."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self._run(images), strict=True))

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        """Every output, in order."""
        pairs = zip(images.shape, self.shape, strict=False)
        fits = len(images.shape) == len(self.shape)
        fits = fits and all(wanted in (found, None) or isinstance(wanted, str) for found, wanted in pairs)
        if not fits or images.dtype != INPUT_TYPES.get(self.type):
            raise UserError(
                f"{self.name}: takes {self.input} {self.type} of {self.shape}, found {images.dtype} of "
                f"{list(images.shape)}"
            )
        with self._in_one_line():
            return self.session.run(None, {self.input: np.ascontiguousarray(images)})

    @contextlib.contextmanager
    def _in_one_line(self) -> Iterator[None]:
        """What onnxruntime says of a graph that it cannot take, as a mistake of the user's."""
        try:
            yield
        except Exception as error:  # it has no base of its own
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise UserError(f"{self.name}: onnxruntime cannot run it: {str(error).strip()[:300]}") from None

    def bound(self, images: Any, logits: Any) -> Callable[[], None]:
        """A call from a CUDA tensor of images to one of logits, both float32; no copy belongs to it."""
        binding = self.session.io_binding()
        ends = ((binding.bind_input, self.input, images),
                (binding.bind_output, self.session.get_outputs()[0].name, logits))  # fmt: skip
        for bind, name, tensor in ends:
            bind(name, "cuda", tensor.device.index or 0, np.float32, tuple(tensor.shape), tensor.data_ptr())

        def call() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        call.tensors = images, logits  # kept as long as their memory is used
        return call


def load_cuda_libraries() -> None:
    """Loads what the CUDA provider links to from the NVIDIA packages beside it, where no loader would look."""
    with _silent():  # it prints what it does not find; the session then says that its provider is missing
        onnxruntime.preload_dlls()


def usable_providers() -> list[str]:
    """The providers that a session gets here, of those that the package lists."""
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "one", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if environment.count_gpus():
        load_cuda_libraries()
    found = []
    for provider in onnxruntime.get_available_providers():
        try:
            with _silent():
                got = onnxruntime.InferenceSession(model, options, providers=[provider]).get_providers()
        except Exception:  # of kinds of its own
            continue
        found += [provider] if got[0] == provider else []
    return found


@contextlib.contextmanager
def _silent() -> Iterator[list[str]]:
    """onnxruntime's providers write of their failures to standard output and error, past Python: afterwards the
    lines are in the list."""
    told: list[str] = []
    with tempfile.TemporaryFile() as kept:
        ends = [os.dup(1), os.dup(2)]
        try:
            for number in (1, 2):
                os.dup2(kept.fileno(), number)
            yield told
        finally:
            for number, end in zip((1, 2), ends, strict=True):
                os.dup2(end, number)
                os.close(end)
            kept.seek(0)
            told += kept.read().decode(errors="replace").splitlines()
