"""Builds optimizers from recipes, and computes the learning rate as a function of the step."""

import copy
import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from runner.config import recipe as recipes
from runner.config.recipe import Constant, Cosine, Linear, OneCycle, Schedule, Step

LAYER = re.compile(r".*?(?:\.|_)\d+(?=\.)|[^.]*")  # of a name: up to its first inner index, or first part


def build_optimizer(recipe: recipes.Optimizer, model: nn.Module, layer_decay: float = 1.0) -> torch.optim.Optimizer:
    """Builds the recipe's optimizer for the trainable parameters of `model`, fused where torch supports it.

    Args:
        recipe: the optimizer's settings.
        model: the model to train.
        layer_decay: factor of the learning rate from each layer to the one before it; see `layer_numbers`.
    """
    if isinstance(recipe, recipes.Muon):
        return build_muon(recipe, model)
    groups = parameter_groups(recipe, model, layer_decay)
    match recipe:
        case recipes.SGD():
            return torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)
        case recipes.Adam():
            return torch.optim.Adam(groups, betas=recipe.betas, fused=True)
        case recipes.AdamW():
            return torch.optim.AdamW(groups, betas=recipe.betas, fused=True)
        case recipes.RMSprop():
            return torch.optim.RMSprop(groups, alpha=recipe.alpha, momentum=recipe.momentum)


def parameter_groups(
    recipe: recipes.ElementwiseOptimizer, model: nn.Module, layer_decay: float
) -> list[dict[str, Any]]:
    """Returns the trainable parameters by learning rate and weight decay, as torch's optimizers take them.

    The last layers are first; of a layer, matrices and filters come before vectors without weight decay.
    """
    layers = layer_numbers(model) if layer_decay != 1 else {}
    last = max(layers.values(), default=0)
    groups: defaultdict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            without_decay = parameter.ndim <= 1 and not recipe.decay_vectors
            groups[last - layers.get(name, last), without_decay].append(parameter)
    return [
        {
            "params": parameters,
            "lr": recipe.lr * layer_decay**depth,
            "weight_decay": 0.0 if without_decay else recipe.weight_decay,
        }
        for (depth, without_decay), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def layer_numbers(model: nn.Module) -> dict[str, int]:
    """Returns the number of the layer of each parameter, by name, from 0 at the input.

    Models of timm say which parameters form a layer. For other models, a layer is an element of a sequence, such as a
    block of a ResNet, or a direct child of the model; normalization layers belong to the filters before them.
    """
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        return group_parameters(model, matcher(coarse=False), reverse=True)
    layer_of = {name: match[0] for name, _ in model.named_parameters() if (match := LAYER.match(name))}
    with_matrices = {layer_of[name] for name, parameter in model.named_parameters() if parameter.ndim > 1}
    numbers: dict[str, int] = {}
    seen: set[str] = set()
    number = 0
    for name, layer in layer_of.items():
        if layer not in seen:
            number += bool(seen) and layer in with_matrices
            seen.add(layer)
        # Also of a module that was seen: it may have parameters before and after a sequence, such as a ViT's positions
        # and its last norm.
        numbers[name] = number
    return numbers


def build_muon(recipe: recipes.Muon, model: nn.Module) -> "Muon":
    """Builds Muon for filters and matrices, with SGD for the last linear layer and all other parameters."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    excluded = {id(parameter) for module in last for parameter in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # As orthogonalized: a scale per channel (C, 1, 1) of a ConvNeXt, or a ViT's positions (1, N, D), is a vector.
    matrices = [p for p in trained if p.ndim > 1 and min(p.flatten(1).shape) > 1 and id(p) not in excluded]
    matrix_ids = {id(p) for p in matrices}
    muon_group = {
        "params": matrices,
        "orthogonal": True,
        "unit_rows": recipe.unit_rows,
        "iterations": recipe.iterations,
        "lr": recipe.lr,
        "momentum": recipe.momentum,
        "weight_decay": recipe.weight_decay,
    }
    sgd_group = {
        "params": [p for p in trained if id(p) not in matrix_ids],
        "orthogonal": False,
        "lr": recipe.other_lr,
        "momentum": recipe.other_momentum,
        "weight_decay": recipe.other_weight_decay,
    }
    return Muon([muon_group, sgd_group])


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum; in parameter groups with `orthogonal`, the update is orthogonalized.

    Filters (out, in, kH, kW) are treated as matrices (out, in × kH × kW); torch.optim.Muon supports only matrices.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # takes no closure
        """Updates all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, [parameter.grad for parameter in parameters], group)

    def _update(self, parameters: list[torch.Tensor], gradients: list[torch.Tensor], group: dict[str, Any]) -> None:
        """Updates the parameters of a group together, so that a GPU gets few kernels."""
        if not group["orthogonal"] and group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        updates = list(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))
        if not group["orthogonal"]:
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
            return
        if group["unit_rows"]:
            norms = list(torch._foreach_norm(parameters))
            torch._foreach_clamp_min_(norms, 1e-12)  # weights of zero stay zero
            torch._foreach_reciprocal_(norms)
            torch._foreach_mul_(norms, [math.sqrt(len(parameter)) for parameter in parameters])
            torch._foreach_mul_(parameters, norms)
        elif group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        directions = orthogonalize([update.flatten(1) for update in updates], group["iterations"])
        if not group["unit_rows"]:
            # Tall matrices get larger steps, so that their outputs change as much as those of square ones.
            ratios = [len(direction) / direction.shape[1] for direction in directions]
            torch._foreach_mul_(directions, [max(1.0, ratio) ** 0.5 for ratio in ratios])
        directions = [part.view_as(parameter) for part, parameter in zip(directions, parameters, strict=True)]
        torch._foreach_add_(parameters, directions, alpha=-group["lr"])


def orthogonalize(matrices: list[torch.Tensor], iterations: int) -> list[torch.Tensor]:
    """Approximates the nearest orthogonal matrices: singular values become 0.7 to 1.2, singular vectors are unchanged.

    Uses Newton-Schulz iteration in bf16 with an odd polynomial of degree five and the coefficients of K. Jordan's Muon.
    Matrices with the same shorter side are one batch, filled up with columns of zeros, which stay zero.

    Args:
        matrices: (rows, columns) each, of any float dtype; the results have the same shapes and dtypes.
        iterations: number of iterations.
    """
    results: dict[int, torch.Tensor] = {}
    batches: defaultdict[int, list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        batches[min(matrix.shape)].append(number)
    for side, numbers in batches.items():
        longest = max(max(matrices[number].shape) for number in numbers)
        x = matrices[numbers[0]].new_zeros((len(numbers), side, longest), dtype=torch.bfloat16)
        wide = [matrix.T if len(matrix) > matrix.shape[1] else matrix for matrix in (matrices[n] for n in numbers)]
        parts = [part[:, : matrix.shape[1]] for part, matrix in zip(x.unbind(), wide, strict=True)]
        torch._foreach_copy_(parts, wide)
        x = newton_schulz(x, iterations)
        for part, matrix, number in zip(x.unbind(), wide, numbers, strict=True):
            result = part[:, : matrix.shape[1]].to(matrix.dtype)
            results[number] = result.T if len(matrices[number]) > side else result
    return [results[number] for number in range(len(matrices))]


def newton_schulz(x: torch.Tensor, iterations: int) -> torch.Tensor:
    """Orthogonalizes a batch of matrices (n, rows, columns) in bf16, with rows ≤ columns; see `orthogonalize`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


class EMA:
    """An exponential moving average of a model's weights, which is evaluated and saved in their place.

    Replaces torch's AveragedModel, which reads its counter from the device at every step and thus synchronizes with
    the GPU.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.buffers_current = True
        self.update_averages = get_ema_multi_avg_fn(decay)

    @property
    def module(self) -> nn.Module:
        """A copy of the model with averaged parameters and current buffers, which are only copied when it is used."""
        if not self.buffers_current:
            for average, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
                average.copy_(buffer)
            self.buffers_current = True
        return self.average

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the average after optimizer step `step`; step 1 initializes it."""
        averages: list[torch.Tensor] = list(self.average.parameters())
        parameters: list[torch.Tensor] = list(self.model.parameters())
        if step == 1:
            torch._foreach_copy_(averages, parameters)
        else:
            self.update_averages(averages, parameters, None)
        self.buffers_current = False


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int, steps: int) -> float:
    """Sets the learning rate of each group to its peak times the schedule's factor; returns that of the first group."""
    factor = lr_factor(schedule, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor
    return optimizer.param_groups[0]["lr"]


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Returns the learning rates of the first group and, if its peak differs, the last one, as in MetricRow."""
    first, last = optimizer.param_groups[0], optimizer.param_groups[-1]
    return {"lr": first["lr"]} | ({"lr_1": last["lr"]} if last["peak_lr"] != first["peak_lr"] else {})


def lr_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Returns the learning rate of an optimizer step, as a fraction of its peak.

    Args:
        schedule: the learning rate schedule.
        step: the optimizer step, from 0 to steps - 1.
        steps: number of steps of the full recipe, even if the run stops early.
    """
    warmup = schedule.warmup * steps
    progress = (step - warmup) / max(1.0, steps - warmup)  # from 0 after warmup to almost 1 at the last step
    if isinstance(schedule, OneCycle):
        # As in torch: the peak is at step warmup - 1, the end at step steps - 1.
        peak = warmup - 1
        if step <= peak:
            return _cosine(schedule.initial, 1.0, step / max(1.0, peak))
        return _cosine(1.0, schedule.final, (step - peak) / (steps - 1 - peak))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    match schedule:
        case Constant():
            return 1.0
        case Step(milestones, factor):
            return factor ** sum(step >= milestone * steps for milestone in milestones)
        case Cosine(_, final):
            return _cosine(1.0, final, progress)
        case Linear(_, final):
            return 1.0 + (final - 1.0) * progress


def _cosine(start: float, end: float, progress: float) -> float:
    """Interpolates between start (progress 0) and end (progress 1) along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
