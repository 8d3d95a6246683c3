"""Training as a user starts it: real processes, real files."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from runner.runs import Run, read_metrics
from tests.conftest import ROOT, TINY, launch, python, runner


def weights(run: Run) -> dict[str, np.ndarray]:
    (folder,) = run.checkpoints.iterdir()
    return load_file(folder / "model.safetensors")


def test_the_run_folder(tiny_run: Path, small_data: Path) -> None:
    run = Run(tiny_run)
    summary = json.loads(run.summary.read_text())
    assert summary["experiment"] == "tiny"
    assert summary["epochs"] == 2
    assert summary["steps"] == 16
    assert summary["test_images"] == 200
    assert np.trace(summary["confusion"]) / 200 == summary["test_accuracy"]
    config = run.config()
    assert config["dataset"]["folder"] == str(small_data)
    assert config["overrides"] == {}
    assert {"torch", "ffcv", "accelerate", "python"} <= config["versions"].keys()
    pictures = {"curves.png", "confusion.png", "samples.png", "mistakes.png", "mistakes.json"}
    assert {path.name for path in run.figures.iterdir()} == pictures
    predictions = np.load(run.predictions)
    for row in json.loads((run.figures / "mistakes.json").read_text())["mistakes"]:
        logits, label = predictions["logits"][row["sample"]], predictions["labels"][row["sample"]]
        assert logits.argmax() == row["predicted"] != row["label"] == label
    stored = np.load(run.predictions)
    assert (stored["logits"].argmax(1) == stored["labels"]).mean() == summary["test_accuracy"]
    assert [row["epoch"] for row in read_metrics(run) if "test/accuracy" in row] == [1, 2]


def test_eval_gives_the_summarys_figures(tiny_run: Path) -> None:
    done = runner("eval", tiny_run, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tiny_run / "summary.json").read_text())
    result = json.loads(done.stdout)
    assert result["test_accuracy"] == summary["test_accuracy"]
    assert result["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
    assert result["confusion"] == summary["confusion"]


def test_the_same_seed_gives_the_same_bits(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    done = runner(
        "train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu", "--name", "b"
    )
    assert done.returncode == 0, done.stderr
    again = weights(Run(tmp_path / "tiny" / "b"))
    for name, tensor in weights(Run(tiny_run)).items():
        np.testing.assert_array_equal(tensor, again[name])


@pytest.mark.processes
@pytest.mark.parametrize("experiment", ["tiny", "tiny-norm"])
def test_two_ranks_train_what_one_trains(experiment: str, data: Path, tmp_path: Path) -> None:
    """On all 10,000 test images. Without batch norm, two ranks differ from one by rounding alone."""
    rows, accuracy = {}, {}
    for processes in (1, 2):
        done = launch(processes, "train", experiment, *TINY, "--data", data, "--runs", tmp_path, "--json",
                      "--name", f"on-{processes}", "--max-steps", 40)  # fmt: skip
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        assert summary["test_images"] == 10_000
        assert np.sum(summary["confusion"], axis=1).tolist() == [1_000] * 10
        run = Run(tmp_path / experiment / f"on-{processes}")
        assert run.config()["world_size"] == processes
        rows[processes], accuracy[processes] = read_metrics(run), summary["test_accuracy"]
    keys = ("train/loss", "train/accuracy", "test/loss")
    figures = {n: [row[key] for row in rows[n] for key in keys if key in row] for n in (1, 2)}
    # Batch norm sees half of a batch on each rank: near, and not the same.
    tolerance = 1e-4 if experiment == "tiny" else 0.1
    np.testing.assert_allclose(figures[2], figures[1], rtol=tolerance)
    assert accuracy[2] == pytest.approx(accuracy[1], abs=1e-3 if experiment == "tiny" else 0.1)


@pytest.mark.processes
def test_three_ranks_count_every_image(data: Path, tmp_path: Path) -> None:
    done = launch(3, "train", "tiny-norm", *TINY, "--data", data, "--runs", tmp_path, "--json", "--max-steps", 3)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test_images"] == 10_000
    assert "device: cpu" in done.stderr


@pytest.mark.processes
def test_more_ranks_than_the_launcher_starts_is_an_error(small_data: Path, tmp_path: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "-m", "runner"]
    done = python(*launcher, "train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path)
    assert done.returncode != 0
    assert "asked for several processes and started one" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
@pytest.mark.parametrize(
    "config", [["one_process.yaml"], ["one_node.yaml", "--num_processes", "2"]], ids=["one_process", "one_node"]
)
def test_gpu_configurations_refuse_a_machine_without(config: list[str], small_data: Path, tmp_path: Path) -> None:
    name, *more = config
    launcher = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "launch" / name, *more, "-m", "runner"]
    done = python(
        *launcher, "train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, CUDA_VISIBLE_DEVICES=""
    )
    assert done.returncode != 0
    assert done.stderr.count("CUDA GPU(s) on this node, found 0") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_a_batch_that_does_not_divide_is_an_error(small_data: Path, tmp_path: Path) -> None:
    done = launch(2, "train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--recipe.batch-size", 61)
    assert done.returncode != 0
    assert "expected a multiple of the 2 ranks" in done.stderr
    assert not (tmp_path / "tiny").exists()


def test_a_diverged_run_stops_with_one_line(small_data: Path, tmp_path: Path) -> None:
    done = runner("train", "tiny-diverging", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "the training loss is nan" in done.stderr
    assert not (tmp_path / "tiny-diverging/seed-0/summary.json").exists()


def test_max_steps_stops_early_and_still_concludes(small_data: Path, tmp_path: Path) -> None:
    done = runner("train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu",
                  "--max-steps", 3, "--recipe.optimizer.lr", 0.01, "--json")  # fmt: skip
    summary = json.loads(done.stdout)
    assert (summary["steps"], summary["test_images"]) == (3, 200)
    config = Run(tmp_path / "tiny" / "seed-0").config()
    assert config["overrides"] == {"recipe.optimizer.lr": [0.05, 0.01]}
    assert config["max_steps"] == 3


def test_streaming_trains_the_same_bits(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    done = runner("train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu",
                  "--loader", "streaming", "--workers", 2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loader: streaming (--loader streaming)" in done.stderr
    run = Run(tmp_path / "tiny" / "seed-0")
    assert run.config()["loader"] == "streaming"
    assert Run(tiny_run).config()["loader"] == "resident"
    streamed = weights(run)
    for name, tensor in weights(Run(tiny_run)).items():
        np.testing.assert_array_equal(tensor, streamed[name])


@pytest.mark.processes
def test_a_last_partial_batch_weighs_every_image_alike(small_data: Path, tmp_path: Path) -> None:
    """500 images in batches of 60 leave 20, which three ranks share as 6, 7 and 7."""
    rows = []
    for processes in (1, 3):
        done = launch(processes, "train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path,
                      "--name", processes, "--recipe.no-drop-last")  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows.append([row for row in read_metrics(Run(tmp_path / "tiny" / str(processes))) if "train/loss" in row])
    assert [row["global_step"] for row in rows[0]] == [9, 18]
    for key in ("train/loss", "train/accuracy"):
        one, three = ([row[key] for row in part] for part in rows)
        np.testing.assert_allclose(three, one, rtol=1e-5)


def test_bf16(small_data: Path, tmp_path: Path) -> None:
    done = runner("train", "tiny-norm", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu",
                  "--precision", "bf16", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "tiny-norm" / "seed-0")
    assert run.config()["precision"] == "bf16"
    assert all(tensor.dtype in (np.float32, np.int64) for tensor in weights(run).values())


def test_it_learns(source, data: Path, tmp_path: Path) -> None:
    """A small network in two epochs: far above chance on real images and on synthetic ones."""
    done = runner("train", "tiny-wide", *TINY, "--data", data, "--runs", tmp_path, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    accuracy = json.loads(done.stdout)["test_accuracy"]
    assert accuracy > 0.45, f"{accuracy} on {source.name}, 2 epochs, seed 0"


@pytest.mark.gpu
def test_a_gpu_trains_in_bf16(small_data: Path, tmp_path: Path) -> None:
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "launch/one_process.yaml",
        "-m",
        "runner",
    ]
    done = python(*launcher, "train", "tiny-norm", *TINY, "--data", small_data, "--runs", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    config = Run(tmp_path / "tiny-norm" / "seed-0").config()
    assert (config["device"], config["precision"]) == ("cuda", "bf16")


@pytest.mark.gpu
def test_fp16_of_a_seed_is_the_same_after_another_seed(small_data: Path, tmp_path: Path) -> None:
    """The gradient scaler begins anew, too."""
    for name, seeds in (("alone", [1]), ("after", [0, 1])):
        words = ["--data", small_data, "--runs", tmp_path / name, "--precision", "fp16", "--seeds", *seeds]
        done = runner("train", "tiny-norm", *TINY, *words, "--deterministic")
        assert done.returncode == 0, done.stderr
    alone, after = (weights(Run(tmp_path / name / "tiny-norm" / "seed-1")) for name in ("alone", "after"))
    assert all(np.array_equal(tensor, after[name]) for name, tensor in alone.items())


def test_epochs_without_evaluation_change_nothing_else(small_data: Path, tmp_path: Path) -> None:
    found = {}
    for every in (1, 3):
        words = ["--data", small_data, "--runs", tmp_path / str(every), "--recipe.epochs", 4, "--device", "cpu"]
        done = runner("train", "tiny-everything", *TINY, *words, "--evaluate-every", every, "--deterministic")
        assert done.returncode == 0, done.stderr
        run = Run(tmp_path / str(every) / "tiny-everything" / "seed-0")
        found[every] = json.loads(run.summary.read_text()), read_metrics(run), weights(run)
        assert run.config()["deterministic"]
    (all_of_them, rows, theirs), (some, fewer, ours) = found.values()
    assert [row["epoch"] for row in rows if "test/accuracy" in row] == [1, 2, 3, 4]
    assert [row["epoch"] for row in fewer if "test/accuracy" in row] == [3, 4]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [
        row["train/loss"] for row in fewer if "train/loss" in row
    ]
    assert all(np.array_equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert all_of_them["test_accuracy"] == some["test_accuracy"]
    assert some["best_epoch"] in (3, 4)
