"""Every experiment by name. Each module of this package is one paper and defines EXPERIMENTS, and GRIDS where it
has some.

A new architecture is one entry in one of them; a new paper is one module. A module outside the package joins
when it is named with `--experiments-from`. No module here imports torch: architectures are named, not held.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from data_prep.console import UserError
from runner.recipe import Experiment


def load(extra_modules: tuple[str, ...] = ()) -> dict[str, Experiment]:
    """All experiments, in the order of papers and of the rows in each.

    Args:
        extra_modules: importable modules outside this package that define EXPERIMENTS as well.

    Raises:
        UserError: an extra module cannot be imported or defines none, or has a name that is taken.
        ValueError: two experiments of this package have one name.
    """
    found: dict[str, Experiment] = {}
    for module in _modules(extra_modules):
        _add(found, module.EXPERIMENTS, module.__name__, extra_modules)
    return found


def load_grids(extra_modules: tuple[str, ...] = ()) -> dict[str, dict[str, Experiment]]:
    """All grids: by name their trials, which are experiments by name. Raises as `load` does."""
    found: dict[str, dict[str, Experiment]] = {}
    for module in _modules(extra_modules):
        _add(found, getattr(module, "GRIDS", {}), module.__name__, extra_modules)
    return found


def _modules(extra: tuple[str, ...]) -> Iterator[ModuleType]:
    inside = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    for name in [*inside, *extra]:
        try:
            module = importlib.import_module(name)
            module.EXPERIMENTS  # noqa: B018
            yield module
        except (ImportError, AttributeError) as error:
            if name in inside:
                raise
            raise UserError(f"--experiments-from {name}: expected a module with EXPERIMENTS: {error}") from None


def _add(found: dict[str, Any], entries: dict[str, Any], module: str, extra: tuple[str, ...]) -> None:
    for key, entry in entries.items():
        if key in found and module in extra:
            raise UserError(
                f"--experiments-from {module}: expected names of its own, found {key!r}, which exists already"
            )
        if key in found:
            raise ValueError(f"{module}: {key!r} exists already")
        found[key] = entry


def get(name: str, extra_modules: tuple[str, ...] = ()) -> Experiment:
    """The experiment called `name`; a trial of a grid is called `grid/trial`.

    Raises:
        UserError: there is none; names the nearest.
    """
    experiments = load(extra_modules)
    if "/" in name:
        experiments = load_grids(extra_modules).get(name.partition("/")[0], experiments)
    if name not in experiments:
        near = get_close_matches(name, experiments, n=3, cutoff=0.4) or list(experiments)
        raise UserError(f"{name!r}: no such experiment; expected {', '.join(near)} (all: runner list)")
    return experiments[name]
