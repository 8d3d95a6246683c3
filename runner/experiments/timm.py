"""Experiments with the models of the timm library, by name: `timm/resnet26d`.

All have the same recipe, as a common starting point and not as the best for each: AdamW, cosine decay after a warmup,
random crops and flips, label smoothing. No accuracy is reported for it.

Reproduce: runner train timm/resnet26d --data data/cifar10. Names: runner list --timm 'resnet*'.
"""

import fnmatch
from difflib import get_close_matches

from runner.common.errors import UserError
from runner.config.recipe import AdamW, Architecture, Augment, Cosine, Experiment, Recipe

EXPERIMENTS: dict[str, Experiment] = {}  # the names are those of the installed version of timm
PREFIX = "timm/"
RECIPE = Recipe(
    epochs=30,
    batch_size=256,
    optimizer=AdamW(1e-3, weight_decay=0.05),
    schedule=Cosine(warmup=0.05),
    augment=Augment(crop_padding=4, flip="random"),
    label_smoothing=0.1,
)


def get(name: str) -> Experiment:
    """Returns the experiment `timm/MODEL`. Imports timm, and thereby torch.

    Raises:
        UserError: timm has no such model; the message lists similar names.
    """
    models, model = list_models(), name.removeprefix(PREFIX)
    if model not in models:
        near = get_close_matches(model, models, n=3, cutoff=0.4) or ["resnet26d"]
        names = ", ".join(PREFIX + other for other in near)
        raise UserError(f"{name!r}: no such model of timm; expected {names} (all: runner list --timm '*')")
    architecture = Architecture(f"runner.models.timm:{model}", {"drop_rate": 0.0, "drop_path_rate": 0.0, "weights": ""})
    return Experiment(architecture, RECIPE, "timm")


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of timm's models that match a pattern such as `convnext*`. Imports timm, and thereby torch."""
    import timm

    return fnmatch.filter(timm.list_models(), pattern)
