"""Starts the project's commands as real processes, and waits for their effects."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.support import warm

ROOT = Path(__file__).parents[2]
TINY = ("--experiments-from", "tests.support.models.tiny")
ENDING = ("--experiments-from", "tests.support.models.ending")

Done = subprocess.CompletedProcess[str]
Running = warm.Process | subprocess.Popen[str]


def clean_environment(**more: str) -> dict[str, str]:
    """Returns the environment of a command under test, without the user's own settings and with W&B disabled.

    Tests of W&B pass a WANDB_MODE.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "ACCELERATE_"))}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "WANDB_MODE": "disabled", "COLUMNS": "200"} | more


def python(*arguments: object, cwd: Path = ROOT, timeout: float = 1500, **environ: str) -> Done:
    """Runs `python ARGUMENTS` in a fresh process until it ends."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd, timeout=timeout, env=clean_environment(**environ),
    )  # fmt: skip


_servers: dict[str, warm.Server] = {}  # by the library that they preload


def start(
    *arguments: object,
    cwd: Path = ROOT,
    stdout: int | IO[bytes] = subprocess.PIPE,
    stderr: int | IO[bytes] = subprocess.PIPE,
    session: bool = True,
    **environ: str,
) -> Running:
    """Starts `python -m ARGUMENTS`; forks it from a warm process (see `warm`) if the variables of `environ` allow it.

    Args:
        arguments: the module and its arguments.
        cwd: working directory of the process.
        stdout, stderr: subprocess.PIPE, subprocess.STDOUT (for stderr), or a file.
        session: whether to start a new process group, for `os.killpg`.
        environ: variables in addition to `clean_environment`. A library in LD_PRELOAD has a warm process of its own.
    """
    words = ["-m", *map(str, arguments)]
    preload = environ.get("LD_PRELOAD", "")
    if any(name.startswith(warm.COLD) for name in environ if name != "LD_PRELOAD"):
        return subprocess.Popen(
            [sys.executable, *words], cwd=cwd, stdout=stdout, stderr=stderr, text=True,
            env=clean_environment(**environ), start_new_session=session,
        )  # fmt: skip
    if preload not in _servers or _servers[preload].has_ended():
        _servers[preload] = warm.Server(LD_PRELOAD=preload) if preload else warm.Server()
    ends: dict[str, IO[str]] = {}
    with contextlib.ExitStack() as stack:

        def descriptor(name: str, given: int | IO[bytes]) -> int:
            if given == subprocess.PIPE:
                ours, theirs = os.pipe()
                ends[name] = os.fdopen(ours, encoding="utf-8", errors="replace")
                stack.callback(os.close, theirs)
                return theirs
            assert not isinstance(given, int), given
            return given.fileno()

        out = descriptor("stdout", stdout)
        err = out if stderr == subprocess.STDOUT else descriptor("stderr", stderr)
        process = _servers[preload].start(words, cwd, clean_environment(**environ), out, err, session)
    process.stdout, process.stderr = ends.get("stdout"), ends.get("stderr")
    return process


def module(*arguments: object, cwd: Path = ROOT, timeout: float = 1500, **environ: str) -> Done:
    """Runs `python -m ARGUMENTS` until it ends; see `start`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = start(*arguments, cwd=cwd, stdout=out, stderr=err, session=False, **environ)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        texts = [stream.seek(0) or stream.read().decode(errors="replace") for stream in (out, err)]
    return subprocess.CompletedProcess([*map(str, arguments)], code, *texts)


def runner(*arguments: object, **options: object) -> Done:
    """Runs `runner ARGUMENTS` until it ends."""
    return module("runner", *arguments, **options)


def on_ranks(ranks: int) -> list[object]:
    """Returns the module and options that start `ranks` gloo ranks of the module that follows."""
    return ["accelerate.commands.launch", "--config_file", ROOT / "launch/cpu.yaml", "--num_processes", ranks, "-m"]


def launch(ranks: int, *arguments: object, **options: object) -> Done:
    """Runs `accelerate launch ... -m runner ARGUMENTS --device cpu` with `ranks` gloo ranks until it ends."""
    device = () if "--device" in arguments else ("--device", "cpu")
    return module(*on_ranks(ranks), "runner", *arguments, *device, **options)


def start_ranks(ranks: int, *arguments: object, **environ: str) -> Running:
    """Starts `runner ARGUMENTS` on `ranks` gloo ranks, in a new process group."""
    return start(*on_ranks(ranks), "runner", *arguments, **environ)


def wait_until(what: Callable[[], bool], seconds: float = 900, running: Running | None = None) -> None:
    """Waits until `what()` is true; fails the test after `seconds`, or if the process `running` ends first."""
    until = time.monotonic() + seconds
    while not what():
        if running is not None and running.poll() is not None and not what():
            pytest.fail(f"ended with exit code {running.returncode} before the condition was true")
        if time.monotonic() > until:
            pytest.fail(f"condition not true within {seconds} s")
        time.sleep(0.02)


def wait_for_step(run: Path, step: int, seconds: float = 900, running: Running | None = None) -> None:
    """Waits until there is a checkpoint of `step` or later."""
    wait_until(lambda: any(int(folder.name[5:]) >= step for folder in run.glob("checkpoints/step-*")), seconds, running)


def children_of(process: int) -> list[int]:
    """Returns the processes that a process, in any of its threads, has started, such as the ranks of a launcher."""
    started: list[int] = []
    try:
        threads = list(Path(f"/proc/{process}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return []
    for thread in threads:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            started += map(int, (thread / "children").read_text().split())
    return started


def descendants_of(process: int) -> list[int]:
    """Returns all descendants of a process; those that end meanwhile are left out."""
    return [found for child in children_of(process) for found in (child, *descendants_of(child))]


def command_lines() -> set[str]:
    """Returns the command lines of all processes."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended
            found.add(file.read_text(errors="replace").replace("\0", " "))
    return found


def has_ended(process: int) -> bool:
    """Returns whether a process has ended, even if its parent has not noticed."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def gone(processes: list[int], seconds: float) -> bool:
    """Returns whether all processes end within `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if all(has_ended(process) for process in processes):
            return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    """Yields a port that is in use."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]
