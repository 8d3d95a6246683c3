"""CPU settings: the number of threads, the reuse of freed memory, and denormal numbers."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.system.environment import usable_cores

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


@contextlib.contextmanager
def preserve_torch_num_threads() -> Iterator[None]:
    """Restores torch's number of threads on exit.

    Importing ffcv sets this number to one. In addition, numba's OpenMP layer shares it with torch, so every call to
    numba.set_num_threads, such as FFCV's at the start of each epoch, changes it.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def choose_openmp() -> None:
    """Selects OpenMP for numba's parallel loops, unless numba has already started its threads.

    By default, numba prefers TBB, whose threads sleep between loops; waking them takes as long as half a batch.
    """
    import numba

    config: Any = numba.config  # its attributes are set at runtime
    config.THREADING_LAYER = "omp"


def sync_numba_num_threads() -> int:
    """Sets the number of threads for numba's parallel loops to that of torch, and returns it."""
    import numba
    import torch

    choose_openmp()
    config: Any = numba.config
    threads = min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    return threads


def peak_memory() -> int:
    """Returns the most bytes of memory that this process has had at a time; 0 if the system does not tell.

    Unlike getrusage, which may report the memory of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def prepare(processes: int = 1) -> None:
    """Sets torch's number of threads to this process's share of the usable cores, and avoids two causes of slow steps.

    The launcher would give each process either one thread or all of them. By default, glibc maps new zeroed pages for
    every activation larger than a few MiB and unmaps them immediately after use, which makes memory-bound networks
    such as MobileNetV2 much slower.

    Denormal numbers, below 1.2e-38 in float32, count as zero, because a CPU computes with them many times slower.
    Weight decay drives the weights of dead units there: after five of its ten epochs, half of an AlexNet's weights are
    denormal, and a step takes three times as long. Threads that start later inherit this setting.

    Args:
        processes: number of processes of this launch on this node.
    """
    import torch

    torch.set_num_threads(max(1, usable_cores() // processes))
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 << 20)
