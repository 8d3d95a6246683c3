"""Every experiment by name. Each module of this package is one paper and defines EXPERIMENTS.

A new architecture is one entry in one of them; a new paper is one module. A module outside the package joins
when it is named with `--experiments-from`. No module here imports torch: architectures are named, not held.
"""

import importlib
import pkgutil
from difflib import get_close_matches

from data_prep.console import UserError
from runner.recipe import Experiment


def load(extra_modules: tuple[str, ...] = ()) -> dict[str, Experiment]:
    """All experiments, in the order of papers and of the rows in each.

    Args:
        extra_modules: importable modules outside this package that define EXPERIMENTS as well.

    Raises:
        UserError: an extra module cannot be imported or defines none.
        ValueError: two experiments have one name.
    """
    found: dict[str, Experiment] = {}
    inside = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    for name in [*inside, *extra_modules]:
        try:
            entries = importlib.import_module(name).EXPERIMENTS
        except (ImportError, AttributeError) as error:
            if name in inside:
                raise
            raise UserError(f"--experiments-from {name}: expected a module with EXPERIMENTS: {error}") from None
        for key, experiment in entries.items():
            if key in found:
                raise ValueError(f"{name}: an experiment named {key!r} exists already")
            found[key] = experiment
    return found


def get(name: str, extra_modules: tuple[str, ...] = ()) -> Experiment:
    """The experiment called `name`.

    Raises:
        UserError: there is none; names the nearest.
    """
    experiments = load(extra_modules)
    if name not in experiments:
        near = get_close_matches(name, experiments, n=3, cutoff=0.4) or list(experiments)
        raise UserError(f"{name!r}: no such experiment; expected {', '.join(near)} (all: runner list)")
    return experiments[name]
