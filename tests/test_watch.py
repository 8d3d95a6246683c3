"""`runner watch` and `runner compare`: what they show of runs, in which width, and when they end."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import msgspec
import pytest

from runner import experiments
from runner.commands.show import facts
from runner.commands.watch import read_progress, sparkline
from runner.common.files import write_json
from runner.run.folder import Run
from runner.run.lock import locked
from runner.run.metrics import encode_row, read_metrics
from runner.run.schema import Ending, MetricRow, Resumed
from tests.support import many_runs
from tests.support.configs import CONFIG, config_of
from tests.support.processes import ROOT, clean_environment, runner

EPOCHS, STEPS = 4, 40
LOSSES = {10: 2.3, 20: 1.7, 30: 1.1, 40: 0.5}


def written(folder: Path, steps: int, **changes: object) -> Run:
    """A run of four epochs of ten steps each, after some of them."""
    run = Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = msgspec.structs.replace(CONFIG).recipe
    write_json(run.run_json, config_of(recipe=type(recipe)(EPOCHS, 50, recipe.optimizer), **changes))
    rows = []
    for step in range(10, steps + 1, 10):
        speed = {"images_per_second": 1234.0, "memory_gb": 1.5, "data_seconds": 0.001, "compute_seconds": 0.04}
        rows.append(MetricRow(global_step=step, epoch=step / 10, lr=0.1, train_loss=LOSSES[step], **speed))
        rows.append(MetricRow(global_step=step, epoch=step / 10, test_loss=LOSSES[step] + 1, test_accuracy=step / 100))
    run.metrics.write_bytes(b"".join(map(encode_row, rows)))
    return run


def on_terminal(*words: object, columns: int, until: str = "", ctrl_c: bool = False) -> tuple[int, str]:
    """Runs a command on a terminal; returns its exit code, and all that it wrote, without colors and cursor moves."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "runner", *map(str, words)]
    process = subprocess.Popen(
        command, stdout=theirs, stderr=theirs, env=clean_environment(COLUMNS=str(columns), LINES="40"), cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job ignores
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(ours, 65536):
            shown += chunk
            if ctrl_c and until in shown.decode(errors="replace"):
                process.send_signal(signal.SIGINT)
                ctrl_c = False
    os.close(ours)
    return process.wait(60), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "")


def test_a_snapshot_through_a_pipe(tmp_path: Path) -> None:
    run = written(tmp_path / "run", 30)
    done = runner("watch", run.folder, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split()[:2] == ["tiny/seed-0", "crashed"]
    assert lines[1].startswith("epoch 3 of 4, step 30 of 40 ━")
    assert lines[1].rstrip().endswith("75%")
    expected = {
        "train loss": ["1.1000", "1.1000", "2.3000"],  # the latest, the lowest and the highest value
        "test accuracy": ["30.00%", "10.00%", "30.00%"],
        "learning rate": ["0.1", "0.1", "0.1"],
        "images/s": ["1,234", "1,234", "1,234"],
        "compute, ms/step": ["40.0", "40.0", "40.0"],
        "peak memory, GB": ["1.50", "1.50", "1.50"],
    }
    for title, values in expected.items():
        (line,) = [line.removeprefix(title).split() for line in lines if line.startswith(title)]
        assert [line[0], *line[-2:]] == values


def test_the_progress_as_json(tmp_path: Path) -> None:
    run = written(tmp_path / "run", 20)
    write_json(run.ended, Ending(stopped=True, reason="stopped at step 20"))
    progress = json.loads(runner("watch", run.folder, "--json").stdout)
    assert (progress["state"], progress["reason"]) == ("stopped", "stopped at step 20")
    assert (progress["step"], progress["last_step"], progress["epoch"], progress["epochs"]) == (20, 40, 2.0, 4)
    assert progress["metrics"]["train_loss"] == LOSSES[20]
    assert progress["metrics"]["test_accuracy"] == 0.2
    assert progress["seconds_left"] is None


def test_a_run_that_stopped_early_is_shown_as_ended(tmp_path: Path) -> None:
    many_runs.write(tmp_path, 1)
    (path,) = tmp_path.rglob("summary.json")
    run, ended = Run(path.parent), "stopped early; the weights are those of epoch 1"
    last = read_metrics(run)[-1]
    kept = msgspec.structs.replace(run.read_summary(), stopped_early=True, steps=last.global_step, best_epoch=1.0)
    recipe = replace(run.config().recipe, epochs=50)
    write_json(run.run_json, msgspec.structs.replace(run.config(), recipe=recipe))
    assert read_progress(run)[0].last_step > last.global_step
    write_json(run.summary, kept)
    progress, _ = read_progress(run)
    assert (progress.step, progress.last_step, progress.reason) == (last.global_step, last.global_step, ended)
    assert facts(run)["progress"].endswith(f" of 50, step {last.global_step}, {ended}")


@pytest.mark.parametrize(
    ("changes", "last", "left"),
    [
        ({}, 40, 100.0),  # 100 seconds for 20 steps
        ({"max_steps": 30}, 30, 50.0),
        ({"resumed": [Resumed(step=10, world_size=1, bitwise=True, changed={})]}, 40, 200.0),  # for 10 steps
    ],
)
def test_the_time_left_is_that_of_the_steps_of_this_attempt(
    changes: dict[str, object], last: int, left: float, tmp_path: Path
) -> None:
    run = written(tmp_path / "run", 20, **changes)
    os.utime(run.run_json, (1000, 1000))
    os.utime(run.metrics, (1100, 1100))
    with locked(run.lock, 1):
        progress, _ = read_progress(run)
    assert (progress.state, progress.last_step) == ("running", last)
    assert progress.seconds_left == pytest.approx(left)


def test_a_run_that_starts_is_waited_for(tmp_path: Path) -> None:
    """Its folder is locked before it has run.json, and it has no row for a while."""
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder / "lock", 1):
        assert read_progress(Run(folder))[0].state == "running"
        run = written(folder, 0)
        progress, rows = read_progress(run)
        assert (progress.last_step, rows) == (None, [])
        assert "no step yet" in runner("watch", folder).stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_it_watches_until_the_run_ends(columns: int, tmp_path: Path) -> None:
    """And shows every state on the way, in no more columns than the terminal has."""
    run = written(tmp_path / "run", 10)
    code = """
import sys, time
from pathlib import Path
from runner.run.lock import locked
with locked(Path(sys.argv[1]), 1):
    print("locked", flush=True)
    sys.stdin.readline()
"""
    arguments = [sys.executable, "-c", code, str(run.lock)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as trainer:
        assert trainer.stdout.readline() == b"locked\n"
        ours, theirs = pty.openpty()
        words = [sys.executable, "-m", "runner", "watch", str(run.folder), "--interval", "0.1"]
        environ = clean_environment(COLUMNS=str(columns), LINES="40")
        with subprocess.Popen(words, stdout=theirs, stderr=theirs, env=environ, cwd=ROOT) as watching:
            os.close(theirs)
            shown = b""
            stage = 0
            with contextlib.suppress(OSError):  # the end of a terminal
                while chunk := os.read(ours, 65536):
                    shown += chunk
                    if stage == 0 and b"step 10 of 40" in shown:
                        written(run.folder, 20)
                        stage = 1
                    if stage == 1 and b"step 20 of 40" in shown:
                        assert watching.poll() is None
                        trainer.communicate(b"\n")
                        stage = 2
            assert watching.wait(60) == 0
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", shown.decode())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text)]
    assert stage == 2
    assert columns - 8 < max(map(len, lines)) <= columns
    assert "crashed" in text
    assert text.index("step 10 of 40") < text.index("step 20 of 40") < text.index("crashed")


def test_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    run = written(tmp_path / "run", 10)
    with locked(run.lock, 1):
        code, shown = on_terminal("watch", run.folder, columns=80, until="step 10 of 40", ctrl_c=True)
    assert code == 0
    assert "running" in shown
    assert "Traceback" not in shown
    assert "interrupted" not in shown


def test_a_sparkline_is_aligned_with_the_steps() -> None:
    assert sparkline([(10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0)], 40, 4) == "▁▃▆█"
    assert sparkline([(20, 1.0), (40, 0.0)], 40, 8) == "████▁▁▁▁"
    assert sparkline([(10, 1.0), (20, 2.0)], 40, 8) == "▁▁██    "  # the last evaluation was a while ago
    assert sparkline([(1, 0.0), (2, 2.0), (3, 0.0), (4, 4.0)], 4, 2) == "▁█"  # means
    assert sparkline([(1, 5.0), (2, 5.0)], 2, 2) == "▅▅"
    assert len(sparkline([(step, 1.0 / step) for step in range(1, 1001)], 1000, 30)) == 30
    assert sparkline([(1, 0.0), (2, 1.0)], 2, 6) == "▁▁▁███"  # fewer steps than columns


def test_compare_shows_only_what_differs(tmp_path: Path) -> None:
    runs = []
    for number, (name, lr) in enumerate([("a", 0.1), ("b", 0.2)]):
        runs.append(written(tmp_path / name, 40 - 20 * number, run=name, seed=number).folder)
        config = Run(runs[-1]).config()
        recipe = type(config.recipe)(EPOCHS, 50, type(config.recipe.optimizer)(lr))
        write_json(Run(runs[-1]).run_json, msgspec.structs.replace(config, recipe=recipe))
    done = runner("compare", *runs, "--json")
    assert done.returncode == 0, done.stderr
    compared = json.loads(done.stdout)
    assert compared["differences"] == {"recipe.optimizer.lr": [0.1, 0.2], "seed": [0, 1]}
    assert [row["name"] for row in compared["runs"]] == ["tiny/a", "tiny/b"]
    lines = [line.split() for line in runner("compare", *runs).stdout.splitlines()]
    for expected in (
        ["1", "tiny/a", "crashed"],
        ["recipe.optimizer.lr", "0.1", "0.2"],
        ["test", "accuracy", "40.00%", "20.00%"],  # the latest of a run that is unfinished
        ["epochs", "4", "2"],
        ["images/s", "1,234", "1,234"],
        ["peak", "memory,", "GB", "1.50", "1.50"],
    ):
        assert expected in lines
    assert not any("batch_size" in word for line in lines for word in line)


def test_runs_without_a_difference(tmp_path: Path) -> None:
    for name in "ab":
        written(tmp_path / name, 10, run=name)
    assert "settings that differ: none" in runner("compare", tmp_path).stdout.splitlines()


@pytest.mark.parametrize("columns", [80, 120])
def test_many_runs_fit_the_terminal(columns: int, tmp_path: Path) -> None:
    """Every setting and result of every run is there, and none is cut in the middle."""
    names = ["soni-2", "speedrun", "podeti-alexnet", "merabishvili", "podeti-resnet18", "soni-4", "sivva-2"]
    for name in names:
        many_runs.write_run(Run(tmp_path / name / "seed-0"), name, experiments.get(name), 0, name, Random(name))
    code, shown = on_terminal("compare", tmp_path, columns=columns)
    assert code == 0
    lines = [line.rstrip() for line in shown.splitlines()]
    assert max(map(len, lines)) <= columns
    assert sum(line.startswith("recipe.optimizer.lr ") for line in lines) > 1  # in several tables
    factories = [line.split()[1:] for line in lines if line.startswith("architecture.factory ")]
    expected = sorted(experiments.get(name).architecture.factory.rpartition(":")[2] for name in names)
    assert sorted(word for words in factories for word in words) == expected
    accuracies = [line.split()[2:] for line in lines if line.startswith("test accuracy ")]
    assert sum(map(len, accuracies)) == len(names)
