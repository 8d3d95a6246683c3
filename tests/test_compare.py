"""The rows and outcomes of a comparison, of run folders that were written without training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as changed

from runner.commands.compare import results_of
from runner.config.recipe import Reported
from runner.report import collect, compare
from runner.report.run_record import RunRecord
from runner.run.folder import find_runs
from runner.run.schema import GateResult, MetricRow, Origin
from tests.support import many_runs


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    """A finished run on CIFAR-10 of two epochs, whose paper reports an accuracy."""
    many_runs.write(tmp_path, 1)
    ((record,), _) = collect.read_all(find_runs([tmp_path]))
    recipe = replace(record.config.recipe, epochs=2)
    record = replace(record, config=changed(record.config, recipe=recipe, reported=Reported(0.5, "test", "last", "x")))
    return with_summary(record, epochs=2.0, test_accuracy=0.625)


def with_config(record: RunRecord, **changes: Any) -> RunRecord:
    return replace(record, config=changed(record.config, **changes))


def with_summary(record: RunRecord, **changes: Any) -> RunRecord:
    return replace(record, summary=changed(record.summary, **changes))


def test_settings_differ_if_those_of_any_two_runs_do(record: RunRecord) -> None:
    """Also a setting that one of the runs lacks."""
    dataset, gpu = record.config.dataset, changed(record.config.hardware, gpus=["H100"])
    records = [
        record,
        with_config(record, seed=7),
        with_config(record, hardware=gpu, dataset=changed(dataset, name="x")),
    ]
    assert compare.setting_differences(records[:1]) == {}
    assert compare.setting_differences(records) == {
        "dataset.name": [dataset.name, dataset.name, "x"],
        "hardware.gpus": [None, None, ["H100"]],
        "seed": [record.config.seed, 7, record.config.seed],
    }


def test_a_row_has_what_the_files_have(record: RunRecord) -> None:
    row = compare.run_row(record)
    for name in compare.SUMMARY_FIELDS:
        assert getattr(row, name) == getattr(record.summary, name)
    for name in (
        "experiment",
        "paper",
        "seed",
        "precision",
        "world_size",
        "parameters",
        "macs",
        "reported",
        "overrides",
    ):
        assert getattr(row, name) == getattr(record.config, name)
    assert (row.name, row.dataset, row.recipe_epochs) == (record.config.name, "CIFAR-10", 2)
    assert (row.teacher, row.started_from, row.reproduced) == (None, None, 0.625)
    assert [cell.accuracy for cell in row.parity] == [one.accuracy for one in record.parity.rows]
    assert [cell.p50_ms for cell in row.latency] == [one.p50_ms for one in record.latency.rows]
    unmeasured = changed(record.latency.rows[0], p50_ms=None)
    latency = changed(record.latency, rows=[unmeasured, *record.latency.rows])
    assert compare.run_row(replace(record, latency=latency)).latency == row.latency
    empty = compare.run_row(replace(record, summary=None, parity=None, latency=None))
    assert (empty.epochs, empty.test_accuracy, empty.onnx_agreement) == (None, None, None)
    assert (empty.parity, empty.latency) == ([], [])
    origin = Origin(experiment="teacher", folder="x", checkpoint="y", sha256="z")
    row = compare.run_row(with_config(record, teacher=origin, started_from=changed(origin, experiment="start")))
    assert (row.teacher, row.started_from) == ("teacher", "start")


@pytest.mark.parametrize(
    ("on", "epoch", "best_test", "expected"),
    [
        ("test", "last", 0.7, 0.625), ("test", "best", 0.7, 0.7), ("test", "best validation", None, 0.6),
        ("validation", "last", 0.7, 0.2), ("validation", "best", 0.7, 0.3),
    ],
)  # fmt: skip
def test_the_reproduced_accuracy_is_of_the_reported_epoch(
    record: RunRecord, on: str, epoch: str, best_test: float | None, expected: float
) -> None:
    record = with_config(record, reported=Reported(0.5, on, epoch, "x"))
    record = with_summary(
        record, best_test_accuracy=best_test, test_accuracy_of_best_validation=0.6, validation_accuracy=0.2,
        best_validation_accuracy=0.3,
    )  # fmt: skip
    assert compare.reproduced(record) == expected
    for other in (replace(record, summary=None), with_config(record, reported=None)):
        assert compare.reproduced(other) is None
    assert compare.reproduced(with_config(record, dataset=changed(record.config.dataset, name="CIFAR-100"))) is None


def test_an_outcome_is_the_mean_over_seeds(record: RunRecord) -> None:
    """With a deviation over several seeds, and compared with the paper only if nothing was changed."""
    second = with_summary(with_config(record, seed=7), test_accuracy=0.375)
    again = with_config(record, run="again")
    (outcome,) = compare.outcomes([second, record])
    assert (outcome.seeds, outcome.runs, outcome.test_accuracy, outcome.reproduced) == ([0, 7], 2, 0.5, 0.5)
    assert outcome.test_accuracy_std == outcome.reproduced_std == pytest.approx(0.125 * 2**0.5)
    assert (outcome.difference, outcome.incomplete, outcome.unchanged) == (0.0, False, True)
    assert outcome.folders == [str(second.run.folder), str(record.run.folder)]
    assert outcome.label == record.config.experiment
    (outcome,) = compare.outcomes([second, record, again])  # a copy counts no more than the run
    assert (outcome.seeds, outcome.runs, outcome.test_accuracy) == ([0, 7], 3, 0.5)
    assert outcome.test_accuracy_std == pytest.approx(0.125 * 2**0.5)
    (outcome,) = compare.outcomes([record, again])
    assert (outcome.seeds, outcome.test_accuracy_std, outcome.reproduced_std) == ([0], None, None)
    assert (outcome.difference, outcome.seed_count) == (0.125, "2 runs of 1 seed (0)")
    (outcome,) = compare.outcomes([second, with_config(record, reported=None)])
    assert (outcome.reproduced_std, outcome.difference) == (None, -0.125)  # of the first run alone
    assert compare.outcomes([replace(record, summary=None)]) == []
    origin = Origin(experiment="teacher", folder="x", checkpoint="y", sha256="z")
    for changes in ({"teacher": origin}, {"started_from": origin}, {"overrides": {"recipe.batch_size": (128, 64)}}):
        (outcome,) = compare.outcomes([with_config(record, **changes)])
        assert (outcome.unchanged, outcome.reproduced, outcome.difference) == (False, 0.625, None)
    (outcome,) = compare.outcomes([with_config(record, reported=None)])
    assert (outcome.unchanged, outcome.reproduced, outcome.difference) == (True, None, None)
    for epochs, incomplete in ((1.0, True), (1.999, True), (2.0, False), (2 - 1e-12, False), (3.0, False)):
        (outcome,) = compare.outcomes([with_summary(record, epochs=epochs)])
        assert (outcome.incomplete, outcome.difference is None) == (incomplete, incomplete)


def test_outcomes_with_the_same_label_name_what_differs(record: RunRecord) -> None:
    """Only among outcomes on one dataset; several settings are in the order of their names."""
    other = with_config(record, precision="bf16", world_size=4)
    elsewhere = with_config(
        record, dataset=changed(record.config.dataset, name="own", fingerprint="f"), precision="bf16"
    )
    labels = [outcome.label for outcome in compare.outcomes([record, other, elsewhere])]
    name = record.config.experiment
    assert labels == [f"{name} (precision fp32, world_size 1)", f"{name} (precision bf16, world_size 4)", name]
    overridden = with_config(record, overrides={"recipe.epochs": (1, 2)})
    assert compare.outcomes([overridden])[0].label == f"{name} (epochs 2)"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"a": 1, "b": 2, "x.epochs": 3}, "epochs 3, a 1, b 2"),
        ({"a": 1, "b": 2, "c": 3, "x.batch_size": 4, "max_steps": 5}, "batch_size 4, +4"),
        ({"a": "x" * 24, "b": "y" * 25}, f"a {'x' * 24}, b {'y' * 23}…"),
        ({"a": "one  two\nthree", "b": 0.25, "c": 1e-9}, "a one two three, b 0.25, c 1e-09"),
    ],
)
def test_a_label_has_at_most_three_settings(settings: dict[str, Any], text: str) -> None:
    assert compare.format_settings(settings.items()) == text


def test_the_best_run_of_each_architecture_and_dataset(record: RunRecord) -> None:
    dataset = changed(record.config.dataset, name="own")
    architecture = replace(record.config.architecture, factory="a:B")
    runs = [
        with_summary(record, test_accuracy=0.1), with_summary(record, test_accuracy=0.3),
        with_summary(record, test_accuracy=0.2), replace(record, summary=None),
        with_summary(with_config(record, dataset=dataset), test_accuracy=0.0),
        with_config(record, architecture=architecture),
    ]  # fmt: skip
    assert compare.best_of_architectures(runs) == [1, 4, 5]
    assert compare.best_of_architectures(runs[::-1]) == [0, 1, 4]


def test_the_agreement_of_a_run_is_that_of_its_fp32_file(record: RunRecord) -> None:
    fp32 = changed(record.parity.rows[0], precision="fp32", front_end="normalized", agreement=0.5)
    others = [
        changed(fp32, precision="fp16", agreement=0.1), changed(fp32, front_end="raw", agreement=0.2),
        changed(fp32, backend="aotinductor", onnx="deploy/model.fp32.cpu.pt2", agreement=0.3),
    ]  # fmt: skip
    for rows, expected in (([*others, fp32], 0.5), (others, None), ([], None)):
        assert compare.onnx_agreement(replace(record, parity=changed(record.parity, rows=rows))) == expected


def test_results_of_a_run_that_stopped_early_are_of_one_epoch(record: RunRecord) -> None:
    """Not the test accuracy of the best epoch beside the validation accuracy of the last."""
    rows = [MetricRow(global_step=1, epoch=1, validation_accuracy=0.7), MetricRow(global_step=2, epoch=2, lr=0.1)]
    rows[1] = changed(rows[1], validation_accuracy=0.3)
    ended = with_summary(record, test_accuracy=0.6, validation_accuracy=0.7, stopped_early=True)
    assert results_of(replace(ended, metrics=rows))["validation accuracy"] == 0.7
    assert results_of(replace(record, summary=None, metrics=rows))["validation accuracy"] == 0.3


def test_the_best_latency_is_of_single_images_and_of_files_that_passed(record: RunRecord) -> None:
    passed = GateResult(accuracy_change=0.0, agreement=1.0, passed=True)
    cell = changed(compare.run_row(record).latency[0], backend="eager", precision="fp32", batch=1, gate=passed)
    times = (
        (4.0, {}), (3.0, {"backend": "onnxruntime"}), (2.0, {"batch": 2}), (1.0, {"gate": None}),
        (0.5, {"gate": changed(passed, passed=False)}), (0.2, {"batch": 0}), (6.0, {"precision": "fp16"}),
    )  # fmt: skip
    row = changed(compare.run_row(record), latency=[changed(cell, p50_ms=time, **changes) for time, changes in times])
    assert compare.best_gated(row).p50_ms == 3.0
    assert compare.best_gated(changed(row, latency=[])) is None
    assert compare.p50_ms(row, "eager") == 4.0
    assert compare.p50_ms(row, "eager", 2) == 2.0
    assert compare.p50_ms(row, "eager", 1, "fp16") == 6.0
    assert compare.p50_ms(row, "engine") is None


def test_an_outcome_of_an_earlier_version_is_incomplete_by_its_epochs(record: RunRecord) -> None:
    (outcome,) = compare.outcomes([record])
    for epochs, incomplete in ((1.999, True), (2 - 1e-12, False), (2.0, False), (3.0, False)):
        assert changed(outcome, epochs=epochs, incomplete=None).incomplete is incomplete
        assert changed(outcome, epochs=epochs, incomplete=True).incomplete is True  # such as by early stopping


def test_equal_labels_are_numbered(record: RunRecord) -> None:
    """Settings in labels are abbreviated, here to the same text."""
    architecture = record.config.architecture
    arguments = [{"a": "x" * 24 + end} for end in "abc"]
    runs = [with_config(record, architecture=replace(architecture, arguments=one)) for one in arguments]
    first, second, third = (outcome.label for outcome in compare.outcomes(runs))
    assert (second, third) == (f"{first} #2", f"{first} #3")


def test_the_summary_of_runs(record: RunRecord) -> None:
    """A run that completed its recipe comes before one that did not, whatever their accuracies."""
    dataset = changed(record.config.dataset, name="own")
    runs = [
        with_summary(record, test_accuracy=0.2), replace(record, summary=None), with_summary(record, test_accuracy=0.3),
        with_summary(record, test_accuracy=0.9, epochs=1.0), with_config(record, dataset=dataset),
    ]  # fmt: skip
    overview = compare.summarize_runs(runs)
    assert overview.best == {record.dataset: 2, "own": 4}
    assert (overview.incomplete, overview.unfinished, overview.one_class) == ([3], [1], [])
    assert overview.gate == {"passed": [4, 2, 0, 3]}
    assert compare.summarize_runs(runs[3:4]).best == {record.dataset: 0}


def test_latencies_of_several_machines(record: RunRecord) -> None:
    """Copies of a run share rows; a run of the same name with other weights has its own, by its distinct name."""

    def measured(cpu: str, threads: int | None, weights: str, *rows: dict[str, Any], root: str = "") -> RunRecord:
        first = record.latency.rows[0]
        hardware = changed(record.latency.hardware, cpu=cpu)
        plain = {"backend": "eager", "precision": "fp32", "batch": 1, "provider": None, "p50_ms": 1.0}
        report = changed(
            record.latency, hardware=hardware, threads=threads, weights=weights, versions={"torch": "2.15"},
            rows=[changed(first, **(plain | row)) for row in rows],
        )  # fmt: skip
        return replace(record, latency=report, root=root)

    engine = {"backend": "engine", "provider": "tensorrt 11.4 fp32"}
    one = measured("A", 1, "w", {"p50_ms": 3.0}, {"p50_ms": 2.0}, engine | {"p50_ms": 4.0}, {"p50_ms": None})
    two = measured(
        "B", 2, "w", {"p50_ms": 5.0}, engine | {"provider": "tensorrt 12.0 fp32"}, {"batch": None}, root="copy"
    )
    machines, rows = compare.latencies_by_machine([one, two, replace(record, latency=None)])
    assert [machine.partition(" of ")[2] for machine in machines] == [
        "A, 1 thread, torch 2.15",
        "B, 2 threads, torch 2.15",
    ]
    name = record.config.name
    assert [(row.run, row.backend, row.precision, row.batch, row.p50_ms) for row in rows] == [
        (name, "eager", "fp32", 1, [2.0, 5.0]), (name, "tensorrt", "fp32", 1, [4.0, 1.0]),
    ]  # fmt: skip
    other = measured("B", None, "v", {}, root="elsewhere")
    machines, rows = compare.latencies_by_machine([replace(one, root="here"), other])
    assert machines[1].endswith("B, torch 2.15")
    assert [(row.run, row.p50_ms) for row in rows if row.backend == "eager"] == [
        (f"{name} (here)", [2.0, None]), (f"{name} (elsewhere)", [None, 1.0]),
    ]  # fmt: skip
    assert compare.latencies_by_machine([one])[1] == []
    assert compare.latencies_by_machine([]) == ([], [])
