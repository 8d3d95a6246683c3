"""Ends a run that stands still: says so, shows where every thread is, and leaves, so that its peers end too."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h
STARTING = 3  # times the limit until the first sign of life: compiling a model takes long


@contextlib.contextmanager
def watching(seconds: float, who: str) -> Iterator[Callable[[], None]]:
    """Watches this process until the block is left.

    A rank that hangs, or is stopped, keeps its peers waiting in their next collective; they are who notices. They
    leave with exit code 70, and the launcher ends the one that hangs.

    Args:
        seconds: without a sign of life, after which this process counts as hung.
        who: for the message, e.g. "rank 1 of 4".

    Yields:
        A function that gives a sign of life.
    """
    state = {"last": time.monotonic(), "limit": STARTING * seconds}
    over = threading.Event()

    def alive() -> None:
        state["last"], state["limit"] = time.monotonic(), seconds

    def watch() -> None:
        while not over.wait(min(1.0, seconds / 4)):
            silent = time.monotonic() - state["last"]
            if silent > state["limit"]:
                sys.stderr.write(
                    f"runner: {who} made no step for {silent:.0f} s (--hang-timeout {seconds:g}): it hangs, or "
                    "waits for a rank that does; its stacks follow, and it leaves\n"
                )
                sys.stderr.flush()
                faulthandler.dump_traceback(all_threads=True)
                os._exit(EXIT_HUNG)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield alive
    finally:
        over.set()
        thread.join()
