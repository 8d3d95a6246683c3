from pathlib import Path

import pytest
import torch

from runner.config.recipe import SGD, Recipe
from runner.data.open import RankInfo, open_manifest, open_split
from runner.training.evaluate import Evaluation, evaluate
from tests.support.models.tiny import Tiny

RECIPE = Recipe(1, 50, SGD(0.1))


def batches(data: Path, rank: int = 0, world: int = 1):
    return open_split(data, open_manifest(data), "test", RECIPE, RankInfo(torch.device("cpu"), rank, world))


@pytest.mark.parametrize("world", [3, 7])
def test_the_sum_over_ranks_matches_a_single_process(small_data: Path, world: int) -> None:
    torch.manual_seed(0)
    model = Tiny(norm=True)
    tables = []

    def all_reduce(table: torch.Tensor) -> torch.Tensor:
        tables.append(table)
        return sum(tables) if len(tables) == world else torch.ones_like(table)

    for rank in range(world):
        result = evaluate(model, batches(small_data, rank, world), 10, all_reduce)
    single = evaluate(model, batches(small_data), 10)
    assert torch.allclose(result.logits, single.logits, atol=1e-5)
    assert torch.equal(result.labels, single.labels)
    assert single.images == 200
    assert model.training


def test_an_image_evaluated_twice_is_an_error(small_data: Path) -> None:
    with pytest.raises(AssertionError, match="evaluated twice"):
        evaluate(Tiny(), batches(small_data), 10, lambda table: 2 * table)


def test_metrics() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.5, 0.0]])
    result = Evaluation(logits, torch.tensor([0, 1, 1, 0]))
    assert result.accuracy == 0.75
    assert result.confusion == [[2, 0], [1, 1]]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0]))
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
