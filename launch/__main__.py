"""`python -m launch`: submits training to a cluster, and runs sweeps."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from launch.agent import Agent
from launch.search import Search, searchable_options
from launch.submit import Submit
from launch.sweep import Sweep
from runner.common.command_line import options_of, read_command_and_rest
from runner.common.console import run_command
from runner.common.errors import UserError
from runner.config.train_config import TrainConfig

COMMANDS = {"submit": Submit, "sweep": Sweep, "search": Search, "agent": Agent}


def main() -> None:
    """Entry point; options that a command does not declare are passed on to `runner train`."""

    def parse() -> Callable[[], Any]:
        name, *argv = sys.argv[1:] or ["--help"]
        if name not in COMMANDS:
            known = f"python -m launch: expected one of {', '.join(COMMANDS)}; run one with --help to see its options"
            if name in ("-h", "--help"):
                return lambda: print(known)
            raise UserError(f"{name!r}: {known}")
        others = searchable_options() if name == "search" else options_of(TrainConfig)
        command, options = read_command_and_rest(COMMANDS[name], argv, f"python -m launch {name}", others)
        return functools.partial(command, options, os.environ)

    run_command(parse, "launch")


if __name__ == "__main__":
    main()
