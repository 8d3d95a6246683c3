"""Scores a model on a whole split, each image exactly once, on any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from runner.batches import Batches


@dataclass(frozen=True)
class Evaluation:
    """What a model said of every image of a split, in file order, on the CPU.

    logits (N, classes) float32; labels (N,) int64.
    """

    logits: torch.Tensor
    labels: torch.Tensor

    @property
    def images(self) -> int:
        """How many images were scored."""
        return len(self.labels)

    @property
    def predicted(self) -> torch.Tensor:
        """The class of the largest logit, (N,) int64."""
        return self.logits.argmax(1)

    @property
    def accuracy(self) -> float:
        """Top-1, in 0..1."""
        return (self.predicted == self.labels).sum().item() / self.images

    @property
    def loss(self) -> float:
        """Mean cross-entropy without label smoothing, in nats."""
        return F.cross_entropy(self.logits.double(), self.labels).item()

    @property
    def confusion(self) -> list[list[int]]:
        """Images by [label][predicted class]."""
        classes = self.logits.shape[1]
        counts = torch.bincount(self.labels * classes + self.predicted, minlength=classes**2)
        return counts.reshape(classes, classes).tolist()

    def arrays(self) -> dict[str, np.ndarray]:
        """For `predictions.npz`."""
        return {"logits": self.logits.numpy(), "labels": self.labels.numpy()}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    classes: int,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    advance: Callable[[float], None] = lambda amount: None,
) -> Evaluation:
    """Scores `model` in evaluation mode and puts it back into the mode it was in.

    Every rank scores its slices and writes them into their own rows of one table; the sum over ranks is the
    whole table. A column that counts proves that no image was scored twice or left out.

    Args:
        model: maps (N, 3, H, W) to logits (N, classes); on the device of the batches.
        batches: of the split, in file order.
        classes: how many.
        sum_over_ranks: the all-reduce; the identity for one rank.
        advance: told how many images were just scored.
    """
    was_training = model.training
    model.eval()
    table = torch.zeros(batches.samples, classes + 2, dtype=torch.float32)
    for step, (images, labels) in enumerate(batches.epoch(0)):
        rows = batches.slice_of(step)
        if len(labels) == 0:  # a last batch with fewer images than ranks
            continue
        table[rows, :classes] = model(images).float().cpu()
        table[rows, classes] = labels.float().cpu()
        table[rows, classes + 1] += 1
        advance(len(labels))
    model.train(was_training)
    table = sum_over_ranks(table.to(_device_of(model))).cpu()
    assert (table[:, -1] == 1).all(), "an image was scored twice or not at all"
    return Evaluation(table[:, :classes].clone(), table[:, classes].long())


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
