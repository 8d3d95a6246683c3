import math

import pytest
import torch

from runner import optim
from runner.recipe import SGD, Adam, Constant, Cosine


def test_cosine_matches_torchs_per_step() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for step in range(100):
        ours = optim.learning_rate(Cosine(), 0.3, step, 100)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_warmup_rises_to_the_peak_and_final_is_kept() -> None:
    rates = [optim.learning_rate(Cosine(warmup=0.1, final=0.01), 1.0, step, 1000) for step in range(1000)]
    assert rates[:100] == sorted(rates[:100])
    assert rates[0] > 0
    assert rates[100] == max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.01, abs=1e-4)
    assert optim.learning_rate(Constant(warmup=0.5), 2.0, 5, 10) == 2.0
    assert optim.learning_rate(Constant(warmup=0.5), 2.0, 0, 10) == pytest.approx(2 / 6)


def test_the_rate_is_a_function_of_the_step_alone() -> None:
    steps = [7, 3, 99, 3]
    rates = [optim.learning_rate(Cosine(), 1.0, step, 100) for step in steps]
    assert rates[1] == rates[3] == (1 + math.cos(math.pi * 0.03)) / 2


def test_settings_reach_the_optimizer() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    sgd = optim.build(SGD(0.1, 0.8, nesterov=True, weight_decay=1e-4), parameters)
    assert isinstance(sgd, torch.optim.SGD)
    wanted = {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 1e-4}
    assert wanted.items() <= sgd.param_groups[0].items()
    adam = optim.build(Adam(0.01, (0.8, 0.95), 5e-4), parameters)
    assert isinstance(adam, torch.optim.Adam)
    assert {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 5e-4}.items() <= adam.param_groups[0].items()
