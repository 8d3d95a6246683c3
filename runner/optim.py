"""Optimizers from recipes, and the learning rate as a pure function of the step."""

import math

import torch

from runner.recipe import SGD, Adam, Constant, Cosine


def build(recipe: SGD | Adam, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer that the recipe names, fused into one pass over the parameters."""
    match recipe:
        case SGD(lr, momentum, nesterov, weight_decay):
            return torch.optim.SGD(
                parameters, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True
            )
        case Adam(lr, betas, weight_decay):
            return torch.optim.Adam(parameters, lr, betas, weight_decay=weight_decay, fused=True)


def learning_rate(schedule: Constant | Cosine, peak: float, step: int, steps: int) -> float:
    """The learning rate of an optimizer step.

    Args:
        schedule: its shape.
        peak: its highest value.
        step: which step, 0 to steps - 1.
        steps: of the whole recipe, also where a run stops early.
    """
    warmup = schedule.warmup * steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if isinstance(schedule, Constant):
        return peak
    progress = (step - warmup) / max(1.0, steps - warmup)
    return peak * (schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * progress)) / 2)
