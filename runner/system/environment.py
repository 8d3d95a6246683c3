"""Versions, git commit and hardware, for `run.json`. Does not import torch by itself."""

import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from runner.run.schema import Git, Hardware

PACKAGES = (
    "torch",
    "torchvision",
    "ffcv",
    "accelerate",
    "wandb",
    "numpy",
    "numba",
    "onnx",
    "onnxruntime-gpu",
)


def find_versions(*more: str) -> dict[str, str]:
    """Returns the versions of Python and of the installed packages; `more` adds packages."""
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def find_git() -> Git:
    """Returns the commit of the running code, and whether its checkout has changed or new files; empty outside one."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:  # installed in a folder of another repository
            return Git()
        return Git(commit=git("rev-parse", "HEAD"), changed=bool(git("status", "--porcelain", "--", ":/")))
    except (OSError, subprocess.CalledProcessError):
        return Git()


def find_hardware() -> Hardware:
    """Returns processor, usable cores, memory, and, if torch is imported, the GPUs that it sees."""
    gpus, cuda = None, None
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        cuda = torch.version.cuda
    return Hardware(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpus=gpus,
        cuda=cuda,
    )


def count_gpus() -> int:
    """Counts the CUDA GPUs by the driver's own library, which takes less time than importing torch."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
