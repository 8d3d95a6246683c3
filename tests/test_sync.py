"""`runner sync` and training itself against a stand-in of W&B's server: each row once, whatever happens between."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.runs import Run, read_metrics
from tests.conftest import ROOT, TINY, clean_environment, runner
from tests.wandb_server import Server

KEY = "6" * 39 + "b"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Run:
    """A finished run that W&B has not seen."""
    folder = tmp_path / "runs" / "tiny" / "seed-0"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("wandb"))
    return Run(folder)


def online(server: Server) -> dict[str, str]:
    return {"WANDB_MODE": "online", "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url, "WANDB_INIT_TIMEOUT": "10"}


def sync(server: Server, *runs: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return runner("sync", *runs, "--json", **{**online(server), **options})


def shown_rows(server: Server, run: Run) -> list[dict]:
    """The rows that are metrics, as the server has them."""
    rows = server.history(run.config()["wandb_id"])
    return [row for row in rows if not any(key.startswith(("figures/", "confusion", "mistakes")) for key in row)]


def test_a_run_folder_is_replayed_once(server: Server, run: Run) -> None:
    done = sync(server, run.folder)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(run)
    assert json.loads(done.stdout) == [{"run": str(run.folder), "rows": len(rows), "new": True}]
    assert shown_rows(server, run) == rows
    config = run.config()
    shown = server.runs[config["wandb_id"]]
    assert (shown["displayName"], shown["group"], shown["job"]) == ("tiny/seed-0", "tests", "train")
    assert set(shown["tags"]) == {"Tiny", config["dataset"]["name"], "fp32"}
    summary = json.loads(run.summary.read_text())
    for key in ("test_accuracy", "best_test_accuracy"):
        assert shown["summary"][key] == summary[key]
    assert shown["summary"]["parameters"] == config["parameters"]
    assert shown["summary"]["images_per_second"] > 0
    before, requests = json.dumps(server.runs, sort_keys=True), len(server.requests)
    again = sync(server, run.folder)
    assert json.loads(again.stdout)[0]["new"] is False
    assert len(server.requests) == requests
    shutil.rmtree(run.folder / "wandb")  # the mark is lost, and W&B itself knows what it has
    third = sync(server, run.folder)
    assert json.loads(third.stdout)[0]["rows"] == 0, third.stderr
    assert shown_rows(server, run) == rows
    after = json.loads(json.dumps(server.runs))
    for name, held in json.loads(before).items():
        assert after[name]["history"] == held["history"]


def test_artifacts_have_a_lineage(server: Server, run: Run) -> None:
    """Of files that sync only carries, so that their contents do not matter."""
    run.deploy.mkdir()
    (run.deploy / "model.fp32.onnx").write_bytes(b"graph")
    (run.deploy / "model.fp32.tensorrt-rtx.engine").write_bytes(b"engine")
    (run.deploy / "model.fp32.tensorrt-rtx.engine.json").write_text("{}")
    row = {"backend": "onnxruntime", "precision": "fp32", "batch": 1, "p50_ms": 1.5, "provider": "CPU"}
    (run.deploy / "latency.json").write_text(json.dumps({"rows": [row]}))
    assert sync(server, run.folder).returncode == 0
    wandb_id = run.config()["wandb_id"]
    jobs = {held["job"]: name for name, held in server.runs.items()}
    assert set(jobs) == {"train", "export", "engine", "bench"}
    by_id = {number: artifact["artifactTypeName"] for number, artifact in server.artifacts.items()}
    used = {(job, by_id[number]) for name, number in server.uses for job, held in jobs.items() if held == name}
    assert used == {
        ("train", "dataset"),
        ("export", "model"),
        ("engine", "onnx"),
        ("bench", "onnx"),
        ("bench", "engine"),
    }
    logged = {(artifact["runName"], artifact["artifactTypeName"]) for artifact in server.artifacts.values()}
    assert {(wandb_id, "model"), (jobs["export"], "onnx"), (jobs["engine"], "engine")} <= logged
    (model,) = server.artifacts_of("model")
    assert model["aliases"] == ["best", "latest"]
    assert all(artifact["state"] == "COMMITTED" for artifact in server.artifacts.values())
    assert server.runs[wandb_id]["summary"]["latency_p50_ms/onnxruntime_fp32_batch1"] == 1.5
    count = len(server.artifacts)
    shutil.rmtree(run.folder / "wandb")
    assert sync(server, run.folder).returncode == 0
    assert len(server.artifacts) == count


def test_each_row_once_after_two_interruptions(server: Server, run: Run) -> None:
    """Killed twice in the middle of sending; the rows that have come are not sent again."""
    one = read_metrics(run)[0]
    rows = [one | {"global_step": step, "train/loss": 1 / step} for step in range(1, 3001)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for least in (1, 1200):
        command = [sys.executable, "-m", "runner", "sync", str(run.folder)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=clean_environment(**online(server)), start_new_session=True
        )
        wandb_id, until = run.config()["wandb_id"], time.monotonic() + 90
        while len(server.runs.get(wandb_id, {"history": []})["history"]) < least:
            assert time.monotonic() < until
            if process.poll() is not None:
                break
            time.sleep(0.01)
        process.kill()
        subprocess.run(["pkill", "-9", "-f", f"wandb-core.*{process.pid}"], check=False)
        process.wait()
    done = sync(server, run.folder)
    assert done.returncode == 0, done.stderr
    assert shown_rows(server, run) == rows


def test_training_online_shows_what_sync_would(server: Server, small_data: Path, tmp_path: Path) -> None:
    words = ["train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu"]
    done = runner(*words, **online(server))
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "tiny" / "seed-0")
    assert shown_rows(server, run) == read_metrics(run)
    history, artifacts = server.history(run.config()["wandb_id"]), len(server.artifacts)
    assert {"figures/confusion", "figures/curves"} <= set(history[-1])
    assert sync(server, run.folder).returncode == 0
    assert server.history(run.config()["wandb_id"]) == history
    assert len(server.artifacts) == artifacts
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), f"the key is in {path}"


def test_a_resumed_run_repeats_no_row(server: Server, small_data: Path, tmp_path: Path) -> None:
    """Stopped by SIGTERM between checkpoints and gone on with: W&B has each step once."""
    words = ["train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu"]
    words += ["--recipe.epochs", 60, "--checkpoint-every", 3, "--resume", "auto"]
    run = Run(tmp_path / "tiny" / "seed-0")
    for least in (1, 20):
        command = [sys.executable, "-m", "runner", *map(str, words)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=clean_environment(**online(server)), start_new_session=True
        )
        until = time.monotonic() + 120
        while len(read_metrics(run)) < least and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = runner(*words, **online(server))
    assert done.returncode == 0, done.stderr
    assert sync(server, run.folder).returncode == 0
    ours, theirs = (
        [row | {"images_per_second": 0} for row in rows] for rows in (read_metrics(run), shown_rows(server, run))
    )
    assert ours == theirs  # but for the speed of what was trained twice


@pytest.mark.parametrize("fault", ["refuses", "slow"])
def test_a_server_that_fails_costs_training_nothing(
    server: Server, fault: str, small_data: Path, tmp_path: Path
) -> None:
    if fault == "refuses":
        server.status = 500
    else:
        server.delay = 3.0
    words = ["train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu", "--json"]
    done = runner(*words, **{**online(server), "WANDB_INIT_TIMEOUT": "5"})
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "tiny" / "seed-0")
    assert json.loads(done.stdout)["steps"] == read_metrics(run)[-1]["global_step"] == 16
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), f"the key is in {path}"
    assert KEY not in done.stdout + done.stderr
    server.status, server.delay = 200, 0.0
    assert sync(server, run.folder).returncode == 0
    assert shown_rows(server, run) == read_metrics(run)


def test_a_sync_without_server_or_key_is_one_line(server: Server, run: Run) -> None:
    server.status = 500
    done = sync(server, run.folder, WANDB_INIT_TIMEOUT="5")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("runner: ")]
    assert len(lines) == 1
    assert "the same command goes on later" in lines[0]
    done = runner("sync", run.folder, WANDB_MODE="", NETRC="/nowhere", WANDB_BASE_URL=server.url)
    assert done.returncode == 2
    assert "from: wandb login" in done.stderr


def test_a_report_is_made_and_then_updated(server: Server, run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        done = runner(
            "report", run.folder, "--out", tmp_path / "x.html", "--wandb", "someone/project", **online(server)
        )
        assert done.returncode == 0, done.stderr
    (report,) = server.reports.values()
    assert report["displayName"] == "Architectures compared"
    spec = json.loads(report["spec"])
    assert run.config()["wandb_id"] in json.dumps(spec)
