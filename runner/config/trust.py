"""Which code a run folder may name: a run from a stranger must not import what it likes. Does not import torch."""

from dataclasses import dataclass

from runner.common.command_line import Flag


@dataclass(frozen=True)
class TrustedCode:
    """The models that may be built from a run folder, beside those of this package."""

    experiments_from: tuple[str, ...] = ()
    """Importable modules outside this package whose models the run may use."""
    trust: Flag = False
    """Import whatever model the run names. Only for run folders from people whom you would let run code here."""
