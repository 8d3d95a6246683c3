"""`python -m launch sweep`: grids become runs, each once, whatever ends in between."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import local
from launch.agent import Agent
from launch.submit import requested
from launch.trials import Trial, expand
from runner import environment
from runner.runs import Run, claimed_runs, read_json
from tests.conftest import ROOT, TINY, clean_environment, gone, module, python, ranks_of, runner

GRID = "podeti-grid/alexnet-sgd-lr0.01-*-dropout0.5"


def sweep(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    return module("launch", "sweep", *words, **options)


def begun(*words: object) -> subprocess.Popen[str]:
    """A sweep under way, in a session of its own."""
    command = [sys.executable, "-m", "launch", "sweep", *map(str, words)]
    environ = clean_environment(WANDB_MODE="disabled")
    return subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def trials_of(
    names: list[str], data: Path, *options: str, seeds: tuple[int, ...] = (0,), name: str | None = None
) -> list[Trial]:
    words = ["--data", str(data), *TINY, *options]
    return expand(names, seeds, name, lambda own: requested([*own, *words]), ("tests.tiny",))


def test_a_trial_has_one_place_whoever_asks(tmp_path: Path) -> None:
    ids = [trial.id for trial in trials_of(["tiny", "tiny-norm"], tmp_path, seeds=(0, 3))]
    assert ids == ["tiny/seed-0", "tiny/seed-3", "tiny-norm/seed-0", "tiny-norm/seed-3"]
    (changed,) = trials_of(["tiny"], tmp_path, "--recipe.epochs", "5")
    (again,) = trials_of(["tiny", "tiny"], tmp_path, "--recipe.epochs", "5")
    (other,) = trials_of(["tiny"], tmp_path, "--recipe.epochs", "6")
    assert changed.id == again.id != other.id
    assert changed.id.endswith("-seed-0")
    # What is no part of the recipe and changes the outcome all the same.
    options = (["--teacher", "a"], ["--teacher", "b"], ["--start-from", "a"], ["--precision", "bf16"],
               ["--deterministic"], ["--max-steps", "5"])  # fmt: skip
    ids = [trials_of(["tiny"], tmp_path, *words)[0].id for words in options]
    assert len({*ids, "tiny/seed-0"}) == len(options) + 1
    (loader,) = trials_of(["tiny"], tmp_path, "--loader", "streaming")  # which changes nothing
    assert loader.id == "tiny/seed-0"
    assert [trial.id for trial in trials_of(["tiny"], tmp_path, name="mine")] == ["tiny/mine-seed-0"]


def test_a_name_may_be_a_grid_a_paper_or_a_pattern(tmp_path: Path) -> None:
    grid = [trial.request.experiment for trial in trials_of(["podeti-grid"], tmp_path)]
    assert len(grid) == len(set(grid)) > 20
    some = [trial.request.experiment for trial in trials_of([GRID], tmp_path)]
    assert 2 <= len(some) < len(grid)
    assert set(some) < set(grid)
    paper = {trial.request.experiment for trial in trials_of(["soni"], tmp_path)}
    assert {"soni-2", "soni-4"} <= paper


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "NAMES: expected experiments, grids or papers"),
        (["tinny"], "no such experiment; expected tiny"),
        (["no*such"], "matches no experiment"),
        (["tiny", "--recipe.epochs", "0"], "--recipe.epochs 0: expected"),
        (["tiny", "--no-such-option", "1"], "no-such-option"),
        (["tiny", "--name", "$(touch x)"], "expected letters, digits"),
        (["tiny", "--seeds", "1", "1"], "expected each seed once"),
        (["tiny", "--slots", "0"], "--slots 0: expected 1 or more"),
        (["tiny", "--on", "slurm"], "sbatch: not found"),
    ],
)
def test_what_is_refused_is_one_line_and_begins_nothing(
    words: list[str], says: str, small_data: Path, tmp_path: Path
) -> None:
    done = sweep(*words, *TINY, "--data", small_data, "--runs", tmp_path / "runs", PATH="/nowhere")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr
    assert not list(tmp_path.glob("runs/tiny*"))
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize(("given", "expected"), [("5,GPU-7", {"5", "GPU-7"}), (None, {"0", "1"})])
def test_trials_share_the_gpus_that_the_sweep_was_given(
    given: str | None, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time, on a GPU each. In place of training, a process says which it sees."""
    says = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(1)"
    monkeypatch.setattr(local, "training_command", lambda *_: ["-c", says])
    trials = trials_of(["tiny"], tmp_path, "--runs", str(tmp_path / "runs"), seeds=(0, 1))
    environ = {"CUDA_VISIBLE_DEVICES": given} if given else {}
    local.train(trials, [], local.Place(2, 2, 1, ()), tmp_path / "logs", environ)
    seen = [path.read_text().strip() for path in tmp_path.glob("logs/*.log")]
    assert len(seen) == 2
    assert set(seen) == expected


@pytest.mark.parametrize("options", [[], ["--device=cpu"], ["--device", "cpu"]])
def test_an_agent_trains_on_the_cpu_where_it_is_told_to_or_there_is_no_gpu(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the option is spelled, it is said once."""
    monkeypatch.setattr(environment, "count_gpus", lambda: 0 if not options else 4)
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda _, words, environ: became.append(words))
    Agent("podeti-alexnet")(["--data", str(tmp_path), *options], {})
    (words,) = became
    assert str(ROOT / "launch/cpu.yaml") in words
    assert sum(word.startswith("--device") for word in words) == 1


def descendants(process: int) -> list[int]:
    """The processes under one, at any depth; those that end meanwhile are left out."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for child in ranks_of(process):
            found += [child, *descendants(child)]
    return found


@pytest.mark.processes
def test_a_grid_that_is_killed_twice_has_no_hole_and_no_repeat(small_data: Path, tmp_path: Path) -> None:
    """The controller is killed; its trials end with it, and the next call goes on."""
    words = [GRID, "--data", small_data, "--runs", tmp_path, "--device", "cpu", "--max-steps", 2]
    words += ["--recipe.batch-size", 50, "--recipe.validation", 100, "--slots", 2]
    changed = ("--max-steps", "2", "--recipe.batch-size", "50", "--recipe.validation", "100")
    trials = trials_of([GRID], small_data, "--runs", str(tmp_path), *changed)
    whole: dict[str, int] = {}
    for least in (1, 3):
        process = begun(*words)
        until = time.monotonic() + 240
        while sum(trial.state() == "whole" for trial in trials) < least and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.05)
        children = descendants(process.pid)
        process.kill()
        process.wait()
        assert gone(children, 20)
        whole = {trial.id: (trial.run.summary).stat().st_mtime_ns for trial in trials if trial.state() == "whole"}
    assert 3 <= len(whole) < len(trials)
    last = sweep(*words, WANDB_MODE="disabled")
    assert last.returncode == 0, last.stdout + last.stderr
    assert f"{len(trials)} whole" in last.stdout
    assert {trial.state() for trial in trials} == {"whole"}
    for trial in trials:
        if trial.id in whole:
            assert trial.run.summary.stat().st_mtime_ns == whole[trial.id], f"{trial.id} was trained again"
    manifest = read_json(next(tmp_path.glob("sweeps/*/sweep.json")))
    assert manifest["trials"] == {trial.id: "whole" for trial in trials}
    again = sweep(*words, WANDB_MODE="disabled")
    assert again.returncode == 0
    assert len(again.stdout.splitlines()) == 1


@pytest.mark.processes
def test_one_failure_stops_no_other(small_data: Path, tmp_path: Path) -> None:
    words = ["tiny-diverging", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu"]
    done = sweep(*words, "--max-steps", 4, WANDB_MODE="disabled")
    assert done.returncode == 1, done.stderr
    assert "lower the learning rate" in done.stdout
    assert done.stdout.splitlines()[-1] == "2 trials: 1 whole, 1 failed"
    look = sweep(*words, "--max-steps", 4, "--dry-run")
    assert look.stdout.splitlines()[-1] == "2 trials: 1 whole, 1 failed; 1 to train"


@pytest.mark.processes
def test_ctrl_c_leaves_everything_to_go_on_with(small_data: Path, tmp_path: Path) -> None:
    words = ["tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu", "--recipe.epochs", 100]
    (trial,) = trials_of(["tiny"], small_data, "--runs", str(tmp_path), "--recipe.epochs", "100")
    process = begun(*words)
    until = time.monotonic() + 120
    while not list(trial.run.checkpoints.glob("step-*")):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 75
    assert trial.state() == "stopped"
    assert not list(trial.run.folder.glob(".stop-*"))
    step = max(int(folder.name[5:]) for folder in trial.run.checkpoints.glob("step-*"))
    done = sweep(*words, WANDB_MODE="disabled")
    assert done.returncode == 0, done.stderr
    assert trial.state() == "whole"
    assert trial.run.config()["resumed"][0]["step"] == step


def test_a_run_has_one_trainer_at_a_time(small_data: Path, tmp_path: Path) -> None:
    with claimed_runs(tmp_path, "tiny", ["seed-0"]):
        assert Run(tmp_path / "tiny" / "seed-0").state() == "running"
        done = runner("train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu")
        assert done.returncode == 2
        assert f"process {os.getpid()} on" in done.stderr
        assert "trains it" in done.stderr
    assert Run(tmp_path / "tiny" / "seed-0").state() == "missing"


def test_another_training_in_the_folder_is_refused(tiny_run: Path, small_data: Path) -> None:
    words = ["tiny", *TINY, "--data", small_data, "--runs", tiny_run.parent.parent]
    assert sweep(*words, "--dry-run").stdout.splitlines()[-1].startswith("1 trials: 1 whole")
    run = tiny_run.name
    assert run == "seed-0"
    record = json.loads((tiny_run / "run.json").read_text())
    record["recipe"]["epochs"] = 77
    other = tiny_run.parent / "other-seed-0"
    other.mkdir()
    (other / "run.json").write_text(json.dumps(record))
    done = sweep(*words, "--name", "other")
    assert done.returncode == 2
    assert "holds a training with another recipe; choose a --name" in done.stderr
    (other / "run.json").unlink()
    other.rmdir()


@pytest.mark.processes
def test_the_same_grid_for_wandbs_controller(small_data: Path, tmp_path: Path) -> None:
    """The definition is W&B's own form, and its command, with an agent's arguments put in, trains."""
    file = tmp_path / "sweep.yaml"
    words = ["tiny", "tiny-norm", *TINY, "--data", small_data, "--runs", tmp_path, "--seeds", 0, 1]
    done = sweep(*words, "--max-steps", 2, "--device", "cpu", "--as-wandb-sweep", file)
    assert done.returncode == 0, done.stderr
    definition = yaml.safe_load(file.read_text())
    assert definition["parameters"] == {"experiment": {"values": ["tiny", "tiny-norm"]}, "seed": {"values": [0, 1]}}
    command = definition["command"]
    place = command.index("${args}")
    given = [
        *command[2:place],
        "--experiment=tiny-norm",
        "--seed=1",
        "--recipe.optimizer.lr=0.02",
        *command[place + 1 :],
    ]
    trained = python(*given, WANDB_RUN_ID="abc12345", WANDB_SWEEP_ID="s1", WANDB_MODE="offline")
    assert trained.returncode == 0, trained.stderr
    config = Run(tmp_path / "tiny-norm" / "s1-abc12345").config()
    assert (config["wandb_id"], config["seed"]) == ("abc12345", 1)
    assert config["recipe"]["optimizer"]["lr"] == 0.02
