"""One test that fails must not take with it those that follow in its process."""

import gc
import os
import signal

import psutil
import pytest

from tests.support.processes import gone, module, start

SLEEP = ("timeit", "-n", 1, "-r", 1, "import time; time.sleep(0.5)")


def test_a_process_that_nobody_waits_for_does_not_end_the_server() -> None:
    process = start(*SLEEP)
    number = process.pid
    del process
    gc.collect()
    assert gone([number], 30)
    assert module("timeit", "-n", 1, "-r", 1).returncode == 0


@pytest.mark.every
def test_a_server_that_has_ended_is_replaced() -> None:
    process = start("timeit", "-n", 1, "-r", 1, "import time; time.sleep(600)")
    server = psutil.Process(process.pid).ppid()
    assert server != os.getpid()
    os.kill(server, signal.SIGKILL)
    assert gone([server], 30)
    assert process.wait() == -signal.SIGKILL
    os.kill(process.pid, signal.SIGKILL)  # it outlives its server
    assert module("timeit", "-n", 1, "-r", 1).returncode == 0
