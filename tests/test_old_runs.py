"""A run folder that an earlier version made stays readable: scored, exported, resumed, built, reported.

tests/golden/runs/soni-2/seed-0 was trained for 6 steps on 500 synthetic images, exported, scored and measured by
commit 244c7a7; left out are its engine, its lock and W&B's files.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from data_prep import beton, sources
from runner.config.recipe import differences
from runner.run.folder import Run
from tests.support.processes import ROOT, runner


@pytest.fixture(scope="module")
def synthetic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 500 images that it was trained on, whatever CIFAR10_IMAGES says."""
    if not os.environ.get("CIFAR10_IMAGES"):
        return request.getfixturevalue("small_data")
    whole = sources.load("synthetic")
    train, test = sources.limit_split(whole.train, 50), sources.limit_split(whole.test, 20)
    folder = tmp_path_factory.mktemp("synthetic") / "small"
    beton.write(replace(whole, train=train, test=test, provenance={**whole.provenance, "limited": True}), folder)
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the old run, to be changed."""
    source = ROOT / "tests" / "golden" / "runs"
    return Path(shutil.copytree(source, tmp_path / "runs")) / "soni-2" / "seed-0"


def test_an_old_run_is_scored_and_exported(old: Path, synthetic: Path) -> None:
    scored = runner("eval", old, "--data", synthetic, "--device", "cpu", "--json")
    assert scored.returncode == 0, scored.stderr
    summary = json.loads((old / "summary.json").read_text())
    # Sums in another order, as on another processor, may move an image across a boundary.
    assert json.loads(scored.stdout)["test_accuracy"] == pytest.approx(summary["test_accuracy"], abs=0.03)
    parity = ["parity", "--data", synthetic, "--device", "cpu"]
    for words in (parity, ["export", "--precision", "fp16"], ["engine"]):
        done = runner(words[0], old, *words[1:])
        assert done.returncode == 0, done.stderr
    rows = json.loads((old / "deploy" / "parity.json").read_text())["rows"]
    assert {row["precision"] for row in rows} == {"fp32", "int8"}


def test_a_run_of_before_a_setting_existed_is_equal_to_one_of_today(old: Path) -> None:
    """It is resumed, and is in one group with later runs in reports."""
    record = json.loads((old / "run.json").read_text())
    config = Run(old).config()
    for name in ("hue", "cutout"):
        del record["recipe"]["augment"][name]
    del record["recipe"]["prune"]
    (old / "run.json").write_text(json.dumps(record))
    earlier = Run(old).config()
    assert differences({"recipe": config.recipe}, {"recipe": earlier.recipe}) == {}
    assert msgspec.json.encode(earlier.recipe) == msgspec.json.encode(config.recipe)


@pytest.mark.parametrize(("compiles", "mode"), [("false", "none"), ("true", "default")])
def test_a_recipe_that_said_whether_it_compiles_has_a_mode_now(old: Path, compiles: str, mode: str) -> None:
    text = (old / "run.json").read_text()
    (old / "run.json").write_text(text.replace('"compile": false', f'"compile": {compiles}'))
    assert Run(old).config().recipe.compile == mode


def test_an_old_run_is_resumed(old: Path, synthetic: Path) -> None:
    words = ["--data", synthetic, "--runs", old.parent.parent, "--recipe.batch-size", 100]
    words += ["--recipe.validation", 100, "--max-steps", 8, "--resume", "auto", "--device", "cpu"]
    done = runner("train", "soni-2", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((old / "summary.json").read_text())["steps"] == 8
    rows = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    assert [row["global_step"] for row in rows][:2] == [4, 4]  # those before it stay
    assert json.loads((old / "run.json").read_text())["resumed"][0]["step"] == 6


def test_an_old_run_is_reported(old: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = runner("report", old, "--out", page, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["runs"]
    assert (row["name"], row["test_accuracy"], row["seed"]) == ("soni-2/seed-0", 0.11, 0)
    assert row["overrides"] == {"recipe.batch_size": [64, 100], "recipe.validation": [0, 100]}
    assert [part["precision"] for part in row["parity"]] == ["fp32", "int8", "fp32", "int8"]
    assert {part["backend"] for part in row["latency"]} == {"eager", "onnxruntime"}
    assert row["latency"][-1]["gate"] == {"accuracy_change": 0.0, "agreement": 1.0, "passed": True}
    assert "soni-2/seed-0" in page.read_text()
