"""What goes wrong on clusters: each fault ends in bounded time, with one clear message and no process left
behind."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.run.folder import Run
from runner.training import checkpoint
from tests.support.processes import (
    ENDING,
    children_of,
    gone,
    launch,
    module,
    python,
    runner,
    start_ranks,
    taken_port,
    wait_for_step,
)


def ending(data: Path, runs: Path, *more: object) -> list[object]:
    return ["train", "ending", *ENDING, "--data", data, "--runs", runs, "--device", "cpu", *more]


@pytest.mark.processes
def test_a_hung_rank_ends_all_and_stacks_tell_where(small_data: Path, tmp_path: Path) -> None:
    words = ending(small_data, tmp_path, "--hang-timeout", 30)
    with start_ranks(3, *words, END="train 9 1 SIGSTOP") as process:
        wait_for_step(tmp_path / "ending" / "seed-0", 7, running=process)
        ranks = children_of(process.pid)
        _, output = process.communicate(timeout=900)
    assert process.returncode == 1
    hung = [rank for rank in range(3) if f"runner: rank {rank} of 3 completed no step for" in output]
    assert hung in ([0], [2], [0, 2])  # a rank that waits for one that has ended may report that first
    for rank in {0, 2} - {*hung}:
        assert f"rank {rank} of 3: another rank exited" in output
    assert "in train" in output  # a stack
    assert len(ranks) == 3
    assert gone(ranks, 5)


@pytest.mark.processes
def test_ranks_end_with_their_launcher(small_data: Path, tmp_path: Path) -> None:
    with start_ranks(2, *ending(small_data, tmp_path), END="train 9 1 SLEEP1") as process:
        wait_for_step(tmp_path / "ending" / "seed-0", 7, running=process)
        ranks = children_of(process.pid)
        process.kill()
    assert len(ranks) == 2
    assert gone(ranks, 10)


@pytest.mark.every
@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigusr1_is_for_ranks_because_it_kills_the_launcher(ranks: int, small_data: Path, tmp_path: Path) -> None:
    """And with it all ranks, so that the run resumes from its last checkpoint; a rank saves another one first."""
    words = ending(small_data, tmp_path, "--checkpoint-every", 3, "--resume", "auto")
    run = Run(tmp_path / "ending" / "seed-0")
    for target, state in (("launcher", "crashed"), ("rank", "stopped")):
        with start_ranks(ranks, *words, END=f"train 1 {ranks - 1} SLEEP1") as process:
            wait_for_step(run.folder, 3 if target == "launcher" else 6)
            started = children_of(process.pid)
            assert len(started) == ranks
            os.kill(process.pid if target == "launcher" else started[-1], signal.SIGUSR1)
            _, output = process.communicate(timeout=900)
        assert process.returncode == (-signal.SIGUSR1 if target == "launcher" else 1), output
        assert gone(started, 10)
        assert run.state() == state
        assert ("resume with --resume auto" in output) == (target == "rank")
    assert launch(ranks, *words).returncode == 0
    first, second = [entry.step for entry in run.config().resumed]
    assert first % 3 == 0
    assert second > first


@pytest.mark.processes
@pytest.mark.parametrize(
    ("moment", "message", "last"),
    [
        ("train 9 1 NAN", "the training loss is nan within the 20 steps before step 9", "step-8"),
        pytest.param("eval 4 1 NAN", "the test loss is nan at step 7", "step-6", marks=pytest.mark.every),
    ],
)
def test_nan_on_one_rank_stops_all_and_is_never_kept(
    moment: str, message: str, last: str, small_data: Path, tmp_path: Path
) -> None:
    words = ending(small_data, tmp_path, "--checkpoint-every", 1)
    done = launch(3, *words, END=moment)
    assert done.returncode == 1
    assert done.stderr.count(message) == 1, done.stderr
    assert "--precision fp32" in done.stderr
    run = Run(tmp_path / "ending" / "seed-0")
    assert checkpoint.latest(run).name == last
    assert not run.summary.exists()
    assert "NaN" not in run.metrics.read_text()


@pytest.mark.processes
def test_a_taken_port_does_not_matter_on_one_node_and_is_said_on_several(small_data: Path, tmp_path: Path) -> None:
    launcher = ["accelerate.commands.launch", "--config_file"]
    with taken_port() as port:
        words = ["--main_process_port", port, "-m", "runner", *ending(small_data, tmp_path, "--max-steps", 2)]
        one = module(*launcher, "launch/cpu.yaml", "--num_processes", 2, *words)
        assert one.returncode == 0, one.stderr
        several = ["--num_machines", 2, "--num_processes", 2, "--machine_rank", 0, "--main_process_ip", "127.0.0.1"]
        two = module(*launcher, "launch/multi_node.yaml", *several, *words, "--overwrite")
    assert two.returncode != 0
    assert "EADDRINUSE" in two.stderr or f"port `{port}`" in two.stderr


def test_out_of_memory_names_the_batch_and_what_to_try(small_data: Path, tmp_path: Path) -> None:
    # On two cores, because each thread reserves address space.
    limited = "import os, resource, sys; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2]); "
    limited += "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); "
    limited += "from runner.cli import main; main(sys.argv[1:])"
    words = ["--recipe.resize", 1024, "--recipe.batch-size", 480, "--recipe.validation", 0, "--recipe.patience", 0]
    done = python("-c", limited, *ending(small_data, tmp_path, *words))
    assert done.returncode == 1, done.stderr
    assert "out of memory with 480 images at a time" in done.stderr
    assert "increase --recipe.accumulate (batch norm then sees fewer images at a time)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.every
@pytest.mark.processes
def test_the_rank_that_runs_out_of_memory_says_so(small_data: Path, tmp_path: Path) -> None:
    done = launch(2, *ending(small_data, tmp_path), END="train 9 1 MEMORY")
    assert done.returncode == 1
    assert done.stderr.count("rank 1 of 2: out of memory with 30 images at a time (batch 60 over 2 ranks)") == 1


@pytest.fixture
def little_room(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    folder = tmp_path / "little"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=False)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.root
def test_a_full_disk_leaves_the_last_good_checkpoint(small_data: Path, little_room: Path) -> None:
    words = ending(small_data, little_room, "--architecture.arguments.channels", 24)
    run = Run(little_room / "ending" / "seed-0")
    done = runner(*words, "--max-steps", 7)
    assert done.returncode == 0, done.stderr
    run.summary.unlink()
    free = os.statvfs(little_room)
    (little_room / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - (100 << 10)))
    done = runner(*words, "--resume", "auto")
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("no space left on the disk") == 1
    assert "Traceback" not in done.stderr
    assert "step-7 stays" in done.stderr
    (little_room / "filler").unlink()
    done = runner(*words, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert run.config().resumed[-1].step == 7


@pytest.fixture
def read_only(small_data: Path, tmp_path: Path) -> Iterator[Path]:
    """The small dataset where nothing can be written."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if subprocess.run(["mount", "--bind", small_data, folder], check=False).returncode != 0:
        pytest.skip("needs the right to mount")
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.root
def test_a_read_only_dataset_is_enough(read_only: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Read-only"):
        (read_only / "probe").touch()
    done = runner(*ending(read_only, tmp_path / "runs", "--max-steps", 2))
    assert done.returncode == 0, done.stderr
