"""`python -m launch sweep`: every trial of a grid is trained exactly once, whatever is killed meanwhile."""

import ast
import dataclasses
import io
import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from msgspec.structs import replace

from launch import local_pool, slurm_array
from launch.agent import Agent
from launch.slurm_array import ArrayJob
from launch.sweep import Sweep, SweepManifest
from launch.trials import Trial, check_same_training, expand
from runner import cli
from runner.common.errors import UserError
from runner.common.files import read_json, write_json
from runner.run.folder import Run
from runner.run.schema import Ending
from runner.system import environment
from tests.support.processes import (
    ENDING,
    ROOT,
    TINY,
    Running,
    descendants_of,
    gone,
    module,
    start,
    wait_for_step,
    wait_until,
)

GRID = "podeti-grid/alexnet-sgd-lr0.01-*-dropout0.5"


def sweep(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    return module("launch", "sweep", *words, **options)


def start_sweep(*words: object) -> Running:
    """Starts a sweep in its own session."""
    return start("launch", "sweep", *words)


def trials_of(
    names: list[str], data: Path, *options: str, seeds: tuple[int, ...] = (0,), name: str | None = None
) -> list[Trial]:
    modules = () if ENDING[1] in options else TINY
    return expand(names, seeds, name, ["--data", str(data), *modules, *options], ((modules or ENDING)[1],))


def test_the_same_training_always_has_the_same_run_folder(tmp_path: Path) -> None:
    ids = [trial.id for trial in trials_of(["tiny", "tiny-norm"], tmp_path, seeds=(0, 3))]
    assert ids == ["tiny/seed-0", "tiny/seed-3", "tiny-norm/seed-0", "tiny-norm/seed-3"]
    (changed,) = trials_of(["tiny"], tmp_path, "--recipe.epochs", "5")
    (again,) = trials_of(["tiny", "tiny"], tmp_path, "--recipe.epochs", "5")
    (other,) = trials_of(["tiny"], tmp_path, "--recipe.epochs", "6")
    assert changed.id == again.id != other.id
    assert changed.id.endswith("-seed-0")
    # Options outside the recipe that change the outcome.
    options = (["--teacher", "a"], ["--teacher", "b"], ["--start-from", "a"], ["--precision", "bf16"],
               ["--deterministic"], ["--max-steps", "5"])  # fmt: skip
    ids = [trials_of(["tiny"], tmp_path, *words)[0].id for words in options]
    assert len({*ids, "tiny/seed-0"}) == len(options) + 1
    (loader,) = trials_of(["tiny"], tmp_path, "--loader", "streaming")  # which changes nothing
    assert loader.id == "tiny/seed-0"
    assert [trial.id for trial in trials_of(["tiny"], tmp_path, name="mine")] == ["tiny/mine-seed-0"]


def test_a_thousand_seeds_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing takes longer than all of the rest of a listing."""
    calls: list[object] = []
    monkeypatch.setattr(cli, "parse_train", lambda words, parse=cli.parse_train: calls.append(words) or parse(words))
    trials = trials_of(["tiny", "tiny-norm"], tmp_path, "--recipe.epochs", "5", seeds=tuple(range(1000)))
    assert len(calls) == 2
    for trial in (trials[0], trials[999], trials[1000], trials[-1]):
        assert cli.parse_train(trial.arguments) == dataclasses.replace(trial.config, stop_file=None)
    assert len({trial.id for trial in trials}) == 2000


def test_a_trial_is_listed_with_few_file_operations(
    tiny_run: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, crashed, missing = trials_of(["tiny"], small_data, "--runs", str(tmp_path), seeds=(0, 1, 2))
    for trial in (complete, crashed):
        trial.run.folder.mkdir(parents=True)
        recorded = replace(Run(tiny_run).config(), seed=trial.config.all_seeds[0])
        write_json(trial.run.run_json, recorded)
    complete.run.summary.touch()
    crashed.run.lock.touch()
    calls: list[object] = []
    for module_, name in ((os, "stat"), (os, "open"), (io, "open")):
        call = getattr(module_, name)
        monkeypatch.setattr(
            module_, name, lambda path, *more, call=call, **options: calls.append(path) or call(path, *more, **options)
        )
    for trial, state, most in ((complete, "complete", 4), (crashed, "crashed", 10), (missing, "missing", 5)):
        calls.clear()
        check_same_training(trial.run, trial.config.all_seeds[0], trial.config, recorded.dataset.fingerprint)
        assert trial.state() == state
        assert 0 < len(calls) <= most, calls


@pytest.mark.every
def test_a_name_may_be_a_grid_a_paper_or_a_pattern(tmp_path: Path) -> None:
    grid = [trial.config.experiment for trial in trials_of(["podeti-grid"], tmp_path)]
    assert len(grid) == len(set(grid)) > 20
    some = [trial.config.experiment for trial in trials_of([GRID], tmp_path)]
    assert 2 <= len(some) < len(grid)
    assert set(some) < set(grid)
    paper = {trial.config.experiment for trial in trials_of(["soni"], tmp_path)}
    assert {"soni-2", "soni-4"} <= paper


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "NAMES: expected at least one, found none"),
        (["tinny"], "no such experiment; expected tiny"),
        (["no*such"], "matches no experiment"),
        (["tiny", "--recipe.epochs", "0"], "--recipe.epochs 0: expected"),
        (["tiny", "--no-such-option", "1"], "no-such-option"),
        (["tiny", "--name", "$(touch x)"], "expected letters, digits"),
        (["tiny", "--seeds", "1", "1"], "expected each seed once"),
        (["tiny", "--slots", "0"], "--slots 0: expected an integer >= 1"),
        (["tiny", "--on", "slurm"], "sbatch: not found"),
        (["tiny", "--resume", "never"], "--resume never: expected no --resume; jobs and sweeps set --resume auto"),
        (["tiny", "--stop_file=x"], "--stop-file x: expected no --stop-file; jobs and sweeps set their own"),
        (["tiny", "--seed", "3"], "--seed 3: expected no --seed; a sweep sets the seed of each trial; use --seeds"),
        (["tiny", "--gpus-per-node", "x;rm", "--dry-run"], "--gpus-per-node 'x;rm': expected NUMBER or TYPE:NUMBER"),
        (["tiny", "--gpus-per-node", "1", "--dry-run"], "--gpus-per-node 1: expected --on slurm with it"),
        (["tiny", "--at-once", "1"], "--at-once 1: expected --on slurm with it"),
        (["tiny", "--stop-before", "60"], "--stop-before 60: expected --on slurm with it"),
        (["tiny", "--exclusive"], "--exclusive: expected --on slurm with it"),
        (["tiny", "--on", "slurm", "--slots", "1"], "--slots 1: expected --on local"),
        (["tiny", "--as-wandb-sweep", "x", "--slots", "1"], "--slots 1: expected none with --as-wandb-sweep"),
        (["tiny", "--as-wandb-sweep", "x", "--dry-run"], "expected one of them"),
        (["tiny", "--as-wandb-sweep", "x", "--teacher", "${args}"], "expected no ${"),
        (["tiny", "--on", "slurm", "--nodes", "7", "--dry-run"], "tiny/seed-0: batch size 60: expected a multiple of"),
        (["tiny", "--recipe.validation", "500"], "--recipe.validation 500: expected fewer than the 500 training"),
        (["tiny", "--batch-size", "501"], "--recipe.batch-size 501: expected at most the 500 training images"),
        (["tiny", "--teacher", "none", "--dry-run"], f"--teacher {ROOT}/none: expected the folder of a finished run"),
        (["tiny", "--start-from", "none"], f"--start-from {ROOT}/none: expected the folder of a finished run"),
    ],
)
def test_invalid_input_exits_2_with_one_line_and_trains_nothing(
    words: list[str], message: str, small_data: Path, tmp_path: Path
) -> None:
    done = sweep(*words, *TINY, "--data", small_data, "--runs", tmp_path / "runs", PATH="/nowhere")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not (tmp_path / "runs").exists()
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize("options", [[], ["--device", "auto"], ["--device=cpu"], ["--device", "cuda"]])
def test_the_words_that_were_checked_are_those_that_run(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine without a GPU, and on one with two. A process that prints its arguments replaces training."""
    monkeypatch.setattr(local_pool, "training_command", lambda *_: ["-c", "import sys; print(sys.argv[1:])"])
    call = Sweep(("tiny",), Path("data"), tmp_path, experiments_from=TINY[1:])
    for gpus in (0, 2):
        monkeypatch.setattr(environment, "count_gpus", lambda gpus=gpus: gpus)
        if options[-1:] == ["cuda"] and not gpus:
            with pytest.raises(UserError, match="--device cuda: expected a GPU, found none"):
                call.expand(options)
            continue
        (trial,) = call.expand(["--teacher", "a", *options])
        logs = tmp_path / f"logs-{gpus}"
        local_pool.train_trials(local_pool.ListedTrials([trial]), local_pool.Slots(1, gpus, 1, ()), logs, os.environ)
        (log,) = logs.glob("*.log")
        words = ast.literal_eval(log.read_text())
        assert words[:-1] == [*trial.arguments, "--stop-file"]
        config = cli.parse_train(words)
        config.check()
        assert dataclasses.replace(config, stop_file=None) == dataclasses.replace(trial.config, stop_file=None)
        expected = options[-1].rpartition("=")[2] if options else "auto"
        assert config.device == (expected if gpus or expected == "cpu" else "cpu")
        assert (config.teacher, config.data, config.resume) == (Path.cwd() / "a", Path.cwd() / "data", "auto")


@pytest.mark.parametrize(("visible", "expected"), [("5,GPU-7", {"5", "GPU-7"}), (None, {"0", "1"})])
def test_each_slot_trains_on_one_of_the_visible_gpus(
    visible: str | None, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials at a time. A process that prints its visible GPUs replaces training."""
    program = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(1)"
    monkeypatch.setattr(local_pool, "training_command", lambda *_: ["-c", program])
    trials = trials_of(["tiny"], tmp_path, "--runs", str(tmp_path / "runs"), seeds=(0, 1))
    environ = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    local_pool.train_trials(local_pool.ListedTrials(trials), local_pool.Slots(2, 2, 1, ()), tmp_path / "logs", environ)
    seen = [path.read_text().strip() for path in tmp_path.glob("logs/*.log")]
    assert len(seen) == 2
    assert set(seen) == expected


@pytest.mark.parametrize("options", [[], ["--device=auto"], ["--device=cpu"], ["--device", "cpu"]])
def test_an_agent_trains_on_the_cpu_if_asked_to_or_without_a_gpu(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the option is spelled, the command contains it once."""
    monkeypatch.setattr(environment, "count_gpus", lambda: 4 if "cpu" in " ".join(options) else 0)
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda _, words, environ: commands.append(words))
    Agent("podeti-alexnet")(["--data", str(tmp_path), *options], {})
    (words,) = commands
    assert str(ROOT / "launch/cpu.yaml") in words
    assert sum(word.startswith("--device") for word in words) == 1
    config = cli.parse_train(words[words.index("train") + 1 :])
    assert (config.device, config.resume) == ("cpu", "never")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1"], "--seeds 1: expected no --seeds; an agent trains one seed; use --seed"),
        (["--name", "mine"], "--name mine: expected no --name; runs of a W&B sweep are named"),
        (["--device", "cuda"], "--device cuda: expected a GPU, found none"),
    ],
)
def test_an_agent_refuses_what_it_sets(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "count_gpus", lambda: 0)
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("it trains"))
    with pytest.raises(UserError, match=message):
        Agent("podeti-alexnet")(["--data", str(tmp_path), *options], {"WANDB_RUN_ID": "abc"})


@pytest.mark.every
@pytest.mark.processes
@pytest.mark.parametrize(
    ("names", "options"),
    [
        pytest.param(["tiny"], ["--seeds", *range(6)], id="seeds"),
        pytest.param([GRID], ["--max-steps", 2, "--recipe.batch-size", 50, "--recipe.validation", 100], id="grid"),
    ],
)
def test_a_sweep_that_is_killed_twice_trains_every_trial_once(
    names: list[str], options: list[object], small_data: Path, tmp_path: Path
) -> None:
    """The sweep's process is killed; its trials die with it, and the next call resumes them."""
    words = [*names, *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu", *options]
    words += ["--slots", 2 if names == ["tiny"] else 1]  # in two slots, the four of the grid end in pairs
    seeds, changed = (range(6), []) if names == ["tiny"] else ((0,), map(str, options))
    trials = trials_of(names, small_data, "--runs", str(tmp_path), *changed, seeds=tuple(seeds))
    complete: dict[str, int] = {}
    for least in (1, 3):
        process = start_sweep(*words)
        wait_until(lambda: sum(trial.state() == "complete" for trial in trials) >= least, running=process)  # noqa: B023
        children = descendants_of(process.pid)
        process.kill()
        process.wait()
        assert gone(children, 20)
        complete = {trial.id: trial.run.summary.stat().st_mtime_ns for trial in trials if trial.state() == "complete"}
    assert 3 <= len(complete) < len(trials)
    last = sweep(*words)
    assert last.returncode == 0, last.stdout + last.stderr
    assert f"{len(trials)} complete" in last.stdout
    assert {trial.state() for trial in trials} == {"complete"}
    for trial in trials:
        if trial.id in complete:
            assert trial.run.summary.stat().st_mtime_ns == complete[trial.id], f"{trial.id} was trained again"
    manifest = read_json(next(tmp_path.glob("sweeps/*/sweep.json")), SweepManifest)
    assert manifest.trials == {trial.id: "complete" for trial in trials}
    again = sweep(*words)
    assert again.returncode == 0
    assert len(again.stdout.splitlines()) == 1


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """PATH of stand-ins for SLURM: arrays of at most 2 tasks; sbatch logs its arguments; squeue prints `queue`."""
    programs = {
        "scontrol": "echo 'MaxArraySize            = 2'",
        "sbatch": f"""echo "$*" >> {tmp_path}/log; wc -l < {tmp_path}/log""",
        "squeue": f"[ ! -e {tmp_path}/down ] || {{ echo 'Unable to contact slurm controller' >&2; exit 1; }}\n"
        f"cat {tmp_path}/queue",
    }
    (tmp_path / "bin").mkdir()
    (tmp_path / "queue").touch()
    for name, program in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}


def test_a_sweep_larger_than_an_array_is_several_jobs_and_none_twice(
    slurm: dict[str, str], small_data: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    words = ["tiny", *TINY, "--data", small_data, "--runs", runs, "--on", "slurm", "--seeds", *range(5)]
    words += ["--at-once", 1]
    folder = runs / "sweeps" / "tiny"
    folder.mkdir(parents=True)
    (folder / "trials-1").write_text("of a task that may start again")  # one that was lost made the count wrong
    done = sweep(*words, **slurm)
    assert done.returncode == 0, done.stderr
    submitted = (tmp_path / "log").read_text().splitlines()
    assert [re.findall(r"--array=\S+|--dependency=\S+", line) for line in submitted] == [
        ["--array=0-1%1"], ["--array=0-1%1", "--dependency=afterany:1"], ["--array=0-0%1", "--dependency=afterany:2"],
    ]  # fmt: skip
    files = [Path(re.search(r"slurm/sweep\.sbatch (\S+)", line)[1]) for line in submitted]
    assert (folder / "trials-1").read_text() == "of a task that may start again"
    seeds = [re.search(r"--seeds (\d)", line)[1] for file in files for line in file.read_text().splitlines()]
    assert seeds == ["0", "1", "2", "3", "4"]
    manifest = read_json(folder / "sweep.json", SweepManifest)
    assert [(job.job, len(job.trials)) for job in manifest.jobs] == [("1", 2), ("2", 2), ("3", 1)]

    (tmp_path / "down").touch()
    refused = sweep(*words, **slurm)
    assert refused.returncode == 2
    assert "Unable to contact slurm controller; jobs of this sweep may be queued" in refused.stderr
    (tmp_path / "down").unlink()
    (tmp_path / "queue").write_text("1 0 a\n1 1 a\n2 1 a\n3 0 a\n99 0 a\n7 N/A \n")  # a task of job 2 has ended
    again = sweep(*words, **slurm)
    assert again.stdout.startswith("5 trials: 4 queued, 1 missing\n")
    (last,) = (tmp_path / "log").read_text().splitlines()[3:]
    assert "--array=0-0%1 " in last
    assert "--seeds 2" in Path(re.search(r"slurm/sweep\.sbatch (\S+)", last)[1]).read_text()


def test_a_task_that_ends_meanwhile_is_not_submitted_again(
    slurm: dict[str, str], small_data: Path, tmp_path: Path
) -> None:
    """It is in the queue before squeue is called, and complete afterwards."""
    words = ["tiny", *TINY, "--data", small_data, "--runs", tmp_path / "runs", "--on", "slurm"]
    assert sweep(*words, **slurm).returncode == 0
    folder = tmp_path / "runs" / "tiny" / "seed-0"
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\nmkdir -p {folder}; echo '{{}}' >{folder}/summary.json\n")
    assert sweep(*words, **slurm).stdout == "1 trials: 1 complete\n"


def test_concurrent_updates_of_the_manifest_lose_no_job(tmp_path: Path) -> None:
    """A lost job would be submitted again."""
    call = Sweep(("tiny",), Path("data"), tmp_path)

    def add(number: int) -> None:
        for job in range(10):
            call.update_manifest({}, [ArrayJob(f"{number}-{job}", [], f"trials-{number}-{job}")])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert len({job.job for job in call.manifest().jobs}) == 80


@pytest.mark.parametrize("command", ["squeue", "scontrol"])
def test_a_command_of_slurm_that_does_not_answer_is_one_line(
    command: str, slurm: dict[str, str], small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_array, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setenv("PATH", slurm["PATH"])
    (tmp_path / "bin" / command).write_text("#!/bin/sh\nexec sleep 100\n")
    call = Sweep(("tiny",), small_data, tmp_path / "runs", "slurm", experiments_from=TINY[1:])
    if command == "squeue":
        call.update_manifest({}, [ArrayJob("1", ["tiny/seed-0"])])
    with pytest.raises(UserError, match=f"^{command}: no answer within 0.5 s; jobs of this sweep may be queued; .*$"):
        call([], os.environ)
    assert not (tmp_path / "log").exists(), "submitted"


def test_two_calls_at_once_submit_each_trial_once(slurm: dict[str, str], small_data: Path, tmp_path: Path) -> None:
    """The second waits for the first, whose tasks are queued by then."""
    words = ["tiny", *TINY, "--data", small_data, "--runs", tmp_path / "runs", "--on", "slurm", "--seeds", 0, 1]
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text() + f"printf '1 0\\n1 1\\n' > {tmp_path}/queue; sleep 2\n")
    calls = [start("launch", "sweep", *words, **slurm) for _ in range(2)]
    for call in calls:
        _, errors = call.communicate(timeout=900)
        assert call.returncode == 0, errors
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_manifest_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    old = {"names": ["tiny"], "seeds": [0], "trials": {"a": "whole", "b": "broken off", "c": "failed"}}
    write_json(tmp_path / "sweep.json", old | {"jobs": [{"job": "7", "trials": ["a", "b"]}]})
    manifest = read_json(tmp_path / "sweep.json", SweepManifest)
    assert manifest.trials == {"a": "complete", "b": "crashed", "c": "failed"}
    assert manifest.jobs[0].trials == ["a", "b"]


@pytest.mark.processes
def test_a_refusal_does_not_get_the_reason_of_the_attempt_before(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (trial,) = trials_of(["tiny"], tmp_path, "--runs", str(tmp_path))
    trial.run.folder.mkdir(parents=True)
    write_json(trial.run.run_json, Run(tiny_run).config())
    write_json(trial.run.ended, Ending(stopped=True, reason="stopped at step 3"))
    program = "print('runner: train.beton: damaged'); raise SystemExit(2)"
    monkeypatch.setattr(local_pool, "training_command", lambda *_: ["-c", program])
    slots = local_pool.Slots(1, 0, 1, ())
    local_pool.train_trials(local_pool.ListedTrials([trial]), slots, tmp_path / "logs", os.environ)
    assert "failed: train.beton: damaged (log: " in capsys.readouterr().out


@pytest.mark.every
@pytest.mark.processes
def test_a_failed_trial_does_not_stop_the_others(small_data: Path, tmp_path: Path) -> None:
    words = ["tiny-diverging", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu"]
    done = sweep(*words, "--max-steps", 4)
    assert done.returncode == 1, done.stderr
    assert "lower the learning rate" in done.stdout
    assert done.stdout.splitlines()[0] == "2 trials: 2 missing"
    assert re.search(r"^tiny/[0-9a-f]{8}-seed-0: \d+\.\d\d%$", done.stdout, re.M)  # as in the README
    assert done.stdout.splitlines()[-1] == "2 trials: 1 complete, 1 failed"
    dry = sweep(*words, "--max-steps", 4, "--dry-run")
    assert dry.stdout.splitlines()[-1] == "2 trials: 1 complete, 1 failed; 1 to train"


@pytest.mark.every
@pytest.mark.processes
def test_ctrl_c_stops_trials_with_a_checkpoint_and_the_next_call_resumes(small_data: Path, tmp_path: Path) -> None:
    words = ["ending", *ENDING, "--data", small_data, "--runs", tmp_path, "--device", "cpu"]
    (trial,) = trials_of(["ending"], small_data, *ENDING, "--runs", str(tmp_path))
    process = start("launch", "sweep", *words, END="train 9 0 SLEEP1")
    wait_for_step(trial.run.folder, 7, running=process)
    process.send_signal(signal.SIGINT)
    assert process.wait(900) == 75
    assert trial.state() == "stopped"
    assert not list(trial.run.folder.glob(".stop-*"))
    step = max(int(folder.name[5:]) for folder in trial.run.checkpoints.glob("step-*"))
    done = sweep(*words)
    assert done.returncode == 0, done.stderr
    assert trial.state() == "complete"
    assert trial.run.config().resumed[0].step == step < 56


def test_a_folder_with_another_training_is_rejected(tiny_run: Path, small_data: Path) -> None:
    words = ["tiny", *TINY, "--data", small_data, "--runs", tiny_run.parent.parent]
    assert sweep(*words, "--dry-run").stdout.splitlines()[-1].startswith("1 trials: 1 complete")
    run = tiny_run.name
    assert run == "seed-0"
    config = Run(tiny_run).config()
    other = tiny_run.parent / "other-seed-0"
    other.mkdir()
    write_json(other / "run.json", replace(config, recipe=dataclasses.replace(config.recipe, epochs=77)))
    done = sweep(*words, "--name", "other")
    assert done.returncode == 2
    assert "holds a run with a different recipe; choose a --name" in done.stderr
    write_json(other / "run.json", replace(config, max_steps=3))
    for option in ((), ("--max-steps", 4)):
        done = sweep(*words, "--name", "other", *option, "--dry-run")
        assert done.returncode == 2
        assert "holds a run with a different max-steps; choose a --name" in done.stderr
    assert sweep(*words, "--name", "other", "--max-steps", 3, "--dry-run").returncode == 0
    (other / "run.json").unlink()
    other.rmdir()


@pytest.mark.processes
def test_as_wandb_sweep_writes_a_definition_whose_command_trains(small_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    words = ["tiny", "tiny-norm", *TINY, "--data", small_data, "--runs", tmp_path, "--seeds", 0, 1]
    done = sweep(*words, "--max-steps", 2, "--device", "cpu", "--as-wandb-sweep", file)
    assert done.returncode == 0, done.stderr
    file.write_text(file.read_text() + "# edited\n")
    refused = sweep(*words, "--max-steps", 2, "--device", "cpu", "--as-wandb-sweep", file)
    assert (refused.returncode, "expected a new file, found one with other content" in refused.stderr) == (2, True)
    definition = yaml.safe_load(file.read_text())
    assert definition["parameters"] == {"experiment": {"values": ["tiny", "tiny-norm"]}, "seed": {"values": [0, 1]}}
    command = definition["command"]
    position = command.index("${args}")
    argv = [
        *command[2:position],
        "--experiment=tiny-norm",
        "--seed=1",
        "--recipe.optimizer.lr=0.02",
        *command[position + 1 :],
    ]
    trained = module(*argv[1:], WANDB_RUN_ID="abc12345", WANDB_SWEEP_ID="s1", WANDB_MODE="offline")
    assert trained.returncode == 0, trained.stderr
    config = Run(tmp_path / "tiny-norm" / "s1-abc12345").config()
    assert (config.wandb_id, config.seed) == ("abc12345", 1)
    assert config.recipe.optimizer.lr == 0.02
