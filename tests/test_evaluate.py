from pathlib import Path

import pytest
import torch

from runner.batches.protocol import Place, open_manifest, open_split
from runner.evaluate import Evaluation, evaluate
from runner.recipe import SGD, Recipe
from tests.tiny import Tiny

RECIPE = Recipe(1, 50, SGD(0.1))


def batches(data: Path, rank: int = 0, world: int = 1):
    return open_split(data, open_manifest(data), "test", RECIPE, Place(torch.device("cpu"), rank, world))


@pytest.mark.parametrize("world", [3, 7])
def test_the_sum_over_ranks_is_the_evaluation_of_one(small_data: Path, world: int) -> None:
    torch.manual_seed(0)
    model = Tiny(norm=True)
    tables = []

    def keep(table: torch.Tensor) -> torch.Tensor:
        tables.append(table)
        return sum(tables) if len(tables) == world else torch.ones_like(table)

    for rank in range(world):
        result = evaluate(model, batches(small_data, rank, world), 10, keep)
    whole = evaluate(model, batches(small_data), 10)
    assert torch.allclose(result.logits, whole.logits, atol=1e-5)
    assert torch.equal(result.labels, whole.labels)
    assert whole.images == 200
    assert model.training


def test_an_image_scored_twice_is_noticed(small_data: Path) -> None:
    with pytest.raises(AssertionError, match="scored twice"):
        evaluate(Tiny(), batches(small_data), 10, lambda table: 2 * table)


def test_figures() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.5, 0.0]])
    result = Evaluation(logits, torch.tensor([0, 1, 1, 0]))
    assert result.accuracy == 0.75
    assert result.confusion == [[2, 0], [1, 1]]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0]))
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
