import math
from typing import get_args

import pytest
import timm
import torch
import torchvision
from torch import nn

from runner.config.recipe import (
    SGD,
    Adam,
    AdamW,
    Constant,
    Cosine,
    ElementwiseOptimizer,
    Linear,
    Muon,
    OneCycle,
    Optimizer,
    RMSprop,
    Schedule,
    Step,
)
from runner.training import optim

SCHEDULES = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("schedule", "make_scheduler"),
    [
        (Cosine(), lambda o: SCHEDULES.CosineAnnealingLR(o, T_max=100)),
        (Step((0.3, 0.8), 0.2), lambda o: SCHEDULES.MultiStepLR(o, [30, 80], 0.2)),
        (Linear(), lambda o: SCHEDULES.LinearLR(o, 1.0, 0.0, 100)),
        (OneCycle(0.3, 0.04, 4e-6), lambda o: SCHEDULES.OneCycleLR(o, 0.3, total_steps=100)),
        (Constant(), lambda o: SCHEDULES.ConstantLR(o, 1.0)),
    ],
)
def test_schedules_match_torch_at_every_step(schedule: Schedule, make_scheduler) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = make_scheduler(optimizer)
    for step in range(100):
        lr = 0.3 * optim.lr_factor(schedule, step, 100)
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", [Constant, Step, Cosine, Linear])
def test_warmup_rises_to_the_peak(kind: type) -> None:
    rates = [optim.lr_factor(kind(warmup=0.1), step, 1000) for step in range(1000)]
    assert rates[:100] == sorted(rates[:100])
    assert rates[0] > 0
    assert rates[100] == max(rates) == 1.0


def test_schedules_end_at_final() -> None:
    for schedule in (Cosine(0.1, 0.01), Linear(0.1, 0.01)):
        assert optim.lr_factor(schedule, 999, 1000) == pytest.approx(0.01, abs=2e-3)
    assert optim.lr_factor(Constant(warmup=0.5), 0, 10) == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("schedule", "step", "steps", "factor"),
    [
        (Linear(0.05), 1, 2, 1 - 0.9 / 1.9),
        (Step((0.1,), 0.5, warmup=0.2), 2, 10, 0.5),  # the first step after the warmup
        (OneCycle(0.1, 0.0), 0, 10, 0.0),  # the peak is in the first step, which has the initial rate
        (OneCycle(0.25, 0.0), 1, 10, 0.75),  # two thirds of the way to the peak at 1.5
        (OneCycle(0.95, 0.0, 0.125), 9, 10, 0.125),  # the last step is half a step after the peak
        (OneCycle(0.8, 0.0, 0.5), 8, 10, 0.75),
        (OneCycle(1.0, 0.0), 9, 10, 1.0),
    ],
)
def test_schedules_of_few_steps(schedule: Schedule, step: int, steps: int, factor: float) -> None:
    assert optim.lr_factor(schedule, step, steps) == pytest.approx(factor)


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    rates = [optim.lr_factor(Cosine(), step, 100) for step in (7, 3, 99, 3)]
    assert rates[1] == rates[3] == (1 + math.cos(math.pi * 0.03)) / 2


def test_each_group_keeps_its_own_peak() -> None:
    optimizer = optim.build_optimizer(Muon(0.2, other_lr=0.05), small())
    for step in (50, 0, 50):
        assert optim.set_lr(optimizer, Linear(), step, 100) == pytest.approx(0.2 * (1 - step / 100))
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.05 * (1 - step / 100))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 16), nn.Linear(16, 10))


def test_settings_reach_the_optimizer() -> None:
    model = small()
    for recipe, kind, settings in (
        (SGD(0.1, 0.8, nesterov=True, weight_decay=1e-4), torch.optim.SGD,
         {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 1e-4, "fused": True}),
        (Adam(0.01, (0.8, 0.95), 5e-4), torch.optim.Adam,
         {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 5e-4, "fused": True}),
        (RMSprop(0.02, 0.9, 0.5, 1e-3), torch.optim.RMSprop,
         {"lr": 0.02, "alpha": 0.9, "momentum": 0.5, "weight_decay": 1e-3}),
        (AdamW(0.01, (0.8, 0.95), 0.1), torch.optim.AdamW,
         {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "fused": True}),
    ):  # fmt: skip
        optimizer = optim.build_optimizer(recipe, model)
        assert isinstance(optimizer, kind)
        assert settings.items() <= optimizer.param_groups[0].items()
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 8


@pytest.mark.parametrize("kind", get_args(ElementwiseOptimizer))
def test_vectors_have_no_weight_decay_unless_the_recipe_says_so(kind: type) -> None:
    recipe = kind(0.01, weight_decay=0.1, decay_vectors=False)
    decayed, undecayed = optim.build_optimizer(recipe, small()).param_groups
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in undecayed["params"]} == {1}
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0)
    (together,) = optim.build_optimizer(kind(0.01, weight_decay=0.1, decay_vectors=True), small()).param_groups
    assert len(together["params"]) == 8
    by_default = optim.build_optimizer(kind(0.01, weight_decay=0.1), small()).param_groups
    assert len(by_default) == (1 if kind(0.01).decay_vectors else 2)


def rates_of(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """The learning rate of each parameter, in units of the peak, after a schedule has halved it."""
    optimizer = optim.build_optimizer(AdamW(0.5), model, layer_decay)
    optim.set_lr(optimizer, Linear(), 50, 100)
    rates = {id(p): group["lr"] / 0.25 for group in optimizer.param_groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters()}


def test_each_layer_learns_slower_than_the_next() -> None:
    rates = rates_of(small(), 0.5)
    assert rates == {
        "0.weight": 0.25, "0.bias": 0.25, "1.weight": 0.25, "1.bias": 0.25, "3.weight": 0.5, "3.bias": 0.5,
        "4.weight": 1.0, "4.bias": 1.0,
    }  # fmt: skip
    assert set(rates_of(small(), 1.0).values()) == {1.0}


def test_layers_are_numbered_from_the_input() -> None:
    """Vectors alone are a layer only at the input, before all filters."""
    assert set(optim.layer_numbers(small()).values()) == {0, 1, 2}
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert optim.layer_numbers(model) == {
        "0.weight": 0, "0.bias": 0, "1.weight": 1, "1.bias": 1, "2.weight": 1, "2.bias": 1, "3.weight": 2, "3.bias": 2,
    }  # fmt: skip


def test_blocks_of_a_resnet_are_layers() -> None:
    rates = rates_of(torchvision.models.resnet18(num_classes=10), 0.5)
    assert rates["fc.weight"] == rates["fc.bias"] == 1
    assert rates["layer4.1.conv1.weight"] == rates["layer4.1.bn2.bias"] == 0.5
    assert rates["layer4.0.downsample.0.weight"] == rates["layer4.0.conv2.weight"] == 0.25
    assert rates["conv1.weight"] == rates["bn1.weight"] == 0.5**9


def test_the_last_norm_of_a_vit_belongs_to_its_last_block() -> None:
    """Its module also has the positions, which come first."""
    model = torchvision.models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=10)
    rates = rates_of(model, 0.5)
    last_block = rates["encoder.layers.encoder_layer_2.mlp.0.weight"]
    assert (rates["heads.head.weight"], last_block) == (1, 0.5)
    assert rates["encoder.ln.weight"] == rates["encoder.ln.bias"] == last_block
    assert rates["encoder.pos_embedding"] < rates["encoder.layers.encoder_layer_0.ln_1.weight"]


def test_layers_of_timm_are_those_that_it_names() -> None:
    rates = rates_of(timm.create_model("vit_tiny_patch16_224", num_classes=10), 0.5)
    assert rates["head.weight"] == 1
    assert rates["blocks.11.attn.qkv.weight"] == rates["blocks.11.norm1.bias"] == rates["blocks.10.mlp.fc1.bias"] * 2
    assert rates["patch_embed.proj.weight"] == rates["pos_embed"] == min(rates.values())


def test_blocks_of_a_resnet_of_timm_are_layers() -> None:
    rates = rates_of(timm.create_model("resnet18", num_classes=10), 0.5)
    assert rates["layer4.1.conv1.weight"] == 2 * rates["layer4.0.conv1.weight"]
    assert rates["fc.weight"] == 1


def test_the_first_layers_rate_is_logged_beside_the_last_ones() -> None:
    optimizer = optim.build_optimizer(SGD(0.5), small(), 0.5)
    optim.set_lr(optimizer, Linear(), 50, 100)
    assert optim.learning_rates(optimizer) == {"lr": 0.25, "lr_1": 0.0625}


def test_frozen_parameters_are_not_optimized() -> None:
    model = small()
    model[0].requires_grad_(False)
    for kind in get_args(Optimizer):
        groups = optim.build_optimizer(kind(0.1), model).param_groups
        assert sum(len(group["params"]) for group in groups) == 6


def test_muon_takes_filters_and_matrices_but_not_the_last_layer() -> None:
    model = nn.Sequential(*small(), nn.Linear(10, 10))
    matrices, others = optim.build_optimizer(Muon(0.1), model).param_groups
    assert [id(p) for p in matrices["params"]] == [id(model[index].weight) for index in (0, 3, 4)]
    assert len(others["params"]) == 7
    assert any(p is model[5].weight for p in others["params"])


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 1, 6), (1, 5, 6), (1, 6)])
def test_what_is_a_vector_when_flattened_is_no_matrix_for_muon(shape: tuple[int, ...]) -> None:
    """The scale per channel of a ConvNeXt, the class token and the positions of a ViT, a single output."""
    model = nn.Module()
    model.filters, model.other = nn.Parameter(torch.randn(2, 2, 1, 1)), nn.Parameter(torch.ones(shape))
    muon = optim.build_optimizer(Muon(0.1), model)
    assert [[p.shape for p in group["params"]] for group in muon.param_groups] == [[(2, 2, 1, 1)], [shape]]


def test_settings_of_muon_reach_its_groups() -> None:
    recipe = Muon(
        0.1, 0.7, 0.01, unit_rows=True, iterations=3, other_lr=0.2, other_momentum=0.8, other_weight_decay=0.02
    )
    groups = optim.build_optimizer(recipe, small()).param_groups
    names = ("orthogonal", "lr", "momentum", "weight_decay")
    assert [[group[name] for name in names] for group in groups] == [[True, 0.1, 0.7, 0.01], [False, 0.2, 0.8, 0.02]]
    assert (groups[0]["unit_rows"], groups[0]["iterations"]) == (True, 3)


def test_parameters_without_a_gradient_stay() -> None:
    model = small()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = optim.build_optimizer(Muon(0.1), model)
    optimizer.step()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)]
    assert changed == ["0.weight"]


@pytest.mark.parametrize("shape", [(16, 16), (8, 72), (64, 10)])
def test_an_update_of_muon_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    other = torch.randn(shape[0], shape[1] + 3)  # filled up with zeros in the same batch, if it is wide
    orthogonal, _ = optim.orthogonalize([matrix, other], 5)
    (tiny,) = optim.orthogonalize([matrix / 1000], 5)
    torch.testing.assert_close(tiny, orthogonal, atol=0.05, rtol=0)
    assert not optim.orthogonalize([0 * matrix], 5)[0].any()
    assert orthogonal.dtype == torch.float32
    values = torch.linalg.svdvals(orthogonal)
    assert values.min() > 0.5
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    exact = u @ v
    assert torch.nn.functional.cosine_similarity(orthogonal.flatten(), exact.flatten(), 0) > 0.97


@pytest.mark.parametrize("shape", [(4, 8), (12, 4)])
@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.5), (0.5, 0.0)])
def test_muon_matches_torch_on_matrices(shape: tuple[int, int], momentum: float, decay: float) -> None:
    """torch.optim.Muon supports only matrices."""
    one, other = (nn.Parameter(torch.arange(48.0).sin()[: math.prod(shape)].view(shape)) for _ in range(2))
    settings = {"lr": 0.1, "momentum": momentum, "weight_decay": decay}
    muon = optim.Muon([{"params": [one], "orthogonal": True, "unit_rows": False, "iterations": 5, **settings}])
    reference = torch.optim.Muon([other], **settings)
    for step in range(5):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        one.grad, other.grad = gradient.clone(), gradient.clone()
        muon.step()
        # torch averages the gradients, and this sums them: the direction is the same.
        reference.step()
    torch.testing.assert_close(one, other, atol=0.01, rtol=0.01)  # both iterate in bf16


def test_the_other_group_of_muon_is_sgd_with_nesterov_momentum() -> None:
    one, other = (nn.Parameter(torch.arange(8.0)) for _ in range(2))
    muon = optim.Muon([{"params": [one], "orthogonal": False, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}])
    reference = torch.optim.SGD([other], 0.1, 0.9, weight_decay=0.01, nesterov=True)
    for step in range(5):
        one.grad, other.grad = (torch.arange(8.0).add(step).cos() for _ in range(2))
        muon.step()
        reference.step()
    torch.testing.assert_close(one, other)


def test_unit_rows_keep_the_norm() -> None:
    """The weights have the norm of orthogonal rows before each step, and no other decay."""
    weight, zeros = nn.Parameter(0.001 * torch.randn(6, 3, 3, 3)), nn.Parameter(torch.zeros(4, 4))
    settings = {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.5, "iterations": 5}
    muon = optim.Muon([{"params": [weight, zeros], "orthogonal": True, "unit_rows": True, **settings}])
    for parameter in (weight, zeros):
        parameter.grad = torch.randn_like(parameter)
    muon.step()
    assert weight.norm().item() == pytest.approx(6**0.5)
    assert not zeros.any()
    before = weight.detach().clone()
    muon.param_groups[0]["lr"] = 0.1
    muon.step()
    assert (weight - before).norm().item() == pytest.approx(0.1 * 6**0.5, rel=0.3)  # without a factor for tall matrices


def test_the_average_is_of_the_weights_alone() -> None:
    """Its buffers are those of the model when it is used; no gradient flows to it."""
    model = small()
    ema = optim.EMA(model, 0.75)
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    for step, value in ((1, 8.0), (2, 0.0), (3, 4.0)):
        with torch.no_grad():
            model[3].weight.fill_(value)
        model[1].running_mean.fill_(value)
        ema.update(step)
    assert ema.average[1].running_mean.tolist() == [0.0] * 8
    assert ema.module[3].weight[0, 0].item() == 0.75 * (0.75 * 8) + 0.25 * 4
    assert ema.module[1].running_mean.tolist() == [4.0] * 8
    model[1].running_mean.fill_(5.0)
    assert ema.module[1].running_mean.tolist() == [4.0] * 8  # until the next update


def test_groups_of_another_peak_have_a_learning_rate_of_their_own() -> None:
    """Also where both are 0, as at the end of a schedule."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.2, 0.2, 0.4)]
    optimizer = torch.optim.SGD(groups)
    optim.set_lr(optimizer, Linear(), 50, 100)
    assert optim.learning_rates(optimizer) == {"lr": 0.1, "lr_1": 0.2}
    optim.set_lr(optimizer, Linear(), 100, 100)
    assert optim.learning_rates(optimizer) == {"lr": 0.0, "lr_1": 0.0}
