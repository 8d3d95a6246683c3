"""The lock of a run folder, also where nodes share no file locks."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from launch.sweep import Sweep
from runner.common.errors import UserError
from runner.run import lock
from runner.run.folder import Run
from runner.run.lock import Owner, is_locked, locked
from tests.support.configs import CONFIG
from tests.support.processes import ENDING, TINY, runner, start, wait_for_step, wait_until

ELSEWHERE = Owner(1, "another-node", "7")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lock"


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that is mounted without locks."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_sweep_waits_for_another_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nodes share no file locks: otherwise, both would submit the same trials."""
    monkeypatch.setattr(lock, "STALE_SECONDS", 2.0)
    sweep = Sweep(("tiny",), data=tmp_path, runs=tmp_path)
    sweep.folder.mkdir(parents=True)
    (sweep.folder / "submit.lock").write_bytes(msgspec.json.encode(ELSEWHERE))
    start = time.monotonic()
    with sweep.locked("submit.lock"):
        assert time.monotonic() - start > 1.0


def test_the_owner_is_named_and_then_forgotten(file: Path) -> None:
    assert not is_locked(file)
    with locked(file, 1, "7"):
        assert is_locked(file)
        assert msgspec.json.decode(file.read_bytes(), type=Owner) == Owner(os.getpid(), socket.gethostname(), "7")
        with (
            pytest.raises(UserError, match=f"process {os.getpid()} on .*, job 7, uses it"),
            locked(file, 0),
        ):
            pass
    assert not is_locked(file)
    assert file.read_bytes() == b""


def test_a_process_that_lost_its_lock_leaves_it_to_the_new_owner(
    file: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after it was suspended for long, where file locks do not protect it."""
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    other = msgspec.json.encode(ELSEWHERE)
    with locked(file, 0):
        file.write_bytes(other)
        os.utime(file, (0, 1000))
        wait_until(lambda: "lock: taken by process 1 on another-node" in capsys.readouterr().err)
        os.utime(file, (0, 1000))  # again, because a heartbeat may have started before
        time.sleep(0.2)
        assert file.stat().st_mtime == 1000
    assert file.read_bytes() == other


def test_an_owner_on_another_node_is_alive_while_it_gives_signs(file: Path) -> None:
    """This node could lock the file, because file locks are not shared."""
    file.write_bytes(msgspec.json.encode(ELSEWHERE))
    assert is_locked(file)
    with pytest.raises(UserError, match="process 1 on another-node, job 7, uses it"), locked(file, 0, "8"):
        pass
    os.utime(file, (0, time.time() - lock.STALE_SECONDS - 1))
    assert not is_locked(file)
    with locked(file, 0, "8"):
        pass


@pytest.mark.parametrize("locks", ["with-locks", "without-locks"])
def test_only_an_earlier_start_of_the_same_job_is_dead(locks: str, file: Path, request: pytest.FixtureRequest) -> None:
    """A job that is requeued does not wait for itself; a second step of one allocation, on another node, does."""
    if locks == "without-locks":
        request.getfixturevalue("no_locks")
    file.write_bytes(msgspec.json.encode(ELSEWHERE))
    with pytest.raises(UserError, match="process 1 on another-node, job 7, uses it"), locked(file, 0, "7"):
        pass
    with locked(file, 0, "7", start=1):
        assert msgspec.json.decode(file.read_bytes(), type=Owner).start == 1


def test_the_lock_of_a_lost_node_is_replaced(file: Path) -> None:
    """As on NFS, whose server keeps it."""
    file.write_bytes(msgspec.json.encode(ELSEWHERE))
    with file.open() as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="process 1 on another-node"), locked(file, 0):
            pass
        os.utime(file, (0, time.time() - lock.STALE_SECONDS - 1))
        assert is_locked(file)
        os.utime(file, (0, time.time() - lock.ABANDONED_SECONDS - 1))
        assert not is_locked(file)
        with locked(file, 0):
            assert is_locked(file)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_that_is_no_file_is_refused_and_nothing_is_emptied(file: Path, tmp_path: Path, kind: str) -> None:
    """A run folder from someone else could hold it."""
    victim = tmp_path / "victim"
    victim.write_text("text")
    file.symlink_to(victim) if kind == "link" else os.mkfifo(file)
    assert not is_locked(file)
    with pytest.raises(UserError, match="expected a file, found a link or pipe"), locked(file, 0):
        pass
    assert victim.read_text() == "text"


def test_who_waited_for_a_replaced_file_does_not_hold_the_new_one(file: Path) -> None:
    file.write_bytes(msgspec.json.encode(ELSEWHERE))
    results: list[str] = []

    def wait() -> None:
        try:
            with locked(file, 2):
                results.append("held")
        except UserError:
            results.append("refused")

    with file.open() as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.3)
        os.utime(file, (0, time.time() - lock.ABANDONED_SECONDS - 1))
        with locked(file, 5):
            fcntl.flock(kept, fcntl.LOCK_UN)
            waiter.join()
            assert results == ["refused"]


@pytest.mark.usefixtures("no_locks")
def test_without_file_locks_the_process_counts(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    file.write_bytes(msgspec.json.encode(Owner(other.pid, socket.gethostname())))
    assert is_locked(file)
    with pytest.raises(UserError, match=f"process {other.pid} on"), locked(file, 0):
        pass
    other.kill()
    other.wait()
    assert not is_locked(file)
    with locked(file, 0):
        assert "no file locks here (No locks available); a process on another node" in capsys.readouterr().err


def test_the_owner_gives_signs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    with locked(file, 0):
        os.utime(file, (0, 0))
        end = time.monotonic() + 60
        while file.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert file.stat().st_mtime > 0


def test_a_lock_of_an_earlier_version_or_of_a_stranger_is_no_owner(file: Path) -> None:
    for content in ("process 1 on somewhere\n", '{"more": ' + "[" * 10_000):
        file.write_text(content)
        assert not is_locked(file)
        with locked(file, 0):
            pass


def test_a_run_that_trains_on_another_node_is_running_and_refused(small_data: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny" / "seed-0")
    run.folder.mkdir(parents=True)
    run.run_json.write_bytes(msgspec.json.encode(CONFIG, enc_hook=str))
    run.lock.write_bytes(msgspec.json.encode(ELSEWHERE))
    assert run.state() == "running"
    words = ["train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu", "--overwrite"]
    for job in ("", "7"):  # another step of its allocation
        done = runner(*words, SLURM_JOB_ID=job)
        assert done.returncode == 2
        assert "process 1 on another-node, job 7, uses it; wait for it" in done.stderr
        assert run.run_json.exists()
    done = runner(*words, "--max-steps", 1, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert done.returncode == 0, done.stderr


def test_a_run_is_trained_by_one_process_at_a_time(small_data: Path, tmp_path: Path) -> None:
    """A second process is refused, or waits with --resume auto: once the first is killed, it continues the run."""
    words = ["train", "ending", *ENDING, "--data", small_data, "--runs", tmp_path, "--device", "cpu", "--epochs", 400]
    run = Run(tmp_path / "ending" / "seed-0")
    with start("runner", *words, "--checkpoint-every", 1, END="train 4 0 SLEEP1") as first:
        wait_for_step(run.folder, 2, running=first)
        assert run.state() == "running"
        second = runner(*words, "--overwrite")
        assert second.returncode == 2
        assert f"process {first.pid} on {socket.gethostname()} uses it" in second.stderr
        with start("runner", *words, "--resume", "auto", "--max-steps", 9) as third:
            first.kill()
            _, stderr = third.communicate(timeout=900)
    assert (first.returncode, third.returncode) == (-signal.SIGKILL, 0), stderr
    (resumed,) = run.config().resumed
    assert resumed.step >= 2
    assert run.state() == "complete"
