"""The benchmarks' own parts: what they print must be what was measured."""

import json
import re
from pathlib import Path

import pytest

from data_prep.console import UserError
from runner import experiments
from runner.benchmarks import allreduce, measure, scaling, tables
from tests.conftest import python


def test_the_readme_is_made_from_the_results() -> None:
    text = tables.README.read_text()
    assert tables.filled(text) == text, "run: python -m runner.benchmarks.tables --write"


def test_a_cell_without_a_result_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    shown = tables.papers()
    assert shown.count(tables.MISSING) >= 2 * shown.count("| `")
    assert "not measured" in tables.ratios()
    with pytest.raises(UserError, match="expected <!-- papers -->"):
        tables.filled("no marks")


def test_papers_collects_runs(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "papers-cpu.json"
    done = python("-m", "runner.benchmarks.papers", tiny_run, "--json", out)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(out.read_text())["experiments"]
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert entry["test_accuracy"] == summary["test_accuracy"]
    assert len(entry["epochs_test_accuracy"]["0"]) == 2
    assert entry["versions"]["torch"]
    shown = tables._accuracy(entry)
    assert f"{100 * summary['test_accuracy']:.2f} %" in shown
    assert "2 of 2 epochs, seed 0, fp32" in shown
    nothing = python("-m", "runner.benchmarks.papers", tmp_path)
    assert nothing.returncode == 2


def test_ratios_are_taken_within_a_round() -> None:
    assert measure.ratio([10, 20, 30], [1, 2, 6]) == measure.Ratio(10, 5, 10, 3)
    order = []
    subjects = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    measure.in_turn(subjects, 3, "test")
    assert "".join(order) == "abcbcacab"


@pytest.mark.parametrize("name", ["loader", "overhead", "scaling", "deploy", "allreduce", "papers", "tables"])
def test_every_benchmark_explains_itself(name: str) -> None:
    done = python("-m", f"runner.benchmarks.{name}", "--help")
    assert done.returncode == 0
    assert "usage" in done.stdout


def test_the_all_reduce_model_and_its_document_agree() -> None:
    text = allreduce.DOCUMENT.read_text()
    assert allreduce.filled(text) == text, "run: python -m runner.benchmarks.allreduce --write"
    cluster = allreduce.Cluster()
    assert allreduce.all_reduce(1e6, 1, cluster) == 0
    # 8 GPUs of a node: each sends 7/8 of the gradients twice.
    assert allreduce.all_reduce(8e9, 8, cluster) == pytest.approx(2 * 7e9 / cluster.link, rel=2e-3)
    known = experiments.load()
    for name in allreduce.SHOWN:
        shares = [allreduce.efficiency(known[name], 512, gpus, cluster) for gpus in allreduce.GPUS]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] == 1
        assert allreduce.efficiency(known[name], 2048, 64, cluster) > allreduce.efficiency(
            known[name], 512, 64, cluster
        )


def test_ddp_of_one_is_measured_against_none(small_data: Path) -> None:
    code = "import sys, json, pathlib; from runner.benchmarks import scaling; "
    code += "print(json.dumps(scaling.ddp_of_one('soni-2', pathlib.Path(sys.argv[1]), 2, 'cpu')))"
    done = python("-c", code, small_data)
    walls = json.loads(done.stdout.splitlines()[-1])
    assert {name: len(found) for name, found in walls.items()} == {"none": 2, "ddp": 2}


@pytest.mark.processes
def test_the_scaling_benchmark_launches_ranks(small_data: Path) -> None:
    assert scaling.ScalingBenchmark(small_data, "soni-2", steps=3).launched(2, 20) > 0


def test_the_overhead_benchmark_runs_its_parts(small_data: Path, tmp_path: Path) -> None:
    base = [
        "-m",
        "runner.benchmarks.overhead",
        "--data",
        small_data,
        "--steps",
        3,
        "--experiment",
        "podeti-alexnet",
    ]
    # 500 images are too few for 5,000 held-out ones; the refusal comes through.
    refused = python(*base, "--part", "runner")
    assert refused.returncode == 2
    assert "expected less than the 500 training images" in refused.stderr
    fitting = [*base[:-1], "soni-2", "--batch", 20]
    for part, steps in (("imports", 1), ("runner", 3), ("loop", 3), ("accelerate", 3)):
        done = python(*fitting, "--part", part)
        assert done.returncode == 0, done.stderr
        clock = json.loads(done.stdout.splitlines()[-1])
        assert clock == sorted(clock)
        assert len(clock) == steps
    assert python(*base, "--rounds", 3).returncode == 2


def test_the_preview_draws(small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    done = python("-m", "runner.batches.preview", "--data", small_data, "--out", out, "--images", 3)
    assert done.returncode == 0, done.stderr
    assert re.match(rb"\x89PNG", out.read_bytes())
    assert (
        python("-m", "runner.batches.preview", "--data", small_data, "--out", tmp_path / "x" / "y").returncode == 2
    )
