"""The page: everything on it comes from run folders, and it needs nothing but itself."""

import ast
import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.console import UserError
from runner.report import collect, page
from runner.runs import Run, find_runs
from tests import many_runs
from tests.conftest import python, runner


@pytest.fixture(scope="module")
def runs(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: one deployed, one of a paper's experiment cut short on synthetic data, one unfinished."""
    folder = tmp_path_factory.mktemp("compared")
    shutil.copytree(tiny_run, folder / "tiny" / "seed-0", ignore=shutil.ignore_patterns("wandb"))
    for command in (["export"], ["parity"], ["engine"], ["bench", "--seconds", 0.05, "--repeats", 5]):
        done = runner(command[0], folder / "tiny" / "seed-0", *command[1:])
        assert done.returncode == 0, done.stderr
    other = folder / "podeti-alexnet" / "seed-1"
    shutil.copytree(tiny_run, other, ignore=shutil.ignore_patterns("wandb"))
    config = json.loads((other / "run.json").read_text())
    reported = {"accuracy": 0.74, "on": "validation", "epoch": "best", "source": "podeti.txt"}
    config |= {"experiment": "podeti-alexnet", "run": "seed-1", "reported": reported, "parameters": 23_272_266}
    config["dataset"]["name"] = "synthetic-10"
    config["overrides"] = {"recipe.epochs": [10, 2], "recipe.x": [1, "</script><script>alert(1)</script>"]}
    (other / "run.json").write_text(json.dumps(config))
    unfinished = folder / "tiny" / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text(
        (folder / "tiny/seed-0/run.json").read_text().replace('"seed-0"', '"half"')
    )
    (unfinished / "metrics.jsonl").write_text('{"global_step": 1, "epoch": 0.1, "train/loss": 2.0}\n{"global_st')
    return folder


@pytest.fixture(scope="module")
def html(runs: Path) -> Path:
    out = runs / "report.html"
    done = runner("report", runs, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "3 runs compared" in done.stdout
    return out


def text_of(html: Path) -> str:
    """The page's own text, without the plotting library inside it."""
    return re.sub(r"<script>.*?</script>", "", html.read_text(), flags=re.S)


def test_every_figure_stands_on_the_page(runs: Path, html: Path) -> None:
    shown = text_of(html)
    for run in find_runs([runs]):
        row = collect.row(collect.read(run))
        assert row["name"] in shown
        if row["test_accuracy"] is not None:
            assert f"{100 * row['test_accuracy']:.2f} %" in shown
    assert "74.00 % (validation)" in shown
    assert "23,272,266" in shown
    assert "unfinished" in shown
    assert "2.00 of 10" in shown
    assert "not to be held against" in shown


def test_synthetic_data_is_said_aloud(html: Path) -> None:
    shown = text_of(html)
    assert "SYNTHETIC DATA" in shown
    assert '<span class="label synthetic">synthetic-10</span>' in shown


def test_a_value_cannot_become_markup(html: Path) -> None:
    assert "<script>alert" not in html.read_text()
    assert "&lt;/script&gt;" in html.read_text()


def test_nothing_is_fetched_from_outside(html: Path) -> None:
    shown = text_of(html)
    assert not re.search(r'(?:src|href)="(?!data:|#)', shown)
    assert "@import" not in shown


def test_json_rows(runs: Path, tmp_path: Path) -> None:
    done = runner("report", runs, "--json", "--out", tmp_path / "x.html")
    rows = {row["name"]: row for row in json.loads(done.stdout)["runs"]}
    assert set(rows) == {"tiny/seed-0", "podeti-alexnet/seed-1", "tiny/half"}
    assert rows["tiny/seed-0"]["onnx_agreement"] == 1
    assert rows["tiny/seed-0"]["engines"][0]["backend"] == "tensorrt-rtx"
    assert rows["tiny/half"]["test_accuracy"] is None


def test_seeds_of_one_recipe_stand_together(runs: Path) -> None:
    record = collect.read(Run(runs / "tiny" / "seed-0"))
    reported = {"accuracy": 0.5, "on": "test", "epoch": "last", "source": "x"}
    dataset = record.config["dataset"] | {"name": "CIFAR-10"}

    def seeded(seed: int, accuracy: float, **changes: object) -> collect.RunRecord:
        config = record.config | {"seed": seed, "reported": reported, "dataset": dataset} | changes
        return replace(record, config=config, summary=record.summary | {"test_accuracy": accuracy})

    other = seeded(0, 0.9, recipe=record.config["recipe"] | {"epochs": 3})
    together, alone = collect.experiments([seeded(0, 0.4), seeded(1, 0.6), other])
    assert (together["seeds"], alone["seeds"]) == ([0, 1], [0])
    assert together["test_accuracy"] == pytest.approx(0.5)
    assert together["test_accuracy_std"] == pytest.approx(0.1414, abs=1e-4)
    assert together["difference"] == pytest.approx(0.0)
    assert alone["test_accuracy_std"] is None
    shown = page.render([seeded(0, 0.4), seeded(1, 0.6)])
    assert "50.00 ± 14.14 %" in shown
    assert "+0.00" in shown


@pytest.mark.parametrize(
    ("on", "epoch", "expected"),
    [("validation", "best", 0.3), ("validation", "last", 0.2), ("test", "last", 0.5), ("test", "best", 0.6)],
)
def test_reproduced_is_of_the_reported_kind(runs: Path, on: str, epoch: str, expected: float) -> None:
    record = collect.read(Run(runs / "tiny" / "seed-0"))
    config = record.config | {"reported": {"accuracy": 0.5, "on": on, "epoch": epoch, "source": "x"}}
    figures = {
        "test_accuracy": 0.5,
        "best_test_accuracy": 0.6,
        "validation_accuracy": 0.2,
        "best_validation_accuracy": 0.3,
    }
    assert collect.reproduced(replace(record, config=config, summary=figures)) == expected
    assert collect.reproduced(replace(record, config=config, summary=None)) is None


def test_made_without_torch(runs: Path, tmp_path: Path) -> None:
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
    for name, text in (("cut-short", '{"experiment": "x"'), ("of-another-form", '{"experiment": "x"}')):
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def many_html(many: Path) -> Path:
    done = runner("report", many, "--out", many / "report.html", "--markdown", many / "report.md")
    assert done.returncode == 0, done.stderr
    assert "200 runs compared" in done.stdout
    assert [line.split(":")[1] for line in done.stderr.splitlines()] == [" not read"] * 2
    return many / "report.html"


def test_what_cannot_be_read_is_listed_and_breaks_nothing(many_html: Path) -> None:
    shown = text_of(many_html)
    assert "cut-short" in shown
    assert "not readable as JSON" in shown
    assert "of-another-form" in shown
    assert many_html.stat().st_size < 15e6


@pytest.mark.parametrize("name", ["deploy/parity.json", "deploy/latency.json"])
def test_a_row_that_lacks_what_is_shown_is_told(name: str, tmp_path: Path) -> None:
    many_runs.write(tmp_path, 2)
    damaged = find_runs([tmp_path])[0]
    rows = json.loads((damaged.folder / name).read_text())
    del rows["rows"][0]["precision"]
    (damaged.folder / name).write_text(json.dumps(rows))
    records, (entry,) = collect.read_all(find_runs([tmp_path]))
    assert len(records) == 1
    assert entry.run == damaged
    assert "'precision'" in entry.told


def test_a_grid_is_what_varies(many: Path) -> None:
    records, unreadable = collect.read_all(find_runs([many]))
    assert len(unreadable) == 2
    grids = {grid["name"]: grid for grid in collect.grids(records)}
    grid = grids["podeti-grid"]
    assert {"architecture.factory", "recipe.optimizer.lr", "recipe.optimizer.weight_decay"} <= set(grid["factors"])
    assert set(grid["factors"]["recipe.optimizer.lr"]) == {cell["recipe.optimizer.lr"] for cell in grid["cells"]}
    assert "ghasemi" in grids
    assert "seed" not in str(grid["factors"])


def test_markdown_has_every_experiment_and_latency(many: Path, many_html: Path) -> None:
    text = (many / "report.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `soni-2`")]
    assert len(lines) == 1
    assert "83.94% (test, last)" in lines[0] or "(test" in lines[0]
    assert text.count("int8-cpu") == 200
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| `")}
    assert len(widths) == 2  # of two tables, each of one width


GOLDEN = Path(__file__).parent / "wandb_report.json"


def test_a_latency_stands_beside_the_gate_of_what_it_is_of() -> None:
    """Of the same file, engine and provider; the model in torch is what the gate compares with."""
    figures = {"accuracy_change": 0.0, "passed": True}
    rows = [
        {
            "onnx_sha256": "a",
            "engine_sha256": None,
            "provider": "CUDAExecutionProvider",
            "agreement": 0.1,
            **figures,
        },
        {"onnx_sha256": "a", "engine_sha256": "e", "provider": "tensorrt 11.0", "agreement": 0.2, **figures},
    ]
    for row in rows:
        found = collect.gate(rows, {"backend": "any", **row})
        assert found == figures | {"agreement": row["agreement"]}
    for other in ({"engine_sha256": "f"}, {"provider": "CPU"}, {"onnx_sha256": None}):
        assert collect.gate(rows, rows[1] | other) is None


def test_the_wandb_report_is_the_golden_one(tmp_path: Path) -> None:
    """Made of wandb-workspaces' own objects, without a network or a key; and it reads back as what it was.

    After a change that is meant: UPDATE_GOLDEN=1 python -m pytest tests/test_report.py -k golden
    """
    many_runs.write(tmp_path / "runs", 6)
    spec = tmp_path / "spec.json"
    words = ["report", tmp_path / "runs", "--out", tmp_path / "x.html", "--wandb-spec", spec]
    done = runner(*words, NETRC="/nowhere", WANDB_BASE_URL="http://127.0.0.1:9", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(spec.read_text())
    assert json.loads(spec.read_text()) == json.loads(GOLDEN.read_text())
    check = (
        "import sys; from wandb_workspaces.reports.v2 import internal, interface;"
        "model = internal.ReportViewspec.model_validate_json(open(sys.argv[1]).read());"
        "report = interface.Report._from_model(model);"
        "print([type(block).__name__ for block in report.blocks])"
    )
    read = python("-c", check, spec)
    assert read.returncode == 0, read.stderr
    kinds = ast.literal_eval(read.stdout.splitlines()[-1])
    assert kinds.count("PanelGrid") >= 3
    assert "UnknownBlock" not in kinds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    flags = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(executable_path=chromium, args=flags, chromium_sandbox=False)
        yield running
        running.close()


@contextlib.contextmanager
def opened(browser: Any, html: Path, scheme: str = "light", width: int = 1200) -> Iterator[Any]:
    """The page in a tab; nothing was requested and nothing failed when the context ends."""
    tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    problems, requests = [], []
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(html.as_uri())
    tab.wait_for_selector("#tradeoff .main-svg")
    yield tab
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    tab.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser: Any, html: Path, scheme: str) -> None:
    with opened(browser, html, scheme) as tab:
        for chart in ("curve-loss", "curve-accuracy", "confusion-0"):
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
        heads.nth(0).press("Enter")  # by keyboard, the other way round
        assert names() == sorted(names(), reverse=True)
        tab.set_viewport_size({"width": 375, "height": 800})
        tab.wait_for_function("document.documentElement.scrollWidth <= 375", timeout=5_000)


@pytest.mark.browser
def test_filter_overlay_hover_and_heat_maps(browser: Any, many_html: Path) -> None:
    traces = "id => document.getElementById(id).data.length"
    with opened(browser, many_html) as tab:
        assert tab.locator("#count").text_content() == "200 of 200 runs"
        tab.fill("#filter", "mobilenet seed-0")
        rows = tab.locator("#table tbody tr:visible").all_text_contents()
        assert 0 < len(rows) < 60
        assert all("mobilenet" in row and "seed-0" in row for row in rows)
        points = tab.evaluate("document.getElementById('tradeoff').data[1].x.length")
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
        front = tab.evaluate(
            "(({x, y}) => x.map((v, i) => [v, y[i]]))(document.getElementById('tradeoff').data[0])"
        )
        assert front == sorted(front)
        assert [y for _, y in front] == sorted(y for _, y in front)
        tab.locator("#tradeoff").scroll_into_view_if_needed()
        point = tab.locator("#tradeoff .point").first.bounding_box()
        tab.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
        tab.wait_for_selector("#tradeoff .hovertext", timeout=5_000)
        assert "parameters" in tab.locator("#tradeoff .hovertext").first.text_content()
        tab.select_option("#grid-0-x", index=1)
        chosen = tab.locator("#grid-0-x").input_value()
        assert chosen in tab.locator("[id=grid-0]").text_content()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier(browser: Any, html: Path, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with opened(browser, html, scheme) as tab:
        found = Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()
