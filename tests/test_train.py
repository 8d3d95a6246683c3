"""Training as a user starts it: real processes, real files."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from data_prep.sources import Source
from runner.run.folder import Run
from runner.run.metrics import read_metrics
from tests.conftest import Train
from tests.support.compare import weights
from tests.support.processes import ROOT, TINY, launch, module, python, runner


def test_the_run_folder(tiny_run: Path, small_data: Path) -> None:
    run = Run(tiny_run)
    summary = json.loads(run.summary.read_text())
    assert summary["experiment"] == "tiny"
    assert summary["epochs"] == 2
    assert summary["steps"] == 16
    assert summary["test_images"] == 200
    assert np.trace(summary["confusion"]) / 200 == summary["test_accuracy"]
    config = run.config()
    assert config.dataset.folder == str(small_data)
    assert config.overrides == {}
    assert {"torch", "ffcv", "accelerate", "python"} <= config.versions.keys()
    pictures = {"curves.png", "confusion.png", "samples.png", "mistakes.png", "mistakes.json"}
    assert {path.name for path in run.figures.iterdir()} == pictures
    predictions = np.load(run.predictions)
    for row in json.loads((run.figures / "mistakes.json").read_text())["mistakes"]:
        logits, label = predictions["logits"][row["sample"]], predictions["labels"][row["sample"]]
        assert logits.argmax() == row["predicted"] != row["label"] == label
    stored = np.load(run.predictions)
    assert (stored["logits"].argmax(1) == stored["labels"]).mean() == summary["test_accuracy"]
    assert [row.epoch for row in read_metrics(run) if row.test_accuracy is not None] == [1, 2]


def test_eval_gives_the_summarys_figures(tiny_run: Path) -> None:
    done = runner("eval", tiny_run, *TINY, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tiny_run / "summary.json").read_text())
    result = json.loads(done.stdout)
    assert result["test_accuracy"] == summary["test_accuracy"]
    assert result["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
    assert result["confusion"] == summary["confusion"]


def test_the_same_seed_gives_the_same_bits(tiny_run: Path, train: Train) -> None:
    again = weights(train("tiny", "--name", "b").run.folder)
    for name, tensor in weights(tiny_run).items():
        np.testing.assert_array_equal(tensor, again[name])


@pytest.mark.images
@pytest.mark.processes
@pytest.mark.parametrize(
    ("experiment", "options"),
    [
        pytest.param("tiny", [], id="tiny", marks=pytest.mark.every),
        pytest.param("tiny-norm", [], id="tiny-norm", marks=pytest.mark.every),
        pytest.param("tiny-norm", ["--recipe.sync-batch-norm"], id="synchronized"),
    ],
)
def test_two_ranks_train_what_one_trains(experiment: str, options: list[str], data: Path, train: Train) -> None:
    """On all 10,000 test images. Without batch norm, or where it is synchronized, ranks differ by rounding alone."""
    rows, accuracy = {}, {}
    for ranks in (1, 2):
        trained = train(experiment, "--json", "--name", ranks, "--max-steps", 40, *options, data=data, ranks=ranks)
        summary = json.loads(trained.stdout)
        assert summary["test_images"] == 10_000
        assert np.sum(summary["confusion"], axis=1).tolist() == [1_000] * 10
        assert trained.run.config().world_size == ranks
        rows[ranks], accuracy[ranks] = read_metrics(trained.run), summary["test_accuracy"]
    losses = [row.train_loss for row in rows[1] if row.train_loss is not None]
    assert losses[1] < losses[0]  # means of 20 steps each
    # Batch norm that is not synchronized sees half of a batch on each rank: near, and not the same.
    same = experiment == "tiny" or bool(options)
    for names, tolerance in ((("train_loss", "test_loss"), {"rtol": 1e-4}), (("train_accuracy",), {"atol": 5e-3})):
        figures = {n: [getattr(row, name) for row in rows[n] for name in names] for n in (1, 2)}
        figures = {n: [value for value in figures[n] if value is not None] for n in (1, 2)}
        # Rounding may move an image that is near two classes, of about a thousand.
        np.testing.assert_allclose(figures[2], figures[1], **(tolerance if same else {"rtol": 0.1}))
    assert accuracy[2] == pytest.approx(accuracy[1], abs=1e-3 if same else 0.1)


@pytest.mark.every
@pytest.mark.processes
def test_three_ranks_count_every_image(data: Path, train: Train) -> None:
    trained = train("tiny-norm", "--json", "--max-steps", 3, data=data, ranks=3)
    assert json.loads(trained.stdout)["test_images"] == 10_000
    assert "device: cpu" in trained.stderr


@pytest.mark.processes
def test_more_ranks_than_the_launcher_starts_is_an_error(small_data: Path, tmp_path: Path) -> None:
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", 2, "-m", "runner"]
    done = module(*launcher, "train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path)
    assert done.returncode != 0
    assert "asked for several processes and started one" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
@pytest.mark.parametrize(
    "config", [["one_process.yaml", "-q"], ["one_node.yaml", "--num_processes", "2"]], ids=["one_process", "one_node"]
)
def test_gpu_configurations_refuse_a_machine_without(config: list[str], small_data: Path, tmp_path: Path) -> None:
    name, *more = config
    launcher = ["accelerate.commands.launch", "--config_file", ROOT / "launch" / name, *more, "-m", "runner"]
    done = module(*launcher, "train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert done.stderr.count("CUDA GPU(s) on this node, found 0") == 1
    assert ("Traceback" in done.stderr) == (name == "one_node.yaml")  # accelerate's own, which -q leaves out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_a_batch_that_does_not_divide_is_an_error(train: Train) -> None:
    refused = train("tiny", "--recipe.batch-size", 61, ranks=2, expect=1)  # the launcher's code, for the runner's 2
    assert "expected a multiple of the 2 ranks" in refused.stderr
    assert not refused.run.folder.parent.exists()


@pytest.mark.processes
def test_an_error_of_all_ranks_is_printed_though_the_first_is_last(small_data: Path, tmp_path: Path) -> None:
    words = ["late", "--experiments-from", "tests.support.models.late", "--recipe.batch-size", 61]
    refused = launch(2, "train", *words, "--data", small_data, "--runs", tmp_path)
    assert refused.stderr.count("expected a multiple of the 2 ranks") == 1


def test_a_diverged_run_stops_with_one_line(train: Train) -> None:
    diverged = train("tiny-diverging", expect=1)
    assert "Traceback" not in diverged.stderr
    assert "the training loss is nan" in diverged.stderr
    assert not diverged.run.summary.exists()


def test_a_run_that_diverges_in_its_last_step_has_no_result(train: Train) -> None:
    """The loss before the step is finite; that of the evaluation after it is not."""
    diverged = train("tiny", "--lr", 1e38, "--max-steps", 1, expect=1)
    assert "Traceback" not in diverged.stderr
    assert re.search(r"the test loss is (nan|inf) at step 1", diverged.stderr)
    assert "lower the learning rate" in diverged.stderr
    assert not diverged.run.summary.exists()
    assert not list(diverged.run.folder.glob("checkpoints/step-*"))
    assert "nan" not in diverged.run.metrics.read_text().lower()


def test_max_steps_stops_early_and_still_concludes(train: Train) -> None:
    trained = train("tiny", "--max-steps", 3, "--recipe.optimizer.lr", 0.01, "--json")
    summary = json.loads(trained.stdout)
    assert (summary["steps"], summary["test_images"]) == (3, 200)
    lines = trained.stderr.splitlines()
    assert f"run: {trained.run.folder}" in lines
    assert "W&B: disabled" in lines
    number = r"\d+\.\d{4} \(\d+\.\d\d%\)"
    (line,) = [line for line in lines if line.startswith("epoch ")]
    expected = rf"epoch 0\.375/2: train {number}, test {number}, lr 0\.01, [\d,]+ images/s, 0:00 left"
    assert re.fullmatch(expected, line), line
    config = trained.run.config()
    assert config.overrides == {"recipe.optimizer.lr": (0.05, 0.01)}
    assert config.max_steps == 3


@pytest.mark.every
def test_streaming_trains_the_same_bits(tiny_run: Path, train: Train) -> None:
    trained = train("tiny", "--loader", "streaming", "--workers", 2)
    assert "loader: streaming (--loader streaming)" in trained.stderr
    assert trained.run.config().loader == "streaming"
    assert Run(tiny_run).config().loader == "resident"
    streamed = weights(trained.run.folder)
    for name, tensor in weights(tiny_run).items():
        np.testing.assert_array_equal(tensor, streamed[name])


@pytest.mark.processes
def test_a_last_partial_batch_weighs_every_image_alike(train: Train) -> None:
    """500 images in batches of 60 leave 20, which three ranks share as 6, 7 and 7."""
    runs = [train("tiny", "--name", ranks, "--recipe.no-drop-last", ranks=ranks).run for ranks in (1, 3)]
    rows = [[row for row in read_metrics(run) if row.train_loss is not None] for run in runs]
    assert [row.global_step for row in rows[0]] == [9, 18]
    losses = [[row.train_loss for row in part] for part in rows]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    correct = np.array([[500 * row.train_accuracy for row in part] for part in rows])
    np.testing.assert_allclose(correct, correct.round(), atol=1e-3)
    np.testing.assert_allclose(correct[1], correct[0], atol=1.5)  # an image may be between two classes
    norms = [[row.train_grad_norm for row in part] for part in rows]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-3)


def test_bf16(train: Train) -> None:
    """The batches are bf16 as well, in training and in evaluation: the network refuses others."""
    trained = train("tiny-in-precision", "--precision", "bf16", "--json")
    run = trained.run
    assert run.config().precision == "bf16"
    evaluated = runner("eval", run.folder, *TINY, "--device", "cpu", "--json")
    assert json.loads(evaluated.stdout)["test_loss"] == json.loads(trained.stdout)["test_loss"]
    assert all(tensor.dtype in (np.float32, np.int64) for tensor in weights(run.folder).values())


def test_a_precision_that_only_accelerate_knows_is_refused(train: Train) -> None:
    refused = train("tiny", expect=2, ACCELERATE_MIXED_PRECISION="fp8")
    assert "--mixed_precision fp8: expected no, bf16, fp16" in refused.stderr


@pytest.mark.images
@pytest.mark.every
def test_it_learns(source: Source, data: Path, train: Train) -> None:
    """A small network in two epochs: far above chance on real images and on synthetic ones."""
    accuracy = json.loads(train("tiny-wide", "--json", data=data).stdout)["test_accuracy"]
    assert accuracy > 0.45, f"{accuracy} on {source.name}, 2 epochs, seed 0"


def test_steps_are_profiled_and_the_weights_are_the_same(tiny_run: Path, train: Train) -> None:
    trained = train("tiny", "--profile-steps", "7:8", "--peak-tflops", 0.002)
    folder = trained.run.profile
    assert f"profile: {folder / 'steps-7-8.json.gz'}" in trained.stderr.splitlines()
    assert {path.name for path in folder.iterdir()} == {"steps-7-8.json.gz", "steps-7-8.png"}
    assert (folder / "steps-7-8.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads(gzip.decompress((folder / "steps-7-8.json.gz").read_bytes()))["traceEvents"]
    steps = {event["name"]: event for event in events if event.get("cat") == "user_annotation"}
    assert {name for name in steps if name.startswith("step ")} == {"step 7", "step 8"}
    for step in ("step 7", "step 8"):
        start, end = steps[step]["ts"], steps[step]["ts"] + steps[step]["dur"]
        names = [event["name"] for event in events if start <= event.get("ts", 0) < end]
        assert names.count("aten::convolution_backward") == 2
        assert names.count("aten::cross_entropy_loss") == 1
    profiled = weights(trained.run.folder)
    for name, tensor in weights(tiny_run).items():
        np.testing.assert_array_equal(tensor, profiled[name])
    macs = trained.run.config().macs
    for row in read_metrics(trained.run):
        if row.images_per_second is not None:
            assert row.flops_utilization == pytest.approx(6 * macs * row.images_per_second / 2e9)
    assert not Run(tiny_run).profile.exists()
    assert not any(row.flops_utilization for row in read_metrics(Run(tiny_run)))


@pytest.mark.every
def test_a_resumed_run_profiles_the_steps_that_are_left(train: Train) -> None:
    words = ("tiny", "--resume", "auto", "--checkpoint-every", 1)
    run = train(*words, "--max-steps", 3).run
    train(*words, "--max-steps", 5, "--profile-steps", "3:5")
    names = json.loads(gzip.decompress((run.profile / "steps-3-5.json.gz").read_bytes()))["traceEvents"]
    assert {event["name"] for event in names if event["name"].startswith("step ")} == {"step 4", "step 5"}
    before = (run.profile / "steps-3-5.json.gz").stat()
    train(*words, "--max-steps", 6, "--profile-steps", "3:5")  # as a requeued job does: they are profiled already
    assert (run.profile / "steps-3-5.json.gz").stat() == before
    too_late = train(*words, "--max-steps", 7, "--profile-steps", "2:3")
    assert f"profile: none, because {run.folder} resumes after these steps, at 6" in too_late.stderr


@pytest.mark.every
@pytest.mark.processes
def test_the_first_of_two_ranks_is_profiled(train: Train) -> None:
    trained = train("tiny", "--max-steps", 4, "--profile-steps", "2:3", "--peak-tflops", 0.001, ranks=2)
    assert trained.stderr.count("profile: ") == 1
    assert len(list(trained.run.profile.iterdir())) == 2
    (row,) = [row for row in read_metrics(trained.run) if row.train_loss is not None]
    peak = 2 * 0.001e12
    assert row.flops_utilization == pytest.approx(6 * trained.run.config().macs * row.images_per_second / peak)


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
    assert (config.device, config.precision) == ("cuda", "bf16")


@pytest.mark.gpu
def test_fp16_of_a_seed_is_the_same_after_another_seed(small_data: Path, tmp_path: Path) -> None:
    """The gradient scaler begins anew, too."""
    for name, seeds in (("alone", [1]), ("after", [0, 1])):
        words = ["--data", small_data, "--runs", tmp_path / name, "--precision", "fp16", "--seeds", *seeds]
        done = runner("train", "tiny-norm", *TINY, *words, "--deterministic")
        assert done.returncode == 0, done.stderr
    alone, after = (weights(tmp_path / name / "tiny-norm" / "seed-1") for name in ("alone", "after"))
    assert all(np.array_equal(tensor, after[name]) for name, tensor in alone.items())


def test_epochs_without_evaluation_change_nothing_else(train: Train) -> None:
    found = {}
    for every in (1, 3):
        options = ("--recipe.epochs", 4, "--recipe.patience", 0, "--evaluate-every", every, "--deterministic")
        run = train("tiny-everything", *options, "--name", every).run
        found[every] = json.loads(run.summary.read_text()), read_metrics(run), weights(run.folder)
        assert run.config().deterministic
    (all_of_them, rows, theirs), (some, fewer, ours) = found.values()
    assert [row.epoch for row in rows if row.test_accuracy is not None] == [1, 2, 3, 4]
    assert [row.epoch for row in fewer if row.test_accuracy is not None] == [3, 4]
    assert [row.train_loss for row in rows if row.train_loss is not None] == [
        row.train_loss for row in fewer if row.train_loss is not None
    ]
    assert all(np.array_equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert all_of_them["test_accuracy"] == some["test_accuracy"]
    assert some["best_epoch"] in (3, 4)
