"""Batch jobs on two nodes of a real SLURM, started here."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.runs import Run
from tests import slurm_cluster
from tests.conftest import ROOT, TINY, clean_environment, wait_for_step
from tests.test_resume import assert_the_same

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]  # they wait for daemons, and other tests run beside
ENDING = ("--experiments-from", "tests.ending", "--device", "cpu", "--precision", "fp32", "--recipe.epochs", 16)
CANARY = "canary" + "0" * 34  # stands for a W&B key


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    if absent := slurm_cluster.missing():
        pytest.skip(f"SLURM is not installed ({', '.join(absent)})")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root")
    folder = Path(tmp_path_factory.mktemp("slurm"))
    for parent in (folder, *folder.parents):  # munge is another user, and has to reach its socket
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    with slurm_cluster.Cluster(folder) as running:
        yield running


@pytest.fixture(scope="module")
def straight(cluster: slurm_cluster.Cluster, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two nodes that never stopped."""
    runs = tmp_path_factory.mktemp("straight")
    job = cluster.submit(
        "--nodes", 2, "--output", runs / "job.log", "slurm/train.sbatch", "ending", *ENDING,
        "--data", small_data, "--runs", runs,
        cwd=ROOT, environ=clean_environment(WANDB_MODE="disabled"),
    )  # fmt: skip
    assert cluster.wait(job, 400) == "COMPLETED", (runs / "job.log").read_text()
    return runs / "ending" / "seed-0"


@pytest.fixture(autouse=True)
def empty_queue(cluster: slurm_cluster.Cluster) -> None:
    """What a test before left behind is not this one's."""
    cluster.empty()


def test_two_nodes_train_one_model_and_the_key_stays_where_it_is(
    cluster: slurm_cluster.Cluster, small_data: Path, tmp_path: Path
) -> None:
    """By `launch submit`; the key is in no file of SLURM's, ours or W&B's, and in no command line."""
    words = ["submit", "tiny", *TINY, "--data", small_data, "--runs", tmp_path / "runs", "--nodes", 2]
    environ = clean_environment(SLURM_CONF=str(cluster.config), PATH=cluster.environ["PATH"], WANDB_API_KEY=CANARY)
    done = subprocess.run(
        [sys.executable, "-m", "launch", *map(str, words), "--device", "cpu"],
        capture_output=True, text=True, cwd=ROOT, env=environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not handed to SLURM" in done.stderr
    (job,) = re.findall(r"^job (\d+);", done.stdout)
    (log,) = [tmp_path / "runs" / "slurm" / f"runner-tiny-{job}.log"]
    assert cluster.wait(job, 400) == "COMPLETED", log.read_text()
    run = tmp_path / "runs" / "tiny" / "seed-0"
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["test_images"]) == (16, 200)
    files = [path for folder in (cluster.folder, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert any("environment" in path.name for path in files), "SLURM keeps environments elsewhere now"
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in done.stdout + done.stderr


def test_a_job_that_fails_says_so(cluster: slurm_cluster.Cluster, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    job = cluster.submit(
        "--nodes", 2, "--output", log, "slurm/train.sbatch", "tiny", *TINY, "--data", tmp_path / "nowhere",
        "--runs", tmp_path / "runs", "--device", "cpu",
        cwd=ROOT, environ=clean_environment(),
    )  # fmt: skip
    assert cluster.wait(job, 300) == "FAILED", log.read_text()
    assert "there is none; prepare one with" in log.read_text()
    assert not (tmp_path / "runs").exists()


def test_a_job_that_is_preempted_and_then_out_of_time_ends_with_the_same_bits(
    cluster: slurm_cluster.Cluster, straight: Path, small_data: Path, tmp_path: Path
) -> None:
    log, run = tmp_path / "job.log", tmp_path / "runs" / "ending" / "seed-0"
    job = cluster.submit(
        "--nodes", 2, "--signal", "B:USR1@60", "--output", log, "slurm/train.sbatch", "ending",
        *ENDING, "--data", small_data, "--runs", tmp_path / "runs",
        cwd=ROOT, environ=clean_environment(END="train 1 1 SLEEP2", WANDB_MODE="disabled"),
    )  # fmt: skip
    wait_for_step(run, 7, 240)
    cluster.run("scancel", "--batch", "--signal", "USR1", job, check=True)
    cluster.wait_for_requeue(job, 1, 120, TimeLimit=2)  # minutes; the signal comes one before, or a half more
    cluster.wait_for_requeue(job, 2, 240, TimeLimit="UNLIMITED")
    assert cluster.wait(job, 300) == "COMPLETED", log.read_text()
    assert log.read_text().count("stopped with a checkpoint; queued again") == 2
    assert len(Run(run).config()["resumed"]) == cluster.restart_count(job)
    assert_the_same(straight, run)
    assert not list(ROOT.glob(".stop-*"))


def test_a_job_that_is_cancelled_keeps_a_checkpoint_and_stays_away(
    cluster: slurm_cluster.Cluster, small_data: Path, tmp_path: Path
) -> None:
    log, run = tmp_path / "job.log", tmp_path / "runs" / "ending" / "seed-0"
    job = cluster.submit(
        "--nodes", 2, "--output", log, "slurm/train.sbatch", "ending",
        *ENDING, "--data", small_data, "--runs", tmp_path / "runs",
        cwd=ROOT, environ=clean_environment(END="train 1 1 SLEEP2", WANDB_MODE="disabled"),
    )  # fmt: skip
    wait_for_step(run, 7, 240)
    cluster.run("scancel", job, check=True)
    assert cluster.wait(job, 120) == "CANCELLED", log.read_text()
    assert "queued again" not in log.read_text()
    assert list(run.glob("checkpoints/step-*"))
    assert not list(ROOT.glob(".stop-*"))


def test_one_task_of_a_sweep_is_queued_again_alone(
    cluster: slurm_cluster.Cluster, straight: Path, small_data: Path, tmp_path: Path
) -> None:
    """Both tasks run at once, each with a rendezvous of its own; the sweep knows how far they are."""
    words = ["sweep", "ending", *ENDING, "--data", small_data, "--runs", tmp_path, "--seeds", 0, 1, "--name", "s"]
    environ = clean_environment(SLURM_CONF=str(cluster.config), PATH=cluster.environ["PATH"], WANDB_MODE="disabled")

    def sweep(**more: str) -> str:
        command = [sys.executable, "-m", "launch", *map(str, words), "--on", "slurm", "--nodes", "2"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ | more, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (job,) = re.findall(r"^job (\d+), an array of 2;", sweep(END="train 1 1 SLEEP1"), re.M)
    runs = [tmp_path / "ending" / f"s-seed-{seed}" for seed in (0, 1)]
    for run in runs:
        wait_for_step(run, 7, 240)
    assert sweep() == "2 trials: 2 running\n"
    cluster.run("scancel", "--batch", "--signal", "USR1", f"{job}_0", check=True)
    cluster.wait_for_requeue(f"{job}_0", 1, 120)
    logs = tmp_path / "slurm"
    for task in (0, 1):
        told = [log.read_text()[-3000:] for log in logs.glob(f"*_{task}.log")]
        assert cluster.wait(f"{job}_{task}", 400) == "COMPLETED", told
    assert sweep() == "2 trials: 2 whole\n"
    assert len(Run(runs[0]).config()["resumed"]) == 1
    assert "resumed" not in Run(runs[1]).config()
    assert_the_same(straight, runs[0])


@pytest.mark.parametrize("lost", ["n1", "n2"])
def test_a_lost_node_costs_what_was_after_the_last_checkpoint(
    cluster: slurm_cluster.Cluster, straight: Path, small_data: Path, tmp_path: Path, lost: str
) -> None:
    """The node of the batch script and the first rank, and the other. A third takes its place."""
    log, run = tmp_path / "job.log", tmp_path / "runs" / "ending" / "seed-0"
    job = cluster.submit(
        "--nodes", 2, "--output", log, "slurm/train.sbatch", "ending", *ENDING,
        "--data", small_data, "--runs", tmp_path / "runs",
        cwd=ROOT, environ=clean_environment(END="train 8 1 SLEEP1", WANDB_MODE="disabled"),
    )  # fmt: skip
    wait_for_step(run, 7, 240)
    cluster.lose_node(lost)
    cluster.wait_for_requeue(job, 1, 240)
    assert cluster.wait(job, 400) == "COMPLETED", log.read_text()
    assert_the_same(straight, run)
