"""The memory that this process may use: of the machine, and within the limits of its cgroup, such as those of a job."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def total() -> int:
    """Returns the memory of the machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limit() -> int:
    """Returns how many bytes this process may use."""
    memory = total()
    for folder in _cgroup_folders():
        with contextlib.suppress(OSError, ValueError):  # no limit: the value is "max", or there is no such file
            memory = min(memory, int((folder / "memory.max").read_text()))
    return memory


def available() -> int:
    """Returns how many bytes this process can still allocate."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    memory = int(meminfo["MemAvailable"].split()[0]) * 1024
    for folder in _cgroup_folders():
        with contextlib.suppress(OSError, ValueError):  # as in `limit`
            maximum, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            usage = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cache = int(usage["inactive_file"]) + int(usage["active_file"])  # freed when it is needed
            memory = min(memory, maximum - used + cache)
    return memory


def _cgroup_folders() -> Iterator[Path]:
    """Yields the folder of this process's cgroup, then its parents', because the limit of a job is often theirs."""
    with contextlib.suppress(OSError, IndexError):
        folder = CGROUPS / Path("/proc/self/cgroup").read_text().splitlines()[-1].rpartition(":/")[2]
        while folder.is_relative_to(CGROUPS):
            yield folder
            folder = folder.parent
