import sys
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_prep import synthetic
from data_prep.console import UserError
from runner import experiments
from runner.models.resnet import BasicBlock
from runner.recipe import Experiment

ALL = experiments.load()


@pytest.mark.parametrize("name", ALL)
def test_the_stated_size_is_the_models(name: str) -> None:
    experiment = ALL[name]
    model = experiment.architecture.build().eval()
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(1, 3, 32, 32))
    assert logits.shape == (1, 10)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == experiment.parameters
    assert counter.get_total_flops() == 2 * experiment.macs


@pytest.mark.parametrize("name", ALL)
def test_the_loss_falls_on_a_fixed_batch(name: str) -> None:
    from runner import optim

    torch.manual_seed(0)
    experiment = ALL[name]
    model = experiment.architecture.build()
    optimizer = optim.build(experiment.recipe.optimizer, list(model.parameters()))
    pixels, labels = synthetic.draw(20, seed=0, split=0)
    images, labels = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(labels)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.9 * losses[0]


def test_merabishvili_is_the_papers_table() -> None:
    """merabishvili.txt, Figure 1: every row's parameters, in order."""
    first, second, third = 39_204, 156_816, 627_264  # 3×3 convolutions at 66, 132 and 264 channels
    table = [1_782, 132]
    table += 3 * [first, 132, first, 132]
    table += [78_408, 264, second, 264, 8_712, 264] + 3 * [second, 264, second, 264]
    table += [313_632, 528, third, 528, 34_848, 528] + 2 * [third, 528, third, 528]
    table += [264 * 10 + 10]
    model = ALL["merabishvili"].architecture.build()
    sizes = [
        sum(p.numel() for p in module.parameters())
        for module in model.modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.BatchNorm2d | torch.nn.Linear)
    ]
    assert sizes == table
    assert sum(table) == 4_916_284
    assert sum(isinstance(module, BasicBlock) for module in model.modules()) == 10


def test_mobilenet_ends_at_four_by_four() -> None:
    model = ALL["podeti-mobilenetv2"].architecture.build()
    assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 1280, 4, 4)


def test_alexnet_has_the_asked_dropout() -> None:
    model = ALL["podeti-alexnet"].architecture.build()
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="podeti-alexnet"):
        experiments.get("podeti-alexnt")


def test_a_duplicate_name_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("twice")
    module.EXPERIMENTS = {"merabishvili": ALL["merabishvili"]}
    monkeypatch.setitem(sys.modules, "twice", module)
    with pytest.raises(ValueError, match="exists already"):
        experiments.load(("twice",))


def test_every_paper_says_what_it_follows_and_assumed() -> None:
    for module in {f"runner.experiments.{e.paper}" for e in ALL.values()}:
        text = sys.modules[module].__doc__
        assert all(part in text for part in ("Follows", "Left open", "Reproduce:")), module
    assert all(isinstance(e, Experiment) and e.reported for e in ALL.values())
