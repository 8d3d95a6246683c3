"""`runner doctor`: checks what works on this machine, and says how to fix what does not.

Each check tries the operation itself on a small scale. A warning is something that is unavailable here, such as a
GPU; a fault is something that is required and does not work.
"""

import json as json_format
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta

from runner.commands.options import Flag
from runner.common.console import new_table, print_table, track
from runner.common.errors import UserError
from runner.common.text import first_line
from runner.system import environment
from runner.tracking import account

ENOUGH_SPACE = 10 * 2**30  # bytes; the runs of a sweep can take that much
ALL_REDUCE_SECONDS = 180
WANDB_SECONDS = 5


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: name of the check.
        state: well, warning or fault.
        found: a short description.
        remedy: what to do about it; empty if all is well.
    """

    check: str
    state: Literal["well", "warning", "fault"]
    found: str
    remedy: str = ""


def examine(data: Path | None, runs: Path, ranks: int | None, environ: Mapping[str, str]) -> list[Finding]:
    """Runs all checks.

    Args:
        data: prepared dataset; None to skip its check.
        runs: folder of runs.
        ranks: number of processes in the all-reduce; None for one per GPU, or two on the CPU.
        environ: the process environment.
    """
    checks: dict[str, Callable[[], Finding | Iterator[Finding]]] = {
        "versions": versions,
        "data": lambda: dataset(data),
        "disk": lambda: disk(runs),
        "GPUs": gpus,
        "all-reduce": lambda: all_reduce(ranks, environ),
        "rendezvous": rendezvous,
        "SLURM": slurm,
        "W&B": lambda: wandb(environ),
        "onnxruntime": onnxruntime,
        "TensorRT": tensorrt,
    }
    return [finding for name in track(checks, "examine", len(checks)) for finding in _run(name, checks[name])]


def _run(name: str, check: Callable[[], Finding | Iterator[Finding]]) -> list[Finding]:
    """Runs a check; an exception becomes a fault after its findings, so that the other checks still run."""
    findings: list[Finding] = []
    try:
        result = check()
        if isinstance(result, Finding):
            return [result]
        findings.extend(result)
    except Exception as error:
        line = first_line(error)
        findings.append(Finding(name, "fault", f"{type(error).__name__}: {line}", "see the message"))
    return findings


def versions() -> Finding:
    """Checks that torch is new enough to load checkpoints safely."""
    import torch

    found = environment.package_versions(*environment.TENSORRT_PACKAGES)
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        remedy = "install torch 2.10 or later; before, weights_only=True can be bypassed"
        return Finding("versions", "fault", listed, remedy)
    return Finding("versions", "well", listed)


def dataset(folder: Path | None) -> Finding:
    """Checks every file of a prepared dataset against its hash."""
    if folder is None:
        return Finding("data", "warning", "not checked", "--data DIR checks a prepared dataset")
    from runner.data.open import open_manifest

    try:
        manifest = open_manifest(folder)
    except UserError as error:
        return Finding("data", "fault", str(error), f"python -m data_prep prepare --source official --out {folder}")
    images = sum(split.images for split in manifest.splits.values())
    return Finding("data", "well", f"{manifest.name}, {images:,} images, all hashes match")


def disk(runs: Path) -> Finding:
    """Writes, syncs and renames a file where runs will be, as checkpoints do, and checks the free space."""
    existing = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".doctor-") as folder:
            start = time.perf_counter()
            with (Path(folder) / "new").open("wb") as file:
                file.write(bytes(8 << 20))
                file.flush()
                os.fsync(file.fileno())
            (Path(folder) / "new").rename(Path(folder) / "renamed")
            seconds = time.perf_counter() - start
    except OSError as error:
        return Finding("disk", "fault", f"{existing}: {error.strerror}", "use another folder for --runs")
    free = shutil.disk_usage(existing).free
    found = f"{existing}: {free / 2**30:,.0f} GiB free, 8 MiB synced and renamed in {seconds * 1e3:.0f} ms"
    if free < ENOUGH_SPACE:
        return Finding("disk", "warning", found, "free some space: a full disk ends runs at their next checkpoint")
    return Finding("disk", "well", found)


def gpus() -> Iterator[Finding]:
    """Multiplies a matrix in bf16 on every GPU."""
    import torch

    count = environment.count_gpus()
    if count == 0:
        yield Finding("GPUs", "warning", "none", "train with --device cpu, or check the driver with nvidia-smi")
        return
    if not torch.cuda.is_available():
        found = f"{count} found by the driver, none by torch {torch.__version__} (CUDA {torch.version.cuda})"
        yield Finding("GPUs", "fault", found, "install torch for the driver's CUDA version, or a newer driver")
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        found = f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB, compute capability {major}.{minor}"
        ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.bfloat16)
        if not ((ones @ ones) == 64).all():
            yield Finding(f"GPU {index}", "fault", f"{found}; a bf16 product is wrong", "check the driver and the GPU")
        elif major < 8:
            yield Finding(f"GPU {index}", "warning", found, "bf16 is slow before Ampere; use --precision fp16")
        else:
            yield Finding(f"GPU {index}", "well", found)


def all_reduce(ranks: int | None, environ: Mapping[str, str]) -> Finding:
    """Sums the ranks of processes under `accelerate launch`, with NCCL on GPUs and with gloo otherwise."""
    count = environment.count_gpus()
    ranks = ranks or max(2, count)
    on_gpus = count >= ranks
    backend = "NCCL" if on_gpus else "gloo"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(ranks), "--main_process_port", "0", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "-m", "runner.system.all_reduce"]
    more = {} if on_gpus else {"ACCELERATE_USE_CPU": "true"}
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**environ, **more},
            timeout=ALL_REDUCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        found = f"{ranks} ranks with {backend}: no answer in {ALL_REDUCE_SECONDS} s"
        remedy = "set NCCL_DEBUG=INFO for details, or NCCL_P2P_DISABLE=1 to rule out the links between GPUs"
        return Finding("all-reduce", "fault", found, remedy)
    expected = f"sum {sum(range(ranks))}"
    if result.returncode != 0 or expected not in result.stdout:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1][:200]
        found = f"{ranks} ranks with {backend}: {last}"
        return Finding("all-reduce", "fault", found, "set NCCL_DEBUG=INFO for details")
    return Finding("all-reduce", "well", f"{ranks} ranks with {backend} agree")


def rendezvous() -> Finding:
    """Checks that the host name resolves to a non-loopback address, which accepts a TCP connection from here."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        remedy = "pass an address to --main_process_ip instead of a name"
        return Finding("rendezvous", "warning", f"{name}: does not resolve", remedy)
    with socket.create_server(("", 0)) as server, socket.create_connection((address, server.getsockname()[1]), 5):
        pass
    if address.startswith("127."):
        found = f"{name} is {address}, which other nodes cannot reach"
        return Finding("rendezvous", "warning", found, "pass its network address to --main_process_ip")
    return Finding("rendezvous", "well", f"{name} is {address}, and accepts connections")


def slurm() -> Finding:
    """Checks whether jobs can be submitted from here."""
    if shutil.which("sbatch") is None:
        return Finding("SLURM", "warning", "no sbatch", "run accelerate launch on each node; see launch/README.md")
    command = ["sinfo", "--noheader", "--format=%P %D %G"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        result = subprocess.CompletedProcess(command, 1)
    if result.returncode != 0:
        return Finding(
            "SLURM",
            "warning",
            "sbatch is installed, but no controller answers",
            "set SLURM_CONF, or use a login node of the cluster",
        )
    return Finding("SLURM", "well", "partition, nodes, GPUs: " + "; ".join(result.stdout.split("\n")[:4]).strip("; "))


def wandb(environ: Mapping[str, str]) -> Finding:
    """Checks that the W&B server answers, and that there is an API key."""
    mode = environ.get("WANDB_MODE")
    if mode in ("offline", "disabled"):
        return Finding("W&B", "warning", f"WANDB_MODE={mode}", "unset it to go online")
    url = account.base_url(environ)
    host = urlsplit(url)
    port = host.port or (443 if host.scheme == "https" else 80)
    try:
        with socket.create_connection((host.hostname or "", port), WANDB_SECONDS) as plain:
            if host.scheme == "https":
                ssl.create_default_context().wrap_socket(plain, server_hostname=host.hostname).close()
    except OSError as error:
        return Finding("W&B", "warning", f"{url}: {error}", "set WANDB_MODE=offline to avoid waiting; sync later")
    if not account.has_key(environ):
        remedy = "run wandb login; without a key, runs are offline"
        return Finding("W&B", "warning", f"{url} answers, but there is no API key", remedy)
    return Finding("W&B", "well", f"{url} answers, and there is an API key")


def onnxruntime() -> Finding:
    """Checks which execution providers work; onnxruntime itself lists all that it was built with."""
    from runner.deploy import session

    providers = session.usable_providers()
    if environment.count_gpus() and "CUDAExecutionProvider" not in providers:
        remedy = "install the CUDA and cuDNN versions that onnxruntime-gpu requires"
        return Finding("onnxruntime", "fault", ", ".join(providers), remedy)
    return Finding("onnxruntime", "well", ", ".join(providers))


def tensorrt() -> Iterator[Finding]:
    """Builds a one-layer engine with each TensorRT library that loads; on a GPU, also loads and runs it."""
    from runner.deploy import engine_library

    for backend in engine_library.LIBRARIES:
        try:
            trial = engine_library.smoke_test(backend)
        except UserError as error:
            yield Finding(backend, "warning", str(error), "see runner/deploy/README.md")
        except Exception as error:  # of the library as well: the other one is tried nevertheless
            yield Finding(
                backend, "fault", first_line(error), "check the driver, or install another version of the library"
            )
        else:
            if trial.gpu:
                found = f"builds, loads and runs an engine ({trial.bytes:,} bytes) on {trial.gpu}"
            else:
                found = f"builds an engine ({trial.bytes:,} bytes) for compute capability "
                found += f"{', '.join(trial.capabilities)}; loading and running it needs such a GPU"
            yield Finding(backend, "well", found)
    try:
        selected, _ = engine_library.select_library("auto")
        yield Finding("engines", "well", f"--backend auto selects {selected}")
    except UserError as error:
        yield Finding("engines", "fault", str(error), "see runner/deploy/README.md")


def show(findings: list[Finding]) -> None:
    """Prints the findings as a table."""
    from rich.text import Text

    colors = {"well": "green", "warning": "yellow", "fault": "red"}
    table = new_table("check", "state", "found", "what to do")
    for finding in findings:
        table.add_row(finding.check, Text(finding.state, colors[finding.state]), finding.found, finding.remedy)
    print_table(table)


@dataclass(frozen=True)
class Doctor:
    """Check data, disk, GPUs, all-reduce, SLURM, W&B and TensorRT; suggest fixes."""

    data: Path | None = None
    """Prepared dataset to check, file by file."""
    runs: Path = Path("runs")
    """Folder of runs; its disk is checked."""
    ranks: Annotated[int, Meta(ge=2)] | None = None
    """Number of ranks in the all-reduce; by default one per GPU, or two on the CPU."""
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        findings = examine(self.data, self.runs, self.ranks, environ)
        if self.json:
            print(json_format.dumps([asdict(finding) for finding in findings]))
        else:
            show(findings)
        if any(finding.state == "fault" for finding in findings):
            raise SystemExit(1)
