"""Options shared by several commands."""

from pathlib import Path
from typing import Annotated

import tyro

from runner import experiments
from runner.common.command_line import Flag
from runner.config.train_config import Device
from runner.config.trust import TrustedCode
from runner.run.folder import Run
from runner.run.schema import Calibration, Precision

__all__ = ["Calibration", "Code", "Device", "Flag", "Precision", "RunFolder", "RunFolders", "open_run"]

Code = Annotated[TrustedCode, tyro.conf.arg(name="")]
RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
RunFolders = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]


def open_run(folder: Path, code: TrustedCode) -> Run:
    """Returns a run whose model may be built. Raises UserError if a module of --experiments-from cannot be imported."""
    experiments.load(code.experiments_from)
    return Run(folder, code)
