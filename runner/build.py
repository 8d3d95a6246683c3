"""The model as training begins with it, and its weights as they are kept."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from data_prep.console import UserError
from runner import checkpoint
from runner.recipe import Architecture, Recipe
from runner.runs import Run


def build(
    architecture: Architecture,
    recipe: Recipe,
    seed: int,
    first_images: Callable[[int], torch.Tensor],
    start: Run | None,
) -> nn.Module:
    """Builds the model of an experiment, on the CPU; the same on every rank.

    Random weights come from `seed`. A model with a method `initialise(first_images)` is then given the way to the
    first training images, `first_images(n)`, (n, 3, H, W) float32, normalised, without augmentation: to fit a layer
    to the data, or to load pretrained weights instead. With `start`, the weights are those of that run; with a
    recipe that prunes, the smallest become 0 and stay so.

    Raises:
        UserError: weights that cannot be had or do not fit.
    """
    torch.manual_seed(seed)
    try:
        model = architecture.build()
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"--architecture.arguments {architecture.arguments}: {error!r}") from None
    if start is not None:
        try:
            model.load_state_dict(checkpoint.load_model(start).state_dict())
        except RuntimeError as error:
            raise UserError(
                f"--start-from {start.folder}: expected the weights of this architecture: {error}"
            ) from None
    elif hasattr(model, "initialise"):
        model.initialise(first_images)
    if recipe.prune:
        with torch.no_grad():
            torch_prune.global_unstructured(
                prunable(model), pruning_method=torch_prune.L1Unstructured, amount=recipe.prune
            )
    return model.to(memory_format=torch.channels_last) if recipe.channels_last else model


def prunable(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The weights of convolutions and linear layers, as torch.nn.utils.prune wants them.

    Not of the layer inside attention, whose weight is read without calling it, past the pruning.
    """
    return [(m, "weight") for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear)]


def kept_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state that the architecture loads again: pruned weights as the zeros that they are."""
    state = model.state_dict()
    kept = {}
    for name, tensor in state.items():
        plain = name.removesuffix("_orig")
        if plain != name and f"{plain}_mask" in state:
            kept[plain] = tensor * state[f"{plain}_mask"]
        elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state):
            kept[name] = tensor
    return kept


def count(model: nn.Module, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Trained parameters, and multiply-accumulates of convolutions and matrix products for one image (3, H, W)."""
    from torch.utils.flop_counter import FlopCounterMode

    was_training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    model.train(was_training)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), counter.get_total_flops() // 2
