"""Experiments by name. Each module of this package is one paper and defines EXPERIMENTS, and optionally GRIDS.

A new architecture is one entry in a module; a new paper is a new module. `--experiments-from` adds a module outside
the package. Experiments name their architectures, so no module here imports torch.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from runner.common.errors import UserError
from runner.config.recipe import Experiment


def load(extra_modules: tuple[str, ...] = ()) -> dict[str, Experiment]:
    """All experiments, in the order of papers and of the rows in each.

    Args:
        extra_modules: importable modules outside this package that define further EXPERIMENTS.

    Raises:
        UserError: an extra module cannot be imported, defines no EXPERIMENTS, or reuses a name.
        ValueError: two experiments of this package have the same name.
    """
    experiments: dict[str, Experiment] = {}
    for module in _modules(extra_modules):
        _add(experiments, module.EXPERIMENTS, module.__name__, extra_modules)
    return experiments


def load_grids(extra_modules: tuple[str, ...] = ()) -> dict[str, dict[str, Experiment]]:
    """All grids by name; each is a dict of trials, which are experiments, by name. Raises as `load`."""
    grids: dict[str, dict[str, Experiment]] = {}
    for module in _modules(extra_modules):
        _add(grids, getattr(module, "GRIDS", {}), module.__name__, extra_modules)
    return grids


def _modules(extra: tuple[str, ...]) -> Iterator[ModuleType]:
    """Imports the modules of this package and the extra ones."""
    inside = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    for name in [*inside, *extra]:
        try:
            module = importlib.import_module(name)
            for entries in (module.EXPERIMENTS, *getattr(module, "GRIDS", {}).values()):
                if not all(isinstance(entry, Experiment) for entry in entries.values()):
                    raise TypeError("expected EXPERIMENTS and GRIDS of Experiment")
        except (Exception, SystemExit) as error:  # a module from outside may do anything when imported
            if name in inside:
                raise
            raise UserError(
                f"--experiments-from {name}: expected an importable module with EXPERIMENTS "
                f"({type(error).__name__}: {error})"
            ) from None
        yield module


def _add(target: dict[str, Any], entries: dict[str, Any], module: str, extra: tuple[str, ...]) -> None:
    """Adds the entries of a module to `target`, whose names must differ."""
    for key, entry in entries.items():
        if key in target and module in extra:
            raise UserError(f"--experiments-from {module}: expected new names, found {key!r}, which exists already")
        if key in target:
            raise ValueError(f"{module}: {key!r} exists already")
        target[key] = entry


def get(name: str, extra_modules: tuple[str, ...] = ()) -> Experiment:
    """Returns the experiment `name`; the name of a grid's trial is `grid/trial`.

    Raises:
        UserError: no such experiment; the message lists similar names.
    """
    experiments = load(extra_modules)
    if "/" in name:
        experiments = load_grids(extra_modules).get(name.partition("/")[0], experiments)
    if name not in experiments:
        near = get_close_matches(name, experiments, n=3, cutoff=0.4) or list(experiments)
        raise UserError(f"{name!r}: no such experiment; expected {', '.join(near)} (all: runner list)")
    return experiments[name]
