"""The pieces of a recipe, each by what it must change and what it must leave alone; trained in this process."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from data_prep.console import UserError
from runner import build, checkpoint, objective
from runner.batches.protocol import Place, open_manifest, open_split
from runner.evaluate import Evaluation, views_of
from runner.models import norm
from runner.recipe import SGD, Adam, Architecture, Recipe, Step, first_mistake, to_json
from runner.runs import Run, read_metrics, write_json
from runner.train import Data, Outcome, parts, train
from tests.conftest import TINY, launch, runner
from tests.tiny import Tiny

CPU = torch.device("cpu")
RECIPE = Recipe(2, 60, SGD(0.05))


@dataclasses.dataclass
class Trained:
    outcome: Outcome
    model: nn.Module
    rows: list[dict[str, float]]
    run: Run


@pytest.fixture
def trained(small_data: Path, tmp_path: Path) -> Iterator[Any]:
    """Trains the tests' small network by a recipe with changes."""
    manifest = open_manifest(small_data)

    def run_it(
        arguments: dict[str, float] | None = None,
        teacher: nn.Module | None = None,
        start: Run | None = None,
        max_steps: int | None = None,
        **changes: Any,
    ) -> Trained:
        recipe = dataclasses.replace(RECIPE, **changes)
        splits = {
            name: open_split(small_data, manifest, name, recipe, Place(CPU))
            for name in ("train", "test", "validation")
        }
        run = Run(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        architecture = Architecture("tests.tiny:Tiny", arguments or {})
        write_json(run.record, {"architecture": to_json(architecture), "dataset": {"name": manifest.name}})
        model = build.build(architecture, recipe, 0, splits["train"].first, start)
        rows: list[dict[str, float]] = []
        data = Data(splits["train"], splits["test"], splits["validation"] if recipe.validation else None, 10)
        accelerator = Accelerator(cpu=True)
        outcome = train(model, recipe, data, accelerator, run, 0, max_steps, teacher, rows.append)
        return Trained(outcome, checkpoint.load_model(run), rows, run)

    yield run_it
    Accelerator().free_memory()


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max((a.float() - b.float()).abs().max().item() for a, b in pairs)


def test_accumulation_is_the_whole_batchs_step(trained) -> None:
    """Also where the parts are not of one size: 60 images in 7 parts."""
    whole = trained()
    for count in (2, 7):
        cut = trained(accumulate=count)
        assert distance(whole.model, cut.model) < 1e-5
        assert [row["global_step"] for row in cut.rows] == [row["global_step"] for row in whole.rows]
        assert cut.rows[0]["train/loss"] == pytest.approx(whole.rows[0]["train/loss"], rel=1e-5)
    sizes = [len(part[1]) for part, _ in parts(torch.zeros(60, 1), torch.zeros(60), 7)]
    assert sum(sizes) == 60
    assert [last for _, last in parts(torch.zeros(60, 1), torch.zeros(60), 7)] == [False] * 6 + [True]


def test_ema_is_the_average_over_steps(trained) -> None:
    """After one step, decay × first weights + (1 - decay) × second; it is what is scored and saved."""
    plain, averaged = trained(max_steps=2), trained(ema=0.75, max_steps=2)
    first = trained(max_steps=1)
    expected = {
        name: 0.75 * tensor + 0.25 * plain.model.state_dict()[name]
        for name, tensor in first.model.state_dict().items()
    }
    for name, tensor in averaged.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_ema_has_the_statistics_of_batch_norm(trained) -> None:
    plain, averaged = trained({"norm": True}), trained({"norm": True}, ema=0.5)
    found = averaged.model.layers[1].running_mean
    torch.testing.assert_close(found, plain.model.layers[1].running_mean, atol=1e-4, rtol=1e-3)


def test_the_gradient_is_clipped(trained) -> None:
    """With plain SGD a step is no longer than the rate times the limit."""
    before = build.build(Architecture("tests.tiny:Tiny"), RECIPE, 0, lambda n: torch.zeros(0), None)
    for limit, longest in ((0.01, 0.05 * 0.01), (1e9, 1.0)):
        after = trained(optimizer=SGD(0.05, momentum=0.0), clip_gradient=limit, max_steps=1).model
        change = [a - b for a, b in zip(after.parameters(), before.parameters(), strict=True)]
        length = torch.cat([part.flatten() for part in change]).norm().item()
        assert length <= longest * 1.001
    assert length > 0.05 * 0.01


def test_the_best_epoch_is_chosen_on_validation_images(trained) -> None:
    held = trained(validation=100, epochs=4)
    epochs = [row for row in held.rows if "validation/accuracy" in row]
    assert len(epochs) == 4
    best = max(epochs, key=lambda row: row["validation/accuracy"])
    assert held.outcome.best["epoch"] == best["epoch"]
    assert held.outcome.validation.images == 100
    assert [row["global_step"] for row in epochs] == [6, 12, 18, 24]  # 400 images are left


def test_no_validation_no_validation_figures(trained) -> None:
    outcome = trained().outcome
    assert outcome.validation is None
    assert outcome.augmented is None
    assert "validation/accuracy" not in outcome.best


def test_test_time_augmentation_is_reported_apart(trained) -> None:
    plain, seen = trained(), trained(test_augmentation="flip-shift")
    assert torch.equal(plain.outcome.test.logits, seen.outcome.test.logits)
    assert not torch.equal(seen.outcome.augmented.logits, seen.outcome.test.logits)


def test_views() -> None:
    images = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    assert len(views_of(images, "none")) == 1
    same, mirrored = views_of(images, "flip")
    assert torch.equal(same, images)
    assert torch.equal(mirrored[..., 0], images[..., 3])
    views = views_of(images, "flip-shift")
    assert len(views) == 6
    assert torch.equal(views[2][:, :, 1:, 1:], images[:, :, :-1, :-1])
    assert torch.equal(views[4][:, :, :-1, :-1], images[:, :, 1:, 1:])


def test_mixed_targets_train(trained) -> None:
    from runner.recipe import Augment

    rows = trained(augment=Augment(mixup=0.4, cutmix=1.0), label_smoothing=0.1).rows
    assert all(0 <= row["train/accuracy"] <= 1 for row in rows if "train/accuracy" in row)


def test_a_compiled_model_trains_alike(trained) -> None:
    assert distance(trained(max_steps=3).model, trained(max_steps=3, compile=True).model) < 1e-4


def test_memory_layout_changes_speed_and_no_result(trained) -> None:
    assert distance(trained(max_steps=3).model, trained(max_steps=3, channels_last=False).model) < 1e-4


def test_distillation_is_its_formula() -> None:
    torch.manual_seed(0)
    teacher, images = Tiny(), torch.randn(6, 3, 32, 32)
    logits, labels = torch.randn(6, 10), torch.randint(10, (6,))
    recipe = dataclasses.replace(RECIPE, teacher_weight=0.7, teacher_temperature=3.0)
    wanted, ours = (teacher(images) / 3).softmax(1), (logits / 3).log_softmax(1)
    divergence = (wanted * (wanted.log() - ours)).sum(1).mean() * 9
    expected = 0.7 * divergence + 0.3 * F.cross_entropy(logits, labels)
    torch.testing.assert_close(objective.of(recipe, teacher)(logits, labels, images), expected)
    zero = objective.of(dataclasses.replace(recipe, teacher_weight=1.0), teacher)
    assert zero(teacher(images), labels, images).item() == pytest.approx(0.0, abs=1e-6)


def test_distillation_comes_nearer_to_its_teacher(trained, small_data: Path) -> None:
    teacher = trained({"channels": 16}, epochs=6).model
    alone, taught = trained(), trained(teacher=teacher, teacher_weight=1.0)
    images = next(iter(open_split(small_data, open_manifest(small_data), "test", RECIPE, Place(CPU)).epoch(0)))[0]
    with torch.no_grad():
        wanted, ours, theirs = (model(images).softmax(1) for model in (teacher, taught.model, alone.model))
    assert F.mse_loss(ours, wanted) < F.mse_loss(theirs, wanted)


def test_pruned_weights_are_zero_and_stay_zero(trained) -> None:
    first = trained()
    pruned = trained(start=first.run, prune=0.6)
    weights = torch.cat([m.weight.flatten() for m, _ in build.prunable(pruned.model)])
    assert (weights == 0).float().mean() == pytest.approx(0.6, abs=0.001)
    before = torch.cat([m.weight.flatten() for m, _ in build.prunable(first.model)])
    kept = before.abs() > before.abs().quantile(0.61)
    assert (weights[kept] != 0).float().mean() > 0.99  # the small ones went
    assert distance(pruned.model, first.model) > 0.001  # and the others were trained on
    assert pruned.model.state_dict().keys() == first.model.state_dict().keys()


def test_a_start_from_another_architecture_is_refused(trained) -> None:
    other = trained({"channels": 4})
    with pytest.raises(UserError, match=r"expected the weights of this architecture"):
        trained(start=other.run)


def test_figures_are_torchmetrics() -> None:
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
        multiclass_confusion_matrix,
    )

    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(500, 10), torch.randint(10, (500,))
    found = Evaluation(logits, labels)
    assert found.accuracy == pytest.approx(multiclass_accuracy(logits, labels, 10, average="micro").item())
    assert found.top5 == pytest.approx(multiclass_accuracy(logits, labels, 10, average="micro", top_k=5).item())
    assert found.class_accuracy == pytest.approx(multiclass_accuracy(logits, labels, 10, average="none").tolist())
    assert found.confusion == multiclass_confusion_matrix(logits, labels, 10).tolist()
    theirs = multiclass_calibration_error(logits.softmax(1), labels, 10, n_bins=15).item()
    assert found.calibration_error == pytest.approx(theirs, abs=1e-6)
    assert Evaluation(logits[:3], torch.tensor([0, 0, 1])).class_accuracy[2:] == [None] * 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--recipe.epochs 0: expected a number in [1, inf)"),
        ({"optimizer": SGD(0.0)}, "--recipe.optimizer.lr 0.0: expected a number in (0, inf)"),
        ({"optimizer": SGD(0.1, momentum=1.5)}, "expected a number in [0, 1)"),
        ({"optimizer": Adam(0.1, betas=(0.9, 1.0))}, "--recipe.optimizer.betas (0.9, 1.0): expected"),
        ({"optimizer": SGD(0.1, momentum=0.0, nesterov=True)}, "expected --recipe.optimizer.momentum above 0"),
        ({"schedule": Step(milestones=(0.5, 1.5))}, "--recipe.schedule.milestones (0.5, 1.5)"),
        ({"ema": 0.9, "prune": 0.5}, "expected one of them"),
        ({"ema": -0.1}, "--recipe.ema -0.1"),
        ({"label_smoothing": float("nan")}, "--recipe.label-smoothing nan"),
        ({"accumulate": 0}, "--recipe.accumulate 0: expected a number in [1, inf)"),
        ({"prune": 1.0}, "[0, 1)"),
    ],
)
def test_numbers_out_of_range_get_one_line(changes: dict[str, Any], message: str) -> None:
    assert message in first_mistake(dataclasses.replace(RECIPE, **changes))
    assert first_mistake(RECIPE) is None


def test_sync_batch_norm_is_batch_norm_on_one_rank(tmp_path: Path) -> None:
    model, plain = Tiny(norm=True), Tiny(norm=True)
    assert norm.synchronised(model) is model
    assert type(model.layers[1]) is nn.BatchNorm2d  # without ranks nothing is replaced
    plain.load_state_dict(model.state_dict())
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert type(norm.synchronised(model).layers[1]) is norm.SyncBatchNorm2d
        images = torch.randn(8, 3, 32, 32)
        for one in (model, plain):
            one(images).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)
    torch.testing.assert_close(model.layers[1].running_mean, plain.layers[1].running_mean)
    torch.testing.assert_close(model.layers[1].running_var, plain.layers[1].running_var)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images))


def test_several_seeds_are_several_runs(small_data: Path, tmp_path: Path) -> None:
    done = runner("train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu", "--json",
                  "--seeds", 0, 5, "--max-steps", 10)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    accuracies = [summary["test_accuracy"] for summary in result["runs"]]
    assert result["test_accuracy_mean"] == pytest.approx(sum(accuracies) / 2)
    alone = runner("train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path / "alone", "--device", "cpu",
                   "--json", "--seed", 5, "--max-steps", 10)  # fmt: skip
    summary = json.loads(alone.stdout)
    assert summary["test_loss"] == result["runs"][1]["test_loss"]  # to the bit the run that it is by itself
    for seed in (0, 5):
        assert Run(tmp_path / "tiny" / f"seed-{seed}").config()["seed"] == seed
    again = runner("train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu",
                   "--seeds", 4, 5)  # fmt: skip
    assert again.returncode == 2
    assert not (tmp_path / "tiny" / "seed-4").exists()  # nothing is begun that cannot be done


def test_a_run_names_its_teacher_and_its_start(tiny_run: Path, small_data: Path, tmp_path: Path) -> None:
    done = runner("train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path, "--device", "cpu",
                  "--teacher", tiny_run, "--start-from", tiny_run, "--recipe.prune", 0.5,
                  "--max-steps", 2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = Run(tmp_path / "tiny" / "seed-0").config()
    for key in ("teacher", "started_from"):
        assert config[key]["experiment"] == "tiny"
        assert config[key]["checkpoint"] == "step-16"
        assert len(config[key]["sha256"]) == 64
    missing = runner("train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path / "x", "--device", "cpu",
                     "--teacher", tmp_path / "nowhere")  # fmt: skip
    assert missing.returncode == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.processes
def test_ranks_accumulate_average_and_clip_like_one(small_data: Path, tmp_path: Path) -> None:
    """Two ranks with everything that touches gradients and weights: the losses of one rank to rounding."""
    rows = []
    for processes in (1, 2):
        done = launch(processes, "train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path,
                      "--name", processes, "--recipe.accumulate", 3, "--recipe.ema", 0.8,
                      "--recipe.clip-gradient", 0.5, "--recipe.augment.mixup", 0.3,
                      "--recipe.validation", 60)  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows.append(read_metrics(Run(tmp_path / "tiny" / str(processes))))
    for one, two in zip(*rows, strict=True):
        for key in one.keys() - {"images_per_second"}:
            assert two[key] == pytest.approx(one[key], rel=2e-4), key
