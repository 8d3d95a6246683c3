"""A GPU's kernels: the fastest that cuDNN finds, or the same ones every time."""

from collections.abc import MutableMapping

import torch


def exact_fp32() -> None:
    """Convolutions and products of float32 in float32: cuDNN rounds to TF32's ten bits unless told otherwise."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def prepare(device: torch.device, deterministic: bool, environ: MutableMapping[str, str]) -> None:
    """Makes a GPU the current one, on which kernels of ours start, and chooses how torch chooses its kernels.

    Nothing is done on the CPU, whose sums are the same every time. Torch's own switch would do harm there: it
    imports the compiler, which takes seconds, and two runs of two ranks were no longer equal to the bit after it.

    Args:
        device: of this rank.
        deterministic: an operation that has no deterministic kernel is an error from here on.
        environ: the process environment, in which cuBLAS looks before its first call.
    """
    if device.type != "cuda":
        return
    torch.cuda.set_device(device.index or 0)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
