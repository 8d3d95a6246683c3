"""The tracker: metrics.jsonl first, the same rows in W&B, and no failure of W&B stops training."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest

from runner.common.files import write_json
from runner.run.folder import Run
from runner.run.metrics import read_metrics
from runner.tracking.account import DEFAULT_BASE_URL, DEFAULT_HOSTS, base_url, has_key
from tests.support import wandb_file
from tests.support.processes import ROOT, clean_environment, python, wait_until
from tests.support.wandb_server import Server, end_clients

KEY = "5" * 39 + "a"  # of the form of a W&B key


def test_the_offline_file_has_everything_that_was_logged(tiny_run: Path) -> None:
    run = Run(tiny_run)
    (path,) = run.folder.glob("wandb/offline-run-*/*.wandb")
    history = wandb_file.history(path)
    rows = [row for row in history if not any(key.startswith(("figures/", "confusion", "mistakes")) for key in row)]
    assert rows == [msgspec.to_builtins(row) for row in read_metrics(run)]
    assert {key for row in rows for key in row} >= {
        "train/loss", "train/accuracy", "test/loss", "test/accuracy", "lr", "images_per_second", "train/grad_norm",
        "data_seconds", "compute_seconds", "memory_gb",
    }  # fmt: skip
    assert any(key.startswith("figures/confusion") for row in history for key in row)
    records = list(wandb_file.records(path))
    started = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (started.project, started.run_group, started.job_type) == ("training-runner", "tests", "train")
    assert started.display_name == "tiny/seed-0"
    assert {"Tiny", run.config().dataset.name, "fp32"} == set(started.tags)
    config = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in started.config.update}
    assert config["experiment"] == "tiny"
    assert config["recipe"]["batch_size"] == 60
    axes = {r.metric.glob_name or r.metric.name: r.metric for r in records if r.WhichOneof("record_type") == "metric"}
    assert axes["*"].step_metric == "global_step"
    updates = [item for r in records if r.WhichOneof("record_type") == "summary" for item in r.summary.update]
    summary = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates}
    assert summary["test_accuracy"] == run.read_summary().test_accuracy
    assert summary["parameters"] == run.config().parameters
    logged = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    (weights,) = [artifact for artifact in logged if artifact.type == "model"]
    assert weights.name == "tiny-weights"
    assert list(weights.aliases) == ["latest"]
    assert {entry.path for entry in weights.manifest.contents} == {"model.safetensors", "manifest.json"}
    tables = {artifact.name.rpartition("-")[2] for artifact in logged if artifact.type == "run_table"}
    assert tables == {"confusion_table", "mistakes"}


@pytest.mark.every
def test_wandb_writes_only_into_the_run_folder(train, tmp_path: Path) -> None:
    """Not into the home folder, nor where WANDB_DIR says."""
    home = tmp_path / "home"
    home.mkdir()
    environ = {"HOME": str(home), "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": "", "WANDB_DIR": str(home)}
    trained = train("tiny", "--max-steps", 1, WANDB_MODE="offline", **environ)
    run = trained.run
    assert f"W&B: offline; upload with: runner sync {run.folder}" in trained.stderr
    assert list(run.folder.glob("wandb/offline-run-*/*.wandb")) != []
    assert [path for path in home.rglob("*") if "wandb" in path.name.lower()] == []


@pytest.mark.every
def test_the_users_own_server_is_found_in_the_settings_of_wandb(train, tmp_path: Path, monkeypatch) -> None:
    """A key for that server, and none for W&B's own: the run is online, and everything goes there."""
    home = tmp_path / "home"
    (home / ".config" / "wandb").mkdir(parents=True)
    with Server() as server:
        (home / ".config/wandb/settings").write_text(f"[default]\nbase_url = {server.url}\n")
        (home / ".netrc").write_text(f"machine {urlsplit(server.url).netloc} login user password {KEY}\n")
        (home / ".netrc").chmod(0o600)  # Python refuses to read it otherwise
        environ = {"HOME": str(home), "WANDB_MODE": "", "NETRC": "", "WANDB_BASE_URL": ""}
        trained = train("tiny", "--max-steps", 1, **environ)
        assert "W&B: online" in trained.stderr
        assert server.history(trained.run.config().wandb_id)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert base_url({}) == DEFAULT_BASE_URL
    assert base_url({"WANDB_CONFIG_DIR": str(home / ".config/wandb")}) == server.url
    assert (
        base_url({"WANDB_BASE_URL": "http://other", "WANDB_CONFIG_DIR": str(home / ".config/wandb")}) == "http://other"
    )


def test_a_run_folder_cannot_name_the_server(tiny_run: Path, tmp_path: Path) -> None:
    """The key would go there."""
    folder = Path(shutil.copytree(tiny_run, tmp_path / "tiny" / "seed-0", ignore=shutil.ignore_patterns("wandb")))
    (folder / "wandb").mkdir()
    with Server() as server, Server() as hostile:
        for place in (folder, tmp_path):
            (place / "wandb").mkdir(exist_ok=True)
            (place / "wandb" / "settings").write_text(f"[default]\nbase_url = {hostile.url}\n")
        config = tmp_path / "config"
        config.mkdir()
        (config / "settings").write_text(f"[default]\nbase_url = {server.url}\n")
        environ = {"WANDB_CONFIG_DIR": str(config), "WANDB_API_KEY": KEY, "WANDB_MODE": "", "WANDB_BASE_URL": ""}
        done = python("-m", "runner", "sync", folder, cwd=tmp_path, **environ)
        assert done.returncode == 0, done.stderr
        assert server.history(Run(folder).config().wandb_id)
        assert hostile.runs == {}


def test_a_login_of_either_of_wandbs_hosts_is_found(tmp_path: Path) -> None:
    import wandb

    assert wandb.Settings.model_fields["base_url"].default == DEFAULT_BASE_URL
    for host in (*DEFAULT_HOSTS, "other"):
        (tmp_path / "netrc").write_text(f"machine {host} login user password {KEY}\n")
        (tmp_path / "netrc").chmod(0o600)
        environ = {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
        assert has_key(environ) == (host != "other")


def test_disabled_writes_only_local_files(train) -> None:
    run = train("tiny", "--max-steps", 2, WANDB_MODE="disabled").run
    assert not (run.folder / "wandb").exists()
    assert read_metrics(run)


# A tracker in a separate process: it logs each line of standard input as a step, and prints it once W&B has it.
PROGRAM = """
import os, sys
from pathlib import Path
from urllib.parse import urlsplit
from runner.run.folder import Run
from runner.run.schema import MetricRow
from runner.tracking import tracker

run, tracker.FINISH_TIMEOUT = Run(Path(sys.argv[1])), float(sys.argv[2])
tracked = tracker.Tracker(run, run.config(), os.environ)
for step in map(int, sys.stdin):
    tracked.log(MetricRow(global_step=step, epoch=0.0))
    tracked.actions.put(lambda remote, step=step: print(step, flush=True))
tracked.finish()
print("abandoned" if tracked.abandoned else "finished", flush=True)
os._exit(0)
"""


class Tracked:
    """A tracker in a separate process, and the server that it logs to."""

    def __init__(self, server: Server, folder: Path, finish_timeout: float) -> None:
        self.run, self.server = Run(folder), server
        environ = clean_environment(WANDB_MODE="online", WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, folder, str(finish_timeout)], cwd=ROOT, env=environ, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def log(self, *steps: int) -> None:
        """Logs rows, and waits until they are in metrics.jsonl."""
        self.process.stdin.writelines(f"{step}\n" for step in steps)
        self.process.stdin.flush()
        wait_until(lambda: self.run.metrics.exists() and self.steps[-1:] == [steps[-1]], running=self.process)

    @property
    def steps(self) -> list[int]:
        """The steps in metrics.jsonl."""
        return [row.global_step for row in read_metrics(self.run)]

    @property
    def remote_steps(self) -> list[int]:
        """The steps at the server."""
        return [row["global_step"] for row in self.server.history(self.run.config().wandb_id)]


@pytest.fixture
def tracked(tiny_run: Path, tmp_path: Path) -> Iterator[Callable[..., Tracked]]:
    started = []

    def launch(finish_timeout: float = 200) -> Tracked:
        shutil.copy(tiny_run / "run.json", tmp_path)
        started.append(Tracked(server, tmp_path, finish_timeout))
        return started[-1]

    with Server() as server:
        yield launch
        for tracker in started:
            end_clients(tracker.process.pid)
            tracker.process.kill()
            tracker.process.wait()


def test_a_tracker_that_hangs_at_the_end_is_abandoned(tracked) -> None:
    tracker = tracked(finish_timeout=0.5)
    tracker.log(1)
    assert tracker.process.stdout.readline() == "1\n"
    with tracker.server.lock:  # the server does not answer from now on
        out, stderr = tracker.process.communicate(timeout=900)
    assert out == "abandoned\n"
    assert (
        stderr.count("W&B did not finish uploading in time; upload what is missing after the run with: runner sync")
        == 1
    )


def test_a_slow_tracker_delays_no_row(tracked) -> None:
    tracker = tracked()
    with tracker.server.lock:
        tracker.log(*range(10))
        assert tracker.server.requests == []  # all are in metrics.jsonl although W&B has not answered
    out, stderr = tracker.process.communicate(timeout=900)
    assert out.split() == [*map(str, range(10)), "finished"], stderr
    assert tracker.remote_steps == tracker.steps == list(range(10))


def test_a_tracker_that_raises_is_disabled(tracked) -> None:
    tracker = tracked()
    tracker.log(1)
    assert tracker.process.stdout.readline() == "1\n"
    end_clients(tracker.process.pid)
    tracker.log(2, 3, 4)
    out, stderr = tracker.process.communicate(timeout=900)
    assert out.split()[-1] == "abandoned"  # W&B may take rows into a buffer before it sees that its process is gone
    assert stderr.count("runner sync") == stderr.count("W&B failed") == 1
    assert tracker.steps == [1, 2, 3, 4]


def test_a_run_that_could_not_be_finished_does_not_get_the_rows_of_the_next(tiny_run: Path, tmp_path: Path) -> None:
    """In a new process, because both are open in it at once."""
    runs = []
    for name in ("one", "two"):
        run = Run(shutil.copytree(tiny_run, tmp_path / name, ignore=shutil.ignore_patterns("wandb")))
        write_json(run.run_json, msgspec.structs.replace(run.config(), wandb_id=f"id-{name}"))
        runs.append(run)
    program = f"""
import os
from pathlib import Path
from runner.run.folder import Run
from runner.tracking import wandb_run
for folder in ({str(runs[0].folder)!r}, {str(runs[1].folder)!r}):
    run = Run(Path(folder))
    wandb_run.prepare_environ(run, os.environ)
    remote = wandb_run.start(run, run.config(), os.environ, "offline")
    print(remote.id)
wandb_run.kill_service()
os._exit(0)
"""
    done = python("-c", program)
    assert done.stdout.split() == ["id-one", "id-two"], done.stderr


def test_wandb_is_not_imported_by_the_package() -> None:
    done = python("-c", "import runner.tracking.tracker, sys; assert 'wandb' not in sys.modules")
    assert done.returncode == 0, done.stderr
