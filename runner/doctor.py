"""`runner doctor`: can this machine walk the road, and what is to be done where it cannot?

Each check does the thing itself, in small, and says what it found. A warning is a way that is not open here, such
as a machine without a GPU; a fault is something that was asked for and does not work.
"""

import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from data_prep.console import UserError, track
from runner import environment, tracking

ROOMY = 10 * 2**30  # bytes that runs of a sweep take easily
ALL_REDUCE_SECONDS = 180
W_AND_B_SECONDS = 5


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        state: how it is.
        found: in a few words.
        remedy: what to do; empty where all is well.
    """

    check: str
    state: Literal["well", "warning", "fault"]
    found: str
    remedy: str = ""


def examine(data: Path | None, runs: Path, ranks: int | None, environ: Mapping[str, str]) -> list[Finding]:
    """All checks, one after the other.

    Args:
        data: prepared dataset; None to leave it out.
        runs: folder of runs.
        ranks: of the all-reduce; None for one a GPU, or two on the CPU.
        environ: the process environment.
    """
    if ranks is not None and ranks < 2:
        raise UserError(f"--ranks {ranks}: expected 2 or more")
    checks: dict[str, Callable[[], Finding | Iterator[Finding]]] = {
        "versions": versions,
        "data": lambda: dataset(data),
        "disk": lambda: disk(runs),
        "GPUs": gpus,
        "all-reduce": lambda: all_reduce(ranks, environ),
        "rendezvous": rendezvous,
        "SLURM": slurm,
        "W&B": lambda: w_and_b(environ),
        "onnxruntime": onnxruntime,
        "TensorRT": tensorrt,
    }
    return [found for check in track(checks, "examine", len(checks)) for found in _done(check, checks[check])]


def _done(check: str, examined: Callable[[], Finding | Iterator[Finding]]) -> list[Finding]:
    """A check must not end the others."""
    try:
        found = examined()
        return [found] if isinstance(found, Finding) else list(found)
    except Exception as error:
        line = (str(error).splitlines() or [""])[0][:200]
        return [Finding(check, "fault", f"{type(error).__name__}: {line}", "see the message")]


def versions() -> Finding:
    """Python and packages; torch has to be new enough to load checkpoints safely."""
    import torch

    found = environment.versions("tensorrt", "tensorrt-rtx")
    told = ", ".join(f"{name} {version}" for name, version in found.items())
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return Finding(
            "versions", "fault", told, "torch 2.10 or later; before, weights_only=True could be got past"
        )
    return Finding("versions", "well", told)


def dataset(folder: Path | None) -> Finding:
    """Every file of a prepared dataset against its hash."""
    if folder is None:
        return Finding("data", "warning", "not looked at", "--data DIR checks a prepared dataset")
    from runner.batches.protocol import open_manifest

    try:
        manifest = open_manifest(folder)
    except UserError as error:
        return Finding("data", "fault", str(error), "python -m data_prep prepare")
    images = sum(split.images for split in manifest.splits.values())
    return Finding("data", "well", f"{manifest.name}, {images:,} images, every file has its hash")


def disk(runs: Path) -> Finding:
    """Writes, syncs and renames where runs will be, as checkpoints do; and how much room there is."""
    existing = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".doctor-") as folder:
            began = time.perf_counter()
            with (Path(folder) / "part").open("wb") as file:
                file.write(bytes(8 << 20))
                file.flush()
                os.fsync(file.fileno())
            (Path(folder) / "part").rename(Path(folder) / "whole")
            seconds = time.perf_counter() - began
    except OSError as error:
        return Finding("disk", "fault", f"{existing}: {error.strerror}", "another folder for --runs")
    free = shutil.disk_usage(existing).free
    told = f"{existing}: {free / 2**30:,.0f} GiB free, 8 MiB synced and renamed in {seconds * 1e3:.0f} ms"
    if free < ROOMY:
        return Finding("disk", "warning", told, "make room: a full disk ends runs at their next checkpoint")
    return Finding("disk", "well", told)


def gpus() -> Iterator[Finding]:
    """Every GPU multiplies a matrix in bf16, by kernels that this torch has for it."""
    import torch

    count = environment.count_gpus()
    if count == 0:
        yield Finding("GPUs", "warning", "none", "train with --device cpu, or look at the driver with nvidia-smi")
        return
    if not torch.cuda.is_available():
        told = f"{count} by the driver, none by torch {torch.__version__} (CUDA {torch.version.cuda})"
        yield Finding("GPUs", "fault", told, "a torch for the driver's CUDA version, or a newer driver")
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        told = f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB, compute capability {major}.{minor}"
        ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.bfloat16)
        right = bool(((ones @ ones) == 64).all())
        state = "well" if right and major >= 8 else "warning" if right else "fault"
        remedy = (
            "" if state == "well" else "bf16 is slow before Ampere: --precision fp16" if right else "wrong product"
        )
        yield Finding(f"GPU {index}", state, told, remedy)


def all_reduce(ranks: int | None, environ: Mapping[str, str]) -> Finding:
    """Real processes under `accelerate launch` add one another's ranks: NCCL with GPUs, gloo without."""
    count = environment.count_gpus()
    ranks = ranks or max(2, count)
    on_gpus = count >= ranks
    backend = "NCCL" if on_gpus else "gloo"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(ranks), "--main_process_port", "0", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "-m", "runner.doctor"]
    more = {} if on_gpus else {"ACCELERATE_USE_CPU": "true"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**environ, **more},
            timeout=ALL_REDUCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        told = f"{ranks} ranks by {backend}: no answer in {ALL_REDUCE_SECONDS} s"
        return Finding("all-reduce", "fault", told, "NCCL_DEBUG=INFO, or NCCL_P2P_DISABLE=1 to rule out the links")
    expected = f"sum {sum(range(ranks))}"
    if done.returncode != 0 or expected not in done.stdout:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1][:200]
        return Finding("all-reduce", "fault", f"{ranks} ranks by {backend}: {last}", "NCCL_DEBUG=INFO tells more")
    return Finding("all-reduce", "well", f"{ranks} ranks by {backend} agree")


def rank() -> None:
    """What each process of `all_reduce` does."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    ours = torch.tensor(float(accelerator.process_index), device=accelerator.device)
    total = accelerator.reduce(ours, "sum")
    if accelerator.is_main_process:
        print(f"sum {int(total)}", flush=True)
    torch.distributed.destroy_process_group()
    os._exit(0)  # see runner.job.Finished


def rendezvous() -> Finding:
    """Whether other nodes could find this one by its name, and a port can be had."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        remedy = "an address for --main_process_ip instead of a name"
        return Finding("rendezvous", "warning", f"{name}: resolves to nothing", remedy)
    with socket.create_server(("", 0)) as server, socket.create_connection((address, server.getsockname()[1]), 5):
        pass
    if address.startswith("127."):
        told = f"{name} is {address}, which other nodes cannot reach"
        return Finding("rendezvous", "warning", told, "give --main_process_ip the address of its network")
    return Finding("rendezvous", "well", f"{name} is {address}, and takes connections")


def slurm() -> Finding:
    """Whether jobs can be submitted from here."""
    if shutil.which("sbatch") is None:
        return Finding("SLURM", "warning", "no sbatch", "accelerate launch by hand; see README, several nodes")
    done = subprocess.run(["sinfo", "--noheader", "--format=%P %D %G"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        told = "sbatch is here, but no controller answers"
        return Finding("SLURM", "warning", told, "SLURM_CONF, or a login node of the cluster")
    return Finding("SLURM", "well", "partition, nodes, GPUs: " + "; ".join(done.stdout.split("\n")[:4]).strip("; "))


def w_and_b(environ: Mapping[str, str]) -> Finding:
    """Whether its server answers, and a key is known."""
    mode = environ.get("WANDB_MODE")
    if mode in ("offline", "disabled"):
        return Finding("W&B", "warning", f"WANDB_MODE={mode}", "unset it to go online")
    url = environ.get("WANDB_BASE_URL", tracking.SERVER)
    host = urlsplit(url)
    port = host.port or (443 if host.scheme == "https" else 80)
    try:
        with socket.create_connection((host.hostname or "", port), W_AND_B_SECONDS) as plain:
            if host.scheme == "https":
                ssl.create_default_context().wrap_socket(plain, server_hostname=host.hostname).close()
    except OSError as error:
        return Finding("W&B", "warning", f"{url}: {error}", "WANDB_MODE=offline spares the wait; sync later")
    if not tracking.has_key(environ):
        return Finding("W&B", "warning", f"{url} answers, no key", "wandb login; without, runs are offline")
    return Finding("W&B", "well", f"{url} answers, a key is known")


def onnxruntime() -> Finding:
    """The providers that a session really gets; the package lists more than run."""
    from runner.deploy import session

    found = session.usable_providers()
    state = "well" if "CUDAExecutionProvider" in found or not environment.count_gpus() else "fault"
    remedy = "" if state == "well" else "CUDA and cuDNN of the versions that onnxruntime-gpu wants"
    return Finding("onnxruntime", state, ", ".join(found), remedy)


def tensorrt() -> Iterator[Finding]:
    """Each library that loads builds an engine of one layer."""
    from runner.deploy import engine

    any_built = False
    for backend in engine.MODULES:
        try:
            size = engine.smallest(backend)
        except UserError as error:
            yield Finding(backend, "warning", str(error), "see README, deployment")
        else:
            any_built = True
            yield Finding(backend, "well", f"builds an engine ({size:,} bytes)")
    if not any_built:
        yield Finding("engines", "fault", "no library here builds engines", "pip install tensorrt-rtx")


def show(findings: list[Finding]) -> None:
    """Prints the findings as a table."""
    from rich.console import Console
    from rich.table import Table

    signs = {"well": "[green]well[/]", "warning": "[yellow]warning[/]", "fault": "[red]fault[/]"}
    table = Table("check", "state", "found", "what to do", box=None)
    for finding in findings:
        table.add_row(finding.check, signs[finding.state], finding.found, finding.remedy)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    rank()
