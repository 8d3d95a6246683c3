"""The training state alone: what `state_dict` saves is what `load_state_dict` restores, in this process."""

import contextlib
import io
import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import prune

from runner.common.errors import UserError
from runner.config.recipe import SGD, Optimizer, Recipe
from runner.run.schema import MetricRow
from runner.training.state import (
    TrainState,
    rebuild_ddp_buckets,
    rng_state,
    set_rng_state,
    to_cpu,
    trained_buffers,
)
from tests.support.models.tiny import Tiny

RECIPE = Recipe(1, 12, SGD(0.1, 0.9), ema=0.5)
CPU = torch.device("cpu")


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    accelerator = Accelerator(cpu=True)
    yield accelerator
    accelerator.free_memory()


def trained(accelerator: Accelerator, steps: int, recipe: Recipe = RECIPE, **arguments: Any) -> TrainState:
    """A state after some steps on random images, with the rates as `set_lr` leaves them."""
    torch.manual_seed(steps)
    state = TrainState(Tiny(norm=True, dropout=0.5, **arguments), recipe, accelerator)
    for _ in range(steps):
        logits = state.ddp(torch.randn(12, 3, 32, 32))
        state.meter.add(logits.square().mean(), logits, torch.arange(12) % 10)
        logits.square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        if state.ema:
            state.ema.update(state.step)
    for group in state.optimizer.param_groups:
        group |= {"peak_lr": group["lr"], "lr": 0.01 * steps}
    return state


def stored(state: TrainState) -> dict[str, Any]:
    """The state dict, as a checkpoint stores it."""
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def draws() -> list[float]:
    """The next numbers of every generator."""
    return [random.random(), float(np.random.normal()), float(torch.rand(()))]


def test_a_restored_state_is_the_saved_one(accelerator: Accelerator) -> None:
    saved = trained(accelerator, 3)
    saved.best = MetricRow(global_step=2, epoch=1.0, test_loss=0.5)
    np.random.seed(5)
    np.random.normal()  # NumPy draws pairs and keeps the second
    content = stored(saved)
    expected = draws()
    restored = trained(accelerator, 1)
    restored.load_state_dict(content)
    assert draws() == expected
    assert (restored.step, restored.best) == (3, saved.best)
    assert restored.eval_model is not restored.model
    for one, other in ((saved.model, restored.model), (saved.eval_model, restored.eval_model)):
        for (name, before), after in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(before, after), name
    assert torch.equal(restored.meter.sums, saved.meter.sums)
    assert (restored.meter.images, restored.meter.epoch_sums) == (36, saved.meter.epoch_sums)
    again = stored(restored)
    assert again["world_size"] == len(again["ranks"]) == 1
    for parameter, momentum in content["optimizer"]["state"].items():
        assert torch.equal(momentum["momentum_buffer"], again["optimizer"]["state"][parameter]["momentum_buffer"])
    saved.best = None
    restored.load_state_dict(stored(saved))
    assert restored.best is None


@pytest.mark.parametrize("kind", get_args(Optimizer))
def test_every_optimizer_continues_as_if_it_had_not_been_interrupted(accelerator: Accelerator, kind: type) -> None:
    recipe = replace(RECIPE, optimizer=kind(0.1))

    def step(state: TrainState) -> None:
        state.ddp(torch.ones(12, 3, 32, 32)).square().mean().backward()
        state.optimizer.step()

    saved = trained(accelerator, 3, recipe)
    content = stored(saved)
    step(saved)
    restored = trained(accelerator, 1, recipe)
    restored.load_state_dict(content)
    step(restored)
    for before, after in zip(saved.model.parameters(), restored.model.parameters(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_early_stopping_keeps_the_weights_of_the_first_best_evaluation(accelerator: Accelerator, ema: float) -> None:
    """Those that are evaluated, and also after a restart; without early stopping, the latest ones are saved."""
    recipe = replace(RECIPE, ema=ema, patience=2)
    state, plain = trained(accelerator, 1, recipe), trained(accelerator, 1, replace(recipe, patience=0))
    assert state.saved_model is state.eval_model
    assert not any(parameter.requires_grad for parameter in state.best_model.parameters())
    assert all(parameter.requires_grad for parameter in state.model.parameters())
    for step, accuracy, best in ((1, 0.5, 1), (2, 0.4, 1), (3, 0.5, 1), (4, 0.6, 4), (5, 0.1, 4)):
        row = MetricRow(global_step=step, epoch=1.0, validation_accuracy=accuracy, test_accuracy=1 - accuracy)
        with torch.no_grad():
            state.eval_model.layers[8].bias.fill_(step)
        for each in (state, plain):
            each.add_evaluation(row)
            assert each.best.global_step == best
        assert state.saved_model.layers[8].bias.tolist() == [best] * 10
        assert plain.saved_model is plain.eval_model
    content, restored = stored(state), trained(accelerator, 2, recipe)
    restored.load_state_dict(content)
    assert restored.best == state.best
    assert restored.saved_model.layers[8].bias.tolist() == [4] * 10
    assert restored.eval_model.layers[8].bias.tolist() == [5] * 10
    for lost in (content | {"best_model": None}, stored(plain)):
        restored.load_state_dict(lost)
        assert restored.best is None
        assert restored.saved_model is restored.eval_model
    plain.load_state_dict(content)  # early stopping may be switched off
    assert plain.best == state.best
    assert plain.saved_model is plain.eval_model


def test_without_validation_images_the_accuracy_on_test_images_selects(accelerator: Accelerator) -> None:
    state = trained(accelerator, 1)
    for step, accuracy in ((1, 0.5), (2, 0.7), (3, 0.6)):
        state.add_evaluation(MetricRow(global_step=step, epoch=1.0, test_accuracy=accuracy))
    assert state.best.global_step == 2


def test_a_restored_state_keeps_the_settings_of_this_run(accelerator: Accelerator) -> None:
    """The rate of the next step is the saved one until the schedule sets it from the peak of this run."""
    content = stored(trained(accelerator, 2))
    restored = TrainState(Tiny(norm=True), replace(RECIPE, optimizer=SGD(0.3, 0.8)), accelerator)
    restored.load_state_dict(content)
    (group,) = restored.optimizer.param_groups
    assert {name: group[name] for name in ("lr", "peak_lr", "momentum")} == {
        "lr": 0.02,
        "peak_lr": 0.3,
        "momentum": 0.8,
    }
    assert len(group["params"]) == len(list(restored.model.parameters()))


def test_an_optimizer_of_other_groups_is_refused_in_one_line(accelerator: Accelerator) -> None:
    """As after a version that moved parameters from one group to another."""
    saved = stored(trained(accelerator, 1))
    saved["optimizer"]["param_groups"][0]["params"].pop()
    with pytest.raises(UserError, match=r"the checkpoint's optimizer does not match .*; train from scratch, or resume"):
        trained(accelerator, 0).load_state_dict(saved)


@pytest.mark.parametrize(
    ("evaluated", "current"), [({}, True), ({"evaluated": True}, True), ({"evaluated": False}, False)]
)
def test_averaged_weights_have_the_buffers_of_the_last_evaluation(
    accelerator: Accelerator, evaluated: dict[str, bool], current: bool
) -> None:
    restored = trained(accelerator, 1)
    restored.load_state_dict(stored(trained(accelerator, 2)) | evaluated)
    assert restored.ema.buffers_current == current


def test_without_averaged_weights_the_model_is_evaluated(accelerator: Accelerator) -> None:
    state = trained(accelerator, 1, replace(RECIPE, ema=0.0))
    assert state.eval_model is state.model
    content = stored(state)
    assert content["average"] is None
    state.load_state_dict(content)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_the_scale_of_gradients_is_restored_where_both_runs_have_one(
    accelerator: Accelerator, before: bool, after: bool
) -> None:
    """A resumed run may have another precision with --resume-anyway."""
    state = trained(accelerator, 1)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if before else None
    content = stored(state)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0) if after else None
    state.load_state_dict(content)
    if after:
        assert accelerator.scaler.state_dict()["scale"] == (8.0 if before else 2.0)
    accelerator.scaler = None


@pytest.mark.parametrize(
    ("rank", "world", "source", "images"),
    [
        (0, 2, 0, 10), (1, 2, 1, 20),  # the same number: each its own
        (0, 3, 0, 30), (1, 3, 1, 0), (2, 3, 0, 0), (0, 1, 0, 30),  # another: the first rank has all images so far
    ],
)  # fmt: skip
def test_each_rank_takes_the_state_of_one(
    accelerator: Accelerator, rank: int, world: int, source: int, images: int
) -> None:
    """Of two saved ones: generators and batch norm's statistics, and the sums of loss and hits."""
    content = stored(trained(accelerator, 1)) | {"world_size": 2, "ranks": []}
    expected = []
    for number in range(2):
        torch.manual_seed(number)
        meter = {"sums": torch.full((2,), 1.0 + number, dtype=torch.float64), "images": 10 * (1 + number)}
        state = trained(accelerator, 2 + number)
        content["ranks"].append(
            {
                "buffers": {name: buffer.clone() for name, buffer in trained_buffers(state.model)},
                "meter": meter | {"epoch_sums": [1.0, 2.0, 3.0], "grad_norm": torch.tensor(5.0)},
                "generators": rng_state(CPU),
            }
        )
        expected.append(draws())
    restored = trained(accelerator, 1)
    restored.accelerator = SimpleNamespace(process_index=rank, num_processes=world, scaler=None, device=CPU)
    restored.load_state_dict(content)
    assert draws() == expected[source]
    for name, buffer in trained_buffers(restored.model):
        assert torch.equal(buffer, content["ranks"][source]["buffers"][name])
    assert restored.meter.images == images
    assert restored.meter.sums.tolist() == [images / 10] * 2
    assert restored.meter.epoch_sums == [1.0, 2.0, 3.0]
    assert restored.meter.grad_norm == 5


def test_only_the_first_rank_has_the_state(accelerator: Accelerator) -> None:
    state = trained(accelerator, 1)
    state.accelerator = SimpleNamespace(is_main_process=False, scaler=None, device=CPU)
    assert state.state_dict() == {}


def test_ddp_is_warmed_up_with_two_backward_passes_that_change_nothing() -> None:
    """On one micro-batch, because memory may not have room for more; on one rank there is nothing to warm up."""
    model, sizes = Tiny().eval(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = SimpleNamespace(epoch=lambda epoch: iter([(torch.randn(7, 3, 32, 32), torch.arange(7))] * (1 - epoch)))

    def loss_fn(logits: torch.Tensor, targets: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        assert len(logits) == len(targets) == len(images)
        assert model.training
        sizes.append(len(images))
        return logits.sum()

    for ranks, expected in ((1, []), (2, [4, 4])):
        accelerator = SimpleNamespace(num_processes=ranks, backward=torch.Tensor.backward)
        state: Any = SimpleNamespace(accelerator=accelerator, ddp=model)
        rebuild_ddp_buckets(state, loss_fn, batches, replace(RECIPE, accumulate=2))
        assert sizes == expected
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_masks_of_pruned_weights_are_no_trained_buffers() -> None:
    model = Tiny(norm=True)
    names = [name for name, _ in trained_buffers(model)]
    assert names == [f"layers.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
    prune.l1_unstructured(model.layers[0], "weight", 0.5)
    assert [name for name, _ in trained_buffers(model)] == names


def test_a_copy_on_the_cpu_shares_nothing() -> None:
    value = {"a": torch.ones(2, requires_grad=True), "b": [torch.ones(1), (torch.ones(1), "text")], "c": None}
    copy = to_cpu(value)
    with torch.no_grad():
        value["a"] += 1
        value["b"][0] += 1
        value["b"][1][0].add_(1)
    assert copy["a"].tolist() == [1, 1]
    assert not copy["a"].requires_grad
    assert copy["b"][0] == copy["b"][1][0] == 1
    assert (copy["b"][1][1], copy["c"]) == ("text", None)
    assert isinstance(copy["b"], list)
    assert isinstance(copy["b"][1], tuple)


def test_the_recipe_selects_synchronized_batch_norm(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.models.norm.convert_sync_batch_norm", lambda model: nn.Sequential(model))
    for chosen, kind in ((True, nn.Sequential), (False, Tiny)):
        state = TrainState(Tiny(), replace(RECIPE, sync_batch_norm=chosen), accelerator)
        assert type(state.model) is kind


def test_the_generator_of_a_gpu_is_restored_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be resumed with --resume-anyway where there is none."""
    gpu, restored = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([7]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append((int(state), device)))
    for before in (CPU, gpu):
        for after in (CPU, gpu):
            set_rng_state(rng_state(before), after)
    assert restored == [(7, gpu)]


def test_ranks_that_resumed_from_other_weights_do_not_train(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two or three ranks, whose answers are exchanged here."""
    states = [trained(accelerator, steps) for steps in (2, 2, 3)]
    for state in states:
        state.model.scale = nn.Parameter(torch.tensor(1.0))  # some models have parameters without dimensions
    states[1].model.layers[0].bias.data[3] += 1e-6
    answers: list[str] = []
    monkeypatch.setattr(type(accelerator), "num_processes", 3)
    monkeypatch.setattr("runner.training.state.gather_object", answers.extend)
    for state in states:
        with contextlib.suppress(TypeError):  # nothing is returned
            state.require_same_on_ranks()
    same, changed, later = answers
    assert len({same, changed, later}) == 3
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    for others in ([same, same], [same, changed], [same, later]):
        monkeypatch.setattr("runner.training.state.gather_object", lambda own, others=others: others)
        if others[0] == others[1]:
            states[0].require_same_on_ranks()
            continue
        with pytest.raises(UserError, match=r"^rank 1 resumed at step \d with weights .*, rank 0 at step 2 with"):
            states[0].require_same_on_ranks()
