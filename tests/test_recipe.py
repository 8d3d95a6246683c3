import json
from typing import get_args

import msgspec
import pytest

from runner import experiments
from runner.config.recipe import (
    SGD,
    Adam,
    AdamW,
    Architecture,
    Augment,
    Constant,
    Cosine,
    Experiment,
    Linear,
    Muon,
    OneCycle,
    Optimizer,
    Recipe,
    RMSprop,
    Step,
    differences,
    to_json,
)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(
            3,
            64,
            SGD(0.1, 0.8, nesterov=True),
            Cosine(0.1, 0.01),
            Augment(crop_padding=4, crop_fill="reflect", flip="alternating"),
            "half",
        ),
        Recipe(1, 1, Muon(0.1, unit_rows=True), Step((0.2, 0.9)), validation=5, ema=0.9),
        Recipe(1, 1, AdamW(0.1, decay_vectors=True), OneCycle()),
        Recipe(1, 1, RMSprop(0.1), Linear(0.1)),
        Recipe(1, 1, Adam(1e-3, (0.8, 0.9), 1e-4), Constant(0.5)),
        *(Recipe(1, 1, kind(0.1)) for kind in get_args(Optimizer)),
        *(experiment.recipe for experiment in experiments.load().values()),
    ],
)
def test_json_round_trip(recipe: Recipe) -> None:
    assert msgspec.json.decode(json.dumps(to_json(recipe)), type=Recipe) == recipe


def test_differences_are_named() -> None:
    a = Experiment(Architecture("m:f", {"dropout": 0.3}), Recipe(10, 128, SGD(0.1)), "p")
    b = Experiment(Architecture("m:f", {"dropout": 0.5}), Recipe(1, 128, SGD(0.2)), "p")
    assert differences(a, b) == {
        "architecture.arguments.dropout": (0.3, 0.5),
        "recipe.epochs": (10, 1),
        "recipe.optimizer.lr": (0.1, 0.2),
    }
    assert differences(a, a) == {}
