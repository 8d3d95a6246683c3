"""Local files first; W&B sees the same, and cannot hurt."""

import json
import socket
import threading
import time
from pathlib import Path

import pytest

from runner import tracking
from runner.runs import Run, read_metrics
from tests import wandb_file
from tests.conftest import TINY, python, runner

KEY = "5" * 39 + "a"  # of the form of a W&B key


def test_the_offline_file_holds_what_was_logged(tiny_run: Path) -> None:
    run = Run(tiny_run)
    (path,) = run.folder.glob("wandb/offline-run-*/*.wandb")
    shown = wandb_file.history(path)
    rows = [row for row in shown if not any(key.startswith(("figures/", "confusion", "mistakes")) for key in row)]
    assert rows == read_metrics(run)
    assert {"train/loss", "train/accuracy", "test/loss", "test/accuracy", "lr", "images_per_second"} <= {
        key for row in rows for key in row
    }
    assert any(key.startswith("figures/confusion") for row in shown for key in row)
    kinds = list(wandb_file.records(path))
    started = next(record.run for record in kinds if record.WhichOneof("record_type") == "run")
    assert (started.project, started.run_group, started.job_type) == ("training-runner", "tests", "train")
    assert started.display_name == "tiny/seed-0"
    assert {"Tiny", run.config()["dataset"]["name"], "fp32"} == set(started.tags)
    config = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in started.config.update}
    assert config["experiment"] == "tiny"
    assert config["recipe"]["batch_size"] == 60
    axes = {r.metric.glob_name or r.metric.name: r.metric for r in kinds if r.WhichOneof("record_type") == "metric"}
    assert axes["*"].step_metric == "global_step"
    updates = [item for r in kinds if r.WhichOneof("record_type") == "summary" for item in r.summary.update]
    summary = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates}
    assert summary["test_accuracy"] == json.loads(run.summary.read_text())["test_accuracy"]
    assert summary["parameters"] == run.config()["parameters"]
    logged = [r.artifact for r in kinds if r.WhichOneof("record_type") == "artifact"]
    (weights,) = [artifact for artifact in logged if artifact.type == "model"]
    assert weights.name == "tiny-weights"
    assert list(weights.aliases) == ["latest"]
    assert {entry.path for entry in weights.manifest.contents} == {"model.safetensors", "manifest.json"}
    tables = {artifact.name.rpartition("-")[2] for artifact in logged if artifact.type == "run_table"}
    assert tables == {"confusion_table", "mistakes"}


def test_everything_lies_in_the_run_folder(small_data: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = runner("train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path / "runs", "--device", "cpu",
                  "--max-steps", 1, HOME=str(home), XDG_CACHE_HOME="", XDG_CONFIG_HOME="")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path for path in home.rglob("*") if "wandb" in path.name.lower()] == []


def silent_server() -> socket.socket:
    """Accepts connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    kept = []

    def accept() -> None:
        while True:
            try:
                kept.append(server.accept())
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    return server


@pytest.mark.parametrize("kind", ["closed port", "never answers"])
def test_an_unreachable_server_costs_little_time_and_nothing_else(
    kind: str, small_data: Path, tmp_path: Path
) -> None:
    server = silent_server() if kind == "never answers" else None
    port = server.getsockname()[1] if server else 9
    began = time.monotonic()
    done = runner(
        "train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu", "--json",
        WANDB_MODE="online", WANDB_API_KEY=KEY, WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_INIT_TIMEOUT="5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 120
    summary = json.loads(done.stdout)
    run = Run(tmp_path / "tiny" / "seed-0")
    assert summary["steps"] == read_metrics(run)[-1]["global_step"] == 16
    assert "W&B" in done.stderr
    assert "going on offline" in done.stderr
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), f"the key is in {path}"
    assert KEY not in done.stdout + done.stderr
    if server:
        server.close()


def test_disabled_writes_only_local_files(small_data: Path, tmp_path: Path) -> None:
    done = runner("train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu",
                  "--max-steps", 2, WANDB_MODE="disabled")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "tiny/seed-0/wandb").exists()
    assert read_metrics(Run(tmp_path / "tiny/seed-0"))


def tracker_with(shown: object, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tracking.Tracker:
    """A tracker whose W&B is a stand-in."""
    monkeypatch.setattr(tracking.Tracker, "_start", lambda self: shown)
    return tracking.Tracker(Run(folder), {"wandb_id": "x"}, {"WANDB_MODE": "offline"})


def test_a_tracker_that_hangs_at_the_end_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hung:
        def log(self, row: object, step: int) -> None: ...

        def finish(self) -> None:
            time.sleep(60)

    tracker = tracker_with(Hung(), tmp_path, monkeypatch)
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT", 0.2)
    tracker.log({"global_step": 1})
    tracker.finish()
    assert tracker.hung


def test_a_tracker_that_is_slow_holds_no_row_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Slow:
        def log(self, row: dict[str, float], step: int) -> None:
            time.sleep(0.05)
            seen.append(row["global_step"])

        def finish(self) -> None:
            seen.append("finished")

    tracker = tracker_with(Slow(), tmp_path, monkeypatch)
    began = time.monotonic()
    for step in range(10):
        tracker.log({"global_step": step})
    assert time.monotonic() - began < 0.25
    tracker.finish()
    assert seen == [*range(10), "finished"]


def test_a_tracker_that_raises_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def log(self, row: object, step: int) -> None:
            raise RuntimeError("broken pipe")

    tracker = tracker_with(Broken(), tmp_path, monkeypatch)
    tracker.log({"global_step": 1})
    tracker.log({"global_step": 2})
    tracker.finish()
    assert [row["global_step"] for row in read_metrics(Run(tmp_path))] == [1, 2]
    assert capsys.readouterr().err.count("broken pipe") == 1
    assert not tracker.hung


def test_wandb_is_not_imported_by_the_package() -> None:
    done = python("-c", "import runner.tracking, sys; assert 'wandb' not in sys.modules")
    assert done.returncode == 0, done.stderr
