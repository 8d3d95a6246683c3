"""Reads run folders into the rows and groups that a report shows."""

import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from runner.common.errors import UserError
from runner.config.recipe import Reported, differences, flatten, to_json
from runner.run.folder import Run, State
from runner.run.metrics import read_metrics
from runner.run.schema import (
    EngineSidecar,
    Gate,
    LatencyReport,
    MetricRow,
    Mistake,
    ParityReport,
    Precision,
    RunConfig,
    Summary,
)

GateResult = Literal["passed", "failed", "not scored"]
MAX_CHANGES = 3  # settings that a label names; of more, the first alone
NAMED_FIRST = ("lr", "epochs", "batch_size", "max_steps")
MAX_VALUE = 24  # characters of a setting's value in a label
MIN_GRID_RUNS = 4  # a heat map of fewer runs shows nothing that the table does not
SUMMARY_FIELDS = (
    "epochs", "steps", "test_accuracy", "test_loss", "test_top5", "test_calibration_error", "test_accuracy_augmented",
    "test_images", "validation_accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """Everything that a run folder holds; None for a file that does not exist."""

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
    """Where it was found, if runs of several roots have its name; else empty."""
    fingerprint: str = ""
    """Of its dataset, if several datasets have the same name; else empty."""

    @property
    def name(self) -> str:
        """`experiment/run`, and its root if needed: the label of curves."""
        return f"{self.config.name} ({self.root})" if self.root else self.config.name

    @property
    def dataset(self) -> str:
        """Name of the dataset, and its fingerprint if needed; shown with every figure."""
        name = self.config.dataset.name
        return f"{name} ({self.fingerprint})" if self.fingerprint else name

    @property
    def recipe_epochs(self) -> int:
        """Epochs of the registered recipe, whatever this run changed.

        Raises:
            ValidationError: run.json has no number there.
        """
        registered, _ = self.config.overrides.get("recipe.epochs", (self.config.recipe.epochs, None))
        return msgspec.convert(registered, int)

    @property
    def incomplete(self) -> bool:
        """Whether it is finished, but after fewer epochs than its recipe has."""
        return self.summary is not None and self.summary.epochs < self.recipe_epochs - 1e-9

    @property
    def gate(self) -> GateResult:
        """Whether every file of it that was scored is within its limit."""
        if self.parity is None or not self.parity.rows:
            return "not scored"
        return "passed" if all(row.passed for row in self.parity.rows) else "failed"

    @property
    def failed_files(self) -> list[str]:
        """The precisions that failed the gate."""
        rows = self.parity.rows if self.parity else []
        return list(dict.fromkeys(row.precision for row in rows if not row.passed))

    @property
    def predicts_one_class(self) -> bool:
        """Whether a file of it predicts the same class for all images."""
        return self.parity is not None and any(row.classes_predicted == 1 for row in self.parity.rows)


@dataclass(frozen=True)
class Unreadable:
    """A run folder with a damaged file, and the error in one line."""

    folder: str
    reason: str


class ParityCell(msgspec.Struct, frozen=True):
    """The parity of one ONNX file or engine; accuracy and top-1 agreement in 0..1."""

    precision: Precision
    front_end: str
    provider: str
    agreement: float
    accuracy: float
    passed: bool
    classes_predicted: int | None


class EngineCell(msgspec.Struct, frozen=True):
    """One engine."""

    precision: Precision
    backend: str
    version: str
    bytes: int
    target: str


class LatencyCell(msgspec.Struct, frozen=True):
    """One measured latency, with the parity of the file it was measured on."""

    backend: str
    precision: Precision
    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_second: float
    gate: Gate | None
    calls: int | None
    warning: str | None


class Setup(msgspec.Struct, kw_only=True):
    """What was trained, on which dataset, and the accuracy that the paper reports."""

    experiment: str
    paper: str
    dataset: str
    recipe_epochs: int
    reported: Reported | None
    teacher: str | None
    started_from: str | None
    overrides: dict[str, tuple[Any, Any]]


class Row(Setup, kw_only=True):
    """One run in the comparison, as `runner report --json` prints it; accuracies in 0..1, losses in nats."""

    name: str
    seed: int
    precision: str
    world_size: int
    parameters: int | None
    macs: int | None
    epochs: float | None
    steps: int | None
    test_accuracy: float | None
    test_loss: float | None
    test_top5: float | None
    test_calibration_error: float | None
    test_accuracy_augmented: float | None
    test_images: int | None
    validation_accuracy: float | None
    reproduced: float | None
    onnx_agreement: float | None
    parity: list[ParityCell]
    engines: list[EngineCell]
    latency: list[LatencyCell]


class Outcome(Setup, kw_only=True):
    """Finished runs that differ only in their seed: mean accuracies in 0..1, with standard deviations (n - 1).

    `difference` is `reproduced` minus the reported accuracy; None where the two are not comparable. `label` is the
    experiment with what was changed, and with what else differs from those of the same label.
    """

    epochs: float
    folders: list[str] | UnsetType = UNSET
    label: str | UnsetType = UNSET
    runs: int
    seeds: list[int]
    test_accuracy: float
    test_accuracy_std: float | None
    reproduced: float | None
    reproduced_std: float | None
    difference: float | None

    @property
    def incomplete(self) -> bool:
        """Whether the runs ended after fewer epochs than their recipe has."""
        return self.epochs < self.recipe_epochs - 1e-9

    @property
    def seed_count(self) -> str:
        """`1 seed (0)`, or `3 seeds`; `2 runs of 1 seed (0)` where runs share a seed."""
        seeds = f"1 seed ({self.seeds[0]})" if len(self.seeds) == 1 else f"{len(self.seeds)} seeds"
        return f"{self.runs} runs of {seeds}" if self.runs > len(self.seeds) else seeds


class Grid(msgspec.Struct, frozen=True):
    """Runs that differ in several settings, for heat maps of their accuracy.

    Attributes:
        name: of the grid or paper.
        dataset: its name.
        factors: the values of each setting by its dotted name; the setting with the largest effect comes first.
        cells: for each run the value of every factor, its `accuracy` in 0..1, and its name as `run`.
    """

    name: str
    dataset: str
    factors: dict[str, list[str]]
    cells: list[dict[str, Any]]


PICTURES = ("samples.png", "mistakes.png")  # of figures/, which the page embeds
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_all(runs: list[Run]) -> tuple[list[RunRecord], list[Unreadable]]:
    """Reads every run folder; returns the damaged ones apart, so that they do not hide the others."""
    records, unreadable = [], []
    for run in runs:
        try:
            records.append(read(run))
        except UserError as error:
            reason = str(error).removeprefix(f"{run.folder}{os.sep}").removeprefix(f"{run.folder}: ")
            reason = " ".join(reason.split())
            unreadable.append(Unreadable(printable(run.folder), printable(reason)))
    return tell_apart(records), unreadable


def read(run: Run) -> RunRecord:
    """Reads one run folder, finished or not.

    Raises:
        UserError: a file in it is damaged, or links to one outside.
    """
    try:
        run.check_links()
        state = run.state()
        ending = run.read_ending() if state in ("stopped", "failed") else None
        record = RunRecord(
            run=run,
            config=run.config(),
            summary=run.read_summary(),
            metrics=read_metrics(run),
            parity=run.read_parity(),
            engines=run.read_engines(),
            latency=run.read_latency(),
            mistakes=run.read_mistakes(),
            state=state,
            reason=ending.reason if ending else "",
        )
        row(record)  # raises if a value cannot be shown
        for name in PICTURES:
            _check_png(run.figures / name)
    except (OSError, msgspec.ValidationError) as error:
        raise UserError(f"{run.folder}: damaged ({error}); restore or remove it") from None
    _check_classes(record)
    return record


def _check_png(path: Path) -> None:
    """Raises UserError if a file that exists is not a PNG file."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
                raise UserError(f"{path}: expected a PNG file; remove it")


def _check_classes(record: RunRecord) -> None:
    """Raises UserError if the confusion matrix or a mistake does not fit the classes of the dataset."""
    run, count = record.run, len(record.config.dataset.classes)
    if record.summary is not None:
        rows = record.summary.confusion
        if {len(rows), *map(len, rows)} != {count}:
            raise UserError(f"{run.summary}: confusion: expected {count} × {count} counts; restore or remove it")
    highest = max((max(mistake.label, mistake.predicted) for mistake in record.mistakes), default=-1)
    if highest >= count:
        raise UserError(f"{run.mistakes}: expected one of {count} classes, found {highest}; restore or remove it")


def printable(value: Path | str) -> str:
    """Text that can be encoded: names of files need not be Unicode."""
    return str(value).encode(errors="backslashreplace").decode()


def tell_apart(records: list[RunRecord]) -> list[RunRecord]:
    """Adds roots and fingerprints to the names of runs and datasets that would be the same without."""
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
    """What differs in the path of a run from those of the runs with its name; empty if there are none."""
    if len(folders) == 1:
        return ""
    folder = record.run.folder.resolve()
    relative = printable(folder.relative_to(os.path.commonpath(folders)))
    return relative.removesuffix(record.config.name).rstrip("/") or printable(folder)


def row(record: RunRecord) -> Row:
    """A run's row of the comparison.

    Raises:
        ValidationError: a latency lacks a figure.
    """
    config, summary = record.config, record.summary
    parity = record.parity.rows if record.parity else []
    measured = [latency for latency in record.latency.rows if latency.measured] if record.latency else []
    return Row(
        **{name: getattr(summary, name, None) for name in SUMMARY_FIELDS},
        name=record.name,
        experiment=config.experiment,
        paper=config.paper,
        dataset=record.dataset,
        recipe_epochs=record.recipe_epochs,
        reproduced=reproduced(record),
        reported=config.reported,
        overrides=config.overrides,
        teacher=config.teacher.experiment if config.teacher else None,
        started_from=config.started_from.experiment if config.started_from else None,
        seed=config.seed,
        precision=config.precision,
        world_size=config.world_size,
        parameters=config.parameters,
        macs=config.macs,
        parity=msgspec.convert(parity, list[ParityCell], from_attributes=True),
        onnx_agreement=onnx_agreement(record),
        engines=msgspec.convert(record.engines, list[EngineCell], from_attributes=True),
        latency=msgspec.convert(measured, list[LatencyCell], from_attributes=True),
    )


def reproduced(record: RunRecord) -> float | None:
    """The accuracy that corresponds to the paper's: on the same split, of the same epoch, in 0..1.

    None if the paper reports none, the dataset is not all of CIFAR-10, the run is unfinished, or it held out no
    validation images.
    """
    reported, summary = record.config.reported, record.summary
    if reported is None or summary is None or not record.config.dataset.is_cifar10:
        return None
    best = "best" in reported.epoch
    if reported.on == "validation":
        return summary.best_validation_accuracy if best else summary.validation_accuracy
    if not best:
        return summary.test_accuracy
    if summary.best_test_accuracy is not None:
        return summary.best_test_accuracy
    return summary.test_accuracy_of_best_validation  # the best epoch was chosen on the validation images


def outcomes(records: list[RunRecord]) -> list[Outcome]:
    """The outcome of every group of finished runs that differ only in their seed, each with its label."""
    groups = group_by_training(records)
    labeled = [(group, outcome(group)) for group in groups]
    same: dict[tuple[str, str], list[tuple[list[RunRecord], Outcome]]] = {}
    for group, one in labeled:
        made = changes((name, value) for name, (_, value) in one.overrides.items())
        one.label = f"{one.experiment} ({made})" if made else one.experiment
        same.setdefault((one.dataset, one.label), []).append((group, one))
    for (_, label), alike in same.items():
        settings = [flatten(_training(group[0])) for group, _ in alike]
        names = {name for other in settings for name in differences(settings[0], other)}
        for (_, one), values in zip(alike, settings, strict=True):
            made = changes((name, values.get(name)) for name in sorted(names))
            one.label = f"{label} ({made})" if made else label
    return [one for _, one in labeled]


def changes(settings: Iterable[tuple[str, Any]]) -> str:
    """Settings by dotted name as `lr 0.01, epochs 2`; of many the first, and the number of the others."""
    ordered = []
    for name, setting in settings:
        short = name.removesuffix(".kind").removesuffix(".factory").rpartition(".")[2]
        value = _label(name, setting)
        value = value if len(value) <= MAX_VALUE else f"{value[: MAX_VALUE - 1]}…"
        order = NAMED_FIRST.index(short) if short in NAMED_FIRST else len(NAMED_FIRST)
        ordered.append((order, f"{short} {value}"))
    texts = [text for _, text in sorted(ordered, key=lambda entry: entry[0])]
    return ", ".join(texts) if len(texts) <= MAX_CHANGES else f"{texts[0]}, +{len(texts) - 1}"


def group_by_training(records: list[RunRecord]) -> list[list[RunRecord]]:
    """Finished runs, grouped by everything but the seed."""
    groups: dict[bytes, list[RunRecord]] = {}
    for record in records:
        if record.summary is not None:
            key = msgspec.json.encode(_training(record), order="deterministic")
            groups.setdefault(key, []).append(record)
    return list(groups.values())


def _training(record: RunRecord) -> dict[str, Any]:
    """All that is the same in the seeds of one training."""
    config = record.config
    names = ("experiment", "architecture", "recipe", "max_steps", "teacher", "started_from", "world_size", "precision")
    return {name: getattr(config, name) for name in names} | {"dataset": config.dataset.fingerprint}


def outcome(group: list[RunRecord]) -> Outcome:
    """The outcome of finished runs that differ only in their seed."""
    rows = [row(record) for record in group]
    first = rows[0]
    summaries = [record.summary for record in group if record.summary]
    test_accuracies = [summary.test_accuracy for summary in summaries]
    reproductions = [row.reproduced for row in rows if row.reproduced is not None]
    mean = statistics.mean(reproductions) if reproductions else None
    unchanged = not (first.teacher or first.started_from or first.overrides)
    difference = None
    if first.reported and mean is not None and not group[0].incomplete and unchanged:
        difference = mean - first.reported.accuracy
    seeds = sorted({row.seed for row in rows})
    several = len(seeds) > 1  # runs of one seed have no deviation over seeds
    return Outcome(
        **{name: getattr(first, name) for name in Setup.__struct_fields__},
        epochs=summaries[0].epochs,
        folders=[printable(record.run.folder) for record in group],
        runs=len(rows),
        seeds=seeds,
        test_accuracy=statistics.mean(test_accuracies),
        test_accuracy_std=_std(test_accuracies) if several else None,
        reproduced=mean,
        reproduced_std=_std(reproductions) if several else None,
        difference=difference,
    )


def _std(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def best_of_architectures(records: list[RunRecord]) -> list[int]:
    """For every architecture and dataset, the position of the finished run with the highest test accuracy."""
    best: dict[tuple[str, str], tuple[float, int]] = {}
    for position, record in enumerate(records):
        if record.summary is not None:
            key = (record.config.architecture.factory, record.dataset)
            best[key] = max(best.get(key, (-1.0, 0)), (record.summary.test_accuracy, position))
    return sorted(position for _, position in best.values())


def grids(records: list[RunRecord]) -> list[Grid]:
    """Finished runs of one grid or paper that differ in two or more settings."""
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        if record.summary is not None:
            prefix, slash, _ = record.config.experiment.partition("/")
            groups.setdefault((prefix if slash else record.config.paper, record.dataset), []).append(record)
    candidates = (_grid(name, dataset, group) for (name, dataset), group in groups.items())
    return [grid for grid in candidates if len(grid.cells) >= MIN_GRID_RUNS and len(grid.factors) >= 2]


def _grid(name: str, dataset: str, group: list[RunRecord]) -> Grid:
    """The grid of finished runs; its factors are the settings that are not the same in all of them."""
    settings = [flatten(to_json({"architecture": r.config.architecture, "recipe": r.config.recipe})) for r in group]
    keys = list(dict.fromkeys(key for run_settings in settings for key in run_settings))
    labels = {key: [_label(key, run_settings.get(key)) for run_settings in settings] for key in keys}
    accuracies = [record.summary.test_accuracy for record in group if record.summary]
    varying = [key for key in keys if len(set(labels[key])) > 1]
    varying.sort(key=lambda key: -_effect(labels[key], accuracies))
    return Grid(
        name,
        dataset,
        {key: sorted(set(labels[key]), key=_numbers_first) for key in varying},
        [
            {key: labels[key][i] for key in varying} | {"accuracy": accuracies[i], "run": record.name}
            for i, record in enumerate(group)
        ],
    )


def _label(key: str, value: Any) -> str:
    """A setting's value on the axis of a heat map; a factory without its module."""
    if value is None:
        return "–"
    if key.endswith(".factory"):
        return str(value).rpartition(":")[2]
    return f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())


def _numbers_first(label: str) -> tuple[int, float, str]:
    """A sort key: numbers by value, then everything else by name."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def _effect(labels: list[str], accuracies: list[float]) -> float:
    """The range of the mean accuracies over a factor's values."""
    means = [statistics.mean(a for v, a in zip(labels, accuracies, strict=True) if v == label) for label in set(labels)]
    return max(means) - min(means)


def onnx_agreement(record: RunRecord) -> float | None:
    """Top-1 agreement of the fp32 ONNX file with the model in torch, in 0..1; None if it was not scored."""
    rows = record.parity.rows if record.parity else []
    return next((r.agreement for r in rows if (r.precision, r.front_end) == ("fp32", "normalised")), None)


def p50_ms(row: Row, backend: str, batch: int = 1, precision: str = "fp32") -> float | None:
    """The median latency of a backend in milliseconds; None if it was not measured."""
    key = (backend, batch, precision)
    return next((cell.p50_ms for cell in row.latency if (cell.backend, cell.batch, cell.precision) == key), None)


def best_gated(row: Row) -> LatencyCell | None:
    """The lowest median latency at batch 1 of a file that passed the gate."""
    passed = [cell for cell in row.latency if cell.batch == 1 and cell.gate and cell.gate.passed]
    return min(passed, key=lambda cell: cell.p50_ms, default=None)


def counts(records: list[RunRecord], unreadable: Sequence[Unreadable] = ()) -> str:
    """`5 runs compared, 1 unfinished, 2 not read`."""
    finished = sum(record.summary is not None for record in records)
    parts = [f"{finished} run{'s' if finished != 1 else ''} compared"]
    if unfinished := len(records) - finished:
        parts.append(f"{unfinished} unfinished")
    if unreadable:
        parts.append(f"{len(unreadable)} not read")
    return ", ".join(parts)
