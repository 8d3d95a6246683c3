"""Reads the settings that `accelerate launch` passes in environment variables, and selects the device."""

import ctypes
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runner.common.errors import UserError
from runner.config.train_config import Device

PR_SET_PDEATHSIG = 1  # prctl.h
LIBC = ctypes.CDLL(None)  # loaded at import, because it is called between fork and exec


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        by_accelerate: whether `accelerate launch` started it.
        cpu: whether the launcher's configuration selects the CPU.
        rank, local_rank: rank of this process over all nodes, and on this node.
        world_size, local_world_size: number of processes over all nodes, and on this node.
    """

    by_accelerate: bool
    cpu: bool
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def read(environ: Mapping[str, str]) -> Launch:
    """Reads the variables that `accelerate launch` sets; without it, the launch is a single process.

    Raises:
        UserError: the launcher was asked for several processes and started one.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environ
    # With --cpu, or a config of type NO, accelerate's launcher ignores the number of processes and starts one. It
    # then sets the rendezvous address without a world size.
    if by_accelerate and "MASTER_PORT" in environ and "WORLD_SIZE" not in environ:
        raise UserError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu; "
            "for ranks on the CPU: accelerate launch --config_file launch/cpu.yaml --num_processes N "
            "-m runner train NAME --device cpu"
        )
    return Launch(
        by_accelerate=by_accelerate,
        cpu=environ.get("ACCELERATE_USE_CPU", "").lower() == "true",
        rank=int(environ.get("RANK", 0)),
        local_rank=int(environ.get("LOCAL_RANK", 0)),
        world_size=int(environ.get("WORLD_SIZE", 1)),
        local_world_size=int(environ.get("LOCAL_WORLD_SIZE", 1)),
    )


def die_with_parent(parent: int | None = None) -> None:
    """Makes the kernel kill this process when its parent dies; exits if the parent is already dead.

    Otherwise, after the launcher is killed, its ranks would continue to train and write to the same folder.

    Args:
        parent: process ID of the parent; None if it is not known.
    """
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is None:  # process 1 adopts orphans; in a container it may be the launcher itself
        orphaned = os.getppid() == 1 and b"accelerate" not in Path("/proc/1/cmdline").read_bytes()
    else:
        orphaned = os.getppid() != parent
    if orphaned:
        os._exit(1)


def outlive_parent() -> None:
    """Undoes `die_with_parent`, for a process that must write a checkpoint after Ctrl-C has ended its launcher.

    accelerate's launcher for a single process does not wait for the process to exit.
    """
    LIBC.prctl(PR_SET_PDEATHSIG, 0)


def select_device(requested: Device, launch: Launch, num_gpus: int) -> tuple[Literal["cuda", "cpu"], str]:
    """Selects the device.

    Args:
        requested: the user's --device.
        launch: how the process was started.
        num_gpus: number of GPUs on this node.

    Returns:
        The device, and a one-line message that states the device and the reason.

    Raises:
        UserError: --device or the launch requires more GPUs than are available.
    """
    if requested == "cpu" or (requested == "auto" and launch.cpu):
        reason = "--device cpu" if requested == "cpu" else "selected by the launch configuration"
        return "cpu", f"device: cpu ({reason})"
    if requested == "auto" and not launch.by_accelerate and num_gpus == 0:
        return "cpu", "device: cpu (auto: this machine has no CUDA GPU)"
    if requested == "cuda" and launch.cpu:
        raise UserError(
            "--device cuda: expected a launch configuration for GPUs, found one for the CPU; use --device cpu, "
            "or launch/one_process.yaml or launch/one_node.yaml"
        )
    required_by = "--device cuda" if requested == "cuda" else "this launch configuration"
    if num_gpus < launch.local_world_size:
        raise UserError(
            f"{required_by} requires {launch.local_world_size} CUDA GPU(s) on this node, found {num_gpus}; use "
            f"--device cpu{', or a smaller --num_processes' if launch.local_world_size > 1 else ''}"
        )
    return "cuda", f"device: cuda ({launch.world_size} process(es))"
