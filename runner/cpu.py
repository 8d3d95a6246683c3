"""The CPU's share of speed: how many threads, and memory that is kept instead of given back."""

import ctypes
import os

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def prepare(processes: int = 1) -> None:
    """Sets torch's threads to this process's share of the usable cores, and keeps freed memory for reuse.

    The launcher gives a process one thread or all of them. And by default every activation of more than a few
    MiB is a fresh mapping of zeroed pages, given back right after: for MobileNetV2 that costs a third of a
    training step and half of a forward pass.

    Args:
        processes: of ours on this node.
    """
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 << 20)
