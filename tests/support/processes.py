"""Starting the project's commands as real processes, and waiting for what they do."""

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
    """The environment of a command under test: no settings of the person who runs the tests, and no W&B.

    Tests that are about W&B name a WANDB_MODE.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "ACCELERATE_"))}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "WANDB_MODE": "disabled", "COLUMNS": "200"} | more


def python(*arguments: object, cwd: Path = ROOT, timeout: float = 500, **environ: str) -> Done:
    """`python ARGUMENTS` in a fresh process, to its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd, timeout=timeout, env=clean_environment(**environ),
    )  # fmt: skip


_servers: list[warm.Server] = []


def start(
    *arguments: object,
    cwd: Path = ROOT,
    stdout: int | IO[bytes] = subprocess.PIPE,
    stderr: int | IO[bytes] = subprocess.PIPE,
    session: bool = True,
    **environ: str,
) -> Running:
    """`python -m ARGUMENTS` under way, forked warm where the variables of `environ` let it.

    Args:
        arguments: module and its arguments.
        cwd: its folder.
        stdout, stderr: subprocess.PIPE, subprocess.STDOUT (for stderr), or a file.
        session: in a process group of its own, for `os.killpg`.
        environ: variables beside `clean_environment`.
    """
    words = ["-m", *map(str, arguments)]
    if any(name.startswith(warm.COLD) for name in environ):
        return subprocess.Popen(
            [sys.executable, *words], cwd=cwd, stdout=stdout, stderr=stderr, text=True,
            env=clean_environment(**environ), start_new_session=session,
        )  # fmt: skip
    if not _servers:
        _servers.append(warm.Server())
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
        process = _servers[0].start(words, cwd, clean_environment(**environ), out, err, session)
    process.stdout, process.stderr = ends.get("stdout"), ends.get("stderr")
    return process


def module(*arguments: object, cwd: Path = ROOT, timeout: float = 500, **environ: str) -> Done:
    """`python -m ARGUMENTS`, to its end. See `start`."""
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
    """`runner ARGUMENTS`, to its end."""
    return module("runner", *arguments, **options)


def on_ranks(ranks: int) -> list[object]:
    """The module and options that start so many gloo ranks of the module that follows."""
    return ["accelerate.commands.launch", "--config_file", ROOT / "launch/cpu.yaml", "--num_processes", ranks, "-m"]


def launch(ranks: int, *arguments: object, **options: object) -> Done:
    """`accelerate launch ... -m runner ARGUMENTS --device cpu` with so many gloo ranks, to its end."""
    device = () if "--device" in arguments else ("--device", "cpu")
    return module(*on_ranks(ranks), "runner", *arguments, *device, **options)


def start_ranks(ranks: int, *arguments: object, **environ: str) -> Running:
    """A `runner ...` on so many gloo ranks that is under way, in a process group of its own."""
    return start(*on_ranks(ranks), "runner", *arguments, **environ)


def wait_until(what: Callable[[], bool], seconds: float = 240, running: Running | None = None) -> None:
    """Waits for something to be so; fails the test after `seconds`, or where the process that does it has ended."""
    until = time.monotonic() + seconds
    while not what():
        if running is not None and running.poll() is not None and not what():
            pytest.fail(f"ended with exit code {running.returncode} before it was waited for")
        if time.monotonic() > until:
            pytest.fail(f"not within {seconds} s")
        time.sleep(0.02)


def wait_for_step(run: Path, step: int, seconds: float = 240, running: Running | None = None) -> None:
    """Until a checkpoint of `step` or later is there."""
    wait_until(lambda: any(int(folder.name[5:]) >= step for folder in run.glob("checkpoints/step-*")), seconds, running)


def children_of(process: int) -> list[int]:
    """The processes that a process has started, as the ranks of a launcher."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def descendants_of(process: int) -> list[int]:
    """The processes under one, at any depth; those that end meanwhile are left out."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for child in children_of(process):
            found += [child, *descendants_of(child)]
    return found


def gone(processes: list[int], seconds: float) -> bool:
    """Whether all have ended within so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        states = [Path(f"/proc/{process}/stat") for process in processes]
        if not any(state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z" for state in states):
            return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    """A port that someone listens on."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]
