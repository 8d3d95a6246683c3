"""The pieces of a recipe, each by what it must change and what it must leave alone; trained in this process."""

import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from runner.common.errors import UserError
from runner.common.files import write_json
from runner.config.recipe import SGD, Adam, AdamW, Architecture, Augment, Linear, Muon, Recipe, Step
from runner.config.train_config import TrainConfig
from runner.data import Batches
from runner.data.open import RankInfo, open_manifest, open_split
from runner.data.resident import ResidentBatches
from runner.models import norm
from runner.run.folder import Run
from runner.run.metrics import encode_row, read_metrics
from runner.run.schema import MetricRow
from runner.system import cpu
from runner.training import checkpoint
from runner.training.evaluate import Evaluation, augmented_views
from runner.training.loop import LoopOptions, TrainingData, TrainResult, micro_batches, train
from runner.training.loss import make_loss
from runner.training.meter import gradient_norm
from runner.training.model import build_model, prunable
from runner.training.state import TrainState
from tests.support.compare import MEASURED
from tests.support.configs import config_of, trusted
from tests.support.models.tiny import Tiny
from tests.support.processes import python

RECIPE = Recipe(2, 60, SGD(0.05))


def opened(data: Path, split: str, recipe: Recipe) -> Batches:
    return open_split(data, open_manifest(data), split, recipe, RankInfo(torch.device("cpu")))


@dataclasses.dataclass
class Trained:
    outcome: TrainResult
    bare: nn.Module  # that was trained
    model: nn.Module  # that was kept
    rows: list[MetricRow]
    run: Run


@pytest.fixture
def trained(small_data: Path, tmp_path: Path) -> Iterator[Any]:
    """Trains the tests' small network by a recipe with changes."""
    name = open_manifest(small_data).name

    def run_it(
        arguments: dict[str, float] | None = None,
        teacher: nn.Module | None = None,
        start: Run | None = None,
        max_steps: int | None = None,
        options: LoopOptions | None = None,
        **changes: Any,
    ) -> Trained:
        recipe = dataclasses.replace(RECIPE, **changes)
        splits = {split: opened(small_data, split, recipe) for split in ("train", "test", "validation")}
        run = trusted(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        architecture = Architecture("tests.support.models.tiny:Tiny", arguments or {})
        write_json(run.run_json, config_of(architecture=architecture, dataset=name))
        model = build_model(architecture, recipe, 0, splits["train"].first_images, start)
        rows: list[MetricRow] = []
        data = TrainingData(splits["train"], splits["test"], splits["validation"] if recipe.validation else None, 10)
        accelerator = Accelerator(cpu=True)
        outcome = train(
            model, recipe, data, accelerator, run, 0, max_steps, teacher, rows.append, options or LoopOptions()
        )
        return Trained(outcome, model, checkpoint.load_model(run), rows, run)

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
        assert [row.global_step for row in cut.rows] == [row.global_step for row in whole.rows]
        assert cut.rows[0].train_loss == pytest.approx(whole.rows[0].train_loss, rel=1e-5)
    sizes = [len(images) for images, _, _ in micro_batches(torch.zeros(60, 1), torch.zeros(60), 7)]
    assert sum(sizes) == 60
    assert [last for _, _, last in micro_batches(torch.zeros(60, 1), torch.zeros(60), 7)] == [False] * 6 + [True]


def test_ema_is_the_average_over_steps(trained) -> None:
    """After one step, decay × first weights + (1 - decay) × second; it is what is scored and saved."""
    plain, averaged = trained(max_steps=2), trained(ema=0.75, max_steps=2)
    first = trained(max_steps=1)
    expected = {
        name: 0.75 * tensor + 0.25 * plain.model.state_dict()[name] for name, tensor in first.model.state_dict().items()
    }
    for name, tensor in averaged.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_ema_has_the_statistics_of_batch_norm(trained) -> None:
    plain, averaged = trained({"norm": True}), trained({"norm": True}, ema=0.5)
    found = averaged.model.layers[1].running_mean
    torch.testing.assert_close(found, plain.model.layers[1].running_mean, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"schedule": Step((1 / 6,), 0.0)}, id="no change after an epoch"),
        pytest.param({"optimizer": SGD(0.3), "ema": 0.5}, id="up and down"),
    ],
)
def test_early_stopping_keeps_the_best_epoch(changes: dict[str, Any], trained) -> None:
    kept = trained(epochs=6, validation=80, patience=2, test_augmentation="flip", **changes)
    rows = [row for row in kept.rows if row.validation_accuracy is not None]
    best = max(rows, key=lambda row: row.validation_accuracy)  # the first of equals
    last = min(best.epoch + 2, 6)
    assert [row.epoch for row in rows] == list(range(1, int(last) + 1))
    outcome = kept.outcome
    assert outcome.stopped_early == (last < 6)
    assert outcome.best == best
    assert (outcome.validation.accuracy, outcome.test.accuracy) == (best.validation_accuracy, best.test_accuracy)
    until_best = trained(epochs=6, validation=80, max_steps=best.global_step, **changes)
    assert distance(until_best.model, kept.model) == 0
    assert outcome.augmented.accuracy == pytest.approx(
        trained(epochs=6, validation=80, test_augmentation="flip", max_steps=best.global_step, **changes)
        .outcome.augmented.accuracy
    )  # fmt: skip
    if "schedule" in changes:
        assert outcome.stopped_early
        assert outcome.epochs == 3


def test_early_stopping_never_ends_without_an_evaluation(trained) -> None:
    """Also not where the best epoch is one that only the end of a shorter training evaluated."""
    recipe = {"epochs": 9, "validation": 80, "patience": 2, "schedule": Step((1 / 9,), 0.0)}
    shorter = trained(**recipe, max_steps=7, options=LoopOptions(evaluate_every=2))
    state = checkpoint.read_state(checkpoint.latest(shorter.run))
    kept = trained(**recipe, options=LoopOptions(evaluate_every=2, resume=state))
    assert kept.outcome.stopped_early
    ended = [row for row in kept.rows if row.train_epoch_loss is not None][-1]
    assert (ended.epoch, ended.validation_accuracy is None) == (kept.outcome.epochs, False)
    assert kept.outcome.best.epoch == 1


def test_a_run_that_gets_early_stopping_at_a_resume_has_no_best_epoch_yet(trained) -> None:
    """Because its checkpoint lacks the weights of that epoch."""
    plain = trained(epochs=6, validation=80, schedule=Step((1 / 6,), 0.0), max_steps=14)
    state = checkpoint.read_state(checkpoint.latest(plain.run))
    for saved in (True, False):
        recipe = dataclasses.replace(RECIPE, epochs=6, validation=80, patience=2)
        resumed = TrainState(Tiny(), recipe, Accelerator(cpu=True))
        best = resumed.best_model.state_dict() if saved else None
        resumed.load_state_dict(state | {"best_model": best})
        assert (resumed.best is not None) == saved
        assert resumed.saved_model is (resumed.best_model if saved else resumed.model)


def test_the_gradient_is_clipped(trained) -> None:
    """With plain SGD a step is no longer than the rate times the limit."""
    before = build_model(Architecture("tests.support.models.tiny:Tiny"), RECIPE, 0, lambda n: torch.zeros(0), None)
    for limit, longest in ((0.01, 0.05 * 0.01), (1e9, 1.0)):
        after = trained(optimizer=SGD(0.05, momentum=0.0), clip_gradient=limit, max_steps=1).model
        change = [a - b for a, b in zip(after.parameters(), before.parameters(), strict=True)]
        length = torch.cat([part.flatten() for part in change]).norm().item()
        assert length <= longest * 1.001
    assert length > 0.05 * 0.01


def test_a_row_has_the_norm_of_the_last_steps_gradient(trained) -> None:
    """Of plain SGD, the norm of the step divided by the rate; with a limit, the norm before it is clipped."""
    for norms in ({"norm": False}, {"norm": True}):
        one, two = (trained(norms, optimizer=SGD(0.05, momentum=0.0), max_steps=steps) for steps in (1, 2))
        pairs = zip(two.model.parameters(), one.model.parameters(), strict=True)
        expected = torch.cat([(b - a).flatten() for a, b in pairs]).norm().item() / 0.05
        assert two.rows[0].train_grad_norm == pytest.approx(expected, rel=1e-3)
    limited = trained(optimizer=SGD(0.05, momentum=0.0), max_steps=1, clip_gradient=0.01)
    unlimited = trained(optimizer=SGD(0.05, momentum=0.0), max_steps=1)
    assert limited.rows[0].train_grad_norm == unlimited.rows[0].train_grad_norm > 0.01


def test_the_norm_is_computed_once_a_row(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at all where clipping computes it."""
    calls, compute = [], nn.utils.get_total_norm
    monkeypatch.setattr(nn.utils, "get_total_norm", lambda *tensors: calls.append(1) or compute(*tensors))
    rows = [row for row in trained(epochs=6).rows if row.train_loss is not None]
    assert [row.global_step for row in rows] == [8, 16, 20, 24, 32, 40, 48]
    assert len(calls) == len(rows)
    assert all(row.train_grad_norm > 0 for row in rows)
    trained(clip_gradient=1.0)
    assert len(calls) == len(rows)


def test_the_norm_of_scaled_gradients_is_that_of_the_gradients() -> None:
    model = nn.Linear(3, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model(torch.ones(1, 3)).sum().backward()
    expected = gradient_norm(model, None)
    model.zero_grad()
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    assert gradient_norm(model, scaler).item() == pytest.approx(expected.item())


def test_every_group_of_another_learning_rate_is_logged(trained) -> None:
    rows = trained(optimizer=Muon(0.1, other_lr=0.02), schedule=Linear()).rows
    assert [(row.lr, row.lr_1) for row in rows if row.train_loss is not None] == [
        (pytest.approx(rate * left), pytest.approx(other * left))
        for rate, other, left in ((0.1, 0.02, 9 / 16), (0.1, 0.02, 1 / 16))
    ]
    assert b'"lr/1":' in encode_row(rows[0])
    assert all(row.lr_1 is None for row in trained(optimizer=AdamW(0.1)).rows)


@pytest.mark.parametrize("slow", ["data", "compute"])
def test_the_time_of_a_step_is_that_of_its_batch_and_the_rest(slow: str, trained, monkeypatch) -> None:
    read, forward = ResidentBatches.read, Tiny.forward

    def slow_read(self: ResidentBatches, samples: np.ndarray, sizes: list[int]) -> Any:
        for batch in read(self, samples, sizes):
            time.sleep(0.05)
            yield batch

    def slow_forward(self: Tiny, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return forward(self, images)

    if slow == "data":
        monkeypatch.setattr(ResidentBatches, "read", slow_read)
    else:
        monkeypatch.setattr(Tiny, "forward", slow_forward)
    rows = [row for row in trained().rows if row.train_loss is not None]
    assert len(rows) == 2
    for row in rows:
        assert getattr(row, f"{slow}_seconds") >= 0.05
        assert min(row.data_seconds, row.compute_seconds) > 0
        assert row.data_seconds + row.compute_seconds == pytest.approx(60 / row.images_per_second)


def test_the_peak_of_memory_stays() -> None:
    before = cpu.peak_memory()
    large = np.ones(2**25)  # 256 MiB
    peak = cpu.peak_memory()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert peak >= max(before, resident) >= large.nbytes
    del large
    assert cpu.peak_memory() >= peak - 2**20  # the kernel counts pages in batches


def test_the_best_epoch_is_chosen_on_validation_images(trained) -> None:
    held = trained(validation=100, epochs=4)
    epochs = [row for row in held.rows if row.validation_accuracy is not None]
    assert len(epochs) == 4
    best = max(epochs, key=lambda row: row.validation_accuracy)
    assert held.outcome.best.epoch == best.epoch
    assert held.outcome.validation.num_images == 100
    assert [row.global_step for row in epochs] == [6, 12, 18, 24]  # 400 images are left


@pytest.mark.parametrize(("seconds", "saved"), [(0.0, {8, 16, 24, 32}), (3600.0, {8, 32})])
def test_checkpoints_of_short_epochs_have_a_pause(trained, tmp_path: Path, seconds: float, saved: set[int]) -> None:
    """The first evaluation and the last step are always followed by one."""
    found: set[str] = set()

    def look() -> None:
        found.update(folder.name for folder in tmp_path.glob("run-*/checkpoints/step-*"))

    trained(epochs=4, options=LoopOptions(checkpoint_seconds=seconds, heartbeat=look))
    look()
    assert found == {f"step-{step}" for step in saved}


DENORMALS = """
import torch
from runner.deploy.session import OnnxSession
from runner.system import cpu
from tests.support.graphs import graph_of
from tests.support.models.tiny import Tiny
def count():
    return int((torch.full((1 << 20,), 1e-39) * 1.5).count_nonzero())
cpu.prepare()
before = count()
OnnxSession(graph_of(Tiny()).SerializeToString())
print(before, count())
"""


def test_denormal_numbers_count_as_zero() -> None:
    """A CPU computes with them many times slower; onnxruntime must not turn this off for the whole process."""
    done = python("-c", DENORMALS)
    assert done.stdout.split() == ["0", "0"], done.stderr


def test_each_epoch_has_an_order_of_its_own(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the samples that training reads, each once."""
    orders, read = [], ResidentBatches.read

    def recorded(self: ResidentBatches, samples: np.ndarray, sizes: list[int]) -> Any:
        if self.options.training and len(sizes) > 1:  # not the first images, to which a model may adapt
            orders.append(samples.tolist())
        return read(self, samples, sizes)

    monkeypatch.setattr(ResidentBatches, "read", recorded)
    trained(epochs=3)
    assert [len(set(order)) for order in orders] == [480] * 3
    assert len({tuple(order) for order in orders}) == 3


def test_no_validation_no_validation_figures(trained) -> None:
    outcome = trained().outcome
    assert outcome.validation is None
    assert outcome.augmented is None
    assert outcome.best.validation_accuracy is None


def test_test_time_augmentation_is_reported_apart(trained) -> None:
    plain, seen = trained(), trained(test_augmentation="flip-shift")
    assert torch.equal(plain.outcome.test.logits, seen.outcome.test.logits)
    assert not torch.equal(seen.outcome.augmented.logits, seen.outcome.test.logits)


def test_views() -> None:
    images = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    ((weight, alone),) = augmented_views(images, "none")
    assert weight == 1
    assert alone is images
    (half, same), (_, mirrored) = augmented_views(images, "flip")
    assert half == 0.5
    assert torch.equal(same, images)
    assert torch.equal(mirrored[..., 0], images[..., 3])
    weights, views = zip(*augmented_views(images, "flip-shift"), strict=True)
    assert weights == (0.25, 0.25, *[0.125] * 4)
    assert torch.equal(views[2][:, :, 1:, 1:], images[:, :, :-1, :-1])
    assert torch.equal(views[4][:, :, :-1, :-1], images[:, :, 1:, 1:])


def test_mixed_targets_train(trained, small_data: Path) -> None:
    """The loss of a step is the one to the mixed targets; its hits are of the class that has more of an image."""
    changes = {"augment": Augment(mixup=1.0), "label_smoothing": 0.1}
    first = trained(optimizer=Adam(0.01), epochs=6)  # sure of itself, so that other targets are another loss
    recipe = dataclasses.replace(RECIPE, **changes)
    images, targets = next(iter(opened(small_data, "train", recipe).epoch(0)))
    logits = first.model(images)
    mixed, hard = (F.cross_entropy(logits, t, label_smoothing=0.1).item() for t in (targets, targets.argmax(1)))
    row = trained(start=first.run, max_steps=1, **changes).rows[0]
    assert mixed != pytest.approx(hard, rel=1e-2)
    assert row.train_loss == pytest.approx(mixed, rel=1e-4)
    hits = logits.argmax(1) == targets.argmax(1)
    assert row.train_accuracy == pytest.approx(hits.float().mean().item())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.every)])
def test_a_compiled_model_trains_alike(trained, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's front end alone; `every` also with code that it makes, which takes half a minute."""
    made, compiler = [], torch.compile

    def recorded(model: nn.Module, mode: str) -> Any:
        assert mode == "default"
        made.append(model)
        return compiler(model, backend=backend)

    monkeypatch.setattr(torch, "compile", recorded)
    plain = trained(max_steps=3)
    assert made == []
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = trained(max_steps=3, compile="default")
    assert made == [compiled.bare]
    assert graphs["unique_graphs"] > 0  # it was not only made, but called
    assert distance(plain.model, compiled.model) < 1e-4


def test_memory_layout_changes_speed_and_no_result(trained) -> None:
    last, first = trained(max_steps=3), trained(max_steps=3, channels_last=False)
    for one, expected in ((last, True), (first, False)):
        convolutions = [module.weight for module in one.bare.modules() if isinstance(module, nn.Conv2d)]
        assert [w.is_contiguous(memory_format=torch.channels_last) for w in convolutions] == [expected] * 2
    assert distance(last.model, first.model) < 1e-4


def test_distillation_is_its_formula() -> None:
    torch.manual_seed(0)
    teacher, images = Tiny(), torch.randn(6, 3, 32, 32)
    logits, labels = torch.randn(6, 10), torch.randint(10, (6,))
    recipe = dataclasses.replace(RECIPE, teacher_weight=0.7, teacher_temperature=3.0)
    wanted, ours = (teacher(images) / 3).softmax(1), (logits / 3).log_softmax(1)
    divergence = (wanted * (wanted.log() - ours)).sum(1).mean() * 9
    expected = 0.7 * divergence + 0.3 * F.cross_entropy(logits, labels)
    torch.testing.assert_close(make_loss(recipe, teacher)(logits, labels, images), expected)
    zero = make_loss(dataclasses.replace(recipe, teacher_weight=1.0), teacher)
    assert zero(teacher(images), labels, images).item() == pytest.approx(0.0, abs=1e-6)


def test_distillation_comes_nearer_to_its_teacher(trained, small_data: Path) -> None:
    teacher = trained({"channels": 16}, epochs=6).model
    alone, taught = trained(), trained(teacher=teacher, teacher_weight=1.0)
    images = next(iter(opened(small_data, "test", RECIPE).epoch(0)))[0]
    with torch.no_grad():
        wanted, ours, theirs = (model(images).softmax(1) for model in (teacher, taught.model, alone.model))
    assert F.mse_loss(ours, wanted) < F.mse_loss(theirs, wanted)


def test_pruned_weights_are_zero_and_stay_zero(trained) -> None:
    first = trained()
    pruned = trained(start=first.run, prune=0.6)
    weights = torch.cat([m.weight.flatten() for m, _ in prunable(pruned.model)])
    assert (weights == 0).float().mean() == pytest.approx(0.6, abs=0.001)
    before = torch.cat([m.weight.flatten() for m, _ in prunable(first.model)])
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
    logits, labels = torch.randn(500, 10), torch.randint(10, (500,))
    logits[:100] *= 9  # too confident by far
    logits[100:200] = 1.5 * F.one_hot(labels[100:200], 10)  # not confident enough
    found = Evaluation(logits, labels)
    assert found.accuracy == pytest.approx(multiclass_accuracy(logits, labels, 10, average="micro").item())
    assert found.top5 == pytest.approx(multiclass_accuracy(logits, labels, 10, average="micro", top_k=5).item())
    assert found.class_accuracy == pytest.approx(multiclass_accuracy(logits, labels, 10, average="none").tolist())
    assert found.confusion == multiclass_confusion_matrix(logits, labels, 10).tolist()
    theirs = multiclass_calibration_error(logits.softmax(1), labels, 10, n_bins=15).item()
    assert found.calibration_error == pytest.approx(theirs, abs=1e-6)
    assert Evaluation(logits[:3], torch.tensor([0, 0, 1])).class_accuracy[2:] == [None] * 8
    for label, hit in ((5, 1.0), (4, 0.0)):
        assert Evaluation(torch.arange(10.0)[None], torch.tensor([label])).top5 == hit
    many = torch.zeros(4, 20)
    many[2:, 7] = 1.0
    found = Evaluation(many, torch.tensor([1, 0, 0, 0]))  # in two bins, of which one is too confident, one too little
    assert found.calibration_error == pytest.approx((abs(2 * 0.05 - 1) + 2 * np.e / (np.e + 19)) / 4)
    assert found.num_predicted_classes == 2
    assert np.isnan(Evaluation(torch.full((2, 3), torch.nan), torch.tensor([0, 1])).calibration_error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--recipe.epochs 0: expected an integer >= 1"),
        ({"optimizer": SGD(0.0)}, "--recipe.optimizer.lr 0.0: expected a number > 0.0"),
        ({"optimizer": SGD(0.1, momentum=1.5)}, "--recipe.optimizer.momentum 1.5: expected a number < 1.0"),
        ({"optimizer": Adam(0.1, betas=(0.9, 1.0))}, "--recipe.optimizer.betas 1.0: expected a number < 1.0"),
        ({"optimizer": SGD(0.1, momentum=0.0, nesterov=True)}, "expected --recipe.optimizer.momentum above 0"),
        ({"schedule": Step(milestones=(0.5, 1.5))}, "--recipe.schedule.milestones 1.5"),
        ({"ema": 0.9, "prune": 0.5}, "expected one of them"),
        ({"ema": -0.1}, "--recipe.ema -0.1"),
        ({"label_smoothing": float("nan")}, "--recipe.label-smoothing nan: expected a finite number"),
        ({"accumulate": 0}, "--recipe.accumulate 0: expected an integer >= 1"),
        ({"prune": 1.0}, "--recipe.prune 1.0: expected a number < 1.0"),
    ],
)
def test_numbers_out_of_range_get_one_line(changes: dict[str, Any], message: str) -> None:
    architecture = Architecture("tests.support.models.tiny:Tiny")
    config = TrainConfig("podeti-alexnet", Path("data"), architecture, dataclasses.replace(RECIPE, **changes))
    with pytest.raises(UserError, match=re.escape(message)):
        config.check()
    dataclasses.replace(config, recipe=RECIPE).check()


def test_sync_batch_norm_is_batch_norm_on_one_rank(tmp_path: Path) -> None:
    model, plain = Tiny(norm=True), Tiny(norm=True)
    assert norm.convert_sync_batch_norm(model) is model
    assert type(model.layers[1]) is nn.BatchNorm2d  # without ranks nothing is replaced
    plain.load_state_dict(model.state_dict())
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert type(norm.convert_sync_batch_norm(model).layers[1]) is norm.SyncBatchNorm2d
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


def test_several_seeds_are_several_runs(train, tmp_path: Path) -> None:
    result = json.loads(train("tiny", "--json", "--seeds", 0, 5, "--max-steps", 10).stdout)
    accuracies = [summary["test_accuracy"] for summary in result["runs"]]
    assert result["test_accuracy_mean"] == pytest.approx(sum(accuracies) / 2)
    alone = train("tiny", "--json", "--seed", 5, "--max-steps", 10, runs=tmp_path / "alone")
    summary = json.loads(alone.stdout)
    assert summary["test_loss"] == result["runs"][1]["test_loss"]  # to the bit the run that it is by itself
    for seed in (0, 5):
        assert Run(tmp_path / "tiny" / f"seed-{seed}").config().seed == seed
    train("tiny", "--seeds", 4, 5, expect=2)
    assert not (tmp_path / "tiny" / "seed-4").exists()  # nothing is begun that cannot be done


def test_a_run_names_its_teacher_and_its_start(train, tiny_run: Path, tmp_path: Path) -> None:
    words = ["--teacher", tiny_run, "--start-from", tiny_run, "--recipe.prune", 0.5, "--max-steps", 2]
    config = train("tiny", *words).run.config()
    for origin in (config.teacher, config.started_from):
        assert (origin.experiment, origin.checkpoint, len(origin.sha256)) == ("tiny", "step-16", 64)
    half = shutil.copytree(tiny_run, tmp_path / "half", ignore=shutil.ignore_patterns("summary.json", "lock"))
    for option in ("--teacher", "--start-from"):
        for folder, found in ((tmp_path / "nowhere", "none"), (half, "one that is crashed")):
            refused = train("tiny", option, folder, runs=tmp_path / "x", expect=2)
            assert f"expected the folder of a finished run, found {found}" in refused.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.processes
def test_ranks_accumulate_average_and_clip_like_one(train) -> None:
    """Two ranks with everything that touches gradients and weights: the losses of one rank to rounding."""
    words = ["--recipe.accumulate", 3, "--recipe.ema", 0.8, "--recipe.clip-gradient", 0.5]
    words += ["--recipe.augment.mixup", 0.3, "--recipe.validation", 60]
    runs = [train("tiny", "--name", f"on-{ranks}", *words, ranks=ranks).run for ranks in (1, 2)]
    for one, two in zip(*map(read_metrics, runs), strict=True):
        of_one, of_two = (msgspec.to_builtins(row) for row in (one, two))
        assert of_two.keys() == of_one.keys()
        for key in of_one.keys() - {*MEASURED}:
            assert of_two[key] == pytest.approx(of_one[key], rel=2e-4), key
