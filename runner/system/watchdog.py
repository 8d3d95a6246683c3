"""Exits a process that completes no step within a time limit, after printing the stacks of its threads."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h
STARTUP_FACTOR = 3  # the limit before the first step is this many times longer, because compiling a model takes time


@contextlib.contextmanager
def watch_progress(seconds: float, name: str) -> Iterator[Callable[[], None]]:
    """Watches this process until the block exits.

    A rank that hangs or is suspended blocks its peers in their next collective. The peers detect this and exit with
    code 70, and the launcher then terminates the rank that hangs.

    Args:
        seconds: time without progress after which the process exits.
        name: name of this process in the message, such as "rank 1 of 4".

    Yields:
        A function that resets the timer; call it at every step.
    """
    state = {"last": time.monotonic(), "limit": STARTUP_FACTOR * seconds}
    finished = threading.Event()

    def heartbeat() -> None:
        state["last"], state["limit"] = time.monotonic(), seconds

    def watch() -> None:
        while not finished.wait(min(1.0, seconds / 4)):
            idle = time.monotonic() - state["last"]
            if idle > state["limit"]:
                sys.stderr.write(
                    f"runner: {name} completed no step for {idle:.0f} s (--hang-timeout {seconds:g}): it hangs, or "
                    "waits for a rank that hangs; it exits after printing its stacks\n"
                )
                sys.stderr.flush()
                faulthandler.dump_traceback(all_threads=True)
                os._exit(EXIT_HUNG)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield heartbeat
    finally:
        finished.set()
        thread.join()
