"""Batch jobs on two nodes of a real SLURM cluster on this machine."""

import os
import re
import shlex
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.submit import Allocation
from runner.run.folder import Run
from tests.support import slurm_cluster
from tests.support.compare import assert_same_run
from tests.support.processes import (
    ENDING,
    ROOT,
    TINY,
    clean_environment,
    command_lines,
    module,
    python,
    wait_for_step,
    wait_until,
)
from tests.support.searches import assert_trained_once

pytestmark = pytest.mark.slurm
RESUME = ("--resume", "auto")  # which `launch submit` adds, and a direct sbatch has to
LONGER = (*ENDING, "--device", "cpu", "--precision", "fp32", "--recipe.epochs", 16)
CANARY = "canary" + "0" * 34  # stands for a W&B key


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    if absent := slurm_cluster.missing():
        pytest.skip(f"SLURM is not installed ({', '.join(absent)})")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root")
    folder = Path(tmp_path_factory.mktemp("slurm"))
    for parent in (folder, *folder.parents):  # munge runs as another user, which needs access to its socket
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    with slurm_cluster.Cluster(folder) as running:
        yield running


@dataclass(frozen=True)
class Submitted:
    """An uninterrupted job of two nodes, and the files and commands that contained the W&B key."""

    output: str
    run: Path
    environments: int
    with_key: list[str]


@pytest.fixture(scope="module")
def submitted(cluster: slurm_cluster.Cluster, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """Submits by `launch submit`; interrupted jobs are compared with this run."""
    runs = tmp_path_factory.mktemp("with %j")  # which sbatch would replace
    words = ["submit", "ending", *LONGER, "--data", small_data, "--runs", runs, "--nodes", 2]
    environ = {"WANDB_MODE": "offline", "WANDB_API_KEY": CANARY, "SLURM_CONF": str(cluster.config)}
    done = module("launch", *words, PATH=cluster.environ["PATH"], **environ)
    assert done.returncode == 0, done.stderr
    (job,) = re.findall(r"^job (\d+);", done.stdout)
    commands: set[str] = set()
    while cluster.job_info(job).get("JobState") in slurm_cluster.UNFINISHED:
        commands |= command_lines()
        time.sleep(0.5)
    log = runs / "slurm" / f"runner-ending-{job}.log"
    assert cluster.wait(job) == "COMPLETED", log.read_text()
    assert log.is_file()
    assert any("-m runner train ending" in command for command in commands)
    files = [path for folder in (cluster.folder, runs) for path in folder.rglob("*") if path.is_file()]
    with_key = [str(path) for path in files if CANARY.encode() in path.read_bytes()]
    with_key += [command for command in commands if CANARY in command]
    environments = sum("environment" in path.name for path in files)
    return Submitted(done.stdout + done.stderr, runs / "ending" / "seed-0", environments, with_key)


@pytest.fixture(autouse=True)
def empty_queue(cluster: slurm_cluster.Cluster) -> None:
    """Cancels what an earlier test left."""
    cluster.cancel_all()


@pytest.mark.every
def test_two_nodes_train_one_model(submitted: Submitted) -> None:
    run = Run(submitted.run)
    assert run.config().world_size == 2
    summary = run.read_summary()
    assert (summary.steps, summary.test_images) == (112, 200)


@pytest.mark.every
def test_the_wandb_key_does_not_leave_the_submitting_process(submitted: Submitted) -> None:
    """It is in no file of SLURM, the runner or W&B, in no command line, and never printed."""
    assert "not passed to SLURM" in submitted.output
    assert submitted.environments > 0, "SLURM stores environments elsewhere now"
    assert submitted.with_key == []
    assert CANARY not in submitted.output


def checkout_with(folder: Path, accelerate: str) -> Path:
    """Makes a checkout with this project's code and batch scripts, in which a script replaces `accelerate`."""
    (folder / "launch").mkdir()
    (folder / "slurm").symlink_to(ROOT / "slurm")
    for module_of_launch in (ROOT / "launch").glob("*.py"):
        (folder / "launch" / module_of_launch.name).symlink_to(module_of_launch)
    (folder / "launch" / "activate").write_text("PATH=$PWD:$PATH\n")
    write_program(folder / "accelerate", accelerate)
    return folder


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose `accelerate` prints on what each node would train."""
    program = (
        'while [ "$1" != --num_processes ]; do shift; done\n'
        'echo "$SLURMD_NODENAME: of $2 ranks, with $SLURM_CPUS_ON_NODE CPUs"'
    )
    return checkout_with(tmp_path_factory.mktemp("checkout"), program)


TWO_GPUS = ["n1: of 4 ranks, with 4 CPUs", "n2: of 4 ranks, with 4 CPUs"]
FOUR_CPUS = ["n1: of 2 ranks, with 4 CPUs", "n2: of 2 ranks, with 4 CPUs"]


@pytest.mark.parametrize(
    ("allocation", "expected"),
    [
        (Allocation(2, gpus_per_node="2", cpus_per_gpu=2), TWO_GPUS),
        (Allocation(2, gres="gpu:2", cpus_per_gpu=2), TWO_GPUS),
        (Allocation(2, cpus_per_task=4), FOUR_CPUS),
        pytest.param(Allocation(2, gpus_per_node="1", exclusive=True), FOUR_CPUS, marks=pytest.mark.every),
        pytest.param(Allocation(2, gres="gpu:1", exclusive=True), FOUR_CPUS, marks=pytest.mark.every),
    ],
    ids=["gpus-per-node", "gres", "cpus-per-task", "exclusive", "exclusive-gres"],
)
def test_a_job_has_a_rank_for_each_gpu_and_the_cpus_that_it_asks_for(
    cluster: slurm_cluster.Cluster, stand_in: Path, tmp_path: Path, allocation: Allocation, expected: list[str]
) -> None:
    log = tmp_path / "job.log"
    words = [*allocation.options(), "--output", log, "slurm/train.sbatch", "tiny", *RESUME]
    job = cluster.submit(*words, cwd=stand_in, environ=clean_environment())
    assert cluster.wait(job) == "COMPLETED", log.read_text()
    assert sorted(line for line in log.read_text().splitlines() if "CPUs" in line) == expected
    assert allocation.ranks == int(expected[0].split()[2])


@pytest.mark.every
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", 3], "GPU(s): expected 1/2 of --gpus 3, as on each node; use --gpus-per-node"),
        (["--exclusive"], "0 of the job's 2 GPU(s): expected a request"),
        (Allocation(container_image="/x.sqsh").options(), "srun: unrecognized option '--container-image=/x.sqsh'"),
        (["--ntasks-per-node", 2], "4 tasks on 2 node(s): expected one per node; leave out --ntasks and --ntasks-per"),
    ],
    ids=["gpus", "exclusive", "container", "ntasks-per-node"],
)
def test_a_job_that_does_not_get_what_it_asks_for_fails(
    cluster: slurm_cluster.Cluster, stand_in: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    log = tmp_path / "job.log"
    words = [*options, "--nodes", 2, "--output", log, "slurm/train.sbatch", "tiny", *RESUME]
    job = cluster.submit(*words, cwd=stand_in, environ=clean_environment())
    assert cluster.wait(job) == "FAILED", log.read_text()
    assert message in log.read_text()
    assert "CPUs" not in log.read_text()
    assert "queued again" not in log.read_text()


@pytest.mark.every
def test_a_node_with_two_gpus_trains_on_two_ranks(
    cluster: slurm_cluster.Cluster, small_data: Path, tmp_path: Path
) -> None:
    words = ["submit", "ending", *LONGER, "--data", small_data, "--runs", tmp_path, "--gres", "gpu:2"]
    environ = {"SLURM_CONF": str(cluster.config), "PATH": cluster.environ["PATH"]}
    done = module("launch", *words, "--cpus-per-gpu", 2, "--max-steps", 2, **environ)
    assert done.returncode == 0, done.stderr
    (job,) = re.findall(r"^job (\d+);", done.stdout)
    log = tmp_path / "slurm" / f"runner-ending-{job}.log"
    assert cluster.wait(job) == "COMPLETED", log.read_text()
    assert "train.sbatch: 1 node(s) with 2 GPU(s) each, 2 rank(s)" in log.read_text()
    assert Run(tmp_path / "ending" / "seed-0").config().world_size == 2


@pytest.mark.parametrize(
    "words", [["submit"], pytest.param(["sweep", "--on", "slurm"], marks=pytest.mark.every)], ids=["submit", "sweep"]
)
def test_what_the_job_would_refuse_is_refused_before_the_queue(
    words: list[str], cluster: slurm_cluster.Cluster, small_data: Path, tmp_path: Path
) -> None:
    command = ["launch", words[0], "ending", *LONGER, "--data", small_data, "--runs", tmp_path / "runs", *words[1:]]
    environ = {"SLURM_CONF": str(cluster.config), "PATH": cluster.environ["PATH"]}
    for options, message in (
        (["--resume", "never"], "expected no --resume"),
        (["--stop-file", "x"], "expected no --stop-file"),
        (["--nodes", 7], "expected a multiple of the 7 ranks"),
        (["--teacher", "nowhere"], "--teacher"),
    ):
        refused = module(*command, *options, **environ)
        assert refused.returncode == 2, refused.stdout
        assert message in refused.stderr
    assert cluster.run("squeue", "--noheader").stdout == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.every
def test_a_failing_job_logs_the_reason(cluster: slurm_cluster.Cluster, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    job = cluster.submit(
        "--nodes", 2, "--output", log, "slurm/train.sbatch", "tiny", *TINY, "--data", tmp_path / "nowhere",
        "--runs", tmp_path / "runs", "--device", "cpu", *RESUME,
        cwd=ROOT, environ=clean_environment(),
    )  # fmt: skip
    assert cluster.wait(job) == "FAILED", log.read_text()
    assert "found none; prepare one with" in log.read_text()
    assert not (tmp_path / "runs").exists()


@pytest.mark.every
def test_a_job_that_is_preempted_and_then_times_out_is_bit_identical(
    cluster: slurm_cluster.Cluster, submitted: Submitted, small_data: Path, tmp_path: Path
) -> None:
    log, run = tmp_path / "job.log", tmp_path / "runs" / "ending" / "seed-0"
    job = cluster.submit(
        "--nodes", 2, "--signal", "B:USR1@60", "--output", log, "slurm/train.sbatch", "ending",
        *LONGER, "--data", small_data, "--runs", tmp_path / "runs", *RESUME,
        cwd=ROOT, environ=clean_environment(END="train 1 1 SLEEP2"),
    )  # fmt: skip
    wait_for_step(run, 7)
    cluster.run("scancel", "--batch", "--signal", "USR1", job, check=True)
    cluster.wait_for_requeue(job, 1, TimeLimit=2)  # minutes; the signal comes 60 to 90 seconds earlier
    cluster.wait_for_requeue(job, 2, TimeLimit="UNLIMITED")
    assert cluster.wait(job) == "COMPLETED", log.read_text()
    assert log.read_text().count("stopped with a checkpoint; queued again") == 2
    assert len(Run(run).config().resumed) == cluster.restart_count(job)
    assert_same_run(submitted.run, run)
    assert not [*ROOT.glob(".stop-*"), *(tmp_path / "runs").rglob(".stop-*")]


@pytest.mark.every
def test_a_job_that_cannot_stop_before_its_time_limit_is_requeued(
    cluster: slurm_cluster.Cluster, submitted: Submitted, small_data: Path, tmp_path: Path
) -> None:
    log, run = tmp_path / "job.log", tmp_path / "runs" / "ending" / "seed-0"
    job = cluster.submit(
        "--nodes", 2, "--signal", "B:USR1@60", "--output", log, "slurm/train.sbatch", "ending",
        *LONGER, "--data", small_data, "--runs", tmp_path / "runs", *RESUME,
        cwd=ROOT, environ=clean_environment(END="train 8 1 STALL"),
    )  # fmt: skip
    wait_for_step(run, 7)
    minutes = int(cluster.job_info(job)["RunTime"].split(":")[1])
    cluster.run("scontrol", "update", f"jobid={job}", f"TimeLimit={minutes + 2}", check=True)
    cluster.wait_for_requeue(job, 1, TimeLimit="UNLIMITED")
    assert cluster.wait(job) == "COMPLETED", log.read_text()
    assert "the time limit came before a checkpoint; queued again" in log.read_text()
    assert len(Run(run).config().resumed) == 1
    assert_same_run(submitted.run, run)


@pytest.mark.every
def test_a_job_is_requeued_a_limited_number_of_times(
    cluster: slurm_cluster.Cluster, stand_in: Path, tmp_path: Path
) -> None:
    """Two starts that are asked to stop, where MAX_REQUEUES is 1. A program that waits for the stop file trains."""
    copy, log = Path(shutil.copytree(stand_in, tmp_path / "checkout", symlinks=True)), tmp_path / "job.log"
    waits = 'echo "start $SLURM_RESTART_COUNT"; until rm "$STOP_FILE" 2>/dev/null; do sleep 0.2; done; exit 75'
    (copy / "accelerate").write_text(f"#!/bin/bash\n{waits}\n")
    job = cluster.submit(
        "--output", log, "slurm/train.sbatch", "tiny", *RESUME,
        cwd=copy, environ=clean_environment(MAX_REQUEUES="1"),
    )  # fmt: skip
    for start in (0, 1):
        wait_until(lambda start=start: log.exists() and log.read_text().count("start ") == start + 1)
        cluster.run("scancel", "--batch", "--signal", "USR1", job, check=True)
        if start == 0:
            cluster.wait_for_requeue(job, 1)
    assert cluster.wait(job) == "FAILED", log.read_text()
    assert cluster.job_info(job)["ExitCode"] == "75:0"
    assert cluster.restart_count(job) == 1
    assert log.read_text().count("stopped with a checkpoint; queued again") == 1
    assert (
        "stopped with a checkpoint; not queued again, because MAX_REQUEUES is 1; submit it again to resume"
        in log.read_text()
    )


@pytest.mark.every
def test_a_cancelled_job_writes_a_checkpoint_and_is_not_requeued(
    cluster: slurm_cluster.Cluster, small_data: Path, tmp_path: Path
) -> None:
    log, run = tmp_path / "job.log", tmp_path / "runs" / "ending" / "seed-0"
    job = cluster.submit(
        "--nodes", 2, "--output", log, "slurm/train.sbatch", "ending",
        *LONGER, "--data", small_data, "--runs", tmp_path / "runs", *RESUME,
        cwd=ROOT, environ=clean_environment(END="train 1 1 SLEEP2"),
    )  # fmt: skip
    wait_for_step(run, 7)
    cluster.run("scancel", job, check=True)
    assert cluster.wait(job) == "CANCELLED", log.read_text()
    assert "queued again" not in log.read_text()
    (step,) = map(int, re.findall(r"stopped at step (\d+)", log.read_text()))
    assert (run / "checkpoints" / f"step-{step}" / "manifest.json").is_file()
    assert not [*ROOT.glob(".stop-*"), *(tmp_path / "runs").rglob(".stop-*")]


@pytest.mark.every
def test_one_task_of_a_sweep_is_requeued_alone(
    cluster: slurm_cluster.Cluster, submitted: Submitted, small_data: Path, tmp_path: Path
) -> None:
    """Both tasks run at the same time, each with its own rendezvous; the sweep prints their states."""
    words = ["sweep", "ending", *LONGER, "--data", small_data, "--runs", tmp_path, "--seeds", 0, 1, "--name", "s"]
    environ = {"SLURM_CONF": str(cluster.config), "PATH": cluster.environ["PATH"]}

    def sweep(**more: str) -> str:
        done = module("launch", *words, "--on", "slurm", "--nodes", 2, **environ, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (job,) = re.findall(r"^job (\d+), an array of 2;", sweep(END="train 1 1 SLEEP1", SBATCH_NO_REQUEUE="1"), re.M)
    runs = [tmp_path / "ending" / f"s-seed-{seed}" for seed in (0, 1)]
    for run in runs:
        wait_for_step(run, 7)
    assert sweep() == "2 trials: 2 running\n"
    wandb_ids = [Run(run).config().wandb_id for run in runs]
    cluster.run("scancel", "--batch", "--signal", "USR1", f"{job}_0", check=True)
    cluster.wait_for_requeue(f"{job}_0", 1)
    logs = tmp_path / "slurm"
    for task in (0, 1):
        tails = [log.read_text()[-3000:] for log in logs.glob(f"*_{task}.log")]
        assert cluster.wait(f"{job}_{task}") == "COMPLETED", tails
    for log in logs.glob("*_[01].log"):  # both starts of the first task append to its log
        assert re.search(r"^epoch \d+/16: train .* images/s, ", log.read_text(), re.M)
        assert len(re.findall(r"^run: ", log.read_text(), re.M)) == (2 if log.stem.endswith("_0") else 1)
    assert [Run(run).config().wandb_id for run in runs] == wandb_ids
    assert sweep() == "2 trials: 2 complete\n"
    assert len(Run(runs[0]).config().resumed) == 1
    assert Run(runs[1]).config().resumed == []
    assert_same_run(submitted.run, runs[0])


@pytest.mark.every
@pytest.mark.parametrize("lost", ["n1", "n2"])
def test_after_a_lost_node_the_job_resumes_from_the_last_checkpoint(
    cluster: slurm_cluster.Cluster, submitted: Submitted, small_data: Path, tmp_path: Path, lost: str
) -> None:
    """Either the node of the batch script and the first rank, or the other; a third node replaces it.

    A job that may be requeued once at a time limit still may afterwards.
    """
    log, run = tmp_path / "job.log", tmp_path / "runs" / "ending" / "seed-0"
    job = cluster.submit(
        "--nodes", 2, "--output", log, "slurm/train.sbatch", "ending", *LONGER,
        "--data", small_data, "--runs", tmp_path / "runs", *RESUME,
        cwd=ROOT, environ=clean_environment(END=f"train 8 1 SLEEP{2 if lost == 'n1' else 1}", MAX_REQUEUES="1"),
    )  # fmt: skip
    wait_for_step(run, 7)
    cluster.lose_node(lost)
    cluster.wait_for_requeue(job, 1)
    if lost == "n1":
        wait_until(lambda: len(Run(run).config().resumed) == 1)
        wait_for_step(run, Run(run).config().resumed[0].step + 7)
        cluster.run("scancel", "--batch", "--signal", "USR1", job, check=True)
        cluster.wait_for_requeue(job, 2)
    assert cluster.wait(job) == "COMPLETED", log.read_text()
    resumed = Run(run).config().resumed
    assert len(resumed) == cluster.restart_count(job)
    assert resumed[0].step >= 7
    assert_same_run(submitted.run, run)


@pytest.mark.every
def test_a_search_survives_a_preempted_worker_and_a_lost_node(
    cluster: slurm_cluster.Cluster, small_data: Path, tmp_path: Path
) -> None:
    """Two workers on two nodes: one is asked to stop before its time limit, the other's node is lost."""
    words = ["search", "ending", *ENDING, "--device", "cpu", "--precision", "fp32", "--data", small_data]
    words += ["--runs", tmp_path, "--recipe.epochs", 9, "--recipe.validation", 60, "--checkpoint-every", 3]
    words += ["--recipe.optimizer.lr", "log:1e-3:1e-1", "--recipe.patience", 0, "--trials", 6]
    environ = {"SLURM_CONF": str(cluster.config), "PATH": cluster.environ["PATH"], "END": "train 1 0 SLEEP1"}
    done = module("launch", *words, "--on", "slurm", "--tasks", 2, "--exclusive", **environ)
    assert done.returncode == 0, done.stderr
    (job,) = re.findall(r"^job (\d+), an array of 2;", done.stdout, re.M)
    wait_until(lambda: len([*tmp_path.glob("ending/*/checkpoints/step-*")]) >= 2)
    wait_until(lambda: len([*tmp_path.glob("ending/*/run.json")]) >= 2)
    cluster.run("scancel", "--batch", "--signal", "USR1", f"{job}_0", check=True)
    cluster.lose_node(cluster.job_info(f"{job}_1")["BatchHost"])
    cluster.wait_for_requeue(f"{job}_0", 1)
    cluster.wait_for_requeue(f"{job}_1", 1)
    logs = [log.read_text()[-3000:] for log in (tmp_path / "slurm").glob("*.log")]
    for task in (0, 1):
        assert cluster.wait(f"{job}_{task}") == "COMPLETED", logs
    trials = assert_trained_once(tmp_path, 6)
    assert {trial.epochs for trial in trials} >= {1, 9}
    assert sum(len(Run(tmp_path / trial.run).config().resumed) > 0 for trial in trials) >= 2
    assert not [*(tmp_path / "slurm").glob(".*")]


@pytest.mark.every
def test_a_job_from_within_an_array_requeues_itself_until_the_limit(
    cluster: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    """A direct sbatch passes on the SLURM_ARRAY_* variables of the task that calls it, whose job goes on."""
    wait = 'touch started; while [ ! -e "$STOP_FILE" ]; do sleep 0.1; done; rm "$STOP_FILE" started; exit 75'
    checkout = checkout_with(tmp_path, wait)
    submit = f"sbatch --parsable --output inner.log slurm/train.sbatch tiny {' '.join(RESUME)} >number; sleep 600"
    outer = cluster.submit(
        "--array=0-0", "--output=/dev/null", f"--wrap={submit}", cwd=checkout,
        environ=clean_environment(MAX_REQUEUES="1"),
    )  # fmt: skip
    for restarts in (1, 2):
        wait_until((checkout / "started").exists)
        job = (checkout / "number").read_text().strip()
        cluster.run("scancel", "--batch", "--signal", "USR1", job, check=True)
        if restarts == 1:
            cluster.wait_for_requeue(job, restarts)
    assert cluster.wait(job) == "FAILED"
    assert cluster.job_info(job)["ExitCode"] == "75:0"
    reasons = [line.split("; ", 1)[1] for line in (checkout / "inner.log").read_text().splitlines() if "; " in line]
    assert reasons == ["queued again", "not queued again, because MAX_REQUEUES is 1; submit it again to resume"]
    assert cluster.job_info(f"{outer}_0")["JobState"] == "RUNNING"
    assert cluster.restart_count(f"{outer}_0") == 0


@pytest.mark.every
def test_a_sweep_without_array_trains_line_0_also_from_within_an_array(
    cluster: slurm_cluster.Cluster, stand_in: Path, tmp_path: Path
) -> None:
    log, trials = tmp_path / "inner.log", tmp_path / "trials"
    trials.write_text("tiny --seeds 0\ntiny --seeds 1\n")
    words = ["sbatch", "--wait", "--output", log, "slurm/sweep.sbatch", trials, *RESUME]
    wrap = shlex.join(map(str, words))
    outer = cluster.submit(
        "--array=1-1", "--output=/dev/null", f"--wrap={wrap}", cwd=stand_in, environ=clean_environment()
    )
    assert cluster.wait(f"{outer}_1") == "COMPLETED", log.read_text()
    assert "sweep.sbatch: only line 0 of 2 is trained; --array 0-1 trains all" in log.read_text()


SEEDS = 250
# Their first start stops before it has trained; 49 is the first job of an array.
REQUEUED = [*range(0, SEEDS, 25), 49]
# Writes what `runner train` would; a task of REQUEUED first gets the signal that SLURM sends before the time limit.
TRAIN = f"""
while [ $# -gt 0 ]; do
    case $1 in train) experiment=$2 ;; --seeds) seed=$2 ;; --name) name=$2 ;; --runs) runs=$2 ;; esac
    shift
done
mkdir -p "$runs/$experiment/$name"
if [[ " {" ".join(map(str, REQUEUED))} " == *" $seed "* ]] && [ -z "${{SLURM_RESTART_COUNT:-}}" ]; then
    scancel --batch --signal USR1 "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
    while [ ! -e "$STOP_FILE" ]; do sleep 0.1; done
    rm "$STOP_FILE"
    exit 75
fi
echo trained >>"$runs/$experiment/$name/log"
echo {{}} >"$runs/$experiment/$name/summary.json"
"""


@pytest.mark.every
def test_hundreds_of_trials_are_submitted_and_listed_with_few_calls_and_trained_once(
    cluster: slurm_cluster.Cluster, small_data: Path, tmp_path: Path
) -> None:
    """The sweep and its batch scripts are real; a script replaces `accelerate`, and programs log the calls of SLURM."""
    checkout = checkout_with(tmp_path, TRAIN)
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "scontrol", "squeue", "srun"):
        log = f'echo "${{SLURM_JOB_ID:+job}} {name} $*" >>{tmp_path}/calls'
        write_program(tmp_path / "bin" / name, f'{log}\nexec {shutil.which(name)} "$@"')

    def sweep(*more: object) -> tuple[str, Counter[str]]:
        """Returns the last line and the number of calls of each command, and prints the seconds."""
        words = ["tiny", *TINY, "--data", small_data, "--runs", tmp_path / "runs", "--on", "slurm", "--device", "cpu"]
        (tmp_path / "calls").touch()
        before, start = (tmp_path / "calls").read_text(), time.monotonic()
        path = f"{tmp_path}/bin:{cluster.environ['PATH']}"
        done = python(
            "-m", "launch", "sweep", *words, "--seeds", *range(SEEDS), *more,
            cwd=checkout, PATH=path, SLURM_CONF=str(cluster.config),
        )  # fmt: skip
        seconds = time.monotonic() - start
        assert done.returncode == 0, done.stderr
        calls = Counter(
            line.split()[0]
            for line in (tmp_path / "calls").read_text().removeprefix(before).splitlines()
            if not line.startswith("job ")
        )
        print(f"sweep of {SEEDS} trials {' '.join(map(str, more))}: {seconds:.1f} s, calls: {dict(calls)}")
        return done.stdout.splitlines()[-1], calls

    arrays = SEEDS // slurm_cluster.MAX_ARRAY_SIZE
    _, calls = sweep()
    assert calls == {"scontrol": 1, "sbatch": arrays}
    last, calls = sweep("--dry-run")
    assert re.fullmatch(rf"{SEEDS} trials: (\d+ complete, )?\d+ queued; 0 to train", last)
    assert calls == {"squeue": 1}
    _, calls = sweep()
    assert calls == {"squeue": 1}, "a trial was submitted twice"
    runs = [tmp_path / "runs" / "tiny" / f"seed-{seed}" for seed in range(SEEDS)]
    wait_until(lambda: all((run / "summary.json").is_file() for run in runs))
    wait_until(lambda: not cluster.run("squeue", "--noheader").stdout)
    assert sweep("--dry-run")[0] == f"{SEEDS} trials: {SEEDS} complete; 0 to train"
    assert {(run / "log").read_text() for run in runs} == {"trained\n"}
    calls = Counter(line.split()[1] for line in (tmp_path / "calls").read_text().splitlines() if line[:4] == "job ")
    assert calls["srun"] == SEEDS + len(REQUEUED)
    # A job on one node calls it only to be requeued, and again where the controller is busy.
    assert len(REQUEUED) <= calls["scontrol"] <= 6 * len(REQUEUED)
    assert not list((tmp_path / "runs" / "slurm").glob(".*"))


@pytest.mark.every
@pytest.mark.parametrize("state", ["frozen", "killed"])
def test_without_the_controller_no_trial_counts_as_not_queued(
    cluster: slurm_cluster.Cluster, small_data: Path, tmp_path: Path, state: str
) -> None:
    """Neither where it is down nor where it does not answer in time; afterwards, nothing is submitted twice."""
    cluster.submit(
        "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 600", cwd=ROOT, environ=dict(os.environ)
    )
    words = ["sweep", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--on", "slurm", "--seeds", 0, 1]
    environ = {"SLURM_CONF": str(cluster.config), "PATH": cluster.environ["PATH"]}
    assert "an array of 2;" in module("launch", *words, **environ).stdout
    cluster.controller.send_signal(signal.SIGSTOP if state == "frozen" else signal.SIGTERM)
    try:
        for more in (["--dry-run"], []):
            refused = module("launch", *words, *more, **environ)
            assert refused.returncode == 2, refused.stdout
            assert refused.stdout == ""
            reason = "Socket timed out" if state == "frozen" else "Unable to contact slurm controller"
            assert re.fullmatch(
                rf"launch: squeue: .*{reason}.*; jobs of this sweep may be queued; .*\n", refused.stderr
            )
    finally:
        if state == "frozen":
            cluster.controller.send_signal(signal.SIGCONT)
        else:
            cluster.start_controller()
            wait_until(lambda: cluster.run("squeue").returncode == 0)
    assert module("launch", *words, **environ).stdout == "2 trials: 2 queued\n"


@pytest.mark.every
def test_a_job_that_was_queued_without_an_answer_is_not_submitted_twice(
    cluster: slurm_cluster.Cluster, small_data: Path, tmp_path: Path
) -> None:
    """A busy controller answers too late, and queues the job all the same."""
    cluster.submit(
        "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 600", cwd=ROOT, environ=dict(os.environ)
    )
    (tmp_path / "bin").mkdir()
    freeze, real = f"kill -STOP {cluster.controller.pid}", shutil.which("sbatch")
    write_program(
        tmp_path / "bin" / "sbatch", f'{freeze}; {real} "$@"; code=$?; {freeze.replace("STOP", "CONT")}; exit $code'
    )
    words = ["--data", small_data, "--runs", tmp_path / "my runs", "--device", "cpu"]
    environ = {"SLURM_CONF": str(cluster.config), "PATH": f"{tmp_path}/bin:{cluster.environ['PATH']}"}
    for command in (
        ["sweep", "tiny", *TINY, *words, "--on", "slurm", "--seeds", 0, 1],
        ["submit", "tiny", *TINY, *words],
    ):
        lost = module("launch", *command, **environ)
        assert lost.returncode == 2, lost.stdout
        (line,) = lost.stderr.splitlines()
        assert re.search("Socket timed out .*; the job may have been queued anyway; check squeue --me", line)
    wait_until(lambda: cluster.run("squeue", "-h", "--array", "-o", "%j").stdout.count("runner-tiny") == 3)
    again = module("launch", "sweep", "tiny", *TINY, *words, "--on", "slurm", "--seeds", 0, 1, 2, **environ)
    assert again.stdout.startswith("3 trials: 2 queued, 1 missing\n")
