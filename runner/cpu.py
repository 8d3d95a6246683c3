"""The CPU's share of speed: how many threads, and memory that is kept instead of given back."""

import contextlib
import ctypes
import os
from collections.abc import Iterator

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Puts torch's number of threads back.

    Importing ffcv sets it to one; and numba's OpenMP layer shares it with torch, so that every
    numba.set_num_threads, FFCV's at the start of each epoch among them, sets torch's as well.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def choose_openmp() -> None:
    """Has numba run its parallel loops by OpenMP, if it has not begun: its threads are awake at once.

    Waking those of TBB, which numba prefers where it finds it, costs as much as half a batch.
    """
    import numba

    numba.config.THREADING_LAYER = "omp"


def give_numba_torchs_threads() -> int:
    """Has numba's parallel loops run on as many threads as torch's operations, and says how many."""
    import numba
    import torch

    choose_openmp()
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    return threads


def prepare(processes: int = 1) -> None:
    """Sets torch's threads to this process's share of the usable cores, and keeps freed memory for reuse.

    The launcher gives a process one thread or all of them. And by default every activation of more than a few
    MiB is a fresh mapping of zeroed pages, given back right after, which slows memory-bound networks like
    MobileNetV2 down by far.

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
