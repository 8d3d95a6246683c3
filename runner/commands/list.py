"""`runner list`: lists every experiment, every grid, or timm's models."""

import dataclasses
import json as json_format
from collections.abc import MutableMapping
from typing import Annotated

from runner import experiments
from runner.commands.options import Flag, NoneByDefault
from runner.common.console import new_table, print_table
from runner.common.errors import UserError
from runner.config.recipe import Experiment
from runner.experiments import timm


@dataclasses.dataclass(frozen=True)
class List:
    """List every experiment: paper, architecture, parameters, MACs, reported accuracy."""

    grids: Flag = False
    """List the grids and their trials instead; a trial can be trained by name like any experiment."""
    timm: str | None = None
    """List the models of the timm library that match a pattern such as 'convnext*' instead; `timm/MODEL` is the name of
    an experiment."""
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""
    experiments_from: Annotated[tuple[str, ...], NoneByDefault] = ()
    """Importable modules outside this package that define further EXPERIMENTS."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        if self.timm is not None:
            self.list_timm(self.timm)
            return
        if self.grids:
            self.list_grids()
            return
        known = experiments.load(self.experiments_from)
        if self.json:
            print(json_format.dumps([_as_json(name, experiment) for name, experiment in known.items()]))
            return
        table = new_table("name", "paper", "architecture", "params", "MACs", "reported")
        for name, experiment in known.items():
            table.add_row(*_cells(name, experiment))
        print_table(table)

    def list_timm(self, pattern: str) -> None:
        """Prints the names of timm's models that match a pattern, without a table, so that scripts can use them."""
        if self.grids or self.experiments_from:
            other = "--grids" if self.grids else "--experiments-from"
            raise UserError(f"--timm {pattern} and {other}: expected one of them")
        names = [timm.PREFIX + name for name in timm.list_models(pattern.removeprefix(timm.PREFIX))]
        if not names:
            raise UserError(f"--timm {pattern!r}: matches no model; expected a pattern such as 'convnext*'")
        print(json_format.dumps(names) if self.json else "\n".join(names))

    def list_grids(self) -> None:
        """Prints every grid with its trials."""
        grids = experiments.load_grids(self.experiments_from)
        if self.json:
            print(json_format.dumps({name: list(trials) for name, trials in grids.items()}))
            return
        for name, trials in grids.items():
            print(f"{name}: {len(trials)} trials")
            for trial in trials:
                print(f"    {trial}")


def _as_json(name: str, experiment: Experiment) -> dict[str, object]:
    return {
        "name": name,
        "paper": experiment.paper,
        "architecture": _architecture(experiment),
        "parameters": experiment.parameters,
        "macs": experiment.macs,
        "reported": experiment.reported and dataclasses.asdict(experiment.reported),
    }


def _cells(name: str, experiment: Experiment) -> list[str]:
    reported = experiment.reported
    return [
        name,
        experiment.paper,
        _architecture(experiment),
        f"{experiment.parameters / 1e6:.2f} M" if experiment.parameters else "–",
        f"{experiment.macs / 1e6:,.0f} M" if experiment.macs else "–",
        f"{reported.accuracy:.2%} {reported.on.replace('validation', 'val.')}" if reported else "–",
    ]


def _architecture(experiment: Experiment) -> str:
    return experiment.architecture.factory.rpartition(":")[2]
