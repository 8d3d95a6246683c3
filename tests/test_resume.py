"""A run that was stopped or killed, and went on, is the run that never was: the same weights, to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from data_prep.console import sha256_of
from runner.runs import Run, read_metrics
from tests.conftest import ROOT, TINY, clean_environment, launch, runner

LONG = ["--recipe.epochs", 8, "--checkpoint-every", 3]  # long enough to be caught in the middle


def arguments(data: Path, runs: Path, *more: object) -> list[object]:
    return ["train", "tiny-everything", *TINY, "--data", data, "--runs", runs, *more]


def assert_the_same(one: Path, other: Path) -> None:
    """Weights to the bit, and every row of metrics but for its speed."""
    for name, tensor in weights(one).items():
        np.testing.assert_array_equal(tensor, weights(other)[name], err_msg=name)
    rows = [
        [{key: value for key, value in row.items() if key != "images_per_second"} for row in read_metrics(Run(run))]
        for run in (one, other)
    ]
    assert rows[0] == rows[1]
    summaries = [json.loads((run / "summary.json").read_text()) | {"run": ""} for run in (one, other)]
    assert summaries[0] == summaries[1]


def weights(run: Path) -> dict[str, np.ndarray]:
    (folder,) = (run / "checkpoints").iterdir()
    return load_file(folder / "model.safetensors")


def begun(processes: int, *words: object) -> subprocess.Popen[str]:
    """A training that is under way, by itself or under the launcher."""
    command = [sys.executable, "-m"]
    if processes > 1:
        launcher = ["accelerate.commands.launch", "--config_file", ROOT / "launch/cpu.yaml"]
        command += [*launcher, "--num_processes", processes, "-m"]
    command += ["runner", *words, "--device", "cpu"]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=clean_environment(), stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for_step(run: Path, step: int) -> None:
    """Until a checkpoint of `step` or later is there."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if any(int(folder.name[5:]) >= step for folder in run.glob("checkpoints/step-*")):
            return
        time.sleep(0.02)
    pytest.fail(f"no checkpoint of step {step}")


@pytest.fixture(scope="module")
def straight(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Runs that were never interrupted, by their number of ranks."""
    folder, made = tmp_path_factory.mktemp("straight"), {}

    def run(processes: int) -> Path:
        if processes not in made:
            runs = folder / str(processes)
            done = launch(processes, *arguments(small_data, runs, *LONG))
            assert done.returncode == 0, done.stderr
            made[processes] = runs / "tiny-everything" / "seed-0"
        return made[processes]

    return run


@pytest.mark.processes
@pytest.mark.parametrize(
    ("processes", "how"),
    [(1, "SIGUSR1"), (2, "SIGKILL"), (3, "stop file")],
)
def test_what_was_ended_and_resumed_is_what_never_ended(
    straight, small_data: Path, tmp_path: Path, processes: int, how: str
) -> None:
    """In the middle of an epoch; weights, rows and summary."""
    run = tmp_path / "tiny-everything" / "seed-0"
    process = begun(processes, *arguments(small_data, tmp_path, *LONG))
    wait_for_step(run, 9)
    if how == "stop file":
        (run / "stop").touch()
    elif how == "SIGKILL":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.send_signal(getattr(signal, how))
    _, told = process.communicate(timeout=120)
    assert not (run / "summary.json").exists(), "it was over before it could be ended"
    if how == "SIGKILL":
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == (75 if processes == 1 else 1)  # the launcher gives 1 for every failure
        assert "go on with --resume auto" in told
        assert not (run / "stop").exists()
    time.sleep(1)
    done = launch(processes, *arguments(small_data, tmp_path, *LONG, "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    (resumed,) = Run(run).config()["resumed"]
    assert resumed["bitwise"]
    assert resumed["step"] >= 9
    assert Run(run).config()["wandb_id"]
    assert_the_same(straight(processes), run)


@pytest.mark.processes
def test_another_number_of_ranks_goes_on_with_the_same_images(small_data: Path, tmp_path: Path) -> None:
    """Without dropout and batch norm, two ranks and one differ by rounding alone."""
    words = ["train", "tiny", *TINY, "--data", small_data]
    for runs, changes in (
        ("straight", [(1, [])]),
        ("changed", [(2, ["--max-steps", 11]), (1, ["--resume", "auto"])]),
    ):
        for processes, more in changes:
            done = launch(processes, *words, "--runs", tmp_path / runs, *more)
            assert done.returncode == 0, done.stderr
    assert "not to the bit" in done.stderr
    run = tmp_path / "changed" / "tiny" / "seed-0"
    (resumed,) = Run(run).config()["resumed"]
    assert resumed == {"step": 11, "world_size": 1, "bitwise": False, "changed": {}}
    for name, tensor in weights(tmp_path / "straight" / "tiny" / "seed-0").items():
        np.testing.assert_allclose(tensor, weights(run)[name], atol=1e-5, err_msg=name)


def stopped(data: Path, runs: Path) -> Path:
    done = runner("train", "tiny", *TINY, "--data", data, "--runs", runs, "--device", "cpu", "--max-steps", 5)
    assert done.returncode == 0, done.stderr
    return runs / "tiny" / "seed-0"


def resumed(data: Path, runs: Path, *more: object) -> subprocess.CompletedProcess[str]:
    words = ["train", "tiny", *TINY, "--data", data, "--runs", runs, "--device", "cpu"]
    return runner(*words, *(more if "--resume" in more else ["--resume", "auto", *more]))


def test_another_training_is_refused_with_the_difference(small_data: Path, data: Path, tmp_path: Path) -> None:
    run = stopped(small_data, tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
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
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    done = resumed(small_data, tmp_path, "--recipe.optimizer.lr", 0.01, "--resume-anyway")
    assert done.returncode == 0, done.stderr
    config = Run(run).config()
    assert config["recipe"]["optimizer"]["lr"] == 0.01
    assert config["resumed"][0]["changed"] == {"recipe.optimizer.lr": [0.05, 0.01]}


def test_a_damaged_checkpoint_is_named(small_data: Path, tmp_path: Path) -> None:
    run = stopped(small_data, tmp_path)
    for name in ("state.pt", "model.safetensors"):
        path = run / "checkpoints" / "step-5" / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        done = resumed(small_data, tmp_path)
        assert done.returncode == 2
        assert f"{path}: damaged" in done.stderr
        assert "expected a whole checkpoint, found none" in done.stderr
        path.write_bytes(content)
    # An older one that is whole is gone on from, and the damaged one is named all the same.
    newer = run / "checkpoints" / "step-7"
    shutil.copytree(run / "checkpoints" / "step-5", newer)
    (newer / "state.pt").write_bytes(b"not a checkpoint")
    done = resumed(small_data, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step-7/state.pt: damaged" in done.stderr
    assert Run(run).config()["resumed"][0]["step"] == 5


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


def test_resume_begins_where_there_is_nothing_and_finds_a_given_checkpoint(
    small_data: Path, tmp_path: Path
) -> None:
    done = resumed(small_data, tmp_path, "--max-steps", 5)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny" / "seed-0"
    assert "resumed" not in Run(run).config()
    given = resumed(small_data, tmp_path, "--resume", run / "checkpoints" / "step-5", "--max-steps", 6)
    assert given.returncode == 0, given.stderr
    missing = resumed(small_data, tmp_path, "--resume", run / "checkpoints" / "step-99")
    assert missing.returncode == 2
    assert "expected a checkpoint with manifest.json, found none" in missing.stderr
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
