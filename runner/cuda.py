"""A GPU's kernels: the fastest that cuDNN finds, or the same ones every time."""

from collections.abc import MutableMapping

import torch


def prepare(device: torch.device, deterministic: bool, environ: MutableMapping[str, str]) -> None:
    """Makes a GPU the current one, on which kernels of ours start, and chooses how torch chooses its kernels.

    Args:
        device: of this rank; nothing is to be chosen on the CPU.
        deterministic: an operation that has no deterministic kernel is an error from here on.
        environ: the process environment, in which cuBLAS looks before its first call.
    """
    torch.use_deterministic_algorithms(deterministic)
    if device.type != "cuda":
        return
    torch.cuda.set_device(device.index or 0)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
