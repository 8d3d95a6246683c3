"""The training loss: cross-entropy with labels or class probabilities, optionally with knowledge distillation."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from runner.config.recipe import Recipe

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_loss(
    recipe: Recipe, teacher: nn.Module | None, autocast: Callable[[], AbstractContextManager] = nullcontext
) -> Loss:
    """Returns the loss of a recipe, as a function of logits (N, classes), targets, and images (N, 3, H, W).

    Targets are labels (N,) or probabilities (N, classes). With a teacher, adds knowledge distillation (Hinton et al.
    2015, arXiv:1503.02531): the KL divergence between teacher and student at the recipe's temperature, multiplied by
    its square to keep the scale of the gradient. The teacher runs under `autocast`, in the precision of training.
    """

    def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)

    if teacher is None:
        return cross_entropy

    def distillation(logits: torch.Tensor, targets: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), autocast():
            teacher_log_probs = F.log_softmax(teacher(images).float() / recipe.teacher_temperature, 1)
        student_log_probs = F.log_softmax(logits.float() / recipe.teacher_temperature, 1)
        divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
        divergence = divergence * recipe.teacher_temperature**2
        weight = recipe.teacher_weight
        return weight * divergence + (1 - weight) * cross_entropy(logits, targets, images)

    return distillation
