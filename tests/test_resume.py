"""A run that was stopped or killed, and went on, is the run that never was: the same weights, to the bit."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from data_prep.console import sha256_of
from runner import checkpoint
from runner.runs import Run, read_metrics
from tests import wandb_file
from tests.conftest import TINY, begun, launch, runner, wait_for_step

ENDING = ("--experiments-from", "tests.ending")
LIVES = (  # how each but the last ends; "last" is the last rank
    "train 12 last SIGKILL",  # in the middle of an epoch
    "eval 2 0 SIGKILL",  # between epochs; the first pass counts operations
    "commit 2 0 SIGKILL",  # at a checkpoint
    "train 6 last SIGTERM",
    "train 6 0 SIGUSR1",
)


def arguments(data: Path, runs: Path, *more: object) -> list[object]:
    """8 epochs of 7 steps."""
    return ["train", "ending", *ENDING, "--data", data, "--runs", runs, "--checkpoint-every", 3, *more]


def assert_the_same(one: Path, other: Path) -> None:
    """Weights, optimizer and generators to the bit, and every row of metrics but for its speed."""
    for name, tensor in weights(one).items():
        np.testing.assert_array_equal(tensor, weights(other)[name], err_msg=name)
    states = [checkpoint.read_state(checkpoint.latest(Run(run))) for run in (one, other)]
    for key in ("step", "best", "model", "optimizer", "average"):
        assert_equal(states[0][key], states[1][key], key)
    for ranks in zip(*(state["ranks"] for state in states), strict=True):
        assert_equal(*[rank["generators"]["torch"] for rank in ranks], "generators")
    rows = [
        [{key: value for key, value in row.items() if key != "images_per_second"} for row in read_metrics(Run(run))]
        for run in (one, other)
    ]
    assert rows[0] == rows[1]
    summaries = [json.loads((run / "summary.json").read_text()) | {"run": ""} for run in (one, other)]
    assert summaries[0] == summaries[1]


def assert_equal(one: object, other: object, where: str) -> None:
    """Nested dictionaries and lists of tensors, to the bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        for k, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}.{k}")
    else:
        assert one == other, where


def weights(run: Path) -> dict[str, np.ndarray]:
    (folder,) = (run / "checkpoints").iterdir()
    return load_file(folder / "model.safetensors")


@pytest.mark.processes
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_what_was_ended_five_times_is_what_never_ended(small_data: Path, tmp_path: Path, processes: int) -> None:
    """Killed in the middle of an epoch, between epochs and at a checkpoint, and asked to stop by both signals."""
    for life in LIVES:
        run = tmp_path / "ended" / "ending" / "seed-0"
        words = arguments(small_data, tmp_path / "ended", "--resume", "auto")
        ended = launch(processes, *words, END=life.replace("last", str(processes - 1)), WANDB_MODE="disabled")
        assert ended.returncode != 0
        assert not run.joinpath("summary.json").exists(), "it was over before it could be ended"
        asked = life.endswith(("TERM", "USR1"))
        assert ("go on with --resume auto" in ended.stderr) == asked, ended.stderr
    for runs in ("ended", "straight"):
        words = arguments(small_data, tmp_path / runs, "--resume", "auto")
        done = launch(processes, *words, WANDB_MODE="disabled")
        assert done.returncode == 0, done.stderr
    resumed = Run(run).config()["resumed"]
    assert len(resumed) == len(LIVES)
    assert all(entry["bitwise"] for entry in resumed)
    steps = [entry["step"] for entry in resumed]
    assert steps == sorted(set(steps))
    assert steps[0] >= 3
    assert_the_same(tmp_path / "straight" / "ending" / "seed-0", run)


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


@pytest.mark.processes
def test_no_rank_leaves_before_the_first_has_told_w_and_b(small_data: Path, tmp_path: Path) -> None:
    """The launcher ends the ranks that are left as soon as one has gone."""
    done = launch(2, *arguments(small_data, tmp_path), END="train 9 0 SIGUSR1", WANDB_MODE="offline")
    assert done.returncode == 1
    assert "go on with --resume auto" in done.stderr
    (file,) = (tmp_path / "ending" / "seed-0").glob("wandb/offline-run-*/*.wandb")
    assert "exit" in [record.WhichOneof("record_type") for record in wandb_file.records(file)]


@pytest.mark.processes
def test_the_launcher_hands_sigterm_on(small_data: Path, tmp_path: Path) -> None:
    """As SLURM sends it before it takes the nodes."""
    words = arguments(small_data, tmp_path, "--device", "cpu")
    with begun(2, *words, END="train 4 1 SLEEP1") as process:
        wait_for_step(tmp_path / "ending" / "seed-0", 3)
        process.terminate()
        _, told = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "stopped at step" in told


@pytest.fixture(scope="module")
def of_one_rank(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without dropout and batch norm, on which ranks differ by rounding alone."""
    runs = tmp_path_factory.mktemp("one")
    words = ["train", "tiny", *TINY, "--data", small_data, "--runs", runs, "--device", "cpu"]
    done = runner(*words, WANDB_MODE="disabled")
    assert done.returncode == 0, done.stderr
    return runs / "tiny" / "seed-0"


@pytest.mark.processes
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_another_number_of_ranks_goes_on_with_the_same_images(
    of_one_rank: Path, small_data: Path, tmp_path: Path, before: int, after: int
) -> None:
    words = ["train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path]
    begun = launch(before, *words, "--max-steps", 11, WANDB_MODE="disabled")
    assert begun.returncode == 0, begun.stderr
    run = tmp_path / "tiny" / "seed-0"
    wandb_id = Run(run).config()["wandb_id"]
    done = launch(after, *words, "--resume", "auto", WANDB_MODE="disabled")
    assert done.returncode == 0, done.stderr
    assert "not to the bit" in done.stderr
    (resumed,) = Run(run).config()["resumed"]
    assert resumed == {"step": 11, "world_size": after, "bitwise": False, "changed": {}}
    assert Run(run).config()["wandb_id"] == wandb_id
    assert json.loads((run / "summary.json").read_text())["test_images"] == 200
    for name, tensor in weights(of_one_rank).items():
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
    done = resumed(small_data, tmp_path, "--recipe.optimizer.lr", 0.01, "--resume-anyway")
    assert done.returncode == 0, done.stderr
    config = Run(run).config()
    assert config["recipe"]["optimizer"]["lr"] == 0.01
    assert config["resumed"][0]["changed"] == {"recipe.optimizer.lr": [0.05, 0.01]}
    state = checkpoint.read_state(checkpoint.latest(Run(run)))
    assert [group["peak_lr"] for group in state["optimizer"]["param_groups"]] == [0.01]
    done = resumed(small_data, tmp_path, "--recipe.ema", 0.9, "--resume-anyway")
    assert done.returncode == 2
    assert "recipe.ema cannot change under way" in done.stderr


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
    # A run under way has the one before as well: that is gone on from, and the damaged one is named all the same.
    (run / "stop").touch()
    done = resumed(small_data, tmp_path)
    assert "stopped at step 6" in done.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-5", "step-6"]
    (run / "checkpoints" / "step-6" / "state.pt").write_bytes(b"not a checkpoint")
    done = resumed(small_data, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step-6/state.pt: damaged" in done.stderr
    assert [entry["step"] for entry in Run(run).config()["resumed"]] == [5, 5]


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
    assert [row["global_step"] for row in read_metrics(run)] == [row["global_step"] for row in rows]
    assert run.config()["wandb_id"] == before["wandb_id"]
    assert [(entry["step"], entry["bitwise"]) for entry in run.config()["resumed"]] == [(0, True)]


def test_a_manifest_that_is_damaged_is_one_line(small_data: Path, tmp_path: Path) -> None:
    run = stopped(small_data, tmp_path)
    path = run / "checkpoints" / "step-5" / checkpoint.MANIFEST
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
    assert_the_same(*(runs / "tiny-norm" / "seed-0" for runs in (straight, ended)))
