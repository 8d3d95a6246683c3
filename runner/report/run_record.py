"""The contents of a run folder, as reports use them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from runner.common.text import printable
from runner.run.folder import Run, State
from runner.run.schema import EngineSidecar, LatencyReport, MetricRow, Mistake, ParityReport, RunConfig, Summary

GateStatus = Literal["passed", "failed", "not scored"]


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run folder; None, or an empty list, for a file that does not exist."""

    run: Run
    config: RunConfig
    summary: Summary | None
    metrics: list[MetricRow]
    parity: ParityReport | None
    engines: list[EngineSidecar]
    latency: LatencyReport | None
    mistakes: list[Mistake]
    state: State
    reason: str
    """Why the last attempt ended early; empty otherwise."""

    root: str = ""
    """Folder that tells this run apart from others with the same name; empty if the name is unique."""
    fingerprint: str = ""
    """Start of the dataset's fingerprint if several datasets have the same name; empty otherwise."""

    @property
    def name(self) -> str:
        """`experiment/run`, and the root if needed: labels the run in tables and charts."""
        return f"{self.config.name} ({self.root})" if self.root else self.config.name

    @property
    def dataset(self) -> str:
        """Name of the dataset, and its fingerprint if needed; shown with every figure."""
        name = self.config.dataset.name
        return f"{name} ({self.fingerprint})" if self.fingerprint else name

    @property
    def recipe_epochs(self) -> int:
        """Number of epochs in the registered recipe, before any override.

        Raises:
            ValidationError: the value in run.json is not an integer.
        """
        registered, _ = self.config.overrides.get("recipe.epochs", (self.config.recipe.epochs, None))
        return msgspec.convert(registered, int)

    @property
    def shortened(self) -> bool:
        """Whether the run finished after fewer epochs than its recipe has, unless by early stopping."""
        summary = self.summary
        if summary is None:
            return False
        trained = self.config.recipe.epochs if summary.stopped_early else summary.epochs
        return trained < self.recipe_epochs - 1e-9

    @property
    def gate(self) -> GateStatus:
        """The result of the gate: passed if every file that was scored is within its limit."""
        if self.parity is None or not self.parity.rows:
            return "not scored"
        return "passed" if all(row.passed for row in self.parity.rows) else "failed"

    @property
    def failed_precisions(self) -> list[str]:
        """The precisions that failed the gate."""
        rows = self.parity.rows if self.parity else []
        return list(dict.fromkeys(row.precision for row in rows if not row.passed))

    @property
    def predicts_one_class(self) -> bool:
        """Whether one of its scored files predicts the same class for all images."""
        return self.parity is not None and any(row.classes_predicted == 1 for row in self.parity.rows)


@dataclass(frozen=True)
class Unreadable:
    """A run folder that cannot be read, and the reason in one line."""

    folder: str
    reason: str


def disambiguate_names(records: list[RunRecord]) -> list[RunRecord]:
    """Adds roots and fingerprints to runs and datasets whose names would otherwise be the same."""
    folders: dict[str, list[Path]] = {}
    fingerprints: dict[str, set[str]] = {}
    for record in records:
        folders.setdefault(record.config.name, []).append(record.run.folder.resolve())
        fingerprints.setdefault(record.config.dataset.name, set()).add(record.config.dataset.fingerprint)
    apart = []
    for record in records:
        dataset = record.config.dataset
        fingerprint = dataset.fingerprint[:8] if len(fingerprints[dataset.name]) > 1 else ""
        apart.append(replace(record, root=_root(record, folders[record.config.name]), fingerprint=fingerprint))
    return apart


def _root(record: RunRecord, folders: Sequence[Path]) -> str:
    """Returns the part of a run's path that differs from those of other runs with its name; empty if there are none."""
    if len(folders) == 1:
        return ""
    folder = record.run.folder.resolve()
    relative = printable(folder.relative_to(os.path.commonpath(folders)))
    return relative.removesuffix(record.config.name).rstrip("/") or printable(folder)


def format_counts(records: list[RunRecord], unreadable: Sequence[Unreadable] = ()) -> str:
    """Summarizes how many runs there are: `5 runs compared, 1 unfinished, 2 not read`."""
    finished = sum(record.summary is not None for record in records)
    parts = [f"{finished} run{'s' if finished != 1 else ''} compared"]
    if unfinished := len(records) - finished:
        parts.append(f"{unfinished} unfinished")
    if unreadable:
        parts.append(f"{len(unreadable)} not read")
    return ", ".join(parts)
