"""Computes the mean loss and accuracy over training steps, and detects divergence."""

import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

LOG_EVERY = 20  # optimizer steps between two rows of training metrics


class DivergedError(RuntimeError):
    """A loss or a weight is no longer a finite number. Raised on all ranks at the same step."""


class Meter:
    """Sums the loss and the number of correct predictions on the device, so that no step waits for the device.

    Args:
        accelerator: reduces the sums over all ranks.
        state: the state dict of an earlier meter to continue from; None to start from zero.
    """

    def __init__(self, accelerator: Accelerator, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.accelerator = accelerator
        zeros = torch.zeros(2, dtype=torch.float64)
        self.sums = state.get("sums", zeros).to(accelerator.device)  # loss and correct predictions, on this rank
        self.images = state.get("images", 0)
        self.epoch_sums = state.get("epoch_sums", [0.0, 0.0, 0.0])  # loss, correct and images, over all ranks
        self.since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's sums."""
        return {"sums": self.sums.cpu(), "images": self.images, "epoch_sums": self.epoch_sums}

    def add(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds a micro-batch: loss (), logits (N, classes), targets (N,) labels or (N, classes) probabilities."""
        if targets.ndim == 2:  # mixed images: the class with the larger share counts
            targets = targets.argmax(1)
        correct = (logits.detach().argmax(1) == targets).sum()
        self.sums += torch.stack([loss.detach().double() * len(targets), correct.double()])
        self.images += len(targets)

    def pending(self) -> bool:
        """Returns whether images were added since the last window, on any rank."""
        images = torch.tensor(float(self.images), device=self.accelerator.device)
        return bool(self.accelerator.reduce(images, "sum"))

    def window(self, step: int) -> dict[str, float]:
        """Returns the means over all ranks since the last call, by their names in MetricRow.

        Raises:
            DivergedError: the loss is not finite, on any rank.
        """
        local = torch.cat([self.sums, self.sums.new_tensor([self.images])])
        loss, correct, images = sums = self.accelerator.reduce(local, "sum").tolist()
        require_finite(loss, "the training loss", f"within the {LOG_EVERY} steps before step {step}")
        self.epoch_sums = [total + part for total, part in zip(self.epoch_sums, sums, strict=True)]
        self.sums, self.images = torch.zeros_like(self.sums), 0
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return {
            "train_loss": loss / images,
            "train_accuracy": correct / images,
            "images_per_second": images / seconds,
        }

    def epoch(self) -> dict[str, float]:
        """Returns the means over all ranks and over the windows of the epoch, by their names in MetricRow."""
        loss, correct, images = self.epoch_sums
        return {"train_epoch_loss": loss / images, "train_epoch_accuracy": correct / images}

    def check(self, step: int, model: nn.Module) -> None:
        """Raises DivergedError if the loss since the last window or a weight is not finite, on any rank."""
        tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
        weights = torch.stack([tensor.detach().double().sum() for tensor in tensors]).sum()
        loss, weights = self.accelerator.reduce(torch.stack([self.sums[0], weights]), "sum").tolist()
        require_finite(loss, "the training loss", f"within the {LOG_EVERY} steps before step {step}")
        require_finite(weights, "the sum of the weights", f"at step {step}")


def require_finite(value: float, what: str, when: str) -> None:
    """Raises DivergedError if `value`, which is the same on all ranks, is not finite."""
    if not math.isfinite(value):
        raise DivergedError(f"{what} is {value} {when}")
