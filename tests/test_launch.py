"""The quickstart, the accelerate configurations, the scripts, and the installed packages."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from launch.quickstart import BANNER, Pipeline, Quickstart
from launch.submit import Allocation, name_and_log
from runner import cli
from runner.common.errors import UserError
from runner.common.files import write_json
from runner.run.folder import Run
from tests.support import archives
from tests.support.processes import ROOT, TINY, Done, clean_environment, module, python


@pytest.mark.processes
@pytest.mark.parametrize(
    "started", [module, pytest.param(partial(python, "-m"), marks=pytest.mark.every)], ids=["forked", "fresh"]
)
def test_the_quickstart_runs_and_a_second_call_reuses_everything(started: Callable[..., Done], tmp_path: Path) -> None:
    """With processes that are forked with imports done, as in most other tests, or fresh ones, as a user does."""
    images = archives.tar(tmp_path / "pictures.tar.gz", archives.image_files(per_class=10))
    call = ("--source", images, "--experiments", "soni-2", "--out", tmp_path / "out")
    first = started("launch.quickstart", *call, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert BANNER not in first.stdout
    run = Run(tmp_path / "out/runs/pictures/soni-2/1-steps")
    assert run.read_summary().steps == 1
    assert [row.passed for row in run.read_parity().rows] == [True]
    assert (run.deploy / "model.fp32.tensorrt-rtx.engine").stat().st_size > 117_209 * 4
    page = (tmp_path / "out/report.html").read_text()
    assert "soni-2/1-steps" in page
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}
    stages = re.findall(r"^\[\d/8\] \d+:\d\d (\w+)", first.stdout, re.M)
    # The engine comes before the gate, which scores it on a GPU.
    assert " ".join(stages) == "prepare measure train export engine parity bench report"
    again = module("launch.quickstart", *call, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("(already done)") == 6
    assert before == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}
    (run.deploy / "model.fp32.onnx").write_bytes(b"damaged")
    third = module("launch.quickstart", *call, cwd=tmp_path)
    assert third.returncode == 0, third.stdout + third.stderr
    # Only the export runs again. The file is bit-identical, so all later results remain valid.
    assert third.stdout.count("(already done)") == 5
    assert not third.stdout.count("export soni-2 (already done)")


def test_unreachable_official_data_falls_back_to_the_synthetic_set_with_a_banner(
    tiny_run: Path, deployed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from data_prep import manifest as manifests
    from data_prep import official, synthetic

    unreachable = dataclasses.replace(official.CIFAR10, url="http://127.0.0.1:9/cifar-10-binary.tar.gz")
    monkeypatch.setitem(official.BY_SOURCE, "official", unreachable)
    monkeypatch.setattr("launch.quickstart.DOWNLOADS", tmp_path / "downloads")
    draw = synthetic.draw
    monkeypatch.setattr(synthetic, "draw", lambda images, seed, split: draw(images // 100, seed, split))
    stages = []
    monkeypatch.setattr(Pipeline, "run_stage", lambda self, title, done, argv: stages.append(argv))
    monkeypatch.setattr("launch.quickstart.find_runs", lambda folders: [Run(tiny_run), Run(deployed_run)])
    Pipeline(Quickstart(experiments=("soni-2",), epochs=1, out=tmp_path / "out")).run()
    lines = capsys.readouterr().out.splitlines()
    assert lines.count(BANNER) == 2
    assert lines[-1] == BANNER
    assert [line.split("  ")[-1] for line in lines if line.startswith("  run ")] == [
        "(metrics, weights, figures, ONNX, W&B files)",  # no engine was built
        "(metrics, weights, figures, ONNX, engine, W&B files)",
    ]
    data = tmp_path / "out" / "data" / "synthetic"
    assert manifests.read(data).name == "synthetic-10"
    assert ["--data", str(data)] == stages[0][stages[0].index("soni-2") + 1 :][:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiments", "nope"], "no such experiment"),
        (["--experiments", "soni-2", "soni-2"], "expected each name once"),
        (["--epochs", "0"], "--epochs 0"),
        (["--source", "missing.tar"], "no such file"),
        (["--sauce", "x"], "--sauce"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = module("launch.quickstart", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "quickstart-out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume", "never"], "--resume never: expected no --resume; jobs and sweeps set --resume auto"),
        (["--resume=auto"], "--resume auto: expected no --resume"),
        (["--stop_file", "x"], "--stop-file x: expected no --stop-file; jobs and sweeps set their own"),
        (["--overwrite"], "--overwrite: expected no --resume, which jobs and sweeps always set"),
        (["--batch-size", "60", "--nodes", "7"], "batch size 60: expected a multiple of the 7 ranks"),
        (["--nodes", "2", "--gpus-per-node", "h100:4"], "batch size 60: expected a multiple of the 8 ranks"),
        (["--nodes", "2", "--gres", "nvme:9,gpu:h100:4"], "batch size 60: expected a multiple of the 8 ranks"),
        (["--batch-size", "501"], "--recipe.batch-size 501: expected at most the 500 training images"),
        (["--recipe.validation", "500"], "--recipe.validation 500: expected fewer than the 500 training images"),
        (["--teacher", "none"], f"--teacher {ROOT}/none: expected the folder of a finished run"),
        (["--start-from", "none"], f"--start-from {ROOT}/none: expected the folder of a finished run"),
        (["--gpus-per-node", "x;rm"], "--gpus-per-node 'x;rm': expected NUMBER or TYPE:NUMBER, such as 8 or h100:8"),
        (["--time", "soon"], "--time 'soon': expected MINUTES[:SECONDS], HOURS:MINUTES:SECONDS or"),
        (["--runs", "a\\b"], "expected no backslash"),
    ],
)
@pytest.mark.parametrize("dry_run", [["--dry-run"], pytest.param([], marks=pytest.mark.every)], ids=["dry", "real"])
def test_what_a_job_would_refuse_is_refused_at_submit(
    options: list[str], message: str, dry_run: list[str], small_data: Path, tmp_path: Path
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\ntouch {tmp_path}/submitted\n")
    sbatch.chmod(0o755)
    runs = [] if "--runs" in options else ["--runs", tmp_path / "runs"]
    words = ["tiny", *TINY, "--data", small_data, *runs, *options, *dry_run]
    done = module("launch", "submit", *words, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "submitted").exists()
    assert not (tmp_path / "runs").exists()


def test_relative_paths_reach_the_job_as_absolute_ones(small_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    for name, target in (("data", small_data), ("teacher", tiny_run)):
        (tmp_path / name).symlink_to(target)
    words = ["--data", "data", "--runs", "runs", "--teacher", "teacher", "--start-from=teacher", "--dry-run"]
    done = module("launch", "submit", "tiny", *TINY, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    config = cli.parse_train([*command[command.index("slurm/train.sbatch") + 1 :], "--stop-file", "x"])
    config.check()
    folders = {"data": config.data, "runs": config.runs, "teacher": config.teacher}
    assert folders == {name: tmp_path / name for name in folders}
    assert config.start_from == tmp_path / "teacher"
    assert config.resume == "auto"
    assert not (tmp_path / "runs").exists()


def test_weights_reach_the_job_by_an_absolute_path(tmp_path: Path) -> None:
    """Where there is such a file; a model outside the package may give the argument another meaning."""
    (tmp_path / "imagenet.pth").touch()
    program = "import sys; from launch.train_arguments import absolute_paths; print(*absolute_paths(sys.argv[1:]))"
    for value, expected in (("imagenet.pth", f"{tmp_path}/imagenet.pth"), ("best", "best")):
        words = ["--architecture.arguments.weights", value]
        done = python("-c", program, *words, cwd=tmp_path)
        assert done.stdout == f"--architecture.arguments.weights={expected}\n", done.stderr


@pytest.mark.parametrize("command", ["submit", "sweep"])
def test_weights_that_do_not_fit_are_refused_before_the_queue(
    command: str, small_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    config = Run(tiny_run).config()
    (tmp_path / "other").mkdir()
    dataset = replace(config.dataset, classes=[*config.dataset.classes[1:], "zebra"])
    write_json(tmp_path / "other" / "run.json", replace(config, dataset=dataset))
    shutil.copy(tiny_run / "summary.json", tmp_path / "other")
    words = ["launch", command, "tiny-norm", *TINY, "--data", small_data, "--runs", tmp_path / "runs", "--dry-run"]
    done = module(*words, "--teacher", tmp_path / "other")
    assert done.returncode == 2
    assert "expected a run on the classes of" in done.stderr
    done = module(*words, "--start-from", tiny_run)
    assert done.returncode == 2
    assert "expected the weights of this architecture" in done.stderr


VALID = st.sampled_from(
    [
        "8",
        "h100:8",
        "a100_3g.20gb:2",
        "30",
        "1-02:00:00",
        "gpu",
        "gpu,long",
        "gpu:8",
        "gpu:h100:8,nvme:1",
        "64G",
        "a&(b|c)",
    ]
)
STRANGE = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
NO_OPTION = STRANGE.filter(lambda word: not word.startswith(("--resume", "--runs")))  # which the scripts read
NEARLY_VALID = st.builds("".join, st.tuples(VALID, STRANGE) | st.tuples(STRANGE, VALID))


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """The result of a call, or None and why it was refused."""
    try:
        return call(), ""
    except UserError as error:
        return None, str(error)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["gpus_per_node", "gres", "mem", "time", "partition", "account", "qos", "constraint"]),
    VALID | NEARLY_VALID | STRANGE,
)
def test_a_value_is_refused_or_reaches_sbatch_as_it_is(name: str, value: str) -> None:
    option = f"--{name.replace('_', '-')}"
    allocation, message = attempt(lambda: Allocation(**{name: value}))
    if allocation is None:
        assert message.startswith(f"{option} {value!r}: expected ")
        return
    assert allocation.options()[-3:] == ["--nodes=1", f"{option}={value}", "--export=ALL"]
    signs = r"&|*()\[\]" if name == "constraint" else ""  # of its syntax
    assert re.fullmatch(
        rf"[A-Za-z0-9_.,:@+/%={signs}-]+", value
    )  # nothing that a shell, or a line of #SBATCH, would read
    assert not value.startswith("-")
    if name == "gpus_per_node":
        assert allocation.ranks == int(value.split(":")[-1])


@settings(max_examples=200, deadline=None)
@given(STRANGE, STRANGE)
def test_sbatch_reads_the_path_of_a_log_as_it_is(name: str, folder: str) -> None:
    """In its patterns, %% is a %, and with a backslash it replaces none."""
    options, message = attempt(lambda: name_and_log(name, Path("/runs") / f"_{folder}", "%j"))
    if options is None:
        assert "\\" in folder or "\n" in folder, message
        return
    job_name, log = options
    assert not {"\\", "\n"} & set(log)
    assert re.fullmatch(r"--job-name=runner-[A-Za-z0-9._-]*", job_name)
    path = re.sub("%(.)", lambda pattern: {"%": "%", "x": "NAME", "j": "7"}[pattern[1]], log.removeprefix("--output="))
    assert path == f"{Path('/runs') / f'_{folder}'}/slurm/NAME-7.log"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the batch scripts run without SLURM; `accelerate` writes its arguments to the file `words`."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "slurm").symlink_to(ROOT / "slurm")
    (folder / "launch").mkdir()
    (folder / "launch" / "activate").touch()
    programs = {
        "scontrol": "echo ' NodeAddr=127.0.0.1 '",
        "srun": 'shift; exec "$@"',
        "accelerate": "printf '%s\\0' \"$@\" >words",
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


RUNS = shutil.ignore_patterns("runs")  # of other tests, in the checkout that they share
JOB_ENVIRONMENT = {
    **{"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_GPUS_PER_NODE": "h100:8"},
    **{"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_ARRAY_TASK_ID": "1"},
}


def run_batch_script(checkout: Path, script: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """From another folder than that of the submission, in which a script of SLURM's spool may start."""
    environ = {"PATH": f"{checkout}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(checkout), **JOB_ENVIRONMENT, **more}
    command = ["bash", checkout / "slurm" / script, *words]
    return subprocess.run(command, cwd="/", env=environ, capture_output=True, text=True, check=False)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(NO_OPTION, min_size=10, max_size=40), st.sampled_from([[], ["--runs", "a b"], ["--runs=/no/a b"]]))
def test_the_batch_scripts_pass_words_on_and_add_only_a_stop_file(
    checkout: Path, values: list[str], runs: list[str]
) -> None:
    """About 300 words, each of them also as the value of an option."""
    options = list(itertools.chain.from_iterable((value, f"--teacher={value}") for value in values))
    shared = ["--data", "/a b/*", "--resume", "auto", *options, *runs]
    folder = checkout / (runs[-1].removeprefix("--runs=") if runs else "runs") / "slurm"
    (checkout / "trials").write_text("tiny --seeds 0 --name a\ngrid/net-[0.1]* --seeds 1 --name b\n")
    trial = ["grid/net-[0.1]*", "--seeds", "1", "--name", "b"]
    for script, first, expected in (("train.sbatch", ["tiny"], ["tiny"]), ("sweep.sbatch", ["trials"], trial)):
        done = run_batch_script(checkout, script, *first, *shared)
        assert done.returncode == 0, done.stderr
        words = (checkout / "words").read_bytes().decode().split("\0")[:-1]
        assert words[words.index("--num_processes") + 1] == "16"
        after = words[words.index("train") + 1 :]
        assert after == [*expected, *shared, "--stop-file", f"{folder}/.stop-7-0"]


def with_program(checkout: Path, folder: Path, name: str, text: str) -> Path:
    """A copy of the checkout with another program."""
    copy = Path(shutil.copytree(checkout, folder, symlinks=True, ignore=RUNS))
    (copy / name).write_text(f"#!/bin/bash\n{text}\n")
    return copy


def with_calls(checkout: Path, name: str, text: str) -> None:
    """Adds a program that logs its arguments, line by line."""
    (checkout / name).write_text(f'#!/bin/bash\necho "$*" >>{name}.calls\n{text}\n')
    (checkout / name).chmod(0o755)


def calls_of(checkout: Path, name: str) -> list[str]:
    return (checkout / f"{name}.calls").read_text().splitlines()


JOB = ("train.sbatch", "tiny", "--data", "x", "--resume", "auto")
# Asks for a checkpoint, as SLURM does before the time limit, and then stops as the ranks do.
STOPS = 'kill -USR1 $PPID; while [ ! -e "$STOP_FILE" ]; do sleep 0.1; done; rm "$STOP_FILE"; exit 75'


def test_a_job_is_queued_again_until_the_limit_which_lost_nodes_do_not_use_up(checkout: Path, tmp_path: Path) -> None:
    copy = with_program(checkout, tmp_path / "copy", "accelerate", STOPS)
    (copy / "runs" / "slurm").mkdir(parents=True, exist_ok=True)
    (copy / "runs" / "slurm" / ".requeues-7").write_text("limit\n" * 5)  # of an earlier job with this number
    (copy / "runs" / "slurm" / ".stop-7-4").touch()
    # SLURM has started it twice more after losing nodes; SLURM_RESTART_COUNT counts those too.
    for restarts, message in (("0", "queued again"), ("3", "queued again"), ("4", "not queued again, because MAX_REQ")):
        done = run_batch_script(copy, *JOB, SLURM_RESTART_COUNT=restarts, MAX_REQUEUES="2")
        assert done.returncode == 75, done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"train.sbatch: stopped with a checkpoint; {message}")
    assert not list(copy.glob("runs/slurm/.*"))


def with_patience(copy: Path, seconds: int) -> None:
    """Replaces the link to the scripts by a copy that waits for so long."""
    (copy / "slurm").unlink()
    shutil.copytree(ROOT / "slurm", copy / "slurm")
    script = (copy / "slurm" / "train.sbatch").read_text()
    (copy / "slurm" / "train.sbatch").write_text(re.sub(r"^PATIENCE=\d+", f"PATIENCE={seconds}", script, flags=re.M))


def test_a_job_whose_ranks_do_not_stop_is_queued_again_at_the_time_limit(checkout: Path, tmp_path: Path) -> None:
    program = "kill -USR1 $PPID; sleep 0.5; kill -TERM $PPID; exec >/dev/null 2>&1; sleep 20; exit 9"
    copy = with_program(checkout, tmp_path / "copy", "accelerate", program)
    with_patience(copy, 2)
    done = run_batch_script(copy, *JOB)
    assert done.stderr.splitlines()[-1] == "train.sbatch: the time limit came before a checkpoint; queued again"
    assert done.returncode == 75


@pytest.mark.parametrize(
    ("program", "patience"),
    [
        ("sleep 1.5; " + STOPS.replace("rm ", "sleep 0.5; rm "), 1),
        (STOPS.replace("exit", "kill -TERM $PPID; sleep 1; exit"), 20),
    ],
    ids=["long before the time limit", "shortly after it"],
)
def test_ranks_that_stop_have_the_time_for_a_checkpoint(
    checkout: Path, tmp_path: Path, program: str, patience: int
) -> None:
    """The script's patience begins only at the time limit."""
    copy = with_program(checkout, tmp_path / "copy", "accelerate", program)
    with_patience(copy, patience)
    done = run_batch_script(copy, *JOB)
    assert done.stderr.splitlines()[-1] == "train.sbatch: stopped with a checkpoint; queued again"
    assert done.returncode == 75


def test_a_cancelled_job_asks_for_a_checkpoint_and_is_not_queued_again(checkout: Path, tmp_path: Path) -> None:
    copy = with_program(checkout, tmp_path / "copy", "accelerate", STOPS.replace("USR1", "TERM"))
    with_patience(copy, 1)  # it waits for the ranks all the same
    with_calls(copy, "scontrol", "echo ' NodeAddr=127.0.0.1 '")
    done = run_batch_script(copy, *JOB)
    assert (done.returncode, "queued" in done.stderr) == (75, False)
    assert not [call for call in calls_of(copy, "scontrol") if call.startswith("requeue")]


@pytest.mark.parametrize(
    "program",
    ['sleep 2.5; [ ! -e "$STOP_FILE" ] || exit 3', STOPS.replace("exit 75", "exit 0")],
    ids=["undisturbed", "complete at the signal"],
)
def test_a_complete_run_is_not_queued_again(checkout: Path, tmp_path: Path, program: str) -> None:
    copy = with_program(checkout, tmp_path / "copy", "accelerate", program)
    with_patience(copy, 1)  # which begins at the time limit
    done = run_batch_script(copy, *JOB)
    assert (done.returncode, "queued" in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize(
    ("srun", "message"),
    [
        ('[ "$1" != --overlap ] || exit 1; shift; exec "$@"', "a node does not answer; queued again"),
        ('[ "$1" != --overlap ] || exit 0; shift; exec "$@"', ""),
        ("exit 1", ""),  # a step that never started never will
    ],
    ids=["lost", "failed", "never started"],
)
def test_a_failed_step_is_queued_again_only_if_a_node_was_lost(
    checkout: Path, tmp_path: Path, srun: str, message: str
) -> None:
    copy = with_program(checkout, tmp_path / "copy", "accelerate", "exit 1")
    (copy / "srun").write_text(f"#!/bin/bash\n{srun}\n")
    (copy / "runs" / "slurm").mkdir(parents=True, exist_ok=True)
    done = run_batch_script(copy, *JOB)
    assert done.returncode == 1
    assert message in done.stderr
    assert ("queued" in done.stderr) == bool(message)


def test_a_second_signal_does_not_undo_the_first(checkout: Path, tmp_path: Path) -> None:
    """It comes when the ranks have written the checkpoint, and removed the stop file, while the script still waits for
    the program that made it."""
    program = STOPS.replace("exit 75", "kill -USR1 $PPID; sleep 0.5; exit 75")
    copy = with_program(checkout, tmp_path / "copy", "accelerate", program)
    with_calls(copy, "touch", '/usr/bin/touch "$@"; sleep 1')
    done = run_batch_script(copy, *JOB)
    assert done.returncode == 75, done.stderr
    assert done.stderr.splitlines()[-1] == "train.sbatch: stopped with a checkpoint; queued again"


@pytest.mark.parametrize(
    ("array", "name"),
    [
        ({}, "7"),
        ({"SLURM_ARRAY_JOB_ID": "7"}, "7_1"),  # 7 would be the whole array
        ({"SLURM_ARRAY_JOB_ID": "5"}, "7"),  # the array of this job, or of one from which it was submitted
    ],
)
def test_a_job_queues_itself_again_and_no_other(
    checkout: Path, tmp_path: Path, array: dict[str, str], name: str
) -> None:
    copy = with_program(checkout, tmp_path / "copy", "accelerate", STOPS)
    with_calls(copy, "scontrol", "echo ' NodeAddr=127.0.0.1 '")
    assert run_batch_script(copy, *JOB, **array).returncode == 75
    assert calls_of(copy, "scontrol")[-1] == f"requeue {name}"


@pytest.mark.parametrize("tries", [3, 100])
@pytest.mark.parametrize("command", ["show node", "requeue"])
def test_a_controller_that_does_not_answer_is_asked_again(
    checkout: Path, tmp_path: Path, command: str, tries: int
) -> None:
    """As when it restarts, or many tasks of a sweep start at once."""
    copy = with_program(checkout, tmp_path / "copy", "accelerate", STOPS)
    with_calls(copy, "sleep", "exec /usr/bin/sleep 0.01")
    answer = f'[[ $* != "{command}"* ]] || [ $(grep -c "^{command}" scontrol.calls) -ge {tries} ] || exit 1'
    with_calls(copy, "scontrol", f"{answer}\necho ' NodeAddr=127.0.0.1 '")
    done = run_batch_script(copy, *JOB)
    asked = [call for call in calls_of(copy, "scontrol") if call.startswith(command)]
    pauses = [seconds for seconds in calls_of(copy, "sleep") if float(seconds) > 1]
    assert pauses == ["5", "10", "20", "40", "60"][: len(asked) - 1]
    last = done.stderr.splitlines()[-1]
    if tries == 3:
        assert (done.returncode, len(asked)) == (75, 3), done.stderr
        assert last == "train.sbatch: stopped with a checkpoint; queued again"
    elif command == "requeue":
        assert (done.returncode, len(asked)) == (75, 6), done.stderr
        assert last == "train.sbatch: cannot be queued again; submit it again to resume"
    else:
        assert (done.returncode, len(asked)) == (1, 6), done.stderr
        assert last.endswith("no address from SLURM's controller; submit the job again")


def test_one_of_very_many_nodes_is_the_first(checkout: Path, tmp_path: Path) -> None:
    """More names than a pipe holds."""
    copy = Path(shutil.copytree(checkout, tmp_path / "copy", symlinks=True, ignore=RUNS))
    with_calls(copy, "scontrol", "[ \"$2\" = node ] || seq -f node-%.0f 100000\necho ' NodeAddr=127.0.0.1 '")
    done = run_batch_script(copy, *JOB)
    assert done.returncode == 0, done.stderr
    assert calls_of(copy, "scontrol")[-1] == "show node node-1 --oneliner"


def test_one_node_does_not_ask_the_controller(checkout: Path, tmp_path: Path) -> None:
    copy = with_program(checkout, tmp_path / "copy", "scontrol", "exit 1")
    with_calls(copy, "srun", 'shift; exec "$@"')
    done = run_batch_script(copy, *JOB, SLURM_NNODES="1")
    assert done.returncode == 0, done.stderr
    assert calls_of(copy, "srun")[0].startswith("--kill-on-bad-exit=1 bash slurm/train_node ")


@pytest.mark.parametrize("address", ["fd00::5", "[fd00::5]"])
def test_an_ipv6_address_is_passed_on(checkout: Path, tmp_path: Path, address: str) -> None:
    copy = with_program(checkout, tmp_path / "copy", "scontrol", f"echo 'NodeName=n1 NodeAddr={address} Port=1'")
    assert run_batch_script(copy, *JOB).returncode == 0
    words = (copy / "words").read_bytes().decode().split("\0")
    assert words[words.index("--main_process_ip") + 1] == "fd00::5"


@pytest.mark.root
@pytest.mark.every
@pytest.mark.processes
def test_two_nodes_train_over_ipv6_alone(checkout: Path, small_data: Path, tmp_path: Path) -> None:
    """In a network namespace without an IPv4 address, with accelerate's own command."""
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to create network namespaces")
    copy = with_program(checkout, tmp_path / "copy", "scontrol", "echo ' NodeAddr=fd00::5 '")
    (copy / "launch" / "multi_node.yaml").symlink_to(ROOT / "launch" / "multi_node.yaml")
    (copy / "accelerate").write_text(f'#!/bin/sh\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n')
    (copy / "srun").write_text('#!/bin/bash\nshift\nSLURM_NODEID=1 "$@" &\n"$@" && wait $!\n')
    network = (
        "ip link set lo up && ip -4 address delete 127.0.0.1/8 dev lo && ip -6 address add fd00::5/128 dev lo nodad"
    )
    words = [*TINY, "--data", small_data, "--runs", tmp_path / "runs", "--device", "cpu", "--max-steps", 2]
    script = shlex.join(["bash", "slurm/train.sbatch", "tiny", *map(str, words), "--resume", "auto"])
    environ = clean_environment(GLOO_SOCKET_IFNAME="lo", **JOB_ENVIRONMENT, SLURM_SUBMIT_DIR=str(copy))
    done = subprocess.run(
        ["unshare", "--net", "bash", "-c", f"{network} && exec {script}"],
        cwd=copy, capture_output=True, text=True, check=False,
        env=environ | {"PATH": f"{copy}:/usr/sbin:/usr/bin:/sbin:/bin", "SLURM_GPUS_PER_NODE": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path / "runs" / "tiny" / "seed-0").config().world_size == 2


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"SLURM_NTASKS": "4"},
            "4 tasks on 2 node(s): expected one per node; leave out --ntasks and --ntasks-per-node",
        ),
        ({"MAX_REQUEUES": "many"}, "MAX_REQUEUES='many': expected an integer >= 0"),
    ],
)
def test_a_job_with_other_settings_is_refused(
    checkout: Path, tmp_path: Path, environ: dict[str, str], message: str
) -> None:
    copy = Path(shutil.copytree(checkout, tmp_path / "copy", symlinks=True, ignore=RUNS))
    (copy / "words").unlink(missing_ok=True)
    done = run_batch_script(copy, *JOB, **environ)
    assert (done.returncode, done.stderr) == (2, f"train.sbatch: {message}\n")
    assert not (copy / "words").exists()


@pytest.mark.parametrize(
    ("task", "last", "code", "message"),
    [
        ("2", "2", 2, "sweep.sbatch: no line 2 in trials: expected --array 0-1 for its 2 line(s)\n"),
        ("0", "0", 0, "sweep.sbatch: only line 0 of 2 is trained; --array 0-1 trains all\n"),
        ("0", "1", 0, ""),
        ("1", "1", 0, ""),
    ],
)
def test_a_task_of_a_sweep_has_a_line(
    checkout: Path, tmp_path: Path, task: str, last: str, code: int, message: str
) -> None:
    copy = Path(shutil.copytree(checkout, tmp_path / "copy", symlinks=True, ignore=RUNS))
    (copy / "trials").write_text("tiny --seeds 0\ntiny --seeds 1")  # the last without a line break
    array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MAX": last}
    done = run_batch_script(copy, "sweep.sbatch", "trials", "--data", "x", "--resume", "auto", **array)
    assert done.returncode == code, done.stderr
    assert [f"{line}\n" for line in done.stderr.splitlines() if "sweep.sbatch" in line] == [message] * bool(message)
    if not code:
        words = (copy / "words").read_bytes().decode().split("\0")
        assert words[words.index("--seeds") + 1] == task


@pytest.mark.parametrize("words", [[], ["no-such-file"], ["empty"]])
def test_a_sweep_needs_a_file_of_trials(checkout: Path, tmp_path: Path, words: list[str]) -> None:
    copy = Path(shutil.copytree(checkout, tmp_path / "copy", symlinks=True, ignore=RUNS))
    (copy / "empty").touch()
    done = run_batch_script(copy, "sweep.sbatch", *words, SLURM_ARRAY_TASK_ID="0")
    found = f"{words[0] if words else 'TRIALS'}: expected a file with the arguments of a trial in each line, found none"
    assert (done.returncode, done.stderr) == (2, f"sweep.sbatch: {found}\n")


def test_a_sweep_of_one_trial_trains_it_without_a_note(checkout: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkout, tmp_path / "copy", symlinks=True, ignore=RUNS))
    (copy / "trials").write_text("tiny --seeds 5\n")
    array = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MAX": "0"}
    done = run_batch_script(copy, "sweep.sbatch", "trials", "--data", "x", "--resume", "auto", **array)
    assert done.returncode == 0, done.stderr
    assert "sweep.sbatch" not in done.stderr
    words = (copy / "words").read_bytes().decode().split("\0")
    assert words[words.index("--seeds") + 1] == "5"


def test_where_no_stop_file_can_be_written_it_is_in_another_folder(checkout: Path, tmp_path: Path) -> None:
    copy = with_program(checkout, tmp_path / "copy", "accelerate", STOPS)
    (copy / "runs").write_text("a file")
    for restarts, message in (("0", "queued again"), ("1", "not queued again, because MAX_REQUEUES is 1")):
        done = run_batch_script(copy, *JOB, SLURM_RESTART_COUNT=restarts, MAX_REQUEUES="1")
        assert done.returncode == 75, done.stderr
        first, *_, last = done.stderr.splitlines()
        (folder,) = re.findall(r"runs/slurm; the stop file is in (/tmp/\S+), and requeues for lost nodes count", first)
        assert last.startswith(f"train.sbatch: stopped with a checkpoint; {message}")
        assert not Path(folder).exists()


def test_requeues_that_cannot_be_counted_end_no_job(checkout: Path, tmp_path: Path) -> None:
    copy = with_program(checkout, tmp_path / "copy", "accelerate", STOPS)
    (copy / "runs" / "slurm" / ".requeues-7").mkdir(parents=True)
    for restarts, message in (("0", "queued again"), ("20", "not queued again, because MAX_REQUEUES is 20")):
        done = run_batch_script(copy, *JOB, SLURM_RESTART_COUNT=restarts)
        assert done.returncode == 75, done.stderr
        assert f"train.sbatch: stopped with a checkpoint; {message}" in done.stderr


def test_a_job_gives_up_before_slurm_kills_it() -> None:
    """KillWait is 30 seconds by default; a test on a cluster waits for the time limit."""
    (seconds,) = re.findall(r"^PATIENCE=(\d+)", (ROOT / "slurm" / "train.sbatch").read_text(), re.M)
    assert 15 <= int(seconds) <= 25


@pytest.mark.parametrize("written", [True, False])
def test_a_stop_file_that_cannot_be_written_does_not_end_the_job(checkout: Path, tmp_path: Path, written: bool) -> None:
    """The folder of logs is there at the start, and then for a time not: as with a quota, or a lost connection."""
    fix = "rm runs/slurm; " + STOPS.partition("; ")[2] if written else "exit 9"
    program = f"rm -r runs/slurm; touch runs/slurm; kill -USR1 $PPID; sleep 2; {fix}"
    copy = with_program(checkout, tmp_path / "copy", "accelerate", program)
    (copy / "runs" / "slurm").mkdir(parents=True, exist_ok=True)
    (copy / "srun").write_text('#!/bin/bash\nshift; exec "$@" 2>/dev/null\n')
    done = run_batch_script(copy, *JOB)
    first, *others = done.stderr.splitlines()
    assert first.endswith("/.stop-7-0, which requests a checkpoint; trying again every second")
    assert others == ["train.sbatch: stopped with a checkpoint; queued again"] * written
    assert done.returncode == (75 if written else 9)


def test_a_job_takes_a_port_that_is_free(checkout: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkout, tmp_path / "copy", symlinks=True, ignore=RUNS))
    for port in range(30000, 31000):  # far from those of the real jobs of other tests
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            assert run_batch_script(copy, *JOB, SLURM_JOB_ID=str(port - 20000)).returncode == 0
            break
    words = (copy / "words").read_bytes().decode().split("\0")
    assert port < int(words[words.index("--main_process_port") + 1]) < port + 10
    assert run_batch_script(copy, *JOB, SLURM_JOB_ID="95000").returncode == 0
    words = (copy / "words").read_bytes().decode().split("\0")
    assert 31_000 <= int(words[words.index("--main_process_port") + 1]) < 31_010  # below the ephemeral ports


LISTEN = (
    "import socket, sys, time; server = socket.create_server(('127.0.0.1', int(sys.argv[1]))); "
    "print('ready', flush=True); time.sleep(600)"
)


@pytest.mark.parametrize(
    ("end", "starts", "code", "job"),  # each with ports of its own
    [
        ("exit 0", 1, 0, "11800"),
        (STOPS, 1, 75, "11820"),
        (STOPS.replace("USR1", "TERM"), 1, 75, "11840"),
        ("exit 1", 5, 1, "11860"),
    ],
    ids=["complete", "stopped", "cancelled", "failed"],
)
def test_only_a_failed_start_gets_another_port_and_at_most_five(
    checkout: Path, tmp_path: Path, end: str, starts: int, code: int, job: str
) -> None:
    """Though another program listens on the port of each."""
    program = (
        f'setsid {sys.executable} -c "{LISTEN}" "$RENDEZVOUS_PORT" >taken 2>/dev/null & echo $! >>listeners\n'
        f"until [ -s taken ]; do sleep 0.05; done; rm taken\n{end}"
    )
    copy = with_program(checkout, tmp_path / "copy", "accelerate", program)
    try:
        done = run_batch_script(copy, *JOB, SLURM_JOB_ID=job)
    finally:
        listeners = (copy / "listeners").read_text().split()
        for process in listeners:
            os.kill(int(process), signal.SIGKILL)
    assert (done.returncode, len(listeners)) == (code, starts), done.stderr
    assert done.stderr.count("starting again with another port") == starts - 1


def test_a_job_whose_port_is_taken_at_the_last_moment_gets_another(checkout: Path, tmp_path: Path) -> None:
    """The first start of the ranks fails, because another program listens by then."""
    program = (
        f'[ ! -e taken ] || {{ printf "%s\\0" "$@" >words; exit 0; }}\n'
        f'setsid {sys.executable} -c "{LISTEN}" "$RENDEZVOUS_PORT" >taken 2>/dev/null & echo $! >listener\n'
        "until [ -s taken ]; do sleep 0.1; done; exit 1"
    )
    copy = with_program(checkout, tmp_path / "copy", "accelerate", program)
    try:
        done = run_batch_script(copy, *JOB, SLURM_JOB_ID="11500")
    finally:
        os.kill(int((copy / "listener").read_text()), signal.SIGKILL)
    assert done.returncode == 0, done.stderr
    (port,) = map(int, re.findall(r"port (\d+) is in use by another program; starting again", done.stderr))
    words = (copy / "words").read_bytes().decode().split("\0")
    assert int(words[words.index("--main_process_port") + 1]) > port


def test_a_job_without_an_address_fails(checkout: Path, tmp_path: Path) -> None:
    copy = with_program(checkout, tmp_path / "copy", "scontrol", "exit 1")
    (copy / "words").unlink(missing_ok=True)
    assert run_batch_script(copy, *JOB).returncode == 1
    assert not (copy / "words").exists()


UUID = "8f2bd1f6-1c5c-4d6e-9a3a-1f0e5b7a9c11"


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, 0),
        ({"SLURM_GPUS_PER_NODE": "8"}, 8),
        ({"SLURM_GPUS_PER_NODE": "h100:8", "SLURM_GPUS_ON_NODE": "16"}, 8),  # --exclusive: all of the node's are there
        ({"SLURM_GPUS_PER_NODE": "a100:4,h100:3"}, 7),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_GPUS": "0"}, 8),  # --gres=gpu:8
        ({"SLURM_STEP_GPUS": "2,3", "SLURM_JOB_GPUS": "0"}, 2),
        ({"SLURM_JOB_GPUS": "0-3,6,8-9"}, 7),
        ({"CUDA_VISIBLE_DEVICES": f"GPU-{UUID},GPU-{UUID[::-1]}"}, 2),
        ({"CUDA_VISIBLE_DEVICES": f"MIG-{UUID}"}, 1),
        ({"CUDA_VISIBLE_DEVICES": f"MIG-GPU-{UUID}/1/0,MIG-GPU-{UUID}/2/0"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"SLURM_GPUS_PER_NODE": "h100"}, "SLURM_GPUS_PER_NODE='h100': expected NUMBER or TYPE:NUMBER"),
        ({"SLURM_JOB_GPUS": "3-0"}, "SLURM_JOB_GPUS='3-0': expected indices such as 0,1 or 0-3, or UUIDs"),
        ({"CUDA_VISIBLE_DEVICES": "all"}, "CUDA_VISIBLE_DEVICES='all': expected indices"),
    ],
)
def test_gpus_are_counted_in_what_slurm_sets(environ: dict[str, str], count: int | str) -> None:
    done = subprocess.run(["bash", ROOT / "slurm/count_gpus"], env=environ, capture_output=True, text=True, check=False)
    if isinstance(count, int):
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{count}\n", "")
    else:
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"count_gpus: {count}")
        assert len(done.stderr.splitlines()) == 1


GRES = {"SLURM_GPUS_PER_NODE": "", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_GPUS": "0-7"}


@pytest.mark.parametrize(
    ("task", "more", "words", "expected"),
    [
        ("", {}, [], 16),
        ("export SLURM_GPUS_ON_NODE=2", {}, [], 4),  # --gres=gpu:2 --exclusive
        ("unset SLURM_GPUS_ON_NODE", {}, [], "0 of the job's 8 GPU(s): expected a request"),
        ("unset SLURM_GPUS_ON_NODE", {}, ["--device", "cpu"], 2),
        ("unset SLURM_GPUS_ON_NODE", {}, ["--device=cpu"], 2),
        ("", {"SLURM_GPUS": "h100:16"}, [], 16),
        (
            "export SLURM_GPUS_ON_NODE=1",
            {"SLURM_GPUS": "9"},
            [],
            "1 GPU(s): expected 1/2 of --gpus 9, as on each node",
        ),
    ],
)
def test_each_node_starts_a_rank_for_each_gpu_that_its_task_gets(
    checkout: Path, tmp_path: Path, task: str, more: dict[str, str], words: list[str], expected: int | str
) -> None:
    """Without the errors, ranks would wait for some that another node does not start, or a job use one GPU of eight."""
    program = f'shift; export SLURMD_NODENAME=n2; {task}; exec "$@"'
    copy = with_program(checkout, tmp_path / "copy", "srun", program.replace("; ;", ";"))
    (copy / "words").unlink(missing_ok=True)
    done = run_batch_script(copy, *JOB, *words, **GRES, **more)
    if isinstance(expected, int):
        assert done.returncode == 0, done.stderr
        started = (copy / "words").read_bytes().decode().split("\0")
        assert started[started.index("--num_processes") + 1] == str(expected)
        assert f", {expected} rank(s)" in done.stderr
    else:
        assert done.returncode == 2, done.stderr
        assert f"train.sbatch: n2: {expected}" in done.stderr
        assert not (copy / "words").exists()


def test_the_first_node_records_that_the_step_has_started(checkout: Path, tmp_path: Path) -> None:
    """Where it can be recorded: without it, a lost node would count as a step that never started."""
    program = '[ -e "$STOP_FILE.started" ] && echo recorded || echo none'
    copy = with_program(checkout, tmp_path / "copy", "accelerate", program)
    (copy / "runs" / "slurm").mkdir(parents=True)
    for node, recorded in (("0", "recorded\n"), ("1", "none\n")):
        assert run_batch_script(copy, *JOB, SLURM_NODEID=node).stdout == recorded
    (copy / "srun").write_text('#!/bin/bash\nshift; rm -r runs/slurm; touch runs/slurm; exec "$@"\n')
    done = run_batch_script(copy, *JOB)
    assert (done.returncode, done.stdout) == (0, "none\n"), done.stderr


def test_a_job_without_gpus_starts_one_rank_per_node(checkout: Path, tmp_path: Path) -> None:
    """Which says itself that it needs --device cpu."""
    copy = Path(shutil.copytree(checkout, tmp_path / "copy", symlinks=True, ignore=RUNS))
    done = run_batch_script(copy, *JOB, SLURM_GPUS_PER_NODE="")
    assert done.returncode == 0, done.stderr
    assert "node(s) with 0 GPU(s) each" in done.stderr


def test_a_job_gives_its_cpus_to_its_tasks(checkout: Path, tmp_path: Path) -> None:
    copy = with_program(checkout, tmp_path / "copy", "accelerate", 'echo "CPUs: $SRUN_CPUS_PER_TASK"')
    assert run_batch_script(copy, *JOB, SLURM_CPUS_PER_TASK="96").stdout == "CPUs: 96\n"
    assert run_batch_script(copy, *JOB).stdout == "CPUs: \n"


def test_a_container_gets_the_folders_that_the_arguments_name(checkout: Path, tmp_path: Path) -> None:
    """Its image has the environment, so the node needs none."""
    copy = with_program(checkout, tmp_path / "copy", "srun", "printf '%s\\n' \"$@\"")
    (copy / "launch" / "activate").write_text("exit 9\n")
    for name in ("data", "modules", "teacher", "with,comma"):
        (tmp_path / name).mkdir()
    words = ["--data", f"{tmp_path}/data", f"--teacher={tmp_path}/teacher", "--name", "/nowhere", "--runs", "mine"]
    image = {"RUNNER_CONTAINER_IMAGE": "ghcr.io#team/runner:1", "PYTHONPATH": f"{tmp_path}/modules"}
    done = run_batch_script(copy, *JOB, *words, **image)
    assert done.returncode == 0, done.stderr
    folders = [copy, tmp_path / "modules", copy / "mine", tmp_path / "data", tmp_path / "teacher"]
    options = done.stdout.splitlines()
    assert options[1:4] == [
        "--container-image=ghcr.io#team/runner:1",
        f"--container-workdir={copy}",
        "--container-mounts=" + ",".join(f"{folder}:{folder}" for folder in folders),
    ]
    refused = run_batch_script(copy, *JOB, f"--teacher={tmp_path}/with,comma", **image)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"train.sbatch: {tmp_path}/with,comma: expected no comma and no colon")


@pytest.mark.parametrize("fault", ["others can write there", "belongs to another user"])
def test_an_environment_that_others_can_change_is_refused(fault: str, tmp_path: Path) -> None:
    """Its programs would run with the rights of who activates it."""
    cache = tmp_path / "cache"
    cache.mkdir()
    if fault == "others can write there":
        cache.chmod(0o777)
    elif os.getuid() == 0:
        os.chown(cache, 12345, 12345)
    else:
        pytest.skip("only root can give a folder away")
    script = f"source {ROOT}/launch/activate"
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "RUNNER_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"{cache}: {fault}" in done.stderr
    assert list(cache.iterdir()) == []


SEARCH = ("search.sbatch", "tiny", "--data", "x", "--trials", "2")
ONE_NODE = {"SLURM_NNODES": "1", "SLURM_NTASKS": "1"}


def search_job(checkout: Path, folder: Path, program: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A job of search.sbatch, whose worker is a program in the shell instead of `python -m launch search`."""
    copy = with_program(checkout, folder, "python", program)
    (copy / "python").chmod(0o755)
    return run_batch_script(copy, *SEARCH, **{**ONE_NODE, **more})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SLURM_NNODES": "2"}, "2 nodes: expected 1; a trial uses one node"),
        ({"SLURM_NTASKS": "2"}, "2 tasks: expected 1; leave out"),
        ({"RUNNER_CONTAINER_IMAGE": "x"}, "RUNNER_CONTAINER_IMAGE: expected none"),
        ({"MAX_REQUEUES": "-1"}, "MAX_REQUEUES='-1': expected an integer >= 0"),
    ],
)
def test_a_worker_of_a_search_that_could_not_work_is_refused(
    checkout: Path, tmp_path: Path, environ: dict[str, str], message: str
) -> None:
    done = search_job(checkout, tmp_path / "copy", "exit 0", **environ)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"search.sbatch: {message}")
    assert not (tmp_path / "copy" / "runs").exists()


@pytest.mark.parametrize("runs", [["--runs", "here"], ["--runs=here"]])
def test_a_worker_of_a_search_gets_the_arguments_and_its_exit_code_is_the_jobs(
    checkout: Path, tmp_path: Path, runs: list[str]
) -> None:
    copy = with_program(checkout, tmp_path / "copy", "python", 'printf "%s\\n" "$@" >words; exit 3')
    (copy / "python").chmod(0o755)
    done = run_batch_script(copy, *SEARCH, *runs, **ONE_NODE)
    assert (done.returncode, done.stderr) == (3, "")
    assert (copy / "words").read_text().split() == ["-m", "launch", "search", *SEARCH[1:], *runs]
    assert list((copy / "here" / "slurm").iterdir()) == []


# SLURM sends signals to the script alone, which passes one on.
HANDLES = "trap 'exit 75' TERM; kill -{signal} $PPID; while true; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("program", "code", "last"),
    [
        (HANDLES.format(signal="USR1"), 75, "stopped with checkpoints; queued again"),
        ("kill -USR1 $PPID; while true; do sleep 0.05; done", 143, "stopped with checkpoints; queued again"),
        (HANDLES.format(signal="TERM"), 75, None),  # cancelled
        ("exit 75", 75, None),  # nobody asked
        ("exit 0", 0, None),
        (HANDLES.format(signal="USR1").replace("75", "1"), 1, None),  # it failed meanwhile
        # It does not stop in time: SLURM sends TERM at the time limit.
        (
            "trap : TERM; kill -USR1 $PPID; sleep 0.5; kill -TERM $PPID; sleep 3", 75,
            "the time limit came before all checkpoints; queued again",
        ),
        # A second USR1 must not reach the worker, which would kill its trials.
        (
            "trap 'echo once >>signals' TERM; kill -USR1 $PPID; until [ -e signals ]; do sleep 0.05; done; "
            "kill -USR1 $PPID; sleep 1; "
            '[ "$(cat signals)" = once ] && exit 75; exit 9', 75, "stopped with checkpoints; queued again",
        ),
    ],
)  # fmt: skip
def test_a_worker_of_a_search_is_queued_again_only_if_it_was_asked_to_stop(
    checkout: Path, tmp_path: Path, program: str, code: int, last: str | None
) -> None:
    done = search_job(checkout, tmp_path / "copy", program)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1:] == ([f"search.sbatch: {last}"] if last else [])
    assert len(list((tmp_path / "copy" / "runs" / "slurm").glob(".requeues-*"))) == (1 if last else 0)


def test_a_worker_of_a_search_is_queued_again_at_most_so_often(checkout: Path, tmp_path: Path) -> None:
    copy = with_program(checkout, tmp_path / "copy", "python", HANDLES.format(signal="USR1"))
    (copy / "python").chmod(0o755)
    for restarts, message in (("0", "queued again"), ("1", "queued again"), ("2", "not queued again, because MAX_REQ")):
        done = run_batch_script(copy, *SEARCH, **ONE_NODE, SLURM_RESTART_COUNT=restarts, MAX_REQUEUES="2")
        assert done.stderr.splitlines()[-1].startswith(f"search.sbatch: stopped with checkpoints; {message}")
    assert not list(copy.glob("runs/slurm/.*"))


def test_a_batch_script_without_resume_ends_at_once(checkout: Path) -> None:
    """A job of it would train until its time limit, and fail when it is queued again."""
    done = run_batch_script(checkout, "train.sbatch", "tiny", "--data", "x", "--resume", "never")
    assert done.returncode == 2
    assert "expected the option --resume auto" in done.stderr


@pytest.mark.parametrize("name", ["one_process", "one_node", "multi_node", "cpu"])
def test_accelerate_reads_the_configurations(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "launch" / f"{name}.yaml"
    loaded = load_config_from_file(str(path))
    assert loaded.mixed_precision == yaml.safe_load(path.read_text())["mixed_precision"]


def test_scripts_are_executable_and_have_no_syntax_errors() -> None:
    for script in ("launch/quickstart", "launch/check", "launch/environment", "launch/wheelhouse", ".ci/run"):
        assert os.access(ROOT / script, os.X_OK)
    for script in (
        "launch/quickstart",
        "launch/check",
        "launch/environment",
        "launch/wheelhouse",
        "launch/activate",
        "slurm/count_gpus",
        "slurm/train_node",
        ".ci/run",
    ):
        subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.fixture
def bare_machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who is not root, on a machine without sudo, with Python and no other package."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dirname", "basename", "grep", "bash", "cat", "sha256sum", "cut"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    for name, text in (("id", "echo 1000"), ("dpkg-query", "exit 1"), ("find", "exit 0")):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    return {"PATH": str(tools), "RUNNER_PYTHON": sys.executable, "RUNNER_CACHE": str(tmp_path / "cache")}


def test_missing_system_packages_without_root_exit_2_with_one_command(bare_machine: dict[str, str]) -> None:
    done = subprocess.run(["/bin/bash", ROOT / "launch/quickstart"], capture_output=True, text=True, env=bare_machine)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "quickstart: missing system packages and no rights to install them; "
        "run: apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev"
    ]
    assert not Path(bare_machine["RUNNER_CACHE"]).exists()


def test_a_relative_cache_is_refused(bare_machine: dict[str, str], tmp_path: Path) -> None:
    """It would be another one in each folder, and in a stranger's folder a stranger's programs."""
    bare_machine["RUNNER_CACHE"] = "cache"
    script = [ROOT / "launch/quickstart"]
    done = subprocess.run(["/bin/bash", *script], capture_output=True, text=True, env=bare_machine, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "quickstart: RUNNER_CACHE=cache: expected an absolute path, because commands start in other folders"
    ]


def test_a_complete_environment_needs_no_system_packages(bare_machine: dict[str, str]) -> None:
    """As on a compute node, which has neither apt nor headers."""
    program = "import platform, sys; print(sys.version, platform.machine())"
    python = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    key = hashlib.sha256((ROOT / "requirements.txt").read_bytes() + python).hexdigest()[:12]
    home = Path(bare_machine["RUNNER_CACHE"]) / f"env-{key}"
    home.mkdir(parents=True)
    (home / "complete").touch()
    (Path(bare_machine["PATH"]) / "dpkg-query").unlink()
    script = f'source {ROOT}/launch/activate && echo "$PATH"'
    done = subprocess.run(["/bin/bash", "-c", script], capture_output=True, text=True, env=bare_machine)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{home}/bin:{bare_machine['PATH']}\n"


PYTHON = r"""#!/bin/bash
case $1 in
-m)
    mkdir -p "$3/bin"
    printf '#!/bin/bash\n' >"$3/bin/python"
    printf '#!/bin/bash\necho "$*" >>%q\n[[ $* != *tensorrt-cu13* ]] || { echo no route >&2; exit %d; }\n' \
        "$CALLS" "$FAILS" >"$3/bin/uv"
    chmod +x "$3/bin/"*
    ;;
esac
"""


@pytest.mark.parametrize(("gpu", "fails"), [(True, 0), (True, 1), (False, 0)])
def test_tensorrt_is_installed_where_there_is_a_gpu(gpu: bool, fails: int, tmp_path: Path) -> None:
    """Once, in the version of its bindings; if that fails, one line says so, and the environment is complete."""
    tools, calls = tmp_path / "tools", tmp_path / "calls"
    tools.mkdir()
    gpus = "echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'" if gpu else "echo 'No devices found.'"
    for name, text in (("nvidia-smi", f"#!/bin/bash\n{gpus}\n"), ("python", PYTHON)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environ = clean_environment(
        PATH=f"{tools}:{os.environ['PATH']}",
        RUNNER_CACHE=str(tmp_path / "cache"),
        RUNNER_PYTHON=str(tools / "python"),
        CALLS=str(calls),
        FAILS=str(fails),
    )
    activate = ["bash", "-c", f"source {ROOT}/launch/activate; echo $?; type -p runner"]
    first, second = (subprocess.run(activate, capture_output=True, text=True, env=environ) for _ in range(2))
    assert first.stdout.startswith("0\n"), first.stderr
    (home,) = (path for path in (tmp_path / "cache").glob("env-*") if path.is_dir())
    assert first.stdout == second.stdout == f"0\n{home}/bin/runner\n"
    assert second.stderr == ""
    bindings = re.search(r"^tensorrt-cu13-bindings==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    installed = [line.split()[-1] for line in calls.read_text().splitlines()]
    assert installed == [str(ROOT / "requirements.txt"), *([f"tensorrt-cu13=={bindings}"] if gpu else [])]
    lines = [
        f"activate: creating the Python environment in {home} (several GB, once)",
        *(["activate: installing TensorRT (several GB, once)"] if gpu else []),
        f"activate: tensorrt-cu13=={bindings}: cannot be installed, see {home}/tensorrt.log (remove it to try again); "
        "engines can be built for RTX cards only",
    ]
    assert first.stderr.splitlines() == (lines if fails else lines[:-1])


def test_the_wheel_is_complete_and_installs(tmp_path: Path) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        tmp_path,
    ]
    install = subprocess.run([*pip, ROOT], capture_output=True, text=True, cwd=tmp_path)
    assert install.returncode == 0, install.stderr
    environ = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [tmp_path / "bin/runner", "list", "--json"], capture_output=True, text=True, env=environ, cwd="/"
    )
    assert len(json.loads(done.stdout)) >= 3
    assert (tmp_path / "runner/report/page.html.j2").is_file()
    assert (tmp_path / "launch/cpu.yaml").is_file()


def test_the_cuda_provider_is_linked_only_to_installed_libraries() -> None:
    """Only the driver's library is not part of a package. Loading them would need a GPU."""
    package = Path(importlib.util.find_spec("onnxruntime").origin).parent
    (provider,) = package.glob("capi/libonnxruntime_providers_cuda.so")
    dynamic = subprocess.run(["readelf", "--dynamic", provider], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(lib(?:cu|nv)[^\]]*)\]", dynamic)) - {"libcuda.so.1"}
    assert len(needed) >= 4
    assert needed <= {path.name for path in package.parent.glob("nvidia/*/lib/*.so*")}


def test_requirements_are_pinned_with_hashes_and_name_no_registry() -> None:
    names = ("requirements.txt", "launch/installers.txt", "launch/wheelhouse_tools.txt")
    files = [(ROOT / name).read_text().replace("\\\n", "").splitlines() for name in names]
    pinned = r"[a-z0-9-]+==[\w.+!-]+(\s+--hash=sha256:[0-9a-f]{64})+"
    assert all(re.fullmatch(pinned, line) for lines in files for line in lines)
    lines = files[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0] for line in lines}
    required = project["dependencies"] + project["optional-dependencies"]["test"]
    assert {re.match(r"[a-z0-9-]+", name)[0] for name in required} <= pinned
    assert not re.search(r"://", (ROOT / "pyproject.toml").read_text())
