from pathlib import Path

import pytest
import torch
from torch import nn

from runner.config.recipe import SGD, Recipe
from runner.data.open import EVALUATION_BATCH, RankInfo, open_manifest, open_split
from runner.system import launcher
from runner.training import checkpoint
from runner.training.eval_run import evaluate_run
from runner.training.evaluate import Evaluation, evaluate
from tests.support.configs import trusted
from tests.support.models.tiny import Tiny

RECIPE = Recipe(1, 50, SGD(0.1))


def batches(data: Path, rank: int = 0, world: int = 1, loader: str = "resident"):
    return open_split(data, open_manifest(data), "test", RECIPE, RankInfo(torch.device("cpu"), rank, world, loader))


@pytest.mark.parametrize("loader", ["resident", pytest.param("streaming", marks=pytest.mark.every)])
@pytest.mark.parametrize(("world", "batch"), [(3, 50), (7, 50), (3, 199)], ids=["3", "7", "a last batch of 1"])
def test_the_sum_over_ranks_matches_a_single_process(
    small_data: Path, world: int, batch: int, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EVALUATION_BATCH, "cpu", batch)
    torch.manual_seed(0)
    model = Tiny(norm=True)
    tables, counts = [], []

    def all_reduce(table: torch.Tensor) -> torch.Tensor:
        tables.append(table)
        return sum(tables) if len(tables) == world else torch.ones_like(table)

    def not_empty(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        assert len(inputs[0])  # not every model takes a slice without images

    model.register_forward_pre_hook(not_empty)
    for rank in range(world):
        result = evaluate(model, batches(small_data, rank, world, loader), 10, all_reduce, counts.append)
    single = evaluate(model, batches(small_data), 10)
    images, labels = zip(*batches(small_data).epoch(0), strict=True)
    with torch.no_grad():
        expected = model.eval()(torch.cat(images))
    model.train()
    assert torch.allclose(single.logits, expected, atol=1e-5)
    assert torch.equal(single.labels, torch.cat(labels))
    assert sum(counts) == 200
    assert torch.allclose(result.logits, single.logits, atol=1e-5)
    assert torch.equal(result.labels, single.labels)
    assert single.num_images == 200
    assert model.training


def test_an_empty_slice_has_no_images(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last batch of one image on three ranks: two of them have none."""
    monkeypatch.setitem(EVALUATION_BATCH, "cpu", 199)
    streams = [batches(small_data, rank, 3, "streaming") for rank in range(3)]
    assert [[len(labels) for _, labels in stream.epoch(0)][-1] for stream in streams] == [0, 0, 1]


def test_every_rank_is_asked_before_every_batch(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a rank without an image of the last batch: otherwise, ranks that agree by a sum would wait forever."""
    monkeypatch.setitem(EVALUATION_BATCH, "cpu", 199)
    for rank in range(3):
        asked: list[int] = []
        with pytest.raises(AssertionError, match="not at all"):  # of the other ranks' images
            evaluate(Tiny(), batches(small_data, rank, 3), 10, before_batch=asked.append)
        assert asked == [0, 1]


def test_the_mode_is_restored_after_an_error(small_data: Path) -> None:
    model = Tiny()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, batches(small_data), 10, advance=lambda amount: 1 / 0)
    assert model.training


def test_the_mode_of_each_module_is_restored(small_data: Path) -> None:
    model = Tiny(norm=True)
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    evaluate(model, batches(small_data), 10)
    assert (model.training, frozen.training) == (True, False)


@pytest.mark.parametrize("times", [0, 2])
def test_an_image_evaluated_twice_or_not_at_all_is_an_error(small_data: Path, times: int) -> None:
    with pytest.raises(AssertionError, match="evaluated twice or not at all"):
        evaluate(Tiny(), batches(small_data), 10, lambda table: times * table)


def test_metrics() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.5, 0.0]])
    result = Evaluation(logits, torch.tensor([0, 1, 1, 0]))
    assert result.accuracy == 0.75
    assert result.confusion == [[2, 0], [1, 1]]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0]))
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)


def test_an_evaluation_on_a_gpu_is_without_tf32(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As training is; the flags can be looked at without a GPU."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = True
    monkeypatch.setattr(launcher, "select_device", lambda *_: ("cuda", "device: cuda"))
    monkeypatch.setattr(checkpoint, "load_model", lambda run: pytest.exit)  # has no `to`
    try:
        with pytest.raises(AttributeError):
            evaluate_run(trusted(tiny_run), None, "cuda", "run", "run", {})
        assert [setting.allow_tf32 for setting in settings] == [False, False]
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value
