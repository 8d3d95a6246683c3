"""Training on files that fail as those of a file server do: the result is that of a quiet run, or one line says why."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest

from runner.run.folder import Run
from runner.run.metrics import read_metrics
from runner.training import checkpoint
from tests.conftest import Once
from tests.support import wandb_file
from tests.support.compare import MEASURED, assert_same_run
from tests.support.faulty_files import FaultyFiles, build, synced_sizes
from tests.support.processes import ENDING, TINY, launch, module, runner, start, wait_for_step
from tests.support.wandb_server import Server

ANYTHING = "* * !wandb,lock any 40 8; * * !wandb,lock kill 900 1"


@pytest.fixture
def files(once: Once, tmp_path: Path) -> FaultyFiles:
    return FaultyFiles(once("faulty-files", build) / "faulty_files.so", tmp_path / "runs", tmp_path / "faults.log")


@pytest.fixture
def quiet(files: FaultyFiles) -> dict[str, str]:
    """The variables of a process in which no call fails."""
    return {"LD_PRELOAD": str(files.library)}


def arguments(data: Path, runs: Path, *more: object) -> list[object]:
    """8 epochs of 7 steps."""
    return ["train", "ending", *ENDING, "--data", data, "--runs", runs, "--resume", "auto", "--device", "cpu", *more]


def without_resume(words: list[object]) -> list[object]:
    return [word for word in words if word not in ("--resume", "auto")]


def assert_one_line(done: subprocess.CompletedProcess[str], ranks: int | None = None) -> None:
    """Asserts that a start failed with a message, and without a traceback but that of the launcher."""
    assert done.returncode in ((1,) if ranks else (1, 2)), done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("runner: ")]
    reasons = [line for line in lines if "another rank has ended" not in line and "no file locks" not in line]
    assert reasons, done.stderr
    assert_no_traceback(done)


def assert_no_traceback(done: subprocess.CompletedProcess[str]) -> None:
    assert not re.search(r'File ".*/runner/(?!__main__)', done.stderr), done.stderr


def outcome(run: Run) -> dict[str, object]:
    """What must be the same in two runs, besides what `assert_same_run` compares."""
    with np.load(run.predictions) as arrays:
        return {name: arrays[name].tobytes() for name in arrays.files}


def assert_same_outcome(one: Run, other: Run) -> None:
    assert_same_run(one.folder, other.folder)
    assert outcome(one) == outcome(other)


@pytest.fixture
def stopped(files: FaultyFiles, small_data: Path) -> Run:
    """A run that was stopped at step 5, with the checkpoints of steps 4 and 5."""
    run = Run(files.below / "ending" / "seed-0")
    (run.folder / "stop").parent.mkdir(parents=True)
    words = arguments(small_data, files.below, "--checkpoint-every", 4, "--max-steps", 14)
    done = runner(*words, LD_PRELOAD=str(files.library), END="train 5 0 SIGTERM")
    assert done.returncode == 75, done.stderr
    return run


def test_errors_that_pass_are_tried_again(small_data: Path, files: FaultyFiles, stopped: Run) -> None:
    """Even two in a row; the run resumes from its newest checkpoint and not from an earlier one."""
    rules = (
        "* open /run.json ESTALE 1 2", "* list checkpoints EIO 1 1", "* readdir checkpoints ESTALE 1 1",
        "* stat step-5/manifest.json EIO 1 2", "* read step-5/state.pt ESTALE 1 2", "* read /metrics.jsonl EIO 1 2",
        "* sync .run.json.part EIO 1 1", "* unlink ended.json ESTALE 1 1", "* sync .writing/state.pt EIO 1 2",
        "* rename checkpoints/step-14 ESTALE 1 1", "* create .predictions EIO 1 1", "* rename summary.json ESTALE 1 1",
    )  # fmt: skip
    words = arguments(small_data, files.below, "--max-steps", 14)
    done = runner(*words, **files.environ(";".join(rules)))
    assert done.returncode == 0, done.stderr
    assert len(files.faults()) == 17
    assert f"{stopped.run_json}: Stale file handle; trying again" in done.stderr
    assert [entry.step for entry in stopped.config().resumed] == [5]
    assert [row.global_step for row in read_metrics(stopped)] == [7, 7, 14, 14]


STAYING = (
    "open /run.json EIO", "list /checkpoints EIO", "readdir /checkpoints ESTALE", "stat /run.json ESTALE",
    "read /metrics.jsonl EIO", "create .metrics.jsonl.part ENOSPC", "create .run.json.part EIO", "write /lock EIO",
    "create /metrics.jsonl ESTALE", "write /metrics.jsonl EIO", "sync /metrics.jsonl EIO", "mkdir .writing EIO",
    "write .writing/model.safetensors ENOSPC", "sync .writing/state.pt EIO", "rename checkpoints/step- EIO",
    "create .predictions EIO", "sync .summary.json.part EIO", "create .summary.json.part ENOSPC",
)  # fmt: skip


DURING_TRAINING = ("write /metrics.jsonl EIO", "sync /metrics.jsonl EIO", "rename checkpoints/step- EIO")


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(("list /checkpoints EIO", "write /metrics.jsonl EIO"), id="two"),
        pytest.param(STAYING, id="all", marks=pytest.mark.every),
    ],
)
def test_an_error_that_stays_is_one_line_and_nothing_is_lost(
    faults: tuple[str, ...], small_data: Path, tmp_path: Path, files: FaultyFiles, stopped: Run
) -> None:
    words = arguments(small_data, files.below, "--max-steps", 14)
    before = stopped.metrics.read_bytes()
    for fault in faults:
        done = runner(*words, **files.environ(f"* {fault} 1 1000"))
        assert_one_line(done)
        messages = [line for line in done.stderr.splitlines() if line.startswith("runner: ")]
        assert len(messages) == 1, done.stderr
        assert re.search("repeat the command|resume with --resume auto|choose another folder", messages[0]), messages
        if fault in DURING_TRAINING:
            assert done.returncode == 1
            assert "resume with --resume auto" in messages[0]
            assert messages[0].split(": ", 2)[2] == stopped.read_ending().reason
        assert not stopped.summary.exists(), fault
        assert stopped.metrics.read_bytes().startswith(before)
        files.cut_power()
    done = runner(*words, LD_PRELOAD=str(files.library))
    assert done.returncode == 0, done.stderr
    assert stopped.config().resumed[0].step == 5
    straight = Run(tmp_path / "straight" / "ending" / "seed-0")
    done = runner(*arguments(small_data, tmp_path / "straight", "--max-steps", 14), LD_PRELOAD=str(files.library))
    assert done.returncode == 0, done.stderr
    assert_same_outcome(straight, stopped)


def test_a_checkpoint_that_cannot_be_read_is_reported_and_the_previous_one_is_used(
    small_data: Path, files: FaultyFiles, stopped: Run
) -> None:
    words = arguments(small_data, files.below, "--max-steps", 14)
    done = runner(*words, **files.environ("* read step-5/state.pt EIO 1 1000"))
    assert done.returncode == 0, done.stderr
    assert "step-5/state.pt: cannot be read (Input/output error)" in done.stderr
    assert [entry.step for entry in stopped.config().resumed] == [4]


def test_checkpoints_that_cannot_be_read_now_are_not_called_damaged(
    small_data: Path, files: FaultyFiles, stopped: Run
) -> None:
    """The remedy for damaged ones would delete them."""
    done = runner(*arguments(small_data, files.below), **files.environ("* read state.pt,manifest.json ESTALE 1 1000"))
    assert_one_line(done)
    assert "step-5/manifest.json: cannot be read (Stale file handle); repeat the command" in done.stderr
    assert "--overwrite" not in done.stderr


def test_what_a_checkpoint_needs_is_on_disk_before_its_rename(small_data: Path, files: FaultyFiles) -> None:
    """Its own files and the rows up to its step; and before the summary, which marks the end, all results."""
    run = Run(files.below / "ending" / "seed-0")
    words = arguments(small_data, files.below, "--checkpoint-every", 3, "--checkpoint-seconds", 0, "--max-steps", 14)
    done = runner(*words, **files.environ(""))
    assert done.returncode == 0, done.stderr
    rows, events = read_metrics(run), files.events()
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    committed = []
    for k, event in enumerate(events):
        if (event.kind, event.call, event.path.parent) == ("done", "rename", run.checkpoints):
            name = re.fullmatch(r"step-(\d+)", event.path.name)
            if name is None:
                continue
            synced = synced_sizes(events[: k + 1])
            assert all(synced[event.path / file] > 0 for file in ("model.safetensors", "state.pt", "manifest.json"))
            assert event.path.with_name(f".{event.path.name}.writing") in [
                e.path for e in events[:k] if e.call == "sync"
            ]
            needed = sum(len(line) for line, row in zip(lines, rows, strict=True) if row.global_step <= int(name[1]))
            assert synced.get(run.metrics, 0) >= needed, event
            committed.append(int(name[1]))
        elif (event.call, event.path) == ("rename", run.summary):
            synced = synced_sizes(events[: k + 1])
            assert synced[run.predictions] == run.predictions.stat().st_size
            assert synced[run.metrics] == len(b"".join(lines))
            committed.append("summary")
    assert committed == [3, 6, 7, 9, 12, 14, "summary"]


@pytest.mark.parametrize("zeros", [False, True])
def test_a_run_that_lost_power_before_its_first_checkpoint_starts_over(
    zeros: bool, small_data: Path, files: FaultyFiles
) -> None:
    words = arguments(small_data, files.below, "--evaluate-every", 4, "--max-steps", 14)
    done = runner(*words, **files.environ(""), END="train 13 0 SIGKILL")
    assert done.returncode != 0
    run = Run(files.below / "ending" / "seed-0")
    assert run.metrics in files.cut_power(zeros)
    done = runner(*words, LD_PRELOAD=str(files.library))
    assert done.returncode == 0, done.stderr
    assert [row.global_step for row in read_metrics(run)] == [7, 7, 14, 14]


def test_errors_at_the_stop_file_do_not_end_a_run(small_data: Path, files: FaultyFiles) -> None:
    words = arguments(small_data, files.below, "--max-steps", 3)
    done = runner(*words, **files.environ("* stat /stop ESTALE,EIO,EACCES 1 1000"))
    assert done.returncode == 0, done.stderr
    assert {event.path.name for event in files.faults()} == {"stop"}


def test_a_checkpoint_that_cannot_be_pruned_is_no_error(small_data: Path, files: FaultyFiles) -> None:
    words = arguments(small_data, files.below, "--checkpoint-every", 3, "--max-steps", 7)
    run = Run(files.below / "ending" / "seed-0")
    for rules in ("* unlink,rmdir,rename .removed EIO,EACCES 1 1000", "* list,readdir /checkpoints EIO 1 1000"):
        shutil.rmtree(run.folder, ignore_errors=True)
        done = runner(*without_resume(words), **files.environ(rules))
        assert done.returncode == 0, done.stderr
        assert files.faults()
        files.log.unlink()
        assert len(list(run.checkpoints.iterdir())) > 1
        assert checkpoint.latest(run).name == "step-7"
        done = runner(*words, LD_PRELOAD=str(files.library))
        assert done.returncode == 0, done.stderr
        assert [path.name for path in run.checkpoints.iterdir()] == ["step-7"]


def test_a_listing_without_the_newest_entry_deletes_no_newest_checkpoint(small_data: Path, files: FaultyFiles) -> None:
    words = arguments(small_data, files.below, "--checkpoint-every", 3, "--max-steps", 14)
    done = runner(*words, **files.environ("* list /checkpoints stale 1 1000"))
    assert done.returncode == 0, done.stderr
    assert len(files.faults()) > 5
    assert checkpoint.latest(Run(files.below / "ending" / "seed-0")).name == "step-14"


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.every)])
def test_ranks_that_see_other_files_resume_from_the_checkpoint_that_the_first_chose(
    ranks: int, small_data: Path, tmp_path: Path, files: FaultyFiles, quiet: dict[str, str]
) -> None:
    """Rank 1 sees the newest checkpoint late, and never in a listing; the result is that of a quiet run."""
    late = "1 list checkpoints stale 1 1000; 1 stat,open step-9 ENOENT 1 9; 1 read step-9 ESTALE 1 4"
    words = ("--checkpoint-every", 3, "--epochs", 2)
    done = launch(ranks, *arguments(small_data, files.below, *words), **quiet, END="train 9 0 SIGTERM")
    assert "stopped at step 9" in done.stderr
    for runs, rules in ((files.below, late), (tmp_path / "straight", "")):
        done = launch(ranks, *arguments(small_data, runs, *words), **files.environ(rules))
        assert done.returncode == 0, done.stderr
    assert len(files.faults()) >= 13
    assert {event.rank for event in files.faults()} == {"1"}
    run, straight = (Run(runs / "ending" / "seed-0") for runs in (files.below, tmp_path / "straight"))
    assert [entry.step for entry in run.config().resumed] == [9]
    assert_same_outcome(straight, run)


@pytest.mark.parametrize("second", ["* lock /lock ENOLCK 1 1000", ""], ids=["none has locks", "one has locks"])
def test_without_file_locks_two_processes_do_not_train_one_run(
    second: str, small_data: Path, files: FaultyFiles
) -> None:
    words = [*without_resume(arguments(small_data, files.below)), "--epochs", 400]
    run = Run(files.below / "ending" / "seed-0")
    with start("runner", *words, **files.environ("* lock /lock EOPNOTSUPP 1 1000"), END="train 9 0 SLEEP1") as process:
        wait_for_step(run.folder, 7, running=process)
        record = run.run_json.read_bytes()
        refused = runner(*words, "--overwrite", **files.environ(second))
        assert process.poll() is None
        process.terminate()
        _, stderr = process.communicate(timeout=900)
    assert process.returncode == 75, stderr
    assert "lock: no file locks here (Operation not supported)" in stderr
    assert refused.returncode == 2, refused.stderr
    assert f"process {process.pid} on" in refused.stderr
    assert run.run_json.read_bytes() == record
    done = runner(*words, "--overwrite", "--max-steps", 1, **files.environ(second))
    assert done.returncode == 0, done.stderr


@pytest.mark.every
def test_a_sweep_without_file_locks_says_what_that_means(small_data: Path, files: FaultyFiles) -> None:
    words = ["launch", "sweep", "tiny", *TINY, "--data", small_data, "--runs", files.below, "--device", "cpu"]
    done = module(*words, "--max-steps", 1, **files.environ("* lock * ENOLCK 1 1000"))
    assert done.returncode == 0, done.stderr
    assert "sweep.lock: no file locks here (No locks available); a process on another node" in done.stderr


def train_through_faults(
    files: FaultyFiles, ranks: int, words: list[object], rules: str, seed: int, **environ: str
) -> int:
    """Restarts training until it ends, without faults after many failures; returns how many faults there were."""
    count = 0
    for life in range(12):
        done = launch(ranks, *words, **files.environ(rules if life < 10 else "", f"{seed}.{life}"), **environ)
        kinds = [event.kind for event in files.faults()]
        count += len(kinds)
        if done.returncode == 0:
            break
        assert life < 10, done.stderr
        if "kill" in kinds:
            assert_no_traceback(done)
        else:
            assert_one_line(done, ranks)
        files.cut_power(zeros=life % 2 == 1)
    done = launch(ranks, *words, LD_PRELOAD=str(files.library), **environ)
    assert done.returncode == 0, done.stderr
    return count


def logged_rows(run: Run) -> dict[int, dict]:
    """The rows in all of W&B's offline files by their index; the same index always has the same row."""
    rows: dict[int, dict] = {}
    for path in sorted(run.folder.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_file.records(path):
            if record.WhichOneof("record_type") == "history":
                items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                row = {key: json.loads(value) for key, value in items.items()}
                index = row.pop("_step")
                if any(key.startswith("train") for key in row):
                    rows.setdefault(index, row)
                    assert comparable(rows[index]) == comparable(row), f"{path}: row {index}"
    return rows


def comparable(row: dict) -> dict:
    """A row of metrics without what differs between two equal runs."""
    return {key: value for key, value in row.items() if not key.startswith("_") and key not in MEASURED}


@pytest.mark.every
@pytest.mark.processes
def test_through_many_faults_a_run_and_its_w_and_b_rows_are_those_of_a_quiet_one(
    small_data: Path, tmp_path: Path, files: FaultyFiles, quiet: dict[str, str]
) -> None:
    """On two ranks, restarted after each kill and each loss of power, which takes what was not synced.

    W&B's offline files never have two versions of a row, and a sync adds the rows that a kill took from them.
    """
    straight = Run(tmp_path / "straight" / "ending" / "seed-0")
    done = launch(2, *arguments(small_data, tmp_path / "straight", "--checkpoint-every", 3), **quiet)
    assert done.returncode == 0, done.stderr
    expected = [comparable(msgspec.to_builtins(row)) for row in read_metrics(straight)]
    count, seed = 0, 0
    with Server() as server:
        online = {"WANDB_MODE": "online", "WANDB_API_KEY": "6" * 39 + "b", "WANDB_BASE_URL": server.url}
        while seed < 3 or count < 200:
            shutil.rmtree(files.below, ignore_errors=True)
            run = Run(files.below / "ending" / "seed-0")
            words = arguments(small_data, files.below, "--checkpoint-every", 3)
            count += train_through_faults(files, 2, words, ANYTHING, seed, WANDB_MODE="offline")
            assert_same_outcome(straight, run)
            logged = logged_rows(run)
            assert {index: comparable(row) for index, row in logged.items()} == {
                index: expected[index] for index in logged
            }
            done = runner("sync", run.folder, **online)
            assert done.returncode == 0, done.stderr
            rows = [row for row in server.history(run.config().wandb_id) if any(key.startswith("train") for key in row)]
            assert [comparable(row) for row in rows] == expected
            seed += 1
