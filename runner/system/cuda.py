"""GPU settings: fast or deterministic kernels, and float32 precision."""

from collections.abc import MutableMapping

import torch


def disable_tf32() -> None:
    """Disables TF32, which rounds the inputs of float32 convolutions and matrix products to ten mantissa bits."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def prepare(device: torch.device, deterministic: bool, environ: MutableMapping[str, str]) -> None:
    """Makes a GPU the current device, disables TF32, and selects fast or deterministic kernels; nothing on the CPU.

    CPU kernels are always deterministic. On the CPU, torch.use_deterministic_algorithms would import the compiler,
    which takes seconds, and after it two runs on two ranks were no longer bit-identical.

    Args:
        device: this rank's device.
        deterministic: if True, operations without a deterministic kernel raise an error from here on.
        environ: the process environment, which cuBLAS reads before its first call.
    """
    if device.type != "cuda":
        return
    torch.cuda.set_device(device.index or 0)
    disable_tf32()  # fp32 is what was asked for; bf16 and fp16 do not use it
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
