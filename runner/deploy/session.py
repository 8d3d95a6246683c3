"""An onnxruntime session that runs where it was told to, or not at all."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from runner import environment

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class ProviderError(RuntimeError):
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
        options.log_severity_level = 3  # errors
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
        self.session = onnxruntime.InferenceSession(content, options, providers=providers)
        self.provider = self.session.get_providers()[0]
        if self.provider != wanted:
            raise ProviderError(f"asked onnxruntime for {wanted}, got {self.provider}")
        given = self.session.get_inputs()[0]
        self.input, self.shape, self.type = given.name, given.shape, given.type

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """images (n, 3, H, W) float32, or (n, H, W, 3) uint8 for a raw front end, to logits (n, classes)
        float32."""
        return self.session.run(None, {self.input: np.ascontiguousarray(images)})[0]

    def all(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every output by its name."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(None, {self.input: np.ascontiguousarray(images)}), strict=True))

    def bound(self, images: Any) -> Callable[[], None]:
        """A call from a CUDA tensor of images to logits that stay on the GPU; no copy belongs to it."""
        binding = self.session.io_binding()
        binding.bind_input(
            self.input, "cuda", images.device.index or 0, np.float32, tuple(images.shape), images.data_ptr()
        )
        binding.bind_output(self.session.get_outputs()[0].name, "cuda", images.device.index or 0)

        def call() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        call.images = images  # kept as long as its memory is read
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
def _silent() -> Iterator[None]:
    """onnxruntime's providers write of their failures to standard output, past Python."""
    with open(os.devnull, "w") as nowhere:
        kept = [os.dup(1), os.dup(2)]
        try:
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
            yield
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
