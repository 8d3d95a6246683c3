"""A run that was stopped or killed, and went on, is the run that never was: the same weights, to the bit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from runner.common.files import sha256_of, write_json
from runner.run.folder import MANIFEST, Run
from runner.run.metrics import read_metrics
from runner.run.schema import Resumed
from runner.system import environment
from runner.training import checkpoint, session
from tests.support import wandb_file
from tests.support.compare import assert_same_run, weights
from tests.support.processes import (
    ENDING,
    ROOT,
    TINY,
    launch,
    python,
    runner,
    start,
    start_ranks,
    wait_for_step,
    wait_until,
)

LIVES = (  # how each but the last ends; "last" is the last rank
    "train 12 last SIGKILL",  # in the middle of an epoch
    "eval 3 0 SIGKILL",  # between epochs; the first two passes check shapes and count operations
    "commit 2 0 SIGKILL",  # at a checkpoint
    "train 6 last SIGTERM",
    "train 6 0 SIGUSR1",
)


def arguments(data: Path, runs: Path, *more: object) -> list[object]:
    """8 epochs of 7 steps."""
    return ["train", "ending", *ENDING, "--data", data, "--runs", runs, "--checkpoint-every", 3, *more]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("processes", "lives"),
    [
        pytest.param(1, LIVES[:1], id="1 rank killed"),
        pytest.param(1, LIVES, id="1 rank", marks=pytest.mark.every),
        pytest.param(2, LIVES, id="2 ranks", marks=pytest.mark.every),
        pytest.param(4, LIVES[:2], id="4 ranks", marks=pytest.mark.every),
    ],
)
def test_what_was_ended_is_what_never_ended(
    small_data: Path, tmp_path: Path, processes: int, lives: tuple[str, ...]
) -> None:
    """Killed in the middle of an epoch, between epochs and at a checkpoint, and asked to stop by both signals."""
    for life in lives:
        run = tmp_path / "ended" / "ending" / "seed-0"
        words = arguments(small_data, tmp_path / "ended", "--resume", "auto")
        ended = launch(processes, *words, END=life.replace("last", str(processes - 1)))
        assert ended.returncode != 0
        assert not run.joinpath("summary.json").exists(), "it was over before it could be ended"
        asked = life.endswith(("TERM", "USR1"))
        assert ("resume with --resume auto" in ended.stderr) == asked, ended.stderr
        if processes > 1 and life.endswith("last SIGKILL"):  # rank 0 ends by itself, long before --hang-timeout
            assert Run(run).state() == "failed", ended.stderr
        if asked and processes > 1:
            assert re.search(r"exitcode +: 75", ended.stderr), ended.stderr
    for runs in ("ended", "straight"):
        words = arguments(small_data, tmp_path / runs, "--resume", "auto")
        done = launch(processes, *words)
        assert done.returncode == 0, done.stderr
    resumed = Run(run).config().resumed
    assert len(resumed) == len(lives)
    assert all(entry.bitwise for entry in resumed)
    steps = [entry.step for entry in resumed]
    assert steps == sorted(steps)  # twice the same where one was ended while it wrote its first checkpoint
    assert steps[0] >= 3
    assert_same_run(tmp_path / "straight" / "ending" / "seed-0", run)


@pytest.mark.every
@pytest.mark.processes
@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        pytest.param(2, (), id="2 ranks"),
        pytest.param(6, ("--recipe.ema", 0), id="6 ranks, no EMA"),  # the mean of 6 equal numbers may differ
        pytest.param(1, (), id="1 rank"),
    ],
)
def test_a_stop_is_obeyed_within_an_evaluation(
    ranks: int, words: tuple[object, ...], small_data: Path, tmp_path: Path
) -> None:
    """Before the next batch: of an epoch's evaluation, of the last one, and of the one with test-time augmentation."""
    run = Run(tmp_path / "ended" / "ending" / "seed-0")
    words = (*words, "--resume", "auto", "--epochs", 2)
    for moment, step in (("eval 3", 7), ("eval 5", 14), ("eval 4", 14)):
        ended = launch(ranks, *arguments(small_data, tmp_path / "ended", *words), END=f"{moment} {ranks - 1} SIGUSR1")
        assert f"stopped at step {step}; resume with --resume auto" in ended.stderr, ended.stderr
        assert run.state() == "stopped"
    for runs in ("ended", "straight"):
        done = launch(ranks, *arguments(small_data, tmp_path / runs, *words))
        assert done.returncode == 0, done.stderr
    assert [(entry.step, entry.bitwise) for entry in run.config().resumed] == [(7, True), (14, True), (14, True)]
    assert_same_run(tmp_path / "straight" / "ending" / "seed-0", run.folder)


@pytest.mark.every
@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_that_stopped_within_an_evaluation_is_resumed_on_other_ranks(
    ranks: int, small_data: Path, tmp_path: Path
) -> None:
    words = arguments(small_data, tmp_path, "--resume", "auto", "--epochs", 2)
    ended = launch(2, *words, END="eval 3 1 SIGUSR1")
    assert "stopped at step 7" in ended.stderr, ended.stderr
    done = launch(ranks, *words)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(Run(tmp_path / "ending" / "seed-0"))
    assert [row.global_step for row in rows if row.test_accuracy is not None] == [7, 14]


def test_a_stop_file_and_a_signal_to_one_process(small_data: Path, tmp_path: Path) -> None:
    words = arguments(small_data, tmp_path, "--device", "cpu", "--resume", "auto")
    asked = tmp_path / "asked"
    asked.touch()
    stopped = runner(*words, "--stop-file", asked)
    assert stopped.returncode == 75
    assert "stopped at step 1" in stopped.stderr
    assert not asked.exists()
    run = tmp_path / "ending" / "seed-0"
    (run / "stop").touch()
    assert "stopped at step 2" in runner(*words).stderr
    assert not (run / "stop").exists()
    (run / "stop").touch()
    assert (
        "stopped at step 3" in runner(*words, "--stop-file", asked).stderr
    )  # as in a job, which has a file of its own
    assert not (run / "stop").exists()
    interrupted = runner(*words, END="train 3 0 SIGINT")
    assert interrupted.returncode == 75
    assert "stopping with a checkpoint; press Ctrl-C again to exit at once" in interrupted.stderr
    assert "stopped at step 6" in interrupted.stderr


def test_a_stop_file_is_looked_up_four_times_per_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every step, because a lookup may be a request to a file server."""
    now, looked = [0.0], []
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(session.os.path, "exists", lambda path: looked.append(path) or now[0] > 1)
    accelerator = SimpleNamespace(is_local_main_process=True)
    training = object.__new__(session.SeedRun)
    training.session = SimpleNamespace(stopped=lambda: False, accelerator=accelerator)
    training.stop_files, training.next_stop_file_check = [tmp_path / "stop"], 0.0
    for step in range(100):
        now[0] = step / 100
        assert not training.should_stop()
    assert len(looked) == 4
    now[0] = 1.25
    assert training.should_stop()
    accelerator.is_local_main_process = False  # the first rank of the node asks for all
    now[0] = 2.0
    assert not training.should_stop()


SECOND_CTRL_C = """
import signal
from runner.training import session

with session.catch_stop_signals() as should_stop:
    assert not should_stop()
    for name in ("SIGTERM", "SIGINT", "SIGINT"):  # the launcher hands the first Ctrl-C on
        signal.raise_signal(getattr(signal, name))
    print(should_stop(), flush=True)
    session.FORWARDED_INTERRUPT_SECONDS = -1.0
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        print("goes on", flush=True)
"""


@pytest.mark.every
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    done = python("-c", SECOND_CTRL_C, PYTHONPATH=str(ROOT), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (130, "True\n")
    assert done.stderr.splitlines()[-1] == "runner: interrupted"


@pytest.mark.processes
def test_ctrl_c_stops_all_ranks_with_a_checkpoint(small_data: Path, tmp_path: Path) -> None:
    """A terminal sends it to the launcher and to all ranks; the launcher hands it on."""
    words = arguments(small_data, tmp_path, "--device", "cpu")
    with start_ranks(2, *words, END="train 4 1 SLEEP1") as process:
        wait_for_step(tmp_path / "ending" / "seed-0", 3, running=process)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=900)
    assert process.returncode != 0
    assert "stopped at step" in stderr


@pytest.mark.processes
def test_ctrl_c_stops_one_process_with_a_checkpoint(small_data: Path, tmp_path: Path) -> None:
    """Although accelerate's launcher of one process does not wait for it."""
    launcher = ["accelerate.commands.launch", "--config_file", ROOT / "launch/one_process.yaml", "-m", "runner"]
    words = arguments(small_data, tmp_path, "--device", "cpu", "--precision", "fp32")
    run = Run(tmp_path / "ending" / "seed-0")
    with start(*launcher, *words, END="train 4 0 SLEEP1") as process:
        wait_for_step(run.folder, 3, running=process)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(900)
        wait_until(lambda: run.state() != "running")
    assert run.state() == "stopped"


@pytest.mark.every
def test_rows_that_are_lost_although_the_checkpoint_is_there_are_reported(small_data: Path, tmp_path: Path) -> None:
    run = Run(stopped(small_data, tmp_path))
    rows = run.metrics.read_bytes()
    for damaged in (rows[:-60], rows[:40] + bytes(40) + rows[80:], b""):
        run.metrics.write_bytes(damaged)
        done = resumed(small_data, tmp_path)
        assert done.returncode == 2
        assert (
            f"{run.metrics}: expected to begin with the {len(rows)} bytes of rows up to step 5"
            in done.stderr.splitlines()[-1]
        )
        assert run.metrics.read_bytes() == damaged
        assert run.summary.is_file()
    run.metrics.write_bytes(rows + b'{"global_step":6,"epo')  # written after the checkpoint
    done = resumed(small_data, tmp_path, "--max-steps", 6)
    assert done.returncode == 0, done.stderr
    assert run.metrics.read_bytes().startswith(rows)
    run.metrics.write_bytes(rows[:-60])
    done = resumed(small_data, tmp_path, "--resume-anyway")
    assert done.returncode == 0, done.stderr


@pytest.mark.every
def test_a_finished_run_that_goes_on_and_is_killed_is_not_complete(small_data: Path, tmp_path: Path) -> None:
    words = arguments(small_data, tmp_path, "--device", "cpu", "--resume", "auto")
    assert runner(*words, "--max-steps", 3).returncode == 0
    run = Run(tmp_path / "ending" / "seed-0")
    assert run.state() == "complete"
    assert runner(*words, END="train 2 0 SIGKILL").returncode != 0
    assert run.state() == "crashed"
    assert runner(*words).returncode == 0
    assert run.state() == "complete"


def test_a_run_is_resumed_with_its_own_recipe(small_data: Path, tmp_path: Path) -> None:
    words = ["train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu"]
    started = runner(*words, "--max-steps", 3, "--lr", 0.01, "--epochs", 1)
    assert started.returncode == 0, started.stderr
    other = runner(*words, "--resume", "auto", "--epochs", 2)
    assert other.returncode == 2
    assert "recipe.epochs: 1 → 2" in other.stderr
    done = runner(*words, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    config = Run(tmp_path / "tiny" / "seed-0").config()
    assert (config.recipe.epochs, config.recipe.optimizer.lr) == (1, 0.01)
    assert config.resumed == [Resumed(step=3, world_size=1, bitwise=True, changed={})]
    named = [*words, "--name", "named"]
    started = runner(*named, "--max-steps", 3, "--seed", 7, "--precision", "bf16", "--deterministic")
    assert started.returncode == 0, started.stderr
    for step, options in ((4, []), (5, ["--deterministic", "--seed", 7, "--precision", "bf16"])):
        done = runner(*named, "--resume", "auto", "--max-steps", step, *options)
        assert done.returncode == 0, done.stderr
    config = Run(tmp_path / "tiny" / "named").config()
    assert (config.seed, config.precision, config.options.deterministic) == (7, "bf16", True)
    assert [(entry.step, entry.changed) for entry in config.resumed] == [(3, {}), (4, {})]


def test_a_run_of_other_code_is_not_called_bit_identical(small_data: Path, tmp_path: Path) -> None:
    """Also where a commit says nothing: with uncommitted changes, or outside a checkout."""
    words = ["train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu", "--epochs", 1]
    assert runner(*words, "--max-steps", 3).returncode == 0
    run = Run(tmp_path / "tiny" / "seed-0")
    config = run.config()
    assert re.fullmatch("[0-9a-f]{64}", config.source_sha256)
    assert environment.source_sha256(["tests.support.compare"]) != environment.source_sha256()  # own experiments
    write_json(run.run_json, msgspec.structs.replace(config, source_sha256="0" * 64))
    done = runner(*words, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "resumed from step 3, not bit-identical" in done.stderr
    assert [entry.bitwise for entry in run.config().resumed] == [False]


def test_a_checkpoint_is_of_one_training(small_data: Path, tmp_path: Path) -> None:
    """It holds the run.json of the training that wrote it, which is compared, wherever it is resumed."""
    words = ["train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu"]
    started = runner(*words, "--name", "a", "--seed", 5, "--lr", 0.2, "--max-steps", 2)
    assert started.returncode == 0, started.stderr
    run = Run(tmp_path / "tiny" / "a")
    foreign = ["--resume", run.checkpoints / "step-2"]
    earlier = shutil.copytree(run.checkpoints / "step-2", tmp_path / "step-2")
    for other, difference in (
        ([*words, "--name", "b", *foreign], "recipe.optimizer.lr: 0.2 → 0.05, seed: 5 → 0"),
        (["train", "tiny-norm", *words[2:], "--name", "b", "--seed", 5, *foreign], "experiment: tiny → tiny-norm"),
    ):
        done = runner(*other)
        assert done.returncode == 2, done.stderr
        assert difference in done.stderr.splitlines()[-1]
    run.run_json.unlink()  # lost
    lost = [*words, "--name", "a", "--resume", "auto", "--max-steps", 3]
    assert "seed: 5 → 0" in runner(*lost).stderr
    done = runner(*lost, "--seed", 5, "--lr", 0.2)
    assert done.returncode == 0, done.stderr
    assert [entry.step for entry in run.config().resumed] == [2]
    shorter = runner(*words, "--name", "a", "--resume", "auto", "--max-steps", 1)
    assert shorter.returncode == 2
    assert "the checkpoint is at step 3, but training ends at step 1" in shorter.stderr
    older = runner(*words, "--name", "a", "--resume", earlier, "--max-steps", 2)
    assert older.returncode == 2
    assert "the checkpoint is at step 2, but training ends at step 2" in older.stderr


@pytest.mark.every
def test_a_changed_run_that_is_killed_is_not_complete(small_data: Path, tmp_path: Path) -> None:
    """Although no step of it was left: its summary would be of the run before the change."""
    words = arguments(small_data, tmp_path, "--device", "cpu")
    assert runner(*words, "--max-steps", 3).returncode == 0
    run = Run(tmp_path / "ending" / "seed-0")
    changed = [*words, "--max-steps", 3, "--resume", "auto", "--resume-anyway", "--lr", 0.7]
    assert runner(*changed, END="eval 3 0 SIGKILL").returncode == -signal.SIGKILL
    assert run.state() == "crashed"
    assert runner(*changed).returncode == 0
    assert run.state() == "complete"
    shown = runner("show", run.folder).stdout
    assert re.search(r"resumed +from step 3, recipe.optimizer.lr: 0.01 → 0.7", shown), shown


def test_a_run_that_was_stopped_may_end_where_it_stopped(small_data: Path, tmp_path: Path) -> None:
    """Before its first evaluation."""
    words = arguments(small_data, tmp_path, "--device", "cpu", "--resume", "auto")
    run = Run(tmp_path / "ending" / "seed-0")
    for step, name in ((2, "SIGUSR1"), (3, "SIGTERM")):
        assert runner(*words, END=f"train {2 if step == 2 else 1} 0 {name}").returncode == 75
        assert (run.state(), checkpoint.latest(run).name) == ("stopped", f"step-{step}")
    done = runner(*words, "--max-steps", 3)
    assert done.returncode == 0, done.stderr
    assert run.read_summary().steps == 3


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.every)])
def test_a_signal_between_two_seeds_starts_no_further(ranks: int, small_data: Path, tmp_path: Path) -> None:
    """The same command trains the seed that is left."""
    words = arguments(small_data, tmp_path, "--seeds", 0, 1, 2, "--max-steps", 2, "--resume", "auto")
    words += ["--recipe.test-augmentation", "flip-shift"]  # six passes over one batch, more than before
    done = launch(ranks, *words, END=f"eval 6 {ranks - 1} SIGTERM")  # in the last one of the first seed
    assert done.returncode == 1, done.stderr  # the launcher's code, for the runner's 75
    runs = [Run(tmp_path / "ending" / f"seed-{seed}") for seed in range(3)]
    assert [run.state() for run in runs] == ["complete", "missing", "missing"]
    done = launch(ranks, *words)
    assert done.returncode == 0, done.stderr
    assert [run.state() for run in runs] == ["complete"] * 3


def test_overwrite_deletes_nothing_but_a_run(small_data: Path, tmp_path: Path) -> None:
    words = ["train", "tiny", *TINY, "--runs", tmp_path, "--device", "cpu", "--overwrite"]
    folder = tmp_path / "tiny" / "seed-0"
    data = shutil.copytree(small_data, folder / "data")
    refused = runner(*words, "--data", small_data)
    assert refused.returncode == 2
    assert f"{folder} is not a run, but holds data" in refused.stderr
    refused = runner(*words, "--data", data)
    assert refused.returncode == 2
    assert "contains files that this run reads" in refused.stderr
    assert data.is_dir()


@pytest.mark.processes
def test_no_rank_leaves_before_the_first_has_logged_to_w_and_b(small_data: Path, tmp_path: Path) -> None:
    """The launcher ends the ranks that are left as soon as one has gone."""
    done = launch(2, *arguments(small_data, tmp_path), END="train 9 0 SIGUSR1", WANDB_MODE="offline")
    assert done.returncode == 1
    assert "resume with --resume auto" in done.stderr
    (file,) = (tmp_path / "ending" / "seed-0").glob("wandb/offline-run-*/*.wandb")
    assert "exit" in [record.WhichOneof("record_type") for record in wandb_file.records(file)]


@pytest.mark.processes
def test_the_launcher_hands_sigterm_on(small_data: Path, tmp_path: Path) -> None:
    """As SLURM sends it before it takes the nodes."""
    words = arguments(small_data, tmp_path, "--device", "cpu")
    with start_ranks(2, *words, END="train 4 1 SLEEP1") as process:
        wait_for_step(tmp_path / "ending" / "seed-0", 3, running=process)
        process.terminate()
        _, output = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "stopped at step" in output


@pytest.mark.processes
@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 1), pytest.param(1, 2, marks=pytest.mark.every), pytest.param(2, 3, marks=pytest.mark.every)],
)
def test_another_number_of_ranks_goes_on_with_the_same_images(
    tiny_run: Path, small_data: Path, tmp_path: Path, before: int, after: int
) -> None:
    """Of a network without dropout and batch norm, on which ranks differ by rounding alone."""
    words = ["train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path]
    begun = launch(before, *words, "--max-steps", 11)
    assert begun.returncode == 0, begun.stderr
    run = tmp_path / "tiny" / "seed-0"
    wandb_id = Run(run).config().wandb_id
    done = launch(after, *words, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "not bit-identical" in done.stderr
    (resumed,) = Run(run).config().resumed
    assert resumed == Resumed(step=11, world_size=after, bitwise=False, changed={})
    assert Run(run).config().wandb_id != wandb_id, "W&B takes no rows after the results of the first 11 steps"
    assert json.loads((run / "summary.json").read_text())["test_images"] == 200
    for name, tensor in weights(tiny_run).items():
        np.testing.assert_allclose(tensor, weights(run)[name], atol=1e-5, err_msg=name)


@pytest.mark.every
def test_repeating_a_run_that_stopped_early_changes_nothing_in_wandb(train, tmp_path: Path) -> None:
    """It has steps left, but does not train them, unlike one that is extended."""
    words = ["tiny", "--recipe.validation", 50, "--recipe.epochs", 6, "--recipe.optimizer.lr", 1e-12]
    words += ["--resume", "auto", "--recipe.patience"]
    run = train(*words, 1).run
    summary, wandb_id = run.read_summary(), run.config().wandb_id
    assert summary.stopped_early
    train(*words, 1)
    assert run.config().wandb_id == wandb_id
    train(*words, 3, "--resume-anyway")
    assert run.read_summary().steps > summary.steps
    assert run.config().wandb_id != wandb_id


def stopped(data: Path, runs: Path) -> Path:
    done = runner("train", "tiny", *TINY, "--data", data, "--runs", runs, "--device", "cpu", "--max-steps", 5)
    assert done.returncode == 0, done.stderr
    return runs / "tiny" / "seed-0"


def resumed(data: Path, runs: Path, *more: object) -> subprocess.CompletedProcess[str]:
    words = ["train", "tiny", *TINY, "--data", data, "--runs", runs, "--device", "cpu"]
    return runner(*words, *(more if "--resume" in more else ["--resume", "auto", *more]))


def test_the_code_of_a_run_includes_the_module_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "my_net.py"
    hashes = [environment.source_sha256(), environment.source_sha256(["no.such.module"])]
    assert hashes[0] == hashes[1]
    for content in ("A = 1", "A = 2"):
        module.write_text(content)
        monkeypatch.setitem(sys.modules, "my_net", SimpleNamespace(__file__=str(module)))
        hashes.append(environment.source_sha256(["my_net"]))
    assert len(set(hashes)) == 3


@pytest.mark.every
def test_an_evaluation_that_no_other_training_has_is_not_bit_identical(small_data: Path, tmp_path: Path) -> None:
    """With early stopping, the weights may be those of the last step of a lower --max-steps."""
    words = ["--epochs", 4, "--recipe.validation", 80, "--recipe.patience", 2]
    for steps, bitwise in ((5, []), (5, [True]), (6, [True, False])):  # the second repeats the end
        done = resumed(small_data, tmp_path, *words, "--max-steps", steps)
        assert done.returncode == 0, done.stderr
        config = Run(tmp_path / "tiny" / "seed-0").config()
        assert [entry.bitwise for entry in config.resumed] == bitwise
        assert ("not bit-identical" in done.stderr) == (bitwise[-1:] == [False])


def test_another_training_is_refused_with_the_difference(small_data: Path, data: Path, tmp_path: Path) -> None:
    run = stopped(small_data, tmp_path)

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}

    before = files()
    for more, difference in (
        (["--recipe.optimizer.lr", 0.01], "recipe.optimizer.lr: 0.05 → 0.01"),
        (["--recipe.augment.flip", "none"], "recipe.augment.flip: random → none"),
        (["--precision", "bf16"], "precision: fp32 → bf16"),
        (["--seed", 1, "--name", "seed-0"], "seed: 0 → 1"),
    ):
        done = resumed(small_data, tmp_path, *more)
        assert done.returncode == 2
        assert difference in done.stderr
        assert "--resume-anyway" in done.stderr
    done = resumed(data, tmp_path)
    assert done.returncode == 2
    assert "dataset:" in done.stderr
    assert files() == before
    wandb_id = Run(run).config().wandb_id
    done = resumed(small_data, tmp_path, "--recipe.optimizer.lr", 0.01, "--resume-anyway")
    assert done.returncode == 0, done.stderr
    config = Run(run).config()
    assert config.recipe.optimizer.lr == 0.01
    assert config.resumed[0].changed == {"recipe.optimizer.lr": (0.05, 0.01)}
    assert config.wandb_id != wandb_id
    state = checkpoint.read_state(checkpoint.latest(Run(run)))
    assert [group["peak_lr"] for group in state["optimizer"]["param_groups"]] == [0.01]
    summary = Run(run).summary.read_bytes()
    for name, *more in (
        ("recipe.ema", "--recipe.ema", 0.9),
        ("recipe.layer_decay", "--recipe.layer-decay", 0.8),
        ("recipe.optimizer.decay_vectors", "--recipe.optimizer.no-decay-vectors"),
    ):
        done = resumed(small_data, tmp_path, *more, "--resume-anyway")
        assert done.returncode == 2, name
        assert f"{name} cannot change within a run" in done.stderr
    assert Run(run).summary.read_bytes() == summary


def test_a_damaged_checkpoint_is_named(small_data: Path, tmp_path: Path) -> None:
    run = stopped(small_data, tmp_path)
    for name in ("state.pt", "model.safetensors"):
        path = run / "checkpoints" / "step-5" / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        done = resumed(small_data, tmp_path)
        assert done.returncode == 2
        assert f"{path}: damaged" in done.stderr
        assert "expected an intact checkpoint, found none" in done.stderr
        path.write_bytes(content)
    # An unfinished run also has the previous one, from which it resumes; the damaged one is reported anyway.
    (run / "stop").touch()
    done = resumed(small_data, tmp_path)
    assert "stopped at step 6" in done.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-5", "step-6"]
    (run / "checkpoints" / "step-6" / "state.pt").write_bytes(b"not a checkpoint")
    done = resumed(small_data, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step-6/state.pt: damaged" in done.stderr
    assert [entry.step for entry in Run(run).config().resumed] == [5, 5]


def test_one_that_ended_before_its_first_checkpoint_begins_again(small_data: Path, tmp_path: Path) -> None:
    """Without its rows twice, in the same W&B run, and not with another recipe."""
    run = Run(stopped(small_data, tmp_path))
    run.summary.unlink()
    shutil.rmtree(run.checkpoints)
    before, rows = run.config(), read_metrics(run)
    other = resumed(small_data, tmp_path, "--recipe.optimizer.lr", 0.01)
    assert other.returncode == 2
    assert "recipe.optimizer.lr: 0.05 → 0.01" in other.stderr
    done = resumed(small_data, tmp_path, "--max-steps", 5)
    assert done.returncode == 0, done.stderr
    assert [row.global_step for row in read_metrics(run)] == [row.global_step for row in rows]
    assert run.config().wandb_id == before.wandb_id
    assert [(entry.step, entry.bitwise) for entry in run.config().resumed] == [(0, True)]


def test_a_manifest_that_is_damaged_is_one_line(small_data: Path, tmp_path: Path) -> None:
    run = stopped(small_data, tmp_path)
    path = run / "checkpoints" / "step-5" / MANIFEST
    path.write_text(path.read_text().replace("sha256", "sha257"))
    done = resumed(small_data, tmp_path)
    assert done.returncode == 2
    assert f"{path}: damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pickle_with_a_payload_does_not_run(small_data: Path, tmp_path: Path) -> None:
    run = stopped(small_data, tmp_path)
    folder, marker = run / "checkpoints" / "step-5", tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (marker,)

    torch.save({"step": Payload()}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["state.pt"] = sha256_of(folder / "state.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = resumed(small_data, tmp_path)
    assert done.returncode == 2
    assert "cannot be read" in done.stderr
    assert not marker.exists()


def test_resume_begins_where_there_is_nothing_and_finds_a_given_checkpoint(small_data: Path, tmp_path: Path) -> None:
    done = resumed(small_data, tmp_path, "--max-steps", 5)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny" / "seed-0"
    assert not Run(run).config().resumed
    given = resumed(small_data, tmp_path, "--resume", run / "checkpoints" / "step-5", "--max-steps", 6)
    assert given.returncode == 0, given.stderr
    missing = resumed(small_data, tmp_path, "--resume", run / "checkpoints" / "step-99")
    assert missing.returncode == 2
    assert "expected auto, never, or the folder of a checkpoint, found none" in missing.stderr
    again = runner("train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu")
    assert again.returncode == 2
    assert "--resume auto" in again.stderr


def test_resuming_a_finished_run_changes_nothing(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "tiny" / "seed-0")
    done = resumed(small_data, tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny" / "seed-0"
    assert json.loads((run / "summary.json").read_text())["steps"] == 16
    assert read_metrics(Run(run)) == read_metrics(Run(tiny_run))
    for name, tensor in weights(tiny_run).items():
        np.testing.assert_array_equal(tensor, weights(run)[name])


def test_stopped_where_no_evaluation_was_due(small_data: Path, tmp_path: Path) -> None:
    """Epochs of one step, of which only the third is scored; stopped after the others, they have a checkpoint."""
    words = ["train", "tiny-norm", *TINY, "--data", small_data, "--device", "cpu", "--recipe.epochs", 3]
    words += ["--recipe.batch-size", 500, "--evaluate-every", 3, "--resume", "auto"]
    straight, ended, asked = tmp_path / "straight", tmp_path / "ended", tmp_path / "asked"
    assert runner(*words, "--runs", straight).returncode == 0
    for step in (1, 2):
        asked.touch()
        assert f"stopped at step {step};" in runner(*words, "--runs", ended, "--stop-file", asked).stderr
    assert runner(*words, "--runs", ended).returncode == 0
    assert_same_run(*(runs / "tiny-norm" / "seed-0" for runs in (straight, ended)))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        pytest.param(2, ("--recipe.ema", 0.9), id="2 ranks, EMA", marks=pytest.mark.every),
        pytest.param(2, (), id="2 ranks", marks=pytest.mark.every),
        pytest.param(1, (), id="1 rank"),
    ],
)
def test_an_end_at_a_checkpoint_within_an_epoch_is_an_end(
    ranks: int, words: tuple[object, ...], small_data: Path, tmp_path: Path
) -> None:
    """A killed run that is asked to end at its checkpoint is evaluated, saved and logged as one that trained on."""
    ended = launch(ranks, *arguments(small_data, tmp_path / "ended", *words), END="commit 2 0 SIGKILL")
    assert ended.returncode != 0  # the checkpoint of step 3 is there, that of step 6 is not
    for runs in ("ended", "straight"):
        words = ("--resume", "auto", "--max-steps", 3, *words)
        done = launch(ranks, *arguments(small_data, tmp_path / runs, *words))
        assert done.returncode == 0, done.stderr
        words = words[4:]
    resumed = tmp_path / "ended" / "ending" / "seed-0"
    assert Run(resumed).config().resumed[-1].step == 3
    assert_same_run(tmp_path / "straight" / "ending" / "seed-0", resumed)
