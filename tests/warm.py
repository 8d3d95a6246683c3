"""Processes that have imported torch and the rest already: forked from one that has done nothing else.

Every command of ours spends most of a short test on imports. A child of this server is a process like any other,
with arguments, environment, folder, streams and exit code of its own; it differs in that its imports have happened.
Where the child is accelerate's launcher, its ranks are children of it as they always are, in sessions of their own;
they too are forked. Tests of imports and of the environment's effect on them use fresh processes.

    python -m tests.warm SOCKET
"""

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

# What commands import when they run. Not onnxruntime, which starts threads: they would be missing in a child; not
# wandb, which makes a folder and removes it when a process ends: the first child would take it from the others.
IMPORTS = (
    "torch", "torchvision", "accelerate", "numba", "numpy", "onnx", "tyro", "rich.progress", "safetensors.torch",
    "runner.cli", "runner.job", "runner.deploy.onnx", "torch.onnx", "torch._dynamo", "jinja2",
    "accelerate.commands.launch", "torch.distributed.run", "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
)  # fmt: skip


class Server:
    """The process that forks, and our end of its socket."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.socket = ours
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=Path(__file__).parent.parent,
        )
        theirs.close()

    def run(
        self, arguments: list[str], cwd: Path, environ: dict[str, str], timeout: float, out: int, err: int
    ) -> int:
        """Runs `python ARGUMENTS` in a child, with these files as its streams; returns its exit code.

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed.
        """
        request = json.dumps({"arguments": arguments, "cwd": str(cwd), "environ": environ}).encode()
        socket.send_fds(self.socket, [len(request).to_bytes(4, "big")], [out, err])
        self.socket.sendall(request)
        child = int.from_bytes(self.socket.recv(4), "big")
        self.socket.settimeout(timeout)
        try:
            answer = self.socket.recv(4)
        except TimeoutError:
            os.kill(child, signal.SIGKILL)
            self.socket.settimeout(None)
            self.socket.recv(4)
            raise subprocess.TimeoutExpired(arguments, timeout) from None
        self.socket.settimeout(None)
        return int.from_bytes(answer, "big", signed=True)


def serve(descriptor: int) -> dict[str, Any] | None:
    """Forks a child for each request until there are no more; returns the request in a child, None at the end."""
    import importlib

    for name in IMPORTS:
        importlib.import_module(name)
    end = socket.socket(fileno=descriptor)
    while True:
        head, streams, _, _ = socket.recv_fds(end, 4, 2)
        if not head:
            return None
        size, content = int.from_bytes(head, "big"), b""
        while len(content) < size:
            content += end.recv(size - len(content))
        child = os.fork()
        if child == 0:
            end.close()
            for stream, number in zip(streams, (1, 2), strict=True):
                os.dup2(stream, number)
                os.close(stream)
            return json.loads(content)
        for stream in streams:
            os.close(stream)
        end.sendall(child.to_bytes(4, "big"))
        _, status = os.waitpid(child, 0)
        end.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))


class Rank:
    """A forked process, as the launcher expects a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.01)
        return self.returncode


def fork_ranks() -> None:
    """Has the launcher in this process fork each rank, where it would start a Python that imports everything."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    def start(_: SubprocessHandler, words: tuple[str, ...], environ: dict[str, str]) -> Rank:
        assert words[:3] == (sys.executable, "-u", "-m"), words
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            run_rank(list(words[3:]), environ)
        return Rank(child)

    SubprocessHandler._popen = start


def run_rank(words: list[str], environ: dict[str, str]) -> NoReturn:
    """Runs a module in this process, which is a copy of the launcher, and ends it as Python would."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        atexit._clear()
        os.closerange(3, 256)  # the launcher's store among them
        os.environ.clear()
        os.environ.update(environ)
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """The server, and in each child of it the program that was asked for."""
    request = serve(int(sys.argv[1]))
    if request is None:
        return
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    sys.path[0] = request["cwd"]
    assert request["arguments"][0] == "-m"
    sys.argv = request["arguments"][1:]
    if sys.argv[0] == "accelerate.commands.launch":
        fork_ranks()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
