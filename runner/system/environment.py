"""Collects versions, the git commit and the hardware for `run.json`. Does not import torch by itself."""

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runner.common import memory
from runner.common.errors import UserError
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
NO_DEVICE = (34, 100)  # CUDA_ERROR_STUB_LIBRARY, CUDA_ERROR_NO_DEVICE
TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-rtx")


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, and its compute capability, such as "9.0"."""

    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability})"


def package_versions(*more: str) -> dict[str, str]:
    """Returns the versions of Python and of the installed packages in PACKAGES and `more`."""
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_revision() -> Git:
    """Returns the commit of the running code, and whether its checkout has changed or new files.

    The result is empty if the code is not in a checkout.
    """
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


def source_sha256(modules: Iterable[str] = ()) -> str:
    """Returns a SHA-256 of the Python files of this package, which also tells uncommitted versions apart.

    `modules` are names of further modules that are imported, such as those of own experiments.
    """
    package = Path(__file__).resolve().parents[1]
    files = {str(path.relative_to(package)): path for path in package.rglob("*.py")}
    found = {name: getattr(sys.modules.get(name), "__file__", None) for name in modules}
    files |= {name: Path(file) for name, file in found.items() if file and Path(file).is_file()}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def describe_hardware() -> Hardware:
    """Returns processor, usable cores, memory, and the GPUs that torch sees: None without a GPU or without torch."""
    gpus, cuda = None, None
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        cuda = torch.version.cuda
    return Hardware(
        cpu=_cpu_name(),
        cores=usable_cores(),
        memory_gib=round(memory.total() / 2**30, 1),
        gpus=gpus,
        cuda=cuda,
    )


def usable_cores() -> int:
    """Returns the number of cores that this process may run on, regardless of any CPU quota of its cgroup."""
    return len(os.sched_getaffinity(0))


def count_gpus() -> int:
    """Returns the number of CUDA devices that this process sees. The driver API that it uses is faster than torch.

    It initializes CUDA, so the process must not fork afterwards and use a GPU in the child process.

    Raises:
        UserError: there is a driver, but it does not work.
    """
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if error in NO_DEVICE:
        return 0
    if error:
        remedy = "check it with nvidia-smi; to do without GPUs, set CUDA_VISIBLE_DEVICES= (nothing)"
        raise UserError(f"the CUDA driver failed (error {error}); {remedy}")
    return count.value


def first_gpu() -> Gpu | None:
    """Returns the first CUDA device that this process sees, which builds and runs engines; None without one.

    Uses the driver API, as `count_gpus` does. None also where the driver does not work: some engines need no GPU.
    """
    try:
        if count_gpus() == 0:
            return None
    except UserError:
        return None
    driver = ctypes.CDLL("libcuda.so.1")
    device, name, major, minor = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    errors = [
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),  # …_MINOR
    ]
    if any(errors):
        raise UserError(f"the CUDA driver does not describe the first GPU (errors {errors}); check it with nvidia-smi")
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}")


def cpu_supports_bf16() -> bool:
    """Returns whether the processor multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
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
