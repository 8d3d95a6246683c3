"""What training makes small: cross-entropy to labels or mixed targets, and the distance from a teacher."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from runner.recipe import Recipe

Objective = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def of(
    recipe: Recipe, teacher: nn.Module | None, autocast: Callable[[], AbstractContextManager] = nullcontext
) -> Objective:
    """The loss of a recipe: a function of logits (n, classes), labels (n,) or targets (n, classes), and images.

    With a teacher, Hinton et al. 2015, arXiv:1503.02531: the divergence between both models' softened predictions,
    times the squared temperature so that its gradient keeps its size, beside the cross-entropy. The teacher
    computes within `autocast`, in the precision of training.
    """

    def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)

    if teacher is None:
        return cross_entropy

    def distillation(logits: torch.Tensor, targets: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), autocast():
            wanted = F.log_softmax(teacher(images).float() / recipe.teacher_temperature, 1)
        ours = F.log_softmax(logits.float() / recipe.teacher_temperature, 1)
        distance = F.kl_div(ours, wanted, reduction="batchmean", log_target=True) * recipe.teacher_temperature**2
        weight = recipe.teacher_weight
        return weight * distance + (1 - weight) * cross_entropy(logits, targets, images)

    return distillation
