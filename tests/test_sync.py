"""`runner sync` and online training against a mock of W&B's server: each row arrives once, also after failures."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from runner.common.errors import UserError
from runner.common.files import write_json
from runner.run.folder import Run
from runner.run.metrics import encode_row, read_metrics
from runner.run.schema import Ending, LatencyReport, LatencyRow, Method
from runner.tracking import account, wandb_run, wandb_sync
from runner.tracking.wandb_sync import best_run
from tests.support.compare import MEASURED
from tests.support.processes import ENDING, TINY, Running, command_lines, runner, start, wait_for_step, wait_until
from tests.support.wandb_server import Server, end_clients

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
    return {"WANDB_MODE": "online", "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url, "WANDB_INIT_TIMEOUT": "120"}


def sync(server: Server, *runs: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return runner("sync", *runs, "--json", **{**online(server), **options})


def shown_rows(server: Server, run: Run) -> list[dict]:
    """The rows of metrics at the server."""
    rows = server.history(run.config().wandb_id)
    return [row for row in rows if not any(key.startswith(("figures/", "confusion", "mistakes")) for key in row)]


def metric_rows(run: Run) -> list[dict]:
    """The rows of metrics.jsonl under W&B's names."""
    return [msgspec.to_builtins(row) for row in read_metrics(run)]


def assert_nowhere(key: str, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            assert key.encode() not in path.read_bytes(), f"the key is in {path}"


def test_a_run_folder_is_sent_once(server: Server, run: Run) -> None:
    done = sync(server, run.folder)
    assert done.returncode == 0, done.stderr
    rows = metric_rows(run)
    assert json.loads(done.stdout) == [{"run": str(run.folder), "rows": len(rows), "new": True}]
    assert shown_rows(server, run) == rows
    config, summary = run.config(), run.read_summary()
    remote = server.runs[config.wandb_id]
    assert (remote["displayName"], remote["group"], remote["job"]) == ("tiny/seed-0", "tests", "train")
    assert set(remote["tags"]) == {"Tiny", config.dataset.name, "fp32"}
    assert remote["summary"]["test_accuracy"] == summary.test_accuracy
    assert remote["summary"]["best_test_accuracy"] == summary.best_test_accuracy
    assert remote["summary"]["parameters"] == config.parameters
    assert remote["summary"]["images_per_second"] > 0
    assert remote["exit_code"] == 0
    before, requests = json.dumps(server.runs, sort_keys=True), len(server.requests)
    again = sync(server, run.folder)
    assert json.loads(again.stdout)[0]["new"] is False
    assert len(server.requests) == requests
    shutil.rmtree(run.folder / "wandb")  # without the marker, W&B itself reports what it has
    run.summary.unlink()
    write_json(run.ended, Ending(stopped=False, reason="out of memory"))
    third = sync(server, run.folder)
    assert json.loads(third.stdout)[0]["rows"] == 0, third.stderr
    assert shown_rows(server, run) == rows
    assert server.runs[config.wandb_id]["exit_code"] == 1  # so that W&B shows it as failed
    after = json.loads(json.dumps(server.runs))
    for name, remote in json.loads(before).items():
        assert after[name]["history"] == remote["history"]


@pytest.mark.every
def test_artifacts_have_a_lineage(server: Server, run: Run) -> None:
    """The contents of most files do not matter, as sync only uploads them."""
    run.deploy.mkdir()
    (run.deploy / "model.fp32.onnx").write_bytes(b"graph")
    (run.deploy / "model.fp32.tensorrt-rtx.engine").write_bytes(b"engine")
    config = run.config()
    row = LatencyRow(backend="onnxruntime", provider="CPU", precision="fp32", batch=1, p50_ms=1.5)
    gone = LatencyRow(backend="engine", precision="fp32", engine_sha256="gone", batch=1, p50_ms=0.5)
    report = LatencyReport(
        run="", weights=run.weights_sha256(), dataset="", device="cpu", hardware=config.hardware, versions={},
        method=Method(warmup_seconds=1, seconds=3, repeats=100), rows=[row, gone],
    )  # fmt: skip
    write_json(run.latency, report)
    assert sync(server, run.folder).returncode == 0
    jobs = {remote["job"]: name for name, remote in server.runs.items()}
    assert set(jobs) == {"train", "export", "engine", "bench"}
    by_id = {number: artifact["artifactTypeName"] for number, artifact in server.artifacts.items()}
    used = {(job, by_id[number]) for name, number in server.uses for job, remote in jobs.items() if remote == name}
    assert used == {
        ("train", "dataset"),
        ("export", "model"),
        ("engine", "onnx"),
        ("bench", "onnx"),
        ("bench", "engine"),
    }
    logged = {(artifact["runName"], artifact["artifactTypeName"]) for artifact in server.artifacts.values()}
    assert {(config.wandb_id, "model"), (jobs["export"], "onnx"), (jobs["engine"], "engine")} <= logged
    (model,) = server.artifacts_of("model")
    assert model["aliases"] == ["best", "latest"]
    assert all(artifact["state"] == "COMMITTED" for artifact in server.artifacts.values())
    summary = server.runs[config.wandb_id]["summary"]
    latencies = {key: value for key, value in summary.items() if key.startswith("latency_p50_ms/")}
    assert latencies == {"latency_p50_ms/onnxruntime_fp32_batch1": 1.5}
    count = len(server.artifacts)
    shutil.rmtree(run.folder / "wandb")
    assert sync(server, run.folder).returncode == 0
    assert len(server.artifacts) == count


def sibling(run: Run, name: str, accuracy: float, **changes: object) -> Run:
    """A copy of a run beside it with another test accuracy; `changes` are of its summary."""
    other = Run(shutil.copytree(run.folder, run.folder.with_name(name)))
    write_json(other.summary, msgspec.structs.replace(other.read_summary(), test_accuracy=accuracy, **changes))
    return other


def test_the_best_run_is_that_of_all_runs_beside_it(run: Run) -> None:
    assert best_run(run) == run.folder
    better, worse = sibling(run, "better", 1.0), sibling(run, "worse", 0.0)
    assert {best_run(one) for one in (run, better, worse)} == {better.folder}
    damaged = sibling(run, "damaged", 1.0)
    damaged.summary.write_text("{}")
    assert best_run(run) == better.folder
    with pytest.raises(UserError, match=r"summary\.json"):
        best_run(damaged)
    sibling(run, "held-out", 0.0, validation_images=10, best_validation_accuracy=1.0)
    assert best_run(run) is None, "test and validation accuracy were compared"


def test_the_best_weights_are_those_that_were_saved_not_those_of_the_best_epoch(run: Run) -> None:
    held_out = {"validation_images": 10}
    sibling(run, "peaked", 0.5, validation_accuracy=0.3, best_validation_accuracy=0.9, **held_out)
    steady = sibling(run, "steady", 0.5, validation_accuracy=0.6, best_validation_accuracy=0.6, **held_out)
    shutil.rmtree(run.folder)
    assert best_run(steady) == steady.folder


def test_a_dataset_may_have_a_name_that_is_too_long_for_wandb(run: Run) -> None:
    config = run.config()
    named = msgspec.structs.replace(config, dataset=msgspec.structs.replace(config.dataset, name="d" * 200))
    assert max(map(len, wandb_run.tags(named))) <= 64
    assert len(wandb_run._artifact_name(named.dataset.name)) <= 128


def test_a_run_that_cannot_be_uploaded_stops_no_other(server: Server, run: Run) -> None:
    (damaged, training) = (sibling(run, name, 0.0) for name in ("damaged", "training"))
    damaged.run_json.write_text("[1]")
    training.summary.unlink()
    shutil.rmtree(sibling(run, "no-weights", 0.0).checkpoints)
    with sibling(run, "a-damaged-row", 0.0).metrics.open("ab") as metrics:
        metrics.write(b"{}\n{}\n")
    sibling(run, "a-damaged-picture-list", 0.0).mistakes.write_text("{}")
    with training.lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = sync(server, run.folder.parent)
    assert done.returncode == 2
    outcomes = {Path(one["run"]).name: one.get("reason", "") for one in json.loads(done.stdout)}
    assert outcomes.pop("seed-0") == ""
    assert "run.json" in outcomes["damaged"]
    assert "still training" in outcomes["training"]
    assert "expected the weights" in outcomes["no-weights"]
    assert "metrics.jsonl" in outcomes["a-damaged-row"]
    assert all(f"{name}: not uploaded: " in done.stderr for name in outcomes)
    assert list(server.runs) == [run.config().wandb_id]


def test_an_uploaded_run_is_skipped_whatever_is_uploaded_before_it(run: Run) -> None:
    """The first upload of a call sets the variable of the server, which must not make the next run another."""
    digest = wandb_sync._digest(run, False, {})
    assert digest == wandb_sync._digest(run, False, {"WANDB_BASE_URL": account.base_url({})})
    assert digest != wandb_sync._digest(run, False, {"WANDB_BASE_URL": "https://wandb.example"})


@pytest.mark.every
def test_each_row_once_after_two_interruptions(server: Server, run: Run) -> None:
    """Killed twice in the middle of an upload; rows that have arrived are not sent again."""
    first = read_metrics(run)[0]
    steps = range(1, 61)
    run.metrics.write_bytes(
        b"".join(encode_row(msgspec.structs.replace(first, global_step=step, train_loss=1 / step)) for step in steps)
    )
    rows = metric_rows(run)
    for last in (20, 40):
        process = start("runner", "sync", run.folder, **online(server))

        def kill(count: int, last: int = last, process: Running = process) -> None:
            if count >= last:
                end_clients(process.pid)
                os.killpg(process.pid, signal.SIGKILL)
                raise ConnectionError

        server.after_rows = kill
        _, stderr = process.communicate(timeout=900)
        assert process.returncode == -signal.SIGKILL, stderr
        assert shown_rows(server, run) == rows[:last]
    server.after_rows = lambda count: None
    done = sync(server, run.folder)
    assert json.loads(done.stdout)[0]["rows"] == 20, done.stderr
    assert shown_rows(server, run) == rows


def test_online_training_logs_what_sync_would(server: Server, train, tmp_path: Path) -> None:
    """The key is in no file, in no output, and in no command line of this machine while rows arrive."""
    commands: set[str] = set()
    server.after_rows = lambda count: commands.update(command_lines())
    trained = train("tiny", **online(server))
    run = trained.run
    assert any("wandb-core" in command for command in commands)
    assert not any(KEY in command for command in commands)
    assert KEY not in trained.stdout + trained.stderr
    assert shown_rows(server, run) == metric_rows(run)
    history, artifacts = server.history(run.config().wandb_id), len(server.artifacts)
    assert {"figures/confusion", "figures/curves"} <= set(history[-1])
    assert sync(server, run.folder).returncode == 0
    assert server.history(run.config().wandb_id) == history
    assert len(server.artifacts) == artifacts
    assert_nowhere(KEY, tmp_path)


@pytest.mark.every
def test_a_resumed_run_repeats_no_row(server: Server, train, small_data: Path, tmp_path: Path) -> None:
    """Stopped by SIGTERM, resumed from an older checkpoint, and killed: W&B has each step once."""
    words = ["ending", "--recipe.batch-size", 12, "--recipe.epochs", 3, "--resume", "auto"]
    run = train(*words, END="train 41 0 SIGTERM", expect=75, **online(server)).run
    assert [row["global_step"] for row in shown_rows(server, run)] == [20, 35, 35, 40]
    shutil.rmtree(run.checkpoints / "step-41")  # so that step 40 is trained twice
    more = [*ENDING, "--data", small_data, "--runs", tmp_path, "--device", "cpu"]
    with start("runner", "train", *words, *more, END="train 42 0 SLEEP1", **online(server)) as process:
        wait_for_step(run.folder, 70, running=process)  # its rows are sent every 15 seconds
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert run.config().resumed[-1].step == 35
    train(*words, **online(server))
    assert run.config().resumed[-1].step == 70
    assert sync(server, run.folder).returncode == 0
    local, remote = (
        [row | dict.fromkeys(MEASURED) for row in rows] for rows in (metric_rows(run), shown_rows(server, run))
    )
    assert local == remote  # except speed and memory of steps that were trained twice


@pytest.mark.parametrize(
    "fault",
    [
        "refuses",
        pytest.param("never answers", marks=pytest.mark.every),
        pytest.param("is slow", marks=pytest.mark.every),
        pytest.param("is not there", marks=pytest.mark.every),
    ],
)
def test_training_survives_a_failing_server(server: Server, fault: str, train, tmp_path: Path) -> None:
    environ = online(server) | {"WANDB_INIT_TIMEOUT": "2"}
    if fault == "refuses":
        server.status = 500
    elif fault == "never answers":
        server.delay = 3600.0
    elif fault == "is slow":
        server.delay = 3.0
    else:
        environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"
    done = train("tiny", "--json", **environ)
    assert json.loads(done.stdout)["steps"] == read_metrics(done.run)[-1].global_step == 16
    assert "W&B" in done.stderr
    assert (
        f"continuing offline; upload what is missing after the run with: runner sync {done.run.folder}" in done.stderr
    )
    assert list(done.run.folder.glob("wandb/offline-run-*/*.wandb")) != []
    assert_nowhere(KEY, tmp_path)
    assert KEY not in done.stdout + done.stderr
    server.status, server.delay = 200, 0.0
    assert sync(server, done.run.folder).returncode == 0
    assert shown_rows(server, done.run) == metric_rows(done.run)


@pytest.mark.every
def test_training_survives_an_outage_in_the_middle(server: Server, small_data: Path, tmp_path: Path) -> None:
    """It goes on while the server refuses everything, and ends on time; each row arrives once."""
    words = [*ENDING, "--data", small_data, "--runs", tmp_path, "--device", "cpu"]
    run = Run(tmp_path / "ending" / "seed-0")
    arrived = threading.Event()

    def fail(count: int) -> None:
        if not arrived.is_set():
            arrived.set()
            server.status = 500

    server.after_rows = fail
    log = tmp_path / "log"  # no pipe, which W&B's process would keep open
    environ = {"END": "train 1 0 SLEEP1", "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1", **online(server)}
    with log.open("wb") as file:
        process = start("runner", "train", "ending", *words, stdout=file, stderr=file, **environ)
    wait_until(arrived.is_set, running=process)
    before = len(read_metrics(run))
    wait_until(lambda: len(read_metrics(run)) > before + 2, running=process)
    server.status = 200
    code, stderr = process.wait(900), log.read_text()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # W&B's process, which tries to upload the rest
    assert code == 0, stderr
    assert run.state() == "complete"
    assert read_metrics(run)[-1].global_step == run.read_summary().steps == 56
    assert shown_rows(server, run) == metric_rows(run), stderr
    assert sync(server, run.folder).returncode == 0
    assert shown_rows(server, run) == metric_rows(run)


@pytest.mark.every
def test_a_server_that_stays_away_delays_the_end_for_a_limited_time(
    server: Server, small_data: Path, tmp_path: Path
) -> None:
    """It refuses everything after the start of the run. A pipe, as to tee, ends with the run."""
    words = ["tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu", "--seeds", 0, 1]
    environ = online(server) | {"WANDB_INIT_TIMEOUT": "10"}
    process = start("runner", "train", *words, stderr=subprocess.STDOUT, **environ)
    wait_until(lambda: bool(server.runs), running=process)
    server.status = 500
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    server.status = 200
    for run in (Run(tmp_path / "tiny" / f"seed-{seed}") for seed in (0, 1)):
        assert output.count(f"runner sync {run.folder}") == 1, output
        assert sync(server, run.folder).returncode == 0
        assert shown_rows(server, run) == metric_rows(run)


def test_a_sync_without_server_or_key_fails_with_one_line(server: Server, run: Run) -> None:
    server.status = 500
    done = sync(server, run.folder, WANDB_INIT_TIMEOUT="2")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("runner: ")]
    assert len(lines) == 1
    assert "sync again later" in lines[0]
    done = runner("sync", run.folder, WANDB_MODE="", NETRC="/nowhere", WANDB_BASE_URL=server.url)
    assert done.returncode == 2
    assert "run: wandb login" in done.stderr


def test_a_report_is_created_and_then_updated(server: Server, run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        done = runner(
            "report", run.folder, "--out", tmp_path / "x.html", "--wandb", "someone/project", **online(server)
        )
        assert done.returncode == 0, done.stderr
    (report,) = server.reports.values()
    assert report["displayName"] == "Architectures compared"
    spec = json.loads(report["spec"])
    assert run.config().wandb_id in json.dumps(spec)
