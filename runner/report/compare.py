"""Compares runs: one row of results per run, and one outcome per group of runs that differ only in their seed."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from runner.common.text import printable
from runner.config.recipe import Reported, differences, flatten
from runner.report.run_record import GateStatus, RunRecord
from runner.run.schema import FrontEnd, GateResult, Precision

MAX_CHANGES = 3  # most settings that a label lists; if there are more, it names only the first
NAMED_FIRST = ("lr", "epochs", "batch_size", "max_steps")
MAX_VALUE = 24  # maximum length of a setting's value in a label
SUMMARY_FIELDS = (
    "epochs", "steps", "test_accuracy", "test_loss", "test_top5", "test_calibration_error", "test_accuracy_augmented",
    "test_images", "validation_accuracy",
)  # fmt: skip


class ParityCell(msgspec.Struct, frozen=True):
    """The result of the parity gate for one ONNX file or engine; accuracy and top-1 agreement are in 0..1."""

    precision: Precision
    front_end: FrontEnd
    provider: str
    agreement: float
    accuracy: float
    passed: bool
    classes_predicted: int | None


class EngineCell(msgspec.Struct, frozen=True):
    """One TensorRT engine of a run."""

    precision: Precision
    backend: str
    version: str
    bytes: int
    target: str


class LatencyCell(msgspec.Struct, frozen=True):
    """One measured latency, with the gate's result for the file that it was measured on."""

    backend: str
    provider: str | None
    label: str
    precision: Precision
    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_second: float
    gate: GateResult | None
    calls: int | None
    warning: str | None


class Setup(msgspec.Struct, kw_only=True):
    """What was trained, on which dataset, and which accuracy the paper reports."""

    experiment: str
    paper: str
    dataset: str
    recipe_epochs: int
    reported: Reported | None
    teacher: str | None
    started_from: str | None
    overrides: dict[str, tuple[Any, Any]]

    @property
    def unchanged(self) -> bool:
        """Whether the experiment was trained as registered, with no changed settings, teacher or initial weights."""
        return not (self.overrides or self.teacher or self.started_from)


class RunRow(Setup, kw_only=True):
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

    Attributes:
        parameters: number of parameters; None if an earlier version did not record it.
        epochs: mean number of epochs; they differ where early stopping ended runs.
        incomplete: whether any of the runs ended after fewer epochs than the recipe has, unless by early stopping.
        label: the experiment and its changed settings, plus other settings if several outcomes would have this label.
        reproduced: the mean accuracy that corresponds to the reported one (see the function `reproduced`).
        difference: `reproduced` minus the reported accuracy; None if the two are not comparable.
    """

    parameters: int | None = None
    epochs: float
    incomplete: bool | None = None
    folders: list[str] | UnsetType = UNSET
    label: str | UnsetType = UNSET
    runs: int
    seeds: list[int]
    test_accuracy: float
    test_accuracy_std: float | None
    reproduced: float | None
    reproduced_std: float | None
    difference: float | None

    def __post_init__(self) -> None:
        if self.incomplete is None:  # a result of an earlier version, without early stopping
            self.incomplete = self.epochs < self.recipe_epochs - 1e-9

    @property
    def seed_count(self) -> str:
        """`1 seed (0)`, or `3 seeds`; `2 runs of 1 seed (0)` where runs share a seed."""
        seeds = f"1 seed ({self.seeds[0]})" if len(self.seeds) == 1 else f"{len(self.seeds)} seeds"
        return f"{self.runs} runs of {seeds}" if self.runs > len(self.seeds) else seeds


def run_row(record: RunRecord) -> RunRow:
    """Builds a run's row of the comparison.

    Raises:
        ValidationError: a latency row lacks a value.
    """
    config, summary = record.config, record.summary
    parity = record.parity.rows if record.parity else []
    measured = [latency for latency in record.latency.rows if latency.measured] if record.latency else []
    return RunRow(
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
    """Returns the accuracy of a run that corresponds to the one its paper reports, in 0..1.

    It is measured on the same split and after the same epoch, the last or the best. None if the paper reports no
    accuracy, the dataset is not all of CIFAR-10, or the run is unfinished or lacks the validation images that the paper
    used.
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
    """Returns the outcome of every group of finished runs that differ only in their seed, each with a label.

    If several groups would have the same label, their labels also list the settings that differ among them.
    """
    groups = group_by_training(records)
    by_label: dict[tuple[str, str], list[tuple[Outcome, dict[str, Any]]]] = {}
    all_outcomes = []
    for group in groups:
        outcome = outcome_of(group)
        label = _with_changes(outcome.experiment, ((name, value) for name, (_, value) in outcome.overrides.items()))
        by_label.setdefault((outcome.dataset, label), []).append((outcome, flatten(_training(group[0]))))
        all_outcomes.append(outcome)
    for (_, label), same_label in by_label.items():
        first_settings = same_label[0][1]
        differing = sorted({name for _, settings in same_label for name in differences(first_settings, settings)})
        labels: Counter[str] = Counter()
        for outcome, settings in same_label:
            outcome.label = _with_changes(label, ((name, settings.get(name)) for name in differing))
            labels[outcome.label] += 1
            if labels[outcome.label] > 1:  # settings are abbreviated
                outcome.label += f" #{labels[outcome.label]}"
    return all_outcomes


def _with_changes(label: str, settings: Iterable[tuple[str, Any]]) -> str:
    """Appends settings to a label in parentheses, if there are any."""
    text = format_settings(settings)
    return f"{label} ({text})" if text else label


def format_settings(settings: Iterable[tuple[str, Any]]) -> str:
    """Formats settings as `lr 0.01, epochs 2`; if there are many, only the first and the number of the others.

    `settings` are pairs of a dotted name and a value.
    """
    ordered = []
    for name, setting in settings:
        short = name.removesuffix(".kind").removesuffix(".factory").rpartition(".")[2]
        value = setting_text(name, setting)
        value = value if len(value) <= MAX_VALUE else f"{value[: MAX_VALUE - 1]}…"
        order = NAMED_FIRST.index(short) if short in NAMED_FIRST else len(NAMED_FIRST)
        ordered.append((order, f"{short} {value}"))
    texts = [text for _, text in sorted(ordered, key=lambda entry: entry[0])]
    return ", ".join(texts) if len(texts) <= MAX_CHANGES else f"{texts[0]}, +{len(texts) - 1}"


def setting_text(key: str, value: Any) -> str:
    """Formats a setting's value for a label or the axis of a heat map; shows a factory without its module."""
    if value is None:
        return "–"
    if key.endswith(".factory"):
        return str(value).rpartition(":")[2]
    return f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())


def setting_differences(records: list[RunRecord]) -> dict[str, list[Any]]:
    """Returns the settings in which runs differ, by dotted name: the value of each run, None where it has none."""
    first, *others = settings = [flatten(_configuration(record)) for record in records]
    names = sorted({name for other in others for name in differences(first, other)})
    return {name: [one.get(name) for one in settings] for name in names}


def _configuration(record: RunRecord) -> dict[str, Any]:
    """Returns what defines a training, its seed, and the software and hardware that trained it."""
    config = record.config
    names = ("seed", "device", "loader", "threads", "deterministic", "hardware", "versions", "git")
    dataset = {"name": config.dataset.name, "fingerprint": config.dataset.fingerprint}
    return _training(record) | {name: getattr(config, name) for name in names} | {"dataset": dataset}


def group_by_training(records: list[RunRecord]) -> list[list[RunRecord]]:
    """Groups finished runs by everything but the seed."""
    groups: dict[bytes, list[RunRecord]] = {}
    for record in records:
        if record.summary is not None:
            key = msgspec.json.encode(_training(record), order="deterministic")
            groups.setdefault(key, []).append(record)
    return list(groups.values())


def _training(record: RunRecord) -> dict[str, Any]:
    """Returns the settings and the dataset that define a training, without its seed."""
    config = record.config
    names = ("experiment", "architecture", "recipe", "max_steps", "teacher", "started_from", "world_size", "precision")
    return {name: getattr(config, name) for name in names} | {"dataset": config.dataset.fingerprint}


def outcome_of(group: list[RunRecord]) -> Outcome:
    """Computes the outcome of a group of finished runs that differ only in their seed."""
    rows = [run_row(record) for record in group]
    first = rows[0]
    summaries = [record.summary for record in group if record.summary]
    test_accuracies = _by_seed((row.seed, row.test_accuracy) for row in rows)
    reproductions = _by_seed((row.seed, row.reproduced) for row in rows)
    mean = statistics.mean(reproductions) if reproductions else None
    incomplete = any(record.shortened for record in group)
    comparable = first.unchanged and not incomplete
    difference = None
    if comparable and first.reported and mean is not None:
        difference = mean - first.reported.accuracy
    seeds = sorted({row.seed for row in rows})
    several = len(seeds) > 1  # runs of one seed have no deviation over seeds
    return Outcome(
        **{name: getattr(first, name) for name in Setup.__struct_fields__},
        parameters=first.parameters,
        epochs=statistics.mean(summary.epochs for summary in summaries),
        incomplete=incomplete,
        folders=[printable(record.run.folder) for record in group],
        runs=len(rows),
        seeds=seeds,
        test_accuracy=statistics.mean(test_accuracies),
        test_accuracy_std=_std(test_accuracies) if several else None,
        reproduced=mean,
        reproduced_std=_std(reproductions) if several else None,
        difference=difference,
    )


def _by_seed(figures: Iterable[tuple[int, float | None]]) -> list[float]:
    """Returns the mean figure of each seed, because copies of a run are not independent results."""
    by_seed: dict[int, list[float]] = {}
    for seed, figure in figures:
        if figure is not None:
            by_seed.setdefault(seed, []).append(figure)
    return [statistics.mean(values) for values in by_seed.values()]


def _std(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


class Overview(msgspec.Struct, frozen=True):
    """What stands out in a comparison; runs are given by their positions.

    Attributes:
        best: for each dataset, the finished run with the highest test accuracy; complete runs come before others.
        gate: finished runs by the result of the gate.
        incomplete: finished runs that ended after fewer epochs than their recipe has.
        unfinished: runs without a summary.
        one_class: finished runs of which an exported file predicts the same class for all images.
    """

    best: dict[str, int]
    gate: dict[GateStatus, list[int]]
    incomplete: list[int]
    unfinished: list[int]
    one_class: list[int]


def summarize_runs(records: Sequence[RunRecord]) -> Overview:
    """Finds the best run on each dataset, and the runs that have a problem."""
    finished = sorted(
        (-record.summary.test_accuracy, position) for position, record in enumerate(records) if record.summary
    )
    positions = [position for _, position in finished]
    positions.sort(key=lambda position: records[position].shortened)  # keeps the order by accuracy
    best: dict[str, int] = {}
    gate: dict[GateStatus, list[int]] = {}
    for position in positions:
        best.setdefault(records[position].dataset, position)
        gate.setdefault(records[position].gate, []).append(position)
    return Overview(
        best=dict(sorted(best.items())),
        gate=gate,
        incomplete=[position for position in positions if records[position].shortened],
        unfinished=[position for position, record in enumerate(records) if record.summary is None],
        one_class=[position for position in positions if records[position].predicts_one_class],
    )


def best_of_architectures(records: list[RunRecord]) -> list[int]:
    """Returns the position of the finished run with the highest test accuracy for every architecture and dataset."""
    best: dict[tuple[str, str], tuple[float, int]] = {}
    for position, record in enumerate(records):
        if record.summary is not None:
            key = (record.config.architecture.factory, record.dataset)
            entry = (record.summary.test_accuracy, position)
            best[key] = max(best.get(key, entry), entry)
    return sorted(position for _, position in best.values())


def onnx_agreement(record: RunRecord) -> float | None:
    """Returns the top-1 agreement of the fp32 ONNX file with the model in torch, in 0..1; None if not scored."""
    rows = record.parity.rows if record.parity else []
    wanted = "onnxruntime", "fp32", FrontEnd.NORMALIZED
    return next((row.agreement for row in rows if (row.backend, row.precision, row.front_end) == wanted), None)


def p50_ms(row: RunRow, backend: str, batch: int = 1, precision: str = "fp32") -> float | None:
    """Returns the median latency of a backend in milliseconds; None if it was not measured."""
    key = (backend, batch, precision)
    return next((cell.p50_ms for cell in row.latency if (cell.backend, cell.batch, cell.precision) == key), None)


class MachineRow(msgspec.Struct, frozen=True):
    """Median latencies in milliseconds of one file of a run on several machines; None where it was not measured."""

    run: str
    backend: str
    precision: Precision
    batch: int
    p50_ms: list[float | None]


def latencies_by_machine(records: Sequence[RunRecord]) -> tuple[list[str], list[MachineRow]]:
    """Returns the machines, and the latencies of each run on them side by side; none if there is only one machine.

    Copies of a run that were measured on several machines share a row: they have the same name and weights. A machine
    is its hardware with a number of threads and a version of torch; of several latencies there, the lowest counts.
    """
    found: dict[tuple[str, str, str, Precision, int], dict[str, float]] = {}
    weights: dict[str, set[str]] = {}
    for record in records:
        if record.latency:
            weights.setdefault(record.config.name, set()).add(record.latency.weights)
    for record in records:
        if record.latency:
            count = record.latency.threads
            threads = f", {count} thread{'s' if count > 1 else ''}" if count else ""
            machine = f"{record.latency.hardware}{threads}, torch {record.latency.versions.get('torch', 'unknown')}"
            name = record.config.name if len(weights[record.config.name]) == 1 else record.name
            for row in record.latency.rows:
                if row.p50_ms is not None and row.batch is not None:
                    # The library of an engine, but not its version, which may differ between machines.
                    library = (row.provider or "").partition(" ")[0] if row.backend == "engine" else ""
                    key = name, record.latency.weights, library or row.backend, row.precision, row.batch
                    figures = found.setdefault(key, {})
                    figures[machine] = min(row.p50_ms, figures.get(machine, row.p50_ms))
    machines = sorted({machine for figures in found.values() for machine in figures})
    if len(machines) < 2:
        return machines, []
    rows = [
        MachineRow(run, backend, precision, batch, [figures.get(machine) for machine in machines])
        for (run, _, backend, precision, batch), figures in found.items()
    ]
    return machines, rows


def best_gated(row: RunRow) -> LatencyCell | None:
    """Returns the lowest median latency at batch size 1 among files that passed the gate; None if there is none."""
    passed = [cell for cell in row.latency if cell.batch == 1 and cell.gate and cell.gate.passed]
    return min(passed, key=lambda cell: cell.p50_ms, default=None)
