"""The entry point of all programs in this package."""

import sys
from typing import Any

from runner.common.command_line import read_command
from runner.common.console import run_command


def run(kind: Any, name: str) -> None:
    """Parses the command line of `python -m runner.benchmarks.NAME` as `kind`, and calls it."""
    run_command(lambda: read_command(kind, sys.argv[1:], f"python -m runner.benchmarks.{name}"), name)
