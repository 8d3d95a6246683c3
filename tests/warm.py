"""Processes that have imported torch and the rest already: forked from one that has done nothing else.

Every command of ours spends most of a short test on imports. A child of this server is a process like any other,
with arguments, environment, folder, streams and exit code of its own; it differs in that its imports have happened.
Tests of imports, of the environment's effect on them, and all launches of several ranks use fresh processes.

    python -m tests.warm SOCKET
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

# What commands import when they run. Not onnxruntime, which starts threads: they would be missing in a child.
IMPORTS = (
    "torch", "torchvision", "accelerate", "numba", "numpy", "onnx", "tyro", "rich.progress", "safetensors.torch",
    "runner.cli", "runner.job", "runner.deploy.onnx", "torch.onnx", "torch._dynamo", "jinja2",
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
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
