"""Which code a run folder may name: a run from a stranger must not import what it likes. Does not import torch."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from runner.common.command_line import Flag


@dataclass(frozen=True)
class TrustedCode:
    """The models that may be built from a run folder, beside those of this package."""

    experiments_from: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Importable module outside this package whose models the run may use; repeat the option for several."""
    trust: Flag = False
    """Import whatever model the run names. Only for run folders from people whom you would let run code here."""
