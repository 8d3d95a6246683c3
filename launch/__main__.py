"""`python -m launch`: hands work to a cluster, and runs sweeps here or there."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import tyro

from data_prep.console import UserError, run_command
from launch.agent import Agent
from launch.submit import Submit
from launch.sweep import Sweep

COMMANDS = {"submit": Submit, "sweep": Sweep, "agent": Agent}


def main() -> None:
    """Entry point. What a command does not know itself are options of `runner train`."""

    def parse() -> Callable[[], Any]:
        name, *given = sys.argv[1:] or ["--help"]
        if name not in COMMANDS:
            known = f"python -m launch: expected one of {', '.join(COMMANDS)}; each explains itself with --help"
            if name in ("-h", "--help"):
                return lambda: print(known)
            raise UserError(f"{name!r}: {known}")
        command, unknown = tyro.cli(
            COMMANDS[name],
            prog=f"python -m launch {name}",
            args=given,
            config=(tyro.conf.FlagCreatePairsOff,),
            return_unknown_args=True,
        )
        return functools.partial(command, unknown, os.environ)

    run_command(parse, "launch")


if __name__ == "__main__":
    main()
