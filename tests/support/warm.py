"""Forks processes in which torch and other modules are already imported, from a server that has done nothing else.

A short test spends most of its time on imports. A forked process is like any other, with its own pid, arguments,
environment, working directory, streams and exit code, but its imports are already done. If it starts `python -m ...`
itself, as launchers, sweeps and the quickstart do, that process is forked from it. Tests of imports, and of environment
variables that take effect when Python starts, use fresh processes.

    python -m tests.support.warm SOCKET
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parents[2]
# Modules that commands import. Not onnxruntime, because it starts threads, which a child would lack; not wandb,
# because it creates a folder and removes it when a process ends: the first child would remove it for all others.
IMPORTS = (
    "torch", "torchvision", "accelerate", "numba", "numpy", "onnx", "tyro", "rich.progress", "safetensors.torch",
    "runner.cli", "runner.training.session", "runner.deploy.onnx", "torch.onnx", "torch._dynamo", "jinja2",
    "accelerate.commands.launch", "torch.distributed.run", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "launch.sweep", "data_prep.cli",
)  # fmt: skip
# Prefixes of environment variables that take effect when a process starts.
COLD = ("HOME", "XDG_", "OMP_", "GOMP_", "LD_", "PYTHON")


def can_fork(command: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Returns whether a command runs a Python module in an environment that does not affect the imports."""
    changed = {name for name in {*environ, *os.environ} if environ.get(name) != os.environ.get(name)}
    changed -= {"OMP_NUM_THREADS"}  # launchers set it, and the runner sets torch's threads by itself
    words = [word for word in command[:3] if word != "-u"]
    return words[:2] == [sys.executable, "-m"] and not any(name.startswith(COLD) for name in changed)


class Server:
    """The process that forks, and the socket to it."""

    def __init__(self, **environ: str) -> None:
        self.socket, theirs = socket.socketpair()
        # Not the stderr of this process, which belongs to the test that runs.
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env=os.environ | environ,
            stderr=self.log,
        )
        theirs.close()

    def has_ended(self) -> bool:
        """Returns whether nothing can be forked any more."""
        return self.process.poll() is not None

    def start(
        self, arguments: Sequence[str], cwd: Path, environ: Mapping[str, str], out: int, err: int, session: bool
    ) -> "Process":
        """Runs `python ARGUMENTS` in a child whose output streams are the descriptors `out` and `err`.

        Raises RuntimeError with the server's last words if it has ended.
        """
        request = {"arguments": list(arguments), "cwd": str(cwd), "environ": dict(environ), "session": session}
        content = json.dumps(request).encode()
        status, theirs = socket.socketpair()
        pid = b""
        with theirs, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self.socket, [len(content).to_bytes(4, "big")], [out, err, theirs.fileno()])
            self.socket.sendall(content)
        with contextlib.suppress(ConnectionResetError):
            pid = status.recv(4)
        if not pid:
            code = self.process.wait(60)
            self.log.seek(0)
            raise RuntimeError(f"the server of warm processes ended with {code}: {self.log.read().decode()}")
        return Process(int.from_bytes(pid, "big"), status)


class Process:
    """A forked process, with the part of the `subprocess.Popen` interface that tests use."""

    def __init__(self, pid: int, status: socket.socket) -> None:
        self.pid, self.returncode = pid, None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        self._status = status

    def poll(self) -> int | None:
        """Returns the exit code, or None while the process runs."""
        return self._read(0)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the process and returns its exit code; raises subprocess.TimeoutExpired."""
        if self._read(timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def _read(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            answer = self._status.recv(4)
            self.returncode = int.from_bytes(answer, "big", signed=True) if answer else -signal.SIGKILL
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """Reads both streams to the end, and waits for the process."""
        found: dict[str, str] = {}
        streams = {name: stream for name in ("stdout", "stderr") if (stream := getattr(self, name))}
        threads = [
            threading.Thread(target=lambda name=name, stream=stream: found.update({name: stream.read()}), daemon=True)
            for name, stream in streams.items()
        ]
        until = None if timeout is None else time.monotonic() + timeout
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        self.wait(None if until is None else max(0.0, until - time.monotonic()))
        return found.get("stdout"), found.get("stderr")

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()
        self.wait()


def serve(descriptor: int) -> dict[str, Any] | None:
    """Forks a child for each request until there are no more; returns the request in a child, None at the end."""
    subprocess.Popen, os.execve = ForkingPopen, execve  # before other modules import them by name
    for name in IMPORTS:
        importlib.import_module(name)
    fill_caches()
    gc.collect()
    gc.freeze()  # otherwise a garbage collection in a child would copy every page
    end = socket.socket(fileno=descriptor)
    running: dict[int, tuple[int, socket.socket]] = {}  # by pidfd
    while True:
        for ready in select.select([end, *running], [], [])[0]:
            if ready is not end:
                pid, status = running.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with status, contextlib.suppress(BrokenPipeError):  # a test that has failed waits no longer
                    status.send(code.to_bytes(4, "big", signed=True))
                continue
            head, streams, _, _ = socket.recv_fds(end, 4, 3)
            if not head:
                return None
            size, content = int.from_bytes(head, "big"), b""
            while len(content) < size:
                content += end.recv(size - len(content))
            child = os.fork()
            if child == 0:
                request = json.loads(content)
                if request["session"]:
                    os.setsid()
                for stream, number in zip(streams, (1, 2), strict=False):
                    os.dup2(stream, number)
                os.closerange(3, 256)
                end.detach()
                for _, status in running.values():
                    status.detach()
                return request
            for stream in streams[:2]:
                os.close(stream)
            status = socket.socket(fileno=streams[2])
            with contextlib.suppress(BrokenPipeError):
                status.send(child.to_bytes(4, "big"))
            running[os.pidfd_open(child)] = child, status


def fill_caches() -> None:
    """Reads what nearly every command reads: the docstrings that tyro makes the help of, and matplotlib's fonts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from runner import cli

    cli.parse(["train", "podeti-alexnet", "--data", "data"])
    figure = Figure()
    figure.text(0, 0, "text")
    FigureCanvasAgg(figure).draw()


class ForkingPopen(subprocess.Popen):
    """`subprocess.Popen` that forks this process if the command is a Python module."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, *rest: Any) -> None:
        pass_fds, cwd, env, _, _, shell, *pipes = rest[:12]
        environ = dict(os.environ if env is None else env)
        command = [os.fsdecode(word) for word in args] if isinstance(args, list | tuple) else []
        if shell or pass_fds or executable or not can_fork(command, environ):
            super()._execute_child(args, executable, preexec_fn, close_fds, *rest)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            try:
                if rest[17]:  # start_new_session
                    os.setsid()
                for descriptor, number in zip((pipes[0], pipes[3], pipes[5]), (0, 1, 2), strict=True):
                    if descriptor != -1:
                        os.dup2(descriptor, number)
                os.closerange(3, 256)
                if cwd:
                    os.chdir(cwd)
                if preexec_fn:
                    preexec_fn()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            become(command[command.index("-m") :], environ)
        self.pid, self._child_created = child, True
        self._close_pipe_fds(*pipes)


def execve(path: str, command: Sequence[str], environ: Mapping[str, str]) -> None:
    """`os.execve` that keeps the imports of this process if the command is a Python module."""
    if path != sys.executable or not can_fork(command, environ):
        _execve(path, command, environ)
    become(command[command.index("-m") :], environ)


_execve = os.execve


def become(arguments: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    """Runs `python ARGUMENTS` in this process, and ends it as Python would, but without freeing imported modules."""
    code: Any = 1
    try:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        atexit._clear()
        os.environ.clear()
        os.environ.update(environ)
        sys.path[0] = str(Path.cwd())
        sys.argv = list(arguments[1:])
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Runs the server and, in each of its children, the requested program."""
    request = serve(int(sys.argv[1]))
    if request is not None:
        os.chdir(request["cwd"])
        become(request["arguments"], request["environ"])


if __name__ == "__main__":
    main()
