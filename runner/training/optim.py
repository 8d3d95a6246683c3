"""Builds optimizers from recipes, and computes the learning rate as a function of the step."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from runner.config import recipe as recipes
from runner.config.recipe import Constant, Cosine, Linear, OneCycle, Schedule, Step


def build_optimizer(recipe: recipes.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the recipe's optimizer for the trainable parameters of `model`, fused where torch supports it."""
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
            return build_muon(recipe, model)


def build_muon(recipe: recipes.Muon, model: nn.Module) -> "Muon":
    """Builds Muon for filters and matrices, with SGD for the last linear layer and all other parameters."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    excluded = {id(parameter) for module in last for parameter in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.ndim > 1 and id(p) not in excluded]
    matrix_ids = {id(p) for p in matrices}
    muon_group = {
        "params": matrices,
        "orthogonal": True,
        "unit_rows": recipe.unit_rows,
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
        super().__init__(groups, {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.0, "unit_rows": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # takes no closure
        """Updates all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
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
        # Tall matrices get larger steps, so that their outputs change as much as those of square ones.
        scale = 1.0 if group["unit_rows"] else max(1.0, rows / columns) ** 0.5
        direction = orthogonalized(update.reshape(rows, columns)).view(parameter.shape)
        parameter.add_(direction, alpha=-group["lr"] * scale)


def orthogonalized(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Approximates the nearest orthogonal matrix: singular values become 0.7 to 1.2, singular vectors are unchanged.

    Uses Newton-Schulz iteration in bf16 with an odd polynomial of degree five and the coefficients of K. Jordan's Muon.

    Args:
        matrix: (rows, columns), of any float dtype; the result has the same dtype.
        iterations: number of iterations.
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


class EMA:
    """An exponential moving average of a model's weights, which is evaluated and saved in their place.

    Replaces torch's AveragedModel, which reads its counter from the device at every step and thus synchronizes with
    the GPU.

    Attributes:
        module: a copy of the model with averaged parameters and current buffers.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.update_averages = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Updates the average after optimizer step `step`; step 1 initializes it."""
        averages: list[torch.Tensor] = list(self.module.parameters())
        parameters: list[torch.Tensor] = list(model.parameters())
        if step == 1:
            torch._foreach_copy_(averages, parameters)
        else:
            self.update_averages(averages, parameters, None)
        if buffers := list(model.buffers()):
            torch._foreach_copy_(list(self.module.buffers()), buffers)


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int, steps: int) -> float:
    """Sets the learning rate of each group to its peak times the schedule's factor; returns that of the first group."""
    factor = lr_factor(schedule, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor
    return optimizer.param_groups[0]["lr"]


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
        return _cosine(1.0, schedule.final, (step - peak) / max(1.0, steps - 1 - peak))
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
