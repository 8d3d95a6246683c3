"""Evaluates a model on every image of a split exactly once, on any number of ranks."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

Views = Literal["none", "flip", "flip-shift"]
"""The views of an image over which test-time augmentation averages the logits; see `augmented_views`."""


@dataclass(frozen=True)
class Evaluation:
    """The logits of a model and the labels for every image of a split, in file order, on the CPU.

    Attributes:
        logits: (N, classes) float32.
        labels: (N,) int64.
    """

    logits: torch.Tensor
    labels: torch.Tensor

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def predicted(self) -> torch.Tensor:
        """The predicted class of each image, (N,) int64."""
        return self.logits.argmax(1)

    @property
    def num_predicted_classes(self) -> int:
        """Number of classes that are predicted for at least one image."""
        return len(self.predicted.unique())

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy, in 0..1."""
        return (self.predicted == self.labels).sum().item() / self.num_images

    @property
    def loss(self) -> float:
        """Mean cross-entropy without label smoothing, in nats."""
        return F.cross_entropy(self.logits.double(), self.labels).item()

    @property
    def top5(self) -> float:
        """Top-5 accuracy, in 0..1; always 1 for five or fewer classes."""
        hits = self.logits.topk(min(5, self.logits.shape[1]), dim=1).indices == self.labels[:, None]
        return hits.any(1).double().mean().item()

    @property
    def class_accuracy(self) -> list[float | None]:
        """Top-1 accuracy of each class; None for a class without images."""
        return [row[k] / sum(row) if sum(row) else None for k, row in enumerate(self.confusion)]

    @property
    def calibration_error(self) -> float:
        """Expected calibration error with 15 bins of equal width, in 0..1.

        The difference between mean confidence and accuracy of each bin, weighted by the number of images in it.

        Guo et al. 2017, arXiv:1706.04599.
        """
        confidence = self.logits.double().softmax(1).amax(1)
        # Intervals (0, 1/15], (1/15, 2/15], …; NaN, which is no integer, stays NaN in the first.
        bins = (confidence * 15).ceil().long().clamp(min=1) - 1
        hits = (self.predicted == self.labels).double()
        distance = torch.zeros(15, dtype=torch.float64).index_add_(0, bins, confidence - hits)
        return distance.abs().sum().item() / self.num_images

    @property
    def confusion(self) -> list[list[int]]:
        """Number of images by [label][predicted class]."""
        classes = self.logits.shape[1]
        counts = torch.bincount(self.labels * classes + self.predicted, minlength=classes**2)
        return counts.reshape(classes, classes).tolist()

    def metrics(self) -> dict[str, float | list[float | None]]:
        """Returns all metrics except the confusion matrix, by name."""
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "top5": self.top5,
            "calibration_error": self.calibration_error,
            "class_accuracy": self.class_accuracy,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays for `predictions.npz`, by name."""
        return {"logits": self.logits.numpy(), "labels": self.labels.numpy()}


class EvaluationBatches(Protocol):
    """This rank's slices of the batches of a split, in file order; see `runner.data.Batches`."""

    @property
    def num_images(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def slice_of(self, step: int) -> slice: ...

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]: ...


def evaluate(
    forward: Callable[[torch.Tensor], torch.Tensor],
    batches: EvaluationBatches,
    num_classes: int,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    advance: Callable[[float], None] = lambda amount: None,
    views: Views = "none",
    before_batch: Callable[[int], None] = lambda batch: None,
) -> Evaluation:
    """Evaluates a model (in evaluation mode) or a function from images to logits, on the batches of all ranks.

    Every rank writes the logits of its slices into its rows of a table of zeros; the sum over ranks is the complete
    table. A column of counts verifies that every image was evaluated exactly once.

    Args:
        forward: maps images of `batches` to logits (N, num_classes), on any device.
        batches: this rank's slices of the split, in file order.
        num_classes: number of classes.
        sum_over_ranks: the all-reduce; the identity for one rank.
        advance: called after each batch of which this rank has images, with their number.
        views: average the logits over several views of each image (test-time augmentation).
        before_batch: called with the number of each batch before it is evaluated, on all ranks, also those that have no
            image of it; an exception that it raises ends the evaluation.

    Returns:
        The logits and labels of the whole split, on every rank.
    """
    table = torch.zeros(batches.num_images, num_classes + 2, dtype=torch.float32, device=batches.device)
    with torch.no_grad(), _evaluation_mode(forward):
        for step, (images, labels) in enumerate(batches.epoch(0)):
            before_batch(step)
            rows = batches.slice_of(step)
            if len(labels) == 0:  # a last batch with fewer images than ranks
                continue
            logits = [weight * forward(view).float() for weight, view in augmented_views(images, views)]
            table[rows, :num_classes] = torch.stack(logits).sum(0)
            table[rows, num_classes] = labels.float()
            table[rows, num_classes + 1] += 1
            advance(len(labels))
    table = sum_over_ranks(table).cpu()
    assert (table[:, -1] == 1).all(), "an image was evaluated twice or not at all"
    return Evaluation(table[:, :num_classes].clone(), table[:, num_classes].long())


@contextlib.contextmanager
def _evaluation_mode(forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Puts a module into evaluation mode, and restores that of each submodule on exit; does nothing for a function."""
    if not isinstance(forward, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in forward.modules()]
    forward.eval()
    try:
        yield
    finally:
        for module, training in modes:  # such as a batch norm that is frozen
            module.training = training


def augmented_views(images: torch.Tensor, kind: Views) -> list[tuple[float, torch.Tensor]]:
    """Returns the views of images (n, 3, H, W) for test-time augmentation, each with its weight; weights sum to 1.

    "none" returns only the image. "flip" adds its mirror image. "flip-shift" also adds the image shifted by one pixel
    up and left, and by one pixel down and right, with reflected edges, and the mirror images of both; the unshifted
    views together have half of the weight, as in airbench's `infer_mirror_translate`.
    """
    if kind == "none":
        return [(1.0, images)]
    shifted = [(1.0, images)]
    if kind == "flip-shift":
        _, _, height, width = images.shape
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        shifted = [(0.5, images), *((0.25, padded[:, :, k : k + height, k : k + width]) for k in (0, 2))]
    return [(weight / 2, view) for weight, image in shifted for view in (image, image.flip(3))]
