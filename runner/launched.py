"""What the launcher asked for, told from the environment it set; and the refusal of what cannot be had."""

import ctypes
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from data_prep.console import UserError

PR_SET_PDEATHSIG = 1  # prctl.h
LIBC = ctypes.CDLL(None)  # here, for it may be called between fork and exec
Device = Literal["auto", "cuda", "cpu"]


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        by_accelerate: under `accelerate launch`, rather than plainly.
        cpu: the launcher's configuration says CPU.
        rank, local_rank: of this process over all nodes, and on its own.
        world_size, local_world_size: processes over all nodes, and on this one.
    """

    by_accelerate: bool
    cpu: bool
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def read(environ: Mapping[str, str]) -> Launch:
    """Reads what `accelerate launch` (or nothing) has put into the environment.

    Raises:
        UserError: the launcher was asked for several processes and has started one.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environ
    # With --cpu, or a config of type NO, accelerate's launcher starts one process whatever it was asked for;
    # the rendezvous address without a world size is the trace that it leaves.
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


def end_with_parent() -> None:
    """Has the kernel kill this process when the one that started it dies.

    The launcher, killed, would leave its ranks behind, training on into the same folder.
    """
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def device(requested: Device, launch: Launch, gpus: int) -> tuple[Literal["cuda", "cpu"], str]:
    """Chooses the device, and says why.

    Args:
        requested: the user's --device.
        launch: how the process was started.
        gpus: how many this node has.

    Returns:
        The device, and one sentence that tells which and why.

    Raises:
        UserError: a GPU was asked for, by --device or by the launch, and there are too few.
    """
    if requested == "cpu" or (requested == "auto" and launch.cpu):
        return (
            "cpu",
            f"device: cpu ({'--device cpu' if requested == 'cpu' else 'the launch configuration says so'})",
        )
    if requested == "auto" and not launch.by_accelerate and gpus == 0:
        return "cpu", "device: cpu (auto: this machine has no CUDA GPU)"
    asked = "--device cuda" if requested == "cuda" else "this launch configuration"
    if gpus < launch.local_world_size:
        raise UserError(
            f"{asked} means {launch.local_world_size} CUDA GPU(s) on this node, found {gpus}; "
            "add --device cpu to train on the CPU, or lower --num_processes"
        )
    return "cuda", f"device: cuda ({launch.world_size} process(es))"
