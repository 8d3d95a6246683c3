"""Options shared by several commands."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from runner import experiments
from runner.common.command_line import Flag, NoneByDefault
from runner.common.errors import UserError
from runner.config.train_config import Device
from runner.config.trust import TrustedCode
from runner.run.folder import Run
from runner.run.schema import Calibration, Precision

__all__ = [
    "Calibration", "Code", "Device", "Flag", "NoneByDefault", "Precision", "RunFolder", "RunFolders", "open_run",
    "refuse_ignored_precisions",
]  # fmt: skip

Code = Annotated[TrustedCode, tyro.conf.arg(name="")]
RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
RunFolders = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS", help_behavior_hint="(required)")
]


def open_run(folder: Path, code: TrustedCode) -> Run:
    """Returns a run whose model may be built. Raises UserError if a module of --experiments-from cannot be imported."""
    experiments.load(code.experiments_from)
    return Run(folder, code)


def refuse_ignored_precisions(precisions: Sequence[str], backends: Sequence[str] = ()) -> None:
    """Raises UserError if a precision is repeated, or if fp32 is missing with `aotinductor`, which has no other."""
    words = " ".join(precisions)
    if len(set(precisions)) < len(precisions):
        raise UserError(f"--precision {words}: expected each once")
    if precisions and "fp32" not in precisions and "aotinductor" in backends:
        raise UserError(f"--precision {words}: expected fp32 with --backend aotinductor, which has no other")
