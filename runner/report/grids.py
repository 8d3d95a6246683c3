"""Grids: runs that differ in several settings, for heat maps of their accuracy."""

import statistics
from typing import Any

import msgspec

from runner.config.recipe import flatten, to_json
from runner.report.compare import setting_text
from runner.report.run_record import RunRecord

MIN_GRID_RUNS = 4  # a heat map of fewer runs shows nothing that the table does not


class Grid(msgspec.Struct, frozen=True):
    """Runs that differ in several settings, for heat maps of their accuracy.

    Attributes:
        name: name of the grid or paper.
        dataset: name of the dataset.
        factors: the values of each setting by its dotted name; the setting with the largest effect comes first.
        cells: for each run, the value of every factor, its test accuracy in 0..1 as `accuracy`, and its name as `run`.
    """

    name: str
    dataset: str
    factors: dict[str, list[str]]
    cells: list[dict[str, Any]]


def find_grids(records: list[RunRecord]) -> list[Grid]:
    """Finds groups of finished runs of one grid or paper that differ in two or more settings."""
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        if record.summary is not None:
            prefix, slash, _ = record.config.experiment.partition("/")
            groups.setdefault((prefix if slash else record.config.paper, record.dataset), []).append(record)
    candidates = (_build_grid(name, dataset, group) for (name, dataset), group in groups.items())
    return [grid for grid in candidates if len(grid.cells) >= MIN_GRID_RUNS and len(grid.factors) >= 2]


def _build_grid(name: str, dataset: str, group: list[RunRecord]) -> Grid:
    """Builds the grid of a group of finished runs; its factors are the settings that differ among them."""
    settings = [flatten(to_json({"architecture": r.config.architecture, "recipe": r.config.recipe})) for r in group]
    keys = list(dict.fromkeys(key for run_settings in settings for key in run_settings))
    labels = {key: [setting_text(key, run_settings.get(key)) for run_settings in settings] for key in keys}
    accuracies = [record.summary.test_accuracy for record in group if record.summary]
    varying = [key for key in keys if len(set(labels[key])) > 1]
    varying.sort(key=lambda key: -_main_effect(labels[key], accuracies))
    return Grid(
        name,
        dataset,
        {key: sorted(set(labels[key]), key=_numbers_first) for key in varying},
        [
            {key: labels[key][i] for key in varying} | {"accuracy": accuracies[i], "run": record.name}
            for i, record in enumerate(group)
        ],
    )


def _numbers_first(label: str) -> tuple[int, float, str]:
    """Sort key that puts numbers first, by value, and then everything else by name."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def _main_effect(labels: list[str], accuracies: list[float]) -> float:
    """Returns the range of the mean accuracies over a factor's values."""
    means = [statistics.mean(a for v, a in zip(labels, accuracies, strict=True) if v == label) for label in set(labels)]
    return max(means) - min(means)
