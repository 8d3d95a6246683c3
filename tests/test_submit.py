"""`python -m launch submit`: the sbatch command, and what it rejects."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.submit import Allocation, Submit, check_mounts, name_and_log
from launch.submit import sbatch as submitted
from runner.common.command_line import options_of, read_command_and_rest
from runner.common.errors import UserError
from runner.config.train_config import TrainConfig
from tests.support.processes import ROOT, TINY, Done, module, python


def submit(*words: object, **environ: str) -> Done:
    return module("launch", "submit", *words, **environ)


def test_dry_run_prints_the_command_and_submits_nothing(small_data: Path, tmp_path: Path) -> None:
    words = ["soni-2", "--data", small_data, "--runs", tmp_path / "my runs", "--nodes", 2]
    words += ["--gpus-per-node", "h100:8", "--time", "1-02:00:00", "--partition", "gpu,long", "--seed", 3]
    words += ["--stop-before", 600, "--cpus-per-gpu", 12, "--mem", "500G", "--exclusive", "--gres", "nvme:1"]
    words += ["--qos", "high", "--constraint", "h100&[rack1|rack2]", "--container-image", "ghcr.io#team/runner:1"]
    words += ["--recipe.epochs", 5, "--dry-run"]
    done = python("-m", "launch", "submit", *words, WANDB_API_KEY="canary")  # a fresh process, as a user starts it
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    script = command.index("slurm/train.sbatch")
    assert command[0] == "sbatch"
    assert set(command[2:script]) == {
        "--job-name=runner-soni-2",
        f"--output={tmp_path}/my runs/slurm/%x-%j.log",
        "--nodes=2",
        "--gpus-per-node=h100:8",
        "--time=1-02:00:00",
        "--partition=gpu,long",
        "--cpus-per-gpu=12",
        "--mem=500G",
        "--exclusive",
        "--gres=nvme:1",
        "--qos=high",
        "--constraint=h100&[rack1|rack2]",
        "--export=ALL,RUNNER_CONTAINER_IMAGE=ghcr.io#team/runner:1",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@600",
    }
    assert command[script + 1 :][:5] == ["soni-2", "--data", str(small_data), "--runs", f"{tmp_path}/my runs"]
    assert command[-2:] == ["--seed=3", "--recipe.epochs=5"]
    assert "canary" not in done.stdout + done.stderr
    assert not (tmp_path / "my runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["$(touch x)"], "no such experiment"),
        (["soni-2", "--name", "$(touch x)"], "expected letters, digits"),
        (["soni-2", "--name", "a\nb"], "expected letters, digits"),
        (["soni-2", "--name", "--wrap=x"], "--name"),
        (["soni-2", "--partition", "a b"], "--partition 'a b': expected a letter or digit"),
        (["soni-2", "--partition", "--wrap=touch x"], "--partition"),
        (["soni-2", "--partition=--wrap=x"], "--partition '--wrap=x': expected"),
        (["soni-2", "--time", "1\n#SBATCH --wrap=x"], "--time"),
        (["soni-2", "--account", "`id`"], "--account"),
        (["soni-2", "--time", "2"], "--time '2': expected more than --stop-before (180 seconds)"),
        (
            ["soni-2", "--time", "0:10:00", "--stop-before", "600"],
            "--time '0:10:00': expected more than --stop-before (600",
        ),
        (["soni-2", "--nodes", "0"], "--nodes 0: expected an integer >= 1"),
        (["soni-2", "--gpus-per-node", "8;id"], "--gpus-per-node"),
        (["soni-2", "--gres", "gpu"], "--gres 'gpu': expected NAME:NUMBER or NAME:TYPE:NUMBER, such as gpu:8 or"),
        (["soni-2", "--gres", "gpu:2", "--gpus-per-node", "2"], "expected GPUs in one of them; leave out the other"),
        (["soni-2", "--cpus-per-gpu", "4"], "--cpus-per-gpu 4: expected --gpus-per-node or --gres gpu:NUMBER with it"),
        (["soni-2", "--gres", "gpu:2", "--cpus-per-gpu", "4", "--cpus-per-task", "8"], "expected one of them; leave"),
        (["soni-2", "--cpus-per-task", "0"], "--cpus-per-task 0: expected an integer >= 1"),
        (["soni-2", "--mem", "64 GB"], "--mem '64 GB': expected MiB, or a number with K, M, G or T, such as 64G"),
        (["soni-2", "--constraint", "`id`"], "--constraint '`id`': expected features"),
        (["soni-2", "--qos=--wrap=x"], "--qos '--wrap=x': expected"),
        (["soni-2", "--container-image", "x,PATH=y"], "--container-image 'x,PATH=y': expected an image"),
        (["soni-2", "--exclusive", "user"], "user: expected no further word"),
        (["soni-2", "--recipe.epochs", "0"], "--recipe.epochs 0: expected an integer >= 1"),
        (["soni-2", "--no-such-option", "1"], "no-such-option"),
        (["soni-2"], "sbatch: not found"),
    ],
)
def test_invalid_input_exits_2_with_one_line(words: list[str], message: str, small_data: Path, tmp_path: Path) -> None:
    done = submit(words[0], "--data", small_data, "--runs", tmp_path / "runs", *words[1:], PATH="/nowhere")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def sbatch(tmp_path: Path) -> dict[str, str]:
    """PATH of a stand-in for sbatch that writes PYTHONPATH and its arguments, line by line, to the file `job`, and the
    variables that it gets to the file `environment`."""
    script = tmp_path / "bin" / "sbatch"
    script.parent.mkdir()
    script.write_text(
        f"""#!/bin/sh\nprintf '%s\\n' "$PYTHONPATH" "$@" > {tmp_path}/job\nenv > {tmp_path}/environment\necho 7\n"""
    )
    script.chmod(0o755)
    return {"PATH": f"{script.parent}:{os.environ['PATH']}"}


def test_a_job_imports_what_could_be_imported_where_it_was_submitted(
    sbatch: dict[str, str], small_data: Path, tmp_path: Path
) -> None:
    """A module beside the user's data, although the job starts in the checkout."""
    (tmp_path / "mine.py").write_text(
        "from tests.support.models import tiny\nEXPERIMENTS = {'own': tiny.EXPERIMENTS['tiny']}"
    )
    (tmp_path / "below").mkdir()
    (tmp_path / "mine.py").rename(tmp_path / "below" / "mine.py")
    (tmp_path / "stop").mkdir()  # no business of a job, whose stop file is elsewhere
    words = ["own", "--experiments-from", "mine", "--data", small_data, "--runs", tmp_path / "runs"]
    done = module("launch", "submit", *words, cwd=tmp_path, PYTHONPATH=f"below:{ROOT}", **sbatch)
    assert done.returncode == 0, done.stderr
    path, *argv = (tmp_path / "job").read_text().splitlines()
    program = "import sys; from runner import cli; print(cli.parse_train(sys.argv[1:]).experiment)"
    parsed = python("-c", program, *argv[argv.index("slurm/train.sbatch") + 1 :], PYTHONPATH=path)
    assert parsed.stdout == "own\n", parsed.stderr


def test_a_run_of_another_training_is_refused_before_the_queue(
    sbatch: dict[str, str], tiny_run: Path, small_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_run, tmp_path / "runs" / "tiny" / "seed-0")
    words = ["tiny", *TINY, "--data", small_data, "--runs", tmp_path / "runs"]
    others = {"recipe": ["--lr", 0.5], "max-steps": ["--max-steps", 3], "precision": ["--precision", "bf16"]}
    for other, options in others.items():
        done = submit(*words, *options, **sbatch)
        assert done.returncode == 2
        assert f"holds a run with a different {other}" in done.stderr
    assert not (tmp_path / "job").exists()
    assert submit(*words, "--lr", 0.5, "--resume-anyway", **sbatch).returncode == 0


def test_a_job_does_not_inherit_the_requests_of_the_job_that_submits_it(
    sbatch: dict[str, str], small_data: Path, tmp_path: Path
) -> None:
    """In its script, srun would request them again, and SLURM_GPUS_PER_NODE would be its number of ranks."""
    outer = {"SLURM_GPUS_PER_NODE": "8", "SLURM_CPUS_PER_GPU": "4", "SRUN_CPUS_PER_TASK": "32"}
    outer |= {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1"}
    outer |= {"SLURM_RESTART_COUNT": "20", "SLURM_EXPORT_ENV": "NONE", "SBATCH_ARRAY_INX": "0-1"}
    words = ["tiny", *TINY, "--data", small_data, "--runs", tmp_path / "runs", "--gres", "gpu:2"]
    done = submit(*words, **outer, SLURM_CONF="mine", NCCL_DEBUG="INFO", **sbatch)
    assert done.returncode == 0, done.stderr
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line
    )
    assert not outer.keys() & environment.keys()
    assert environment["SLURM_CONF"] == "mine"
    assert environment["NCCL_DEBUG"] == "INFO"


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("0", 0),
        ("0:01", 1),
        ("5", 300),
        ("5:06", 306),
        ("1:02:03", 3723),
        ("2-3", 183_600),
        ("2-3:04", 183_840),
        ("2-3:04:05", 183_845),
    ],
)
def test_a_time_limit_is_read_like_sbatch_reads_it(limit: str, seconds: int) -> None:
    """A job that stops as many seconds before the limit could use none; 0 is no limit."""
    assert Allocation(time=limit, stop_before=seconds - 1).time == limit
    if seconds > 0:
        with pytest.raises(UserError, match="expected more than"):
            Allocation(time=limit, stop_before=seconds)


def test_a_job_requests_one_node_by_default_and_the_rest_is_the_clusters() -> None:
    fixed = ["--requeue", "--open-mode=append", "--signal=B:USR1@180"]
    assert Allocation().options() == [*fixed, "--nodes=1", "--export=ALL"]
    assert Allocation().ranks == 1


@pytest.mark.parametrize(("seconds", "accepted"), [(0, False), (1, True), (65_535, True), (65_536, False)])
def test_stop_before_takes_what_sbatch_takes(seconds: int, accepted: bool) -> None:
    """The seconds of its --signal."""
    words = ["tiny", "--data", "data", "--stop-before", str(seconds)]

    def read() -> Submit:
        return read_command_and_rest(Submit, words, "launch submit", options_of(TrainConfig))[0]

    if accepted:
        assert read().slurm.stop_before == seconds
    else:
        with pytest.raises(UserError, match=f"--stop-before {seconds}: expected an integer"):
            read()


@pytest.mark.parametrize(
    ("resources", "ranks"),
    [
        ({}, 2),
        ({"gpus_per_node": "8"}, 16),
        ({"gpus_per_node": "h100:8", "gres": "nvme:1K", "cpus_per_gpu": 4}, 16),
        ({"gres": "nvme:4"}, 2),
        ({"gres": "nvme:1,gpu:4", "cpus_per_gpu": 4}, 8),
        ({"gres": "gpu:a100:2,nvme:7,gpu:h100:1"}, 6),
        ({"gres": "gpu:2,gpu:1"}, "expected each resource once"),
        ({"gres": "nvme:1,gpu:2K"}, "GPUs as a plain number"),
        ({"gres": "gpu:1", "gpus_per_node": "1"}, "leave out the other"),
        ({"cpus_per_gpu": 4, "cpus_per_task": 4, "gpus_per_node": "1"}, "leave out the other"),
        ({"cpus_per_gpu": 4, "gres": "nvme:1"}, "without GPUs, use --cpus-per-task"),
    ],
)
def test_each_gpu_has_a_rank(resources: dict[str, Any], ranks: int | str) -> None:
    if isinstance(ranks, int):
        assert Allocation(nodes=2, **resources).ranks == ranks
    else:
        with pytest.raises(UserError, match=ranks):
            Allocation(nodes=2, **resources)


def test_a_job_has_a_plain_name_and_an_exact_log(tmp_path: Path) -> None:
    name, log = name_and_log("podeti/alexnet lr 0.1", tmp_path / "50%", "%A_%a")
    assert name == "--job-name=runner-podeti-alexnet-lr-0.1"
    assert log == f"--output={tmp_path}/50%%/slurm/%x-%A_%a.log"
    for path in ("a\\b", "a\nb"):
        with pytest.raises(UserError, match="expected no backslash and no line break"):
            name_and_log("tiny", tmp_path / path, "%j")


def test_the_answer_of_sbatch(sbatch: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number may be followed by the name of a cluster; a key of W&B is not passed on, which is reported."""
    script = tmp_path / "bin" / "sbatch"
    for environ, lines in ((sbatch, 0), ({**sbatch, "WANDB_API_KEY": "canary"}, 1)):
        assert submitted([str(script)], tmp_path / "runs", environ) == "7"
        assert capsys.readouterr().err.count("W&B: WANDB_API_KEY is not passed to SLURM") == lines
        assert "canary" not in (tmp_path / "environment").read_text()
    script.write_text("#!/bin/sh\necho '8;cluster'\n")
    assert submitted([str(script)], tmp_path / "runs", sbatch) == "8"
    script.write_text("#!/bin/sh\necho 'sbatch: error: no such partition' >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"^sbatch refused: sbatch: error: no such partition$"):
        submitted([str(script)], tmp_path / "runs", sbatch)
    with pytest.raises(UserError, match=r"cannot write there \(Not a directory\); choose another folder"):
        submitted([str(script)], script, sbatch)


@pytest.mark.parametrize(
    "words", [["--teacher", "x --resume auto"], ["--teacher=--resume auto"], ["--resume", "never", "auto"]]
)
def test_a_job_that_would_not_resume_is_refused(words: list[str], tmp_path: Path) -> None:
    """Also where the value of another option looks like that option."""
    words = ["soni-2", "--data", "data", *words]
    done = subprocess.run(["bash", ROOT / "slurm/train.sbatch", *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("train.sbatch: expected the option --resume auto")


@pytest.mark.parametrize("command", ["submit", "sweep"])
def test_a_path_that_a_container_cannot_mount_is_refused_before_the_queue(
    command: str, sbatch: dict[str, str], small_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "my,runs").mkdir()
    words = [command, "tiny", *TINY, "--data", small_data, "--runs", tmp_path / "my,runs"]
    words += ["--on", "slurm"] if command == "sweep" else []
    done = module("launch", *words, "--container-image", "team/runner", **sbatch)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"launch: {tmp_path}/my,runs: expected no comma and no colon with --container-image, at which pyxis splits "
        "--container-mounts; rename it"
    ]
    assert not (tmp_path / "job").exists()
    assert module("launch", *words, "--dry-run").returncode == 0


def test_only_what_a_container_mounts_must_have_no_comma(tmp_path: Path) -> None:
    """The folder of runs is created by the job, and mounted too."""
    allocation, environ = Allocation(container_image="team/runner"), dict(os.environ)
    for name in ("my,runs", "my:runs"):
        with pytest.raises(UserError, match=f"/{name}: expected no comma and no colon"):
            check_mounts(allocation, [], tmp_path / name, environ)
    check_mounts(allocation, ["--name=/no,where", "--data", "a,b"], tmp_path / "runs", environ)
    (tmp_path / "a,b").mkdir()
    with pytest.raises(UserError, match="/a,b: expected no comma"):
        check_mounts(allocation, [f"--data={tmp_path}/a,b"], tmp_path / "runs", environ)
    check_mounts(Allocation(), [f"--data={tmp_path}/a,b"], tmp_path / "my,runs", environ)


def test_a_missing_dataset_is_rejected(tmp_path: Path) -> None:
    done = submit("soni-2", "--data", tmp_path / "none", "--dry-run")
    assert done.returncode == 2
    assert "python -m data_prep prepare" in done.stderr
