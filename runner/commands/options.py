"""Options shared by several commands."""

from pathlib import Path
from typing import Annotated

import tyro

from runner.common.command_line import Flag
from runner.config.train_config import Device
from runner.config.trust import TrustedCode
from runner.run.schema import Calibration, Precision

__all__ = ["Calibration", "Code", "Device", "Flag", "Precision", "RunFolder", "RunFolders"]

Code = Annotated[TrustedCode, tyro.conf.arg(name="")]
RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
RunFolders = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
