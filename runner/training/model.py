"""Creates the initial model of a run, and converts its weights for checkpoints."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from runner.common.errors import UserError
from runner.config.recipe import Architecture, Recipe
from runner.run.folder import Run
from runner.training import checkpoint

SUGGESTED_SIZES = (8, 16, 32, 64, 224)  # image sizes that an error message can suggest


def build_model(
    architecture: Architecture,
    recipe: Recipe,
    seed: int,
    first_images: Callable[[int], torch.Tensor],
    start: Run | None,
    classes: int = 10,
    shape: tuple[int, int, int] = (3, 32, 32),
    resumed: bool = False,
) -> nn.Module:
    """Builds the model of an experiment on the CPU, identical on every rank.

    If the model has a method `initialize(first_images)`, it is called to fit a layer to the data or to load
    pretrained weights. If the recipe prunes, the smallest weights are then masked with 0.

    Args:
        architecture: the architecture to build.
        recipe: sets pruning and the memory format.
        seed: random seed for the initial weights.
        first_images: returns the first n training images, (n, 3, H, W) float32, normalized, without augmentation.
        start: the run whose weights are loaded; None for random or pretrained weights.
        classes: number of classes; by default that of CIFAR-10.
        shape: (3, H, W) of the model's input; by default that of CIFAR-10.
        resumed: whether a checkpoint replaces the weights; then `initialize` is not called.

    Raises:
        UserError: invalid arguments, an image size that the architecture does not support, or weights that are missing
            or do not match the model.
    """
    torch.manual_seed(seed)
    model = build_for(architecture, classes, shape)
    if start is not None:
        try:
            model.load_state_dict(checkpoint.load_model(start).state_dict())
        except RuntimeError as error:
            raise UserError(
                f"--start-from {start.folder}: expected the weights of this architecture: {error}"
            ) from None
    elif hasattr(model, "initialise"):
        raise UserError(f"{architecture.factory}: expected a method initialize(), found initialise(); rename it")
    elif (initialize := getattr(model, "initialize", None)) is not None and not resumed:
        initialize(first_images)
    if recipe.prune:
        with torch.no_grad():
            torch_prune.global_unstructured(
                prunable(model), pruning_method=torch_prune.L1Unstructured, amount=recipe.prune
            )
    return model.to(memory_format=torch.channels_last) if recipe.channels_last else model


def build_for(architecture: Architecture, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Builds an architecture, and checks that it maps one image (3, H, W) to logits (1, classes).

    Raises:
        UserError: the architecture does not; the message suggests image sizes that it supports.
    """
    channels, height, width = shape

    def build(height: int, width: int) -> tuple[nn.Module, torch.Size]:
        model: nn.Module = architecture.build(classes, (height, width)).eval()
        with torch.no_grad():
            return model, model(torch.zeros(1, channels, height, width)).shape

    def accepts(side: int) -> bool:
        try:
            return build(side, side) is not None
        except Exception:  # networks reject a size in many ways
            return False

    try:
        model, found = build(height, width)
    except Exception as error:
        sides = [side for side in SUGGESTED_SIZES if accepts(side)]
        if not sides:  # the size is not the reason
            raise
        raise UserError(
            f"{architecture.factory}: cannot take images of {height}×{width} ({str(error).splitlines()[0]}); expected "
            f"{' or '.join(map(str, sides[:3]))} pixels a side; use --recipe.resize "
            f"{min(sides, key=lambda side: abs(side - height))}"
        ) from None
    if found != (1, classes):
        raise UserError(
            f"{architecture.factory}: expected logits (1, {classes}) for an image, found {tuple(found)}; its factory "
            "needs a keyword argument `classes`"
        )
    return model.train()


def prunable(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Returns the weights of convolutions and linear layers, as (module, name) pairs for torch.nn.utils.prune.

    Excludes the output layer of attention, because torch reads its weight without calling the layer, which would
    bypass the mask.
    """
    return [(m, "weight") for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear)]


def masked_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the state dict with pruning masks applied, for loading into a model without pruning."""
    state = model.state_dict()
    masked = {}
    for name, tensor in state.items():
        weight = name.removesuffix("_orig")
        if weight != name and f"{weight}_mask" in state:
            masked[weight] = tensor * state[f"{weight}_mask"]
        elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state):
            masked[name] = tensor
    return masked


def count_parameters_and_macs(model: nn.Module, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Counts trainable parameters, and multiply-accumulates of convolutions and matrix products for one image.

    Args:
        model: a model on the CPU.
        shape: image shape (3, H, W).
    """
    from torch.utils.flop_counter import FlopCounterMode

    was_training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    model.train(was_training)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), counter.get_total_flops() // 2
