"""Experiments by name. Each module of this package describes one paper: it defines EXPERIMENTS, and optionally GRIDS.

To add an architecture, add an entry to a module; to add a paper, add a module. `--experiments-from` adds a module
outside the package. Experiments refer to architectures by name, so no module here imports torch.
"""

import contextlib
import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from runner.common.errors import UserError
from runner.config.recipe import Architecture, Experiment
from runner.config.trust import TrustedCode
from runner.experiments import timm


def load(extra_modules: tuple[str, ...] = ()) -> dict[str, Experiment]:
    """Returns all experiments by name, in the order of the papers and of the entries in each.

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
    """Returns all grids by name; each is a dict of trials, which are experiments, by name. Raises as `load` does."""
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
    """Adds the entries of a module to `target`; raises an error if a name already exists there."""
    for key, entry in entries.items():
        if key in target and module in extra:
            raise UserError(f"--experiments-from {module}: expected new names, found {key!r}, which already exists")
        if key in target:
            raise ValueError(f"{module}: {key!r} already exists")
        target[key] = entry


def check_trusted(architecture: Architecture, code: TrustedCode, record: Path) -> None:
    """Checks that the model of a run folder may be imported, because importing and calling it runs its code.

    Allowed are the models of registered experiments, and those that runner.models and the modules of `code` define.

    Args:
        architecture: from the run folder.
        code: what the user trusts.
        record: the file that names it, for the message.

    Raises:
        UserError: it may not.
    """
    grids = load_grids(code.experiments_from).values()
    registered = [load(code.experiments_from), *grids]
    if code.trust or any(
        architecture.factory == e.architecture.factory for group in registered for e in group.values()
    ):
        return
    module, _, name = architecture.factory.partition(":")
    allowed = ("runner.models", *code.experiments_from)
    # Only what returns models, and not what such a module has imported, such as os.system.
    if _is_within(module, ("runner.models",)) or module in code.experiments_from:
        with contextlib.suppress(Exception):
            factory = getattr(importlib.import_module(module), name, None)
            if _is_within(str(getattr(factory, "__module__", "")), allowed) and _returns_model(factory):
                return
    raise UserError(
        f"{record}: expected a model of runner.models or of a module given by --experiments-from, found "
        f"{architecture.factory}; --trust imports it all the same"
    )


def _returns_model(factory: Any) -> bool:
    """Returns whether a class is an nn.Module, or a function is annotated to return one."""
    returned = factory if isinstance(factory, type) else inspect.signature(factory).return_annotation
    return isinstance(returned, type) and any(kind.__module__ == "torch.nn.modules.module" for kind in returned.__mro__)


def _is_within(module: str, packages: Sequence[str]) -> bool:
    """Whether a module is one of the packages, or within one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def is_known(name: str) -> bool:
    """Returns whether this is the name of an experiment of the package; a name of timm is not looked up."""
    return name.startswith(timm.PREFIX) or name in load()


def get(name: str, extra_modules: tuple[str, ...] = ()) -> Experiment:
    """Returns the experiment `name`; the name of a grid's trial is `grid/trial`, and of a model of timm `timm/model`.

    Raises:
        UserError: no such experiment; the message lists similar names.
    """
    if name.startswith(timm.PREFIX):
        return timm.get(name)
    experiments = load(extra_modules)
    if "/" in name:
        experiments = load_grids(extra_modules).get(name.partition("/")[0], experiments)
    if name not in experiments:
        near = get_close_matches(name, experiments, n=3, cutoff=0.4) or list(experiments)
        raise UserError(f"{name!r}: no such experiment; expected {', '.join(near)} (all: runner list)")
    return experiments[name]
