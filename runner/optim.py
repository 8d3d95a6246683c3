"""Optimizers from recipes, and the learning rate as a pure function of the step."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from runner import recipe as recipes
from runner.recipe import Constant, Cosine, Linear, OneCycle, Schedule, Step


def build(recipe: recipes.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, over the parameters of `model` that are trained.

    torch's are fused into one pass over the parameters, where it has that.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    match recipe:
        case recipes.SGD(lr, momentum, nesterov, weight_decay):
            return torch.optim.SGD(trained, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)
        case recipes.Adam(lr, betas, weight_decay):
            return torch.optim.Adam(trained, lr, betas, weight_decay=weight_decay, fused=True)
        case recipes.AdamW(lr, betas, weight_decay, decay_vectors):
            matrices = [p for p in trained if p.ndim > 1 or decay_vectors]
            vectors = [p for p in trained if p.ndim <= 1 and not decay_vectors]
            groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
            return torch.optim.AdamW([group for group in groups if group["params"]], lr, betas, fused=True)
        case recipes.RMSprop(lr, alpha, momentum, weight_decay):
            return torch.optim.RMSprop(trained, lr, alpha, weight_decay=weight_decay, momentum=momentum)
        case recipes.Muon():
            return muon(recipe, model)


def muon(recipe: recipes.Muon, model: nn.Module) -> "Muon":
    """Muon over a model: its filters and matrices, but for the last linear layer's, which SGD takes with the
    rest."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    apart = {id(parameter) for module in last for parameter in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.ndim > 1 and id(p) not in apart]
    chosen = {id(p) for p in matrices}
    ours = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    other = {
        "lr": recipe.other_lr,
        "momentum": recipe.other_momentum,
        "weight_decay": recipe.other_weight_decay,
    }
    return Muon(
        [
            {"params": matrices, "orthogonal": True, "unit_rows": recipe.unit_rows, **ours},
            {"params": [p for p in trained if id(p) not in chosen], "orthogonal": False, **other},
        ]
    )


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is made orthogonal, for groups that say `orthogonal`; plain for the others.

    Filters (out, in, kH, kW) count as matrices (out, in × kH × kW). torch.optim.Muon takes matrices alone.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.0, "unit_rows": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step. Parameters without a gradient are left alone."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        if not group["orthogonal"] and group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        buffer.mul_(group["momentum"]).add_(gradient)
        update = gradient.add(buffer, alpha=group["momentum"])
        if not group["orthogonal"]:
            parameter.add_(update, alpha=-group["lr"])
            return
        rows = len(parameter)
        if group["unit_rows"]:
            parameter.mul_(math.sqrt(rows) / parameter.norm())
        elif group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        columns = parameter.numel() // rows
        # Tall matrices get larger steps, for their outputs to change as much as those of square ones.
        scale = 1.0 if group["unit_rows"] else max(1.0, rows / columns) ** 0.5
        direction = orthogonalised(update.reshape(rows, columns)).view(parameter.shape)
        parameter.add_(direction, alpha=-group["lr"] * scale)


def orthogonalised(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """The nearest orthogonal matrix, roughly: singular values end between 0.7 and 1.2, singular vectors stay.

    Newton-Schulz iteration by an odd polynomial of degree five, with the coefficients of K. Jordan's Muon, in bf16,
    which it tolerates; (rows, columns) of any float dtype, which the result has as well.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    if len(x) > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)


class Average:
    """An exponential moving average of a model's weights, to be evaluated and kept in their place.

    torch's AveragedModel asks the device for its counter in every step, and so waits for it.

    Attributes:
        module: a copy of the model, with the averages as weights and the model's own buffers.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.blend = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes the weights after optimizer step `step` in; those after the first begin it."""
        ours, theirs = list(self.module.parameters()), list(model.parameters())
        if step == 1:
            torch._foreach_copy_(ours, theirs)
        else:
            self.blend(ours, theirs, None)
        if buffers := list(model.buffers()):
            torch._foreach_copy_(list(self.module.buffers()), buffers)


def set_rate(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int, steps: int) -> float:
    """Gives each group its own peak times the schedule's factor; returns the first group's rate."""
    factor = rate_factor(schedule, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor
    return optimizer.param_groups[0]["lr"]


def rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate of an optimizer step, as a share of its peak.

    Args:
        schedule: its shape.
        step: which step, 0 to steps - 1.
        steps: of the whole recipe, also where a run stops early.
    """
    warmup = schedule.warmup * steps
    rest = (step - warmup) / max(1.0, steps - warmup)  # 0 at the end of the warm-up, almost 1 at the last step
    if isinstance(schedule, OneCycle):
        # As in torch's: the peak is at step warmup - 1, the end at step steps - 1.
        peak = warmup - 1
        if step <= peak:
            return _half_cosine(schedule.initial, 1.0, step / max(1.0, peak))
        return _half_cosine(1.0, schedule.final, (step - peak) / max(1.0, steps - 1 - peak))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    match schedule:
        case Constant():
            return 1.0
        case Step(milestones, factor):
            return factor ** sum(step >= milestone * steps for milestone in milestones)
        case Cosine(_, final):
            return _half_cosine(1.0, final, rest)
        case Linear(_, final):
            return 1.0 + (final - 1.0) * rest


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
