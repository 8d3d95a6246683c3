"""Scores a model on a whole split, each image exactly once, on any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from runner.batches import Batches

Views = Literal["none", "flip", "flip-shift"]  # of each image, over which test-time augmentation takes the mean


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
    def top5(self) -> float:
        """Share of images whose label is among the five largest logits."""
        found = self.logits.topk(min(5, self.logits.shape[1]), dim=1).indices == self.labels[:, None]
        return found.any(1).double().mean().item()

    @property
    def class_accuracy(self) -> list[float | None]:
        """Top-1 of each class's images; None for a class without any."""
        return [row[k] / sum(row) if sum(row) else None for k, row in enumerate(self.confusion)]

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: the mean distance of confidence from accuracy, in 15 bins of confidence.

        Guo et al. 2017, arXiv:1706.04599.
        """
        confidence = self.logits.double().softmax(1).amax(1)
        bins = (confidence * 15).ceil().long().clamp(1, 15) - 1  # of (0, 1/15], (1/15, 2/15], …
        hits = (self.predicted == self.labels).double()
        distance = torch.zeros(15, dtype=torch.float64).index_add_(0, bins, confidence - hits)
        return distance.abs().sum().item() / self.images

    @property
    def confusion(self) -> list[list[int]]:
        """Images by [label][predicted class]."""
        classes = self.logits.shape[1]
        counts = torch.bincount(self.labels * classes + self.predicted, minlength=classes**2)
        return counts.reshape(classes, classes).tolist()

    def figures(self) -> dict[str, float | list[float | None]]:
        """Accuracy, loss and the rest by name, for `summary.json`."""
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "top5": self.top5,
            "calibration_error": self.calibration_error,
            "class_accuracy": self.class_accuracy,
        }

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
    views: Views = "none",
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
        views: score the mean over several views of each image (test-time augmentation).
    """
    was_training = model.training
    model.eval()
    table = torch.zeros(batches.samples, classes + 2, dtype=torch.float32, device=_device_of(model))
    for step, (images, labels) in enumerate(batches.epoch(0)):
        rows = batches.slice_of(step)
        if len(labels) == 0:  # a last batch with fewer images than ranks
            continue
        logits = [model(view).float() for view in views_of(images, views)]
        table[rows, :classes] = torch.stack(logits).mean(0)
        table[rows, classes] = labels.float()
        table[rows, classes + 1] += 1
        advance(len(labels))
    model.train(was_training)
    table = sum_over_ranks(table).cpu()
    assert (table[:, -1] == 1).all(), "an image was scored twice or not at all"
    return Evaluation(table[:, :classes].clone(), table[:, classes].long())


def views_of(images: torch.Tensor, kind: Views) -> list[torch.Tensor]:
    """The views of (n, 3, H, W) images over which test-time augmentation takes the mean.

    The image alone; with its mirror image; or these two as they are and shifted by a pixel up and left, and down
    and right, the edge reflected.
    """
    shifted = [images]
    if kind == "flip-shift":
        _, _, height, width = images.shape
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        shifted += [padded[:, :, k : k + height, k : k + width] for k in (0, 2)]
    return shifted if kind == "none" else [view for image in shifted for view in (image, image.flip(3))]


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
