"""An onnxruntime session that runs where it was told to, or not at all."""

import os
from pathlib import Path

import numpy as np
import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class ProviderError(RuntimeError):
    """onnxruntime did not give the provider that was asked for."""


class Session:
    """Runs a one-input, one-output ONNX file.

    Args:
        path: the file.
        device: "cpu" or "cuda". onnxruntime falls back to the CPU without a word; here that is an error.
        threads: on the CPU; None for all usable cores.

    Raises:
        ProviderError: the session's first provider is another one.
    """

    def __init__(self, path: Path, device: str = "cpu", threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.log_severity_level = 3  # errors
        wanted = PROVIDERS[device]
        providers = [wanted] if device == "cpu" else [wanted, PROVIDERS["cpu"]]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self.provider = self.session.get_providers()[0]
        if self.provider != wanted:
            raise ProviderError(f"{path}: asked onnxruntime for {wanted}, got {self.provider}")
        self.input = self.session.get_inputs()[0].name

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """images (n, 3, H, W) float32 to logits (n, classes) float32."""
        return self.session.run(None, {self.input: np.ascontiguousarray(images)})[0]
