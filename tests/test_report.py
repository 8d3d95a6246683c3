"""`runner report`: the page, Markdown and the W&B report."""

import ast
import contextlib
import json
import math
import os
import re
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runner import cli
from runner.common.errors import UserError
from runner.common.files import write_json
from runner.config.recipe import Reported
from runner.report import collect, compare, figures, markdown, page, searches, wandb_report
from runner.report.grids import find_grids
from runner.report.run_record import RunRecord, Unreadable, disambiguate_names
from runner.run.folder import Run, find_runs
from runner.run.schema import GateResult
from runner.search.study import Definition, Study, StudyTrial
from tests.support import many_runs
from tests.support.processes import ROOT, python, runner, wait_until


@pytest.fixture(scope="module")
def runs(deployed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: one deployed, one of a paper's experiment cut short on synthetic data, one unfinished."""
    folder = tmp_path_factory.mktemp("compared")
    shutil.copytree(deployed_run, folder / "tiny" / "seed-0")
    other = folder / "podeti-alexnet" / "seed-1"
    shutil.copytree(deployed_run, other, ignore=shutil.ignore_patterns("deploy"))
    config = Run(other).config()
    changed = msgspec.structs.replace(
        config,
        experiment="podeti-alexnet",
        run="seed-1",
        reported=Reported(0.74, "validation", "best", "podeti.txt"),
        parameters=23_272_266,
        dataset=msgspec.structs.replace(config.dataset, name="synthetic-10"),
        overrides={"recipe.epochs": (10, 2), "recipe.x": (1, "</script><script>alert(1)</script>")},
    )
    write_json(Run(other).run_json, changed)
    unfinished = folder / "tiny" / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text((folder / "tiny/seed-0/run.json").read_text().replace('"seed-0"', '"half"'))
    (unfinished / "metrics.jsonl").write_text('{"global_step": 1, "epoch": 0.1, "train/loss": 2.0}\n{"global_st')
    write_searches(folder)
    return folder


def write_searches(runs: Path) -> None:
    """Two searches: one with rungs and a trial of each state, one of two objectives."""
    for name, objectives in (("<b>halving", ("accuracy",)), ("front", ("accuracy", "latency"))):
        halving = len(objectives) == 1
        definition = Definition(
            names=("tiny",), space={"--recipe.optimizer.lr": "log:0.001:0.1", "--recipe.ema": "0|0.9"}, options=(),
            objectives=objectives, sampler="tpe", seed=0, pruner="asha" if halving else "none",
            rungs=(1, 3, 9) if halving else (9,), reduction=3, train_seed=0, ranks=1, dataset="0123",
        )  # fmt: skip
        study = Study(runs / "searches" / name)
        with study.locked():
            study.define(definition)
            for number in range(9):
                lr, ema = 0.001 * (number + 1), "0.9" if number % 2 else "0"
                values = {"--recipe.optimizer.lr": lr, "--recipe.ema": ema}
                words = {"--recipe.optimizer.lr": f"{lr:g}", "--recipe.ema": ema}
                run = "tiny/seed-0" if number == 8 else f"tiny/s-{number:03d}-seed-0"
                target = definition.rungs[0]
                trial = StudyTrial(number=number, run=run, parameters=words, values=values, target=target)
                study.add(trial, definition.domains)
                if halving and number != 2:
                    study.report(number, {1: 0.1 + 0.05 * number})
                elif not halving:
                    study.complete(number, [0.1 + 0.05 * number, 1.0 + abs(number - 4)])
            if halving:
                study.fail(2, "not finite", final=True)
                for number, epochs in ((7, (3,)), (8, (3, 9))):
                    for epoch in epochs:
                        study.set_target(number, epoch)
                        study.report(number, {epoch: 0.5 + 0.01 * (number + epoch)})
                study.complete(8, [0.67])


def test_searches_are_on_the_page_and_in_the_other_reports(runs: Path, html: Path, tmp_path: Path) -> None:
    text = re.sub(r"\s+", " ", text_of(html))
    assert "&lt;b&gt;halving" in text
    assert "9 trials, 1 complete, 1 failed, 7 paused; 18 of 81 epochs trained" in text
    found, unreadable = searches.read_all([runs])
    assert unreadable == []
    front, halving = sorted(found, key=lambda one: -len(one.definition.objectives))
    assert [trial.number for trial in halving.best[:3]] == [8, 7, 6]
    assert [(rung.epochs, rung.reached, rung.continued) for rung in halving.rungs] == [(1, 8, 2), (3, 2, 1), (9, 1, 0)]
    assert '<a href="#run-1">tiny/seed-0</a></td><td>67.00%</td><td>9</td><td>0.009</td><td>0</td>' in text
    assert [trial.number for trial in front.best] == [8, 7, 6, 5, 4]
    assert math.isclose(sum(halving.importance.values()), 1)
    done = runner("report", runs, "--out", tmp_path / "x.html", "--markdown", tmp_path / "x.md", "--wandb-spec",
                  tmp_path / "x.json", HOME=str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    markdown_text = (tmp_path / "x.md").read_text()
    for one in found:
        assert markdown.search_results(one) in markdown_text
        assert markdown.search_results(one) in markdown_of(json.loads((tmp_path / "x.json").read_text()))


def test_a_damaged_search_is_listed_and_hides_nothing(runs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs, tmp_path / "runs"))
    (copy / "searches" / "front" / "journal.log").write_text("no journal\n" * 2)
    done = runner("report", copy, "--out", tmp_path / "x.html")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"runner: not read: .*/searches/front: damaged \(.*\); restore or remove it\n", done.stderr)
    assert "halving" in text_of(tmp_path / "x.html")


@pytest.fixture(scope="module")
def html(runs: Path) -> Path:
    out = runs / "report.html"
    done = runner("report", runs, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: 2 runs compared, 1 unfinished\n"
    return out


def text_of(html: Path) -> str:
    """The page without its scripts."""
    return re.sub(r"<script>.*?</script>", "", html.read_text(), flags=re.S)


def test_the_page_shows_every_run_and_accuracy(runs: Path, html: Path) -> None:
    text = text_of(html)
    for run in find_runs([runs]):
        row = compare.run_row(collect.read(run))
        assert row.name in text
        if row.test_accuracy is not None:
            assert f"{100 * row.test_accuracy:.2f} %" in text
    assert "74.00 % (validation)" in text
    assert "23,272,266" in text
    assert "unfinished" in text
    assert "2.00 of 10" in text
    assert "not comparable with this run" in text


def test_synthetic_data_is_labeled(html: Path) -> None:
    text = text_of(html)
    assert "SYNTHETIC DATA" in text
    assert '<span class="label synthetic">synthetic-10</span>' in text


def test_values_are_escaped(html: Path) -> None:
    assert "<script>alert" not in html.read_text()
    assert "&lt;/script&gt;" in html.read_text()


def test_markdown_has_no_markup_of_a_run_folder(runs: Path) -> None:
    record = collect.read(Run(runs / "tiny" / "seed-0"))
    bad = "<script>alert(1)</script> [x](y) `z` | *w*"
    dataset = msgspec.structs.replace(record.config.dataset, name=bad)
    config = msgspec.structs.replace(record.config, dataset=dataset, experiment=bad)
    rows = [msgspec.structs.replace(row, backend=bad, warning=bad) for row in record.latency.rows if row.measured]
    latency = msgspec.structs.replace(record.latency, rows=rows)
    text = markdown.render([replace(record, config=config, latency=latency)], [Unreadable(bad, bad)])
    outside_of_code = re.sub(r"`[^`]*`", "", text.replace("\\`", ""))
    assert "<script>" not in outside_of_code
    assert "[x](y)" not in outside_of_code


def test_the_page_loads_nothing_from_a_network(html: Path) -> None:
    text = text_of(html)
    assert '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';' in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert "@import" not in text


def test_json_rows(runs: Path, tmp_path: Path) -> None:
    done = runner("report", runs, "--json", "--out", tmp_path / "x.html")
    compared = json.loads(done.stdout)
    assert compared["unreadable"] == []
    rows = {row["name"]: row for row in compared["runs"]}
    assert set(rows) == {"tiny/seed-0", "podeti-alexnet/seed-1", "tiny/half"}
    assert rows["tiny/seed-0"]["onnx_agreement"] == 1
    assert rows["tiny/seed-0"]["engines"][0]["backend"] == "tensorrt-rtx"
    assert rows["tiny/half"]["test_accuracy"] is None


def test_seeds_of_one_recipe_are_grouped(runs: Path) -> None:
    record = collect.read(Run(runs / "tiny" / "seed-0"))
    reported = Reported(0.5, "test", "last", "x")
    dataset = msgspec.structs.replace(record.config.dataset, name="CIFAR-10")

    def seeded(seed: int, accuracy: float, **changes: object) -> RunRecord:
        config = msgspec.structs.replace(record.config, seed=seed, reported=reported, dataset=dataset, **changes)
        summary = msgspec.structs.replace(record.summary, test_accuracy=accuracy)
        return replace(record, config=config, summary=summary)

    other = seeded(0, 0.9, recipe=replace(record.config.recipe, epochs=3))
    together, alone = compare.outcomes([seeded(0, 0.4), seeded(1, 0.6), other])
    assert (together.seeds, alone.seeds) == ([0, 1], [0])
    assert together.test_accuracy == pytest.approx(0.5)
    assert together.test_accuracy_std == pytest.approx(0.1414, abs=1e-4)
    assert together.difference == pytest.approx(0.0)
    assert alone.test_accuracy_std is None
    text = page.render([seeded(0, 0.4), seeded(1, 0.6)])
    assert "50.00 ± 14.14 %" in text
    assert "+0.00" in text


def test_a_run_that_stopped_early_is_complete(runs: Path) -> None:
    record = collect.read(Run(runs / "tiny" / "seed-0"))
    ended = [
        replace(record, summary=msgspec.structs.replace(record.summary, epochs=epochs, stopped_early=early))
        for epochs, early in ((1.0, False), (1.0, True), (1.5, True))
    ]
    assert [one.shortened for one in ended] == [True, False, False]
    (outcome,) = compare.outcomes(ended[1:])
    assert outcome.epochs == 1.25
    assert not outcome.incomplete
    assert [one.incomplete for one in compare.outcomes(ended)] == [True]


def variant(record: RunRecord, name: str, accuracy: float = 0.5, **changes: Any) -> RunRecord:
    """A record under another name; `dataset` is a name, and `epochs` how many it ran of the recipe's."""
    experiment, run = name.split("/")
    epochs, dataset = changes.pop("epochs", 2.0), changes.pop("dataset", "CIFAR-10")
    fields = {name: changes.pop(name) for name in ("run", "parity", "latency") if name in changes}
    config = msgspec.structs.replace(
        record.config, experiment=experiment, run=run,
        dataset=msgspec.structs.replace(record.config.dataset, name=dataset), **changes,
    )  # fmt: skip
    summary = msgspec.structs.replace(record.summary, test_accuracy=accuracy, epochs=epochs)
    return replace(record, config=config, summary=summary, **fields)


@pytest.fixture(scope="module")
def mixed(runs: Path) -> list[RunRecord]:
    """Complete, incomplete and unfinished runs on two datasets; one fails the gate, one predicts a single class."""
    record = collect.read(Run(runs / "tiny" / "seed-0"))
    parity, latency = record.parity, record.latency
    failed = [msgspec.structs.replace(row, passed=False, culprit="/conv/Conv") for row in parity.rows]
    one_class = [msgspec.structs.replace(row, classes_predicted=1) for row in parity.rows]
    slow = [msgspec.structs.replace(row, calls=4321, warning="p90 is 4.2 times p50") for row in latency.rows]
    unfinished = replace(variant(record, "podeti-mobilenetv2/seed-3"), summary=None, state="crashed")
    return [
        variant(record, "podeti-mobilenetv2/seed-0", 0.6, latency=msgspec.structs.replace(latency, rows=slow)),
        variant(record, "podeti-mobilenetv2/seed-1", 0.7, parity=msgspec.structs.replace(parity, rows=failed), seed=1),
        variant(
            record, "podeti-mobilenetv2/short", 0.9, epochs=1.0, recipe=replace(record.config.recipe, epochs=1),
            overrides={"recipe.epochs": (2, 1)},
        ),
        unfinished,
        variant(record, "efficientnet-b0/seed-0", 0.3, epochs=1.0, dataset="own images"),
        variant(
            record, "podeti-alexnet/seed-0", 0.1, parity=msgspec.structs.replace(parity, rows=one_class),
            dataset="own images",
        ),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def mixed_html(mixed: list[RunRecord], tmp_path_factory: pytest.TempPathFactory) -> Path:
    html = tmp_path_factory.mktemp("mixed") / "report.html"
    page.write(mixed, html, [Unreadable("runs/bad", "run.json: damaged")])
    return html


def test_the_verdict_names_the_best_the_gate_and_what_is_incomplete(mixed_html: Path) -> None:
    text = text_of(mixed_html)
    assert "<h1>5 runs compared, 1 unfinished, 1 not read</h1>" in text
    verdict = " ".join(re.sub(r"<[^>]*>", "", text[text.index('<ul class="verdict">') : text.index("<nav")]).split())
    # The best complete run, not the incomplete one with a higher accuracy.
    assert "Best on CIFAR-10: podeti-mobilenetv2/seed-1, 70.00 %" in verdict
    assert "Best on own images: podeti-alexnet/seed-0, 10.00 %" in verdict
    assert "Gate: 4 passed, 1 failed (podeti-mobilenetv2/seed-1)" in verdict
    assert "proves little: podeti-alexnet/seed-0" in verdict
    assert "2 (podeti-mobilenetv2/short, efficientnet-b0/seed-0)" in verdict
    assert "Unfinished: 1 (podeti-mobilenetv2/seed-3)" in verdict
    assert "Not read: 1" in verdict


class Tables(HTMLParser):
    """The number of cells in each row of each table of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[int]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.rows.append([])
        elif tag == "tr":
            self.rows[-1].append(0)
        elif tag in ("td", "th"):
            self.rows[-1][-1] += int(dict(attrs).get("colspan") or 1)


def test_every_row_of_a_table_has_as_many_cells_as_its_titles(mixed_html: Path) -> None:
    """The template lists titles and cells separately."""
    tables = Tables(mixed_html.read_text()).rows
    assert len(tables) > 4
    for rows in tables:
        assert len(rows) > 1
        assert set(rows) == {rows[0]}


def test_the_tables_show_changes_warnings_calls_and_single_classes(mixed_html: Path) -> None:
    text = text_of(mixed_html)
    assert "podeti-mobilenetv2 (epochs 1)" in text
    assert "(changed)" not in text
    machines, _, each = text[text.index('id="deployment"') :].partition('id="each"')
    assert "p90 is 4.2 times p50" in machines
    assert "p90 is 4.2 times p50" in each
    assert "<td>4,321</td>" in text
    assert text.count(">one class for all images<") == 1
    assert "incomplete, gate passed" in text
    assert "gate failed: fp32" in text
    assert "gate passed, one class" in text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"recipe.epochs": 2, "recipe.optimizer.lr": 0.01}, "lr 0.01, epochs 2"),
        (
            {"recipe.ema": 0.9, "recipe.augment.flip": "none", "recipe.optimizer.lr": 0.01, "a": 1, "b": 2},
            "lr 0.01, +4",
        ),
        ({"architecture.factory": "a.b:Net", "recipe.optimizer.kind": "SGD"}, "architecture Net, optimizer SGD"),
        ({"recipe.teacher": None, "name": "x" * 100}, f"teacher –, name {'x' * 23}…"),
        ({"a.x": 1, "b.x": 2, "c.x": 3, "d.x": 4}, "x 1, +3"),
        ({}, ""),
    ],
)
def test_a_label_names_what_was_changed(settings: dict[str, Any], text: str) -> None:
    assert compare.format_settings(settings.items()) == text


def test_labels_name_what_differs_where_no_override_does(mixed: list[RunRecord]) -> None:
    first, second = mixed[0], variant(mixed[0], "podeti-mobilenetv2/seed-1", precision="bf16")
    labels = [one.label for one in compare.outcomes([first, second])]
    assert labels == ["podeti-mobilenetv2 (precision fp32)", "podeti-mobilenetv2 (precision bf16)"]


def test_runs_and_datasets_of_one_name_are_distinguished(mixed: list[RunRecord], tmp_path: Path) -> None:
    one, two = (replace(mixed[0], run=Run(Path("/a") / root / mixed[0].config.name)) for root in ("x/runs", "y/runs"))
    dataset = msgspec.structs.replace(one.config.dataset, fingerprint="fedcba9876543210")
    three = replace(mixed[2], config=msgspec.structs.replace(mixed[2].config, dataset=dataset))
    distinct = disambiguate_names([one, two, three])
    name, fingerprint = one.config.name, one.config.dataset.fingerprint[:8]
    assert [record.name for record in distinct] == [f"{name} (x/runs)", f"{name} (y/runs)", mixed[2].name]
    assert [record.dataset for record in distinct] == [*[f"CIFAR-10 ({fingerprint})"] * 2, "CIFAR-10 (fedcba98)"]
    assert [record.name for record in disambiguate_names(mixed)] == [record.name for record in mixed]
    for root in ("old", "new"):
        many_runs.write(tmp_path / root, 1)
    records, _ = collect.read_all(find_runs([tmp_path]))
    assert [record.name.partition(" ")[2] for record in records] == ["(new)", "(old)"]


def test_only_several_seeds_have_a_deviation(mixed: list[RunRecord]) -> None:
    config = mixed[0].config
    reported = Reported(0.9, "test", "last", "x")
    one, two, again = (
        variant(mixed[0], f"podeti-mobilenetv2/run-{index}", accuracy, seed=seed, reported=reported, **changes)
        for index, (accuracy, seed, changes) in enumerate([(0.4, 0, {}), (0.6, 1, {}), (0.5, 0, {"macs": config.macs})])
    )
    counts, deviations = [], []
    for records in ([one], [one, two], [one, again]):
        (outcome,) = compare.outcomes(records)
        chart = figures.reported([outcome])
        counts.append(outcome.seed_count)
        deviations.append([trace["error_x"]["array"] for trace in chart["data"] if "error_x" in trace])
    assert counts == ["1 seed (0)", "2 seeds", "2 runs of 1 seed (0)"]
    assert deviations == [[], [[pytest.approx(14.14, abs=0.01)]], []]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", ""), "--out"),
        (("--out", "."), "--out .: expected a file"),
        (("--out", "{tmp}"), "expected a file, found a folder"),
        (("--out", "/dev/null"), "found a folder or device"),
        (("--out", "{tmp}/file/x.html"), "--out {tmp}/file/x.html: cannot write there (Not a directory)"),
        (("--out", "{tmp}/" + "x" * 252), "cannot write there (File name too long)"),
        (("--out", "{tmp}/new/" + "x" * 252), "cannot write there (File name too long)"),
        (("--out", "{tmp}/new", "--markdown", "{tmp}/new/x.md"), "--markdown {tmp}/new/x.md: expected a file in a"),
        (("--wandb", "/project"), "--wandb /project: expected ENTITY/PROJECT"),
        (("--out", "{tmp}/x.html", "--markdown", "{tmp}"), "--markdown {tmp}: expected a file"),
        (("--out", "{tmp}/x.html", "--markdown", "{tmp}/file/x.md"), "--markdown {tmp}/file/x.md: cannot write there"),
        (("--out", "{tmp}/x.html", "--markdown", "{tmp}/x.html"), "expected a file other than that of --out"),
        (("--out", "{tmp}/x.html", "--wandb-spec", "{tmp}/"), "--wandb-spec {tmp}: expected a file"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_first(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "file").touch()
    words = ["report", str(runs), *(word.replace("{tmp}", str(tmp_path)) for word in options)]
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert message.replace("{tmp}", str(tmp_path)) in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("on", "epoch", "expected"),
    [("validation", "best", 0.3), ("validation", "last", 0.2), ("test", "last", 0.5), ("test", "best", 0.6)],
)
def test_reproduced_is_of_the_reported_split_and_epoch(runs: Path, on: str, epoch: str, expected: float) -> None:
    record = collect.read(Run(runs / "tiny" / "seed-0"))
    cifar10 = msgspec.structs.replace(record.config.dataset, name="CIFAR-10 (JPEG copy)")
    config = msgspec.structs.replace(record.config, reported=Reported(0.5, on, epoch, "x"), dataset=cifar10)
    summary = msgspec.structs.replace(
        record.summary,
        test_accuracy=0.5,
        best_test_accuracy=0.6,
        validation_accuracy=0.2,
        best_validation_accuracy=0.3,
    )
    assert compare.reproduced(replace(record, config=config, summary=summary)) == expected
    assert compare.reproduced(replace(record, config=config, summary=None)) is None
    for changes in (
        {"name": "CIFAR-100"},
        {"name": "synthetic-10"},
        {"name": "images of CIFAR-10"},
        {"source": {"limit_per_class": 100}},
        {"classes": ["cat", "dog"]},
        {"image_shape": [64, 64, 3]},
    ):
        other = msgspec.structs.replace(config, dataset=msgspec.structs.replace(cifar10, **changes))
        assert compare.reproduced(replace(record, config=other, summary=summary)) is None


def test_a_report_imports_no_torch(runs: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from runner.cli import main; main(sys.argv[1:]);"
        "assert not {'torch', 'wandb', 'accelerate', 'onnx'} & set(sys.modules)"
    )
    done = python("-c", code, "report", runs, "--out", tmp_path / "x.html")
    assert done.returncode == 0, done.stderr


def test_a_page_that_cannot_be_written(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write there"):
        page.write([collect.read(Run(runs / "tiny" / "seed-0"))], tmp_path / "file" / "report.html")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 finished runs, and two folders that cannot be read."""
    folder = tmp_path_factory.mktemp("many")
    many_runs.write(folder, 200)
    for name, text in (("cut-short", '{"experiment": "x"'), ("incomplete", '{"experiment": "x"}')):
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def many_html(many: Path) -> Path:
    done = runner("report", many, "--out", many / "report.html", "--markdown", many / "report.md")
    assert done.returncode == 0, done.stderr
    assert "200 runs compared, 2 not read" in done.stdout
    assert [line.split(":")[1] for line in done.stderr.splitlines()] == [" not read"] * 2
    return many / "report.html"


def test_damaged_runs_are_listed_on_the_page(many_html: Path) -> None:
    text = text_of(many_html)
    assert "cut-short" in text
    assert "incomplete" in text
    assert text.count("damaged, or written by another version") == 2
    assert many_html.stat().st_size < 15e6


@pytest.mark.parametrize(
    ("name", "key"),
    [("deploy/parity.json", "precision"), ("deploy/latency.json", "precision"), ("deploy/latency.json", "p90_ms")],
)
def test_a_run_with_an_incomplete_row_is_unreadable(name: str, key: str, tmp_path: Path) -> None:
    many_runs.write(tmp_path, 2)
    damaged = find_runs([tmp_path])[0]
    report = json.loads((damaged.folder / name).read_text())
    del report["rows"][0][key]
    (damaged.folder / name).write_text(json.dumps(report))
    records, (entry,) = collect.read_all(find_runs([tmp_path]))
    assert len(records) == 1
    assert entry.folder == str(damaged.folder)
    assert key in entry.reason


def test_the_factors_of_a_grid_are_the_settings_that_vary(many: Path) -> None:
    records, unreadable = collect.read_all(find_runs([many]))
    assert len(unreadable) == 2
    grids = {grid.name: grid for grid in find_grids(records)}
    grid = grids["podeti-grid"]
    assert {"architecture.factory", "recipe.optimizer.lr", "recipe.optimizer.weight_decay"} <= set(grid.factors)
    assert set(grid.factors["recipe.optimizer.lr"]) == {cell["recipe.optimizer.lr"] for cell in grid.cells}
    effects = []
    for factor, values in grid.factors.items():
        cells = [[cell["accuracy"] for cell in grid.cells if cell[factor] == value] for value in values]
        means = [statistics.mean(accuracies) for accuracies in cells]
        effects.append(max(means) - min(means))
    assert effects == sorted(effects, reverse=True)  # the largest first
    assert "ghasemi" in grids
    assert "seed" not in str(grid.factors)


def test_markdown_has_every_experiment_and_latency(many: Path, many_html: Path) -> None:
    text = (many / "report.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `soni-2`")]
    assert len(lines) == 1
    assert "| 52.92% (test, last) |" in lines[0]
    assert text.count("int8-cpu") == 200
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| `")}
    assert len(widths) == 2  # of two tables, each of one width
    assert "| folder | reason |" in text
    assert text.count("damaged, or written by another version") == 2


def test_a_confusion_matrix_has_a_cell_for_each_class_whatever_its_name(runs: Path) -> None:
    """Plotly would take numbers as positions, and names as HTML."""
    record = collect.read(Run(runs / "tiny" / "seed-0"))
    dataset = msgspec.structs.replace(record.config.dataset, classes=["<b>x", "10", *"23456789"])
    chart = figures.confusion(replace(record, config=msgspec.structs.replace(record.config, dataset=dataset)), 0)
    assert {chart["layout"][axis]["type"] for axis in ("xaxis", "yaxis")} == {"category"}
    assert chart["data"][0]["x"] == chart["data"][0]["y"] == ["&lt;b&gt;x", "10", *"23456789"]


GOLDEN = Path(__file__).parent / "golden" / "wandb_report.json"


def test_latencies_of_earlier_versions_get_the_gate_of_the_same_file(tmp_path: Path) -> None:
    """They did not store it: it is looked up by file, engine and provider."""
    many_runs.write(tmp_path, 1)
    (run,) = find_runs([tmp_path])
    latency, parity = run.read_latency(), run.read_parity()
    assert [row.gate is not None for row in latency.rows] == [False, True, True]
    without = [msgspec.structs.replace(row, gate=None) for row in latency.rows]
    without[2] = msgspec.structs.replace(without[2], provider="CUDA")  # was not scored
    write_json(run.latency, msgspec.structs.replace(latency, rows=without))
    agreements = [msgspec.structs.replace(row, agreement=0.1 * i) for i, row in enumerate(parity.rows, 1)]
    write_json(run.parity, msgspec.structs.replace(parity, rows=agreements))
    cells = compare.run_row(collect.read(run)).latency
    assert [cell.gate for cell in cells] == [None, GateResult(accuracy_change=0.0, agreement=0.1, passed=True), None]


def markdown_of(report: dict[str, Any]) -> list[str]:
    """The text of every Markdown block of a W&B report."""
    blocks = [block for block in report["spec"]["blocks"] if block["type"] == "markdown-block"]
    return [block["content"].strip() for block in blocks]


def without_markdown(report: dict[str, Any]) -> dict[str, Any]:
    """The report without the text of its Markdown blocks, which is that of the Markdown tables."""
    blocks = [
        block | {"content": ""} if block["type"] == "markdown-block" else block for block in report["spec"]["blocks"]
    ]
    return report | {"spec": report["spec"] | {"blocks": blocks}}


def test_the_wandb_report_is_the_golden_one(tmp_path: Path) -> None:
    """It is made without a network or a key, and wandb-workspaces reads it back without unknown blocks.

    After an intended change: UPDATE_GOLDEN=1 python -m pytest tests/test_report.py -k golden
    """
    many_runs.write(tmp_path / "runs", 6)
    spec = tmp_path / "spec.json"
    command = ["report", tmp_path / "runs", "--out", tmp_path / "x.html", "--wandb-spec", spec]
    done = runner(*command, NETRC="/nowhere", WANDB_BASE_URL="http://127.0.0.1:9", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(spec.read_text())
    written, golden = json.loads(spec.read_text()), json.loads(GOLDEN.read_text())
    assert without_markdown(written) == without_markdown(golden)
    records, _ = collect.read_all(find_runs([tmp_path / "runs"]))
    parts = (markdown.overview, markdown.accuracies, markdown.latencies)
    tables = [*(part(records) for part in parts), wandb_report.METHOD]
    assert markdown_of(written) == [table.strip() for table in tables]
    check = (
        "import sys; from wandb_workspaces.reports.v2 import internal, interface;"
        "model = internal.ReportViewspec.model_validate_json(open(sys.argv[1]).read());"
        "report = interface.Report._from_model(model);"
        "print([type(block).__name__ for block in report.blocks])"
    )
    parsed = python("-c", check, spec)
    assert parsed.returncode == 0, parsed.stderr
    kinds = ast.literal_eval(parsed.stdout.splitlines()[-1])
    assert kinds.count("PanelGrid") >= 3
    assert "UnknownBlock" not in kinds


def test_what_only_the_page_or_only_wandb_shows_has_a_reason(runs: Path) -> None:
    """Every section of both stands in the table of runner/report/README.md; these runs have no grid."""
    records, _ = collect.read_all(find_runs([runs]))
    unreadable, (found, _) = [Unreadable("a", "damaged")], searches.read_all([runs])
    readme = (ROOT / "runner/report/README.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (yes|–) \| (yes|–) \|([^|]*)\|$", readme, re.M)
    listed = {section.lower(): (on_page == "yes", in_wandb == "yes") for section, on_page, in_wandb, _ in rows}
    assert all(reason.strip() for _, *shown, reason in rows if "–" in shown)
    html = page.render(records, unreadable, found)
    spec = json.loads(wandb_report.specification(records, None, found, unreadable))
    headings = [block for block in spec["spec"]["blocks"] if block["type"] == "heading" and block["level"] == 1]
    in_wandb = {"".join(child["text"] for child in block["children"]).lower() for block in headings} - {"method"}
    on_page = {title.lower() for title in re.findall(r'<h2 id="[^"]*">([^<]*)</h2>', html)}
    assert on_page | {"predictions", "grids"} == {section for section, (page_has, _) in listed.items() if page_has}
    assert in_wandb == {section for section, (_, wandb_has) in listed.items() if wandb_has}


def test_latencies_of_several_machines_stand_side_by_side(tmp_path: Path) -> None:
    """Of copies of a run, which have its weights; a run that was measured on one machine has one figure."""
    many_runs.write(tmp_path / "here", 2)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for run in find_runs([tmp_path / "there"])[:1]:
        latency = run.read_latency()
        rows = [msgspec.structs.replace(row, p50_ms=row.p50_ms and 2 * row.p50_ms) for row in latency.rows]
        hardware = msgspec.structs.replace(latency.hardware, cpu="another")
        write_json(run.latency, msgspec.structs.replace(latency, rows=rows, hardware=hardware))
    records, _ = collect.read_all(find_runs([tmp_path]))
    machines, rows = compare.latencies_by_machine(records)
    assert sum("another" in machine for machine in machines) == 1
    other = next(position for position, machine in enumerate(machines) if "another" in machine)
    both = [row for row in rows if None not in row.p50_ms]
    assert both
    assert all(row.p50_ms[other] == 2 * row.p50_ms[1 - other] for row in both)
    assert {row.run for row in both} == {records[0].config.name}
    assert any(row.p50_ms[other] is None for row in rows)
    assert "Latency of several machines" in markdown.latencies(records)
    assert "<h3>Several machines</h3>" in page.render(records)
    assert compare.latencies_by_machine(records[:1])[1] == []
    assert "several machines" not in markdown.latencies(records[:1])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    flags = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
    with playwright.sync_playwright() as p:
        chromium_browser = p.chromium.launch(executable_path=chromium, args=flags, chromium_sandbox=False)
        yield chromium_browser
        chromium_browser.close()


@contextlib.contextmanager
def opened(browser: Any, html: Path, scheme: str = "light", width: int = 1200) -> Iterator[Any]:
    """The page in a tab; at the end, checks that it made no request and logged no error."""
    tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    problems, requests = [], []
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(html.as_uri())
    tab.wait_for_selector("#tradeoff-0 .main-svg")
    yield tab
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    tab.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.every)])
def test_in_a_browser(browser: Any, html: Path, scheme: str) -> None:
    with opened(browser, html, scheme) as tab:
        for chart in ("curve-loss", "curve-accuracy", "confusion-0", "search-0", "search-1"):
            assert tab.locator(f"[id={chart}] .main-svg").count() > 0
        assert tab.locator("[id=confusion-1] .main-svg").count() == 0  # drawn when its run is opened
        tab.locator("#run-1 > summary").click()
        tab.wait_for_selector("[id=confusion-1] .main-svg")
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        heads = tab.locator("#table thead button")
        names = lambda: tab.locator("#table tbody td:first-child").all_text_contents()  # noqa: E731
        heads.nth(0).click()
        assert names() == sorted(names())
        heads.nth(0).press("Enter")  # by keyboard, in reverse
        assert names() == sorted(names(), reverse=True)
        tab.set_viewport_size({"width": 375, "height": 800})
        tab.wait_for_function("document.documentElement.scrollWidth <= 375", timeout=60_000)


@pytest.mark.browser
def test_filter_overlay_hover_and_heat_maps(browser: Any, many_html: Path) -> None:
    traces = "id => document.getElementById(id).data.length"
    with opened(browser, many_html) as tab:
        assert tab.locator("#count").text_content() == "200 of 200 runs"
        for title in ("accuracy", "parameters"):  # as numbers, and first the lowest
            column = tab.locator("#table thead button").all_text_contents().index(title) + 1
            tab.locator(f"#table thead th:nth-child({column}) button").click()
            texts = tab.locator(f"#table tbody td:nth-child({column})").all_text_contents()
            values = [float(text.replace(",", "").split()[0]) for text in texts]
            assert values == sorted(values)
        tab.fill("#filter", "mobilenet seed-0")
        rows = tab.locator("#table tbody tr:visible").all_text_contents()
        assert 0 < len(rows) < 60
        assert all("mobilenet" in row and "seed-0" in row for row in rows)
        points = tab.evaluate("document.getElementById('tradeoff-0').data[1].x.length")
        assert points == len(rows)
        tab.click("#all")
        assert tab.evaluate(traces, "curve-loss") == 2 * len(rows)  # training and test
        tab.click("#none")
        assert tab.evaluate(traces, "curve-loss") == 0
        tab.locator("#table tbody tr:visible input").first.check()
        assert tab.evaluate(traces, "curve-loss") == 2
        tab.fill("#filter", "")
        tab.select_option("#paper", "ghasemi")
        assert 0 < tab.locator("#table tbody tr:visible").count() < 60
        tab.select_option("#cost", "parameters")
        front = tab.evaluate("(({x, y}) => x.map((v, i) => [v, y[i]]))(document.getElementById('tradeoff-0').data[0])")
        assert front == sorted(front)
        assert [y for _, y in front] == sorted(y for _, y in front)
        tab.locator("#tradeoff-0").scroll_into_view_if_needed()

        def hovered() -> bool:
            """Moves onto the first point; a chart that is being drawn does not notice."""
            point = tab.locator("#tradeoff-0 .point").first.bounding_box()
            tab.mouse.move(0, 0)
            tab.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
            tab.wait_for_timeout(300)
            return tab.locator("#tradeoff-0 .hovertext").count() > 0

        wait_until(hovered)
        assert "parameters" in tab.locator("#tradeoff-0 .hovertext").first.text_content()
        tab.select_option("#grid-0-x", index=1)
        factor = tab.locator("#grid-0-x").input_value()
        assert factor in tab.locator("[id=grid-0]").text_content()


@pytest.mark.browser
def test_datasets_and_incomplete_runs_have_their_own_charts_and_markers(browser: Any, mixed_html: Path) -> None:
    traces = "id => document.getElementById(id).data.map(({name, x, marker}) => [name, x.length, marker?.symbol])"
    with opened(browser, mixed_html, width=1280) as tab:
        assert tab.evaluate(traces, "tradeoff-0") == [
            ["Pareto front", 1, None], ["complete", 2, "circle"], ["incomplete", 1, "circle-open"],
        ]  # fmt: skip
        assert tab.evaluate(traces, "tradeoff-1")[1:] == [["complete", 1, "circle"], ["incomplete", 1, "circle-open"]]
        for cost in ("gated_ms", "parameters"):
            tab.select_option("#cost", cost)
            ticks = tab.evaluate("[...document.querySelectorAll('#tradeoff-0 .xtick')].map(tick => tick.textContent)")
            assert ticks
            assert all(re.fullmatch(r"(0\.0*)?[125]0*[KMBT]?", tick) for tick in ticks), ticks


@pytest.mark.browser
@pytest.mark.parametrize(("width", "columns"), [(1280, 4), (390, 2)])
def test_what_decides_is_visible_without_scrolling(browser: Any, mixed_html: Path, width: int, columns: int) -> None:
    with opened(browser, mixed_html, width=width) as tab:
        heads = tab.locator("#table thead th").all_text_contents()[:4]
        assert heads == ["run", "accuracy", "verdict", "best gated p50 ms"]
        edge = (
            "n => [...document.querySelectorAll('#table tr')].map(({cells}) => cells[n].getBoundingClientRect().right)"
        )
        edges = tab.evaluate(edge, columns - 1)
        assert len(edges) == 7
        assert max(edges) <= width - 16  # the page's margin
        tab.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width, timeout=60_000)


@pytest.mark.every
@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_accessibility_violation(browser: Any, html: Path, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with opened(browser, html, scheme) as tab:
        results = Axe().run(tab)
    assert results.violations_count == 0, results.generate_report()
