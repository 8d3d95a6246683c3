"""Computes the mean loss, accuracy and speed over training steps, and detects divergence."""

import math
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from runner.system import cpu

Batch = TypeVar("Batch")
LOG_EVERY = 20  # optimizer steps between two rows of training metrics


class DivergedError(RuntimeError):
    """A loss or a weight is no longer a finite number. Raised on all ranks at the same step."""


class Meter:
    """Sums the loss and the number of correct predictions on the device, so that no step waits for the device.

    Args:
        accelerator: reduces the sums over all ranks.
        state: the state dict of an earlier meter to continue from; None to start from zero.

    Attributes:
        grad_norm: the norm of the last step's gradient, (), the same on all ranks; None if it was not computed.
    """

    def __init__(self, accelerator: Accelerator, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.accelerator = accelerator
        zeros = torch.zeros(2, dtype=torch.float64)
        self.sums = state.get("sums", zeros).to(accelerator.device)  # loss and correct predictions, on this rank
        self.images = state.get("images", 0)
        self.epoch_sums = state.get("epoch_sums", [0.0, 0.0, 0.0])  # loss, correct and images, over all ranks
        norm: torch.Tensor | None = state.get("grad_norm")
        self.grad_norm = None if norm is None else norm.to(accelerator.device)
        self.since = time.perf_counter()
        self.data_seconds, self.steps = 0.0, 0  # since then, by the host's clock, which waits for no device

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's sums."""
        norm = None if self.grad_norm is None else self.grad_norm.cpu()
        return {"sums": self.sums.cpu(), "images": self.images, "epoch_sums": self.epoch_sums, "grad_norm": norm}

    def add(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds a micro-batch: loss (), logits (N, classes), targets (N,) labels or (N, classes) probabilities."""
        if targets.ndim == 2:  # mixed images: the class with the larger share counts
            targets = targets.argmax(1)
        correct = (logits.detach().argmax(1) == targets).sum()
        self.sums += torch.stack([loss.detach().double() * len(targets), correct.double()])
        self.images += len(targets)

    def timed(self, batches: Iterator[Batch], step: int, before_step: Callable[[int], None]) -> Iterator[Batch]:
        """Yields the batches of the steps from `step`, measures how long each takes, and calls `before_step` first."""
        for number in count(step):
            before_step(number)
            requested = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.data_seconds += time.perf_counter() - requested
            self.steps += 1
            yield batch

    def pending(self) -> bool:
        """Returns whether images were added since the last window, on any rank."""
        images = torch.tensor(float(self.images), device=self.accelerator.device)
        return bool(self.accelerator.reduce(images, "sum"))

    def window(self, step: int) -> dict[str, float]:
        """Returns the means over all ranks since the last call, by their names in MetricRow.

        Raises:
            DivergedError: the loss is not finite, on any rank.
        """
        norms = [] if self.grad_norm is None else [self.grad_norm.double().view(1)]
        local = torch.cat([self.sums, self.sums.new_tensor([self.images]), *norms])
        loss, correct, images, *norms_of_ranks = self.accelerator.reduce(local, "sum").tolist()
        require_finite(loss, "the training loss", f"within the {LOG_EVERY} steps before step {step}")
        self.epoch_sums = [a + b for a, b in zip(self.epoch_sums, (loss, correct, images), strict=True)]
        self.sums, self.images, self.grad_norm = torch.zeros_like(self.sums), 0, None
        metrics = {"train_loss": loss / images, "train_accuracy": correct / images}
        if norms_of_ranks and math.isfinite(norms_of_ranks[0]):  # fp16 skips steps in which it is not
            metrics["train_grad_norm"] = norms_of_ranks[0] / self.accelerator.num_processes
        return metrics | self.speed(images)

    def speed(self, images: float) -> dict[str, float]:
        """Returns the speed over all ranks since the last call, and this rank's memory, by their names in MetricRow."""
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        metrics = {"images_per_second": images / seconds, "memory_gb": peak_memory(self.accelerator.device) / 1e9}
        if self.steps:
            metrics["data_seconds"] = self.data_seconds / self.steps
            metrics["compute_seconds"] = (seconds - self.data_seconds) / self.steps
        self.data_seconds, self.steps = 0.0, 0
        return metrics

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


def gradient_norm(model: nn.Module, scaler: torch.amp.GradScaler | None) -> torch.Tensor:
    """Returns the norm of the gradient of all parameters, (); divides by the loss scale of fp16, if there is one."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return norm if scaler is None else norm / scaler.scale(torch.ones_like(norm))


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes that this process has held since it started: of the GPU, or else resident in memory."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else cpu.peak_memory()


def flops_utilization(images_per_second: float, macs: int, ranks: int, peak_tflops: float) -> float:
    """Returns the fraction of the devices' peak that a model's arithmetic takes.

    A step takes 6 FLOPs per image and multiply-accumulate of the forward pass: 2 in the forward pass, and twice as many
    in the backward pass.

    Args:
        images_per_second: speed of training, over all ranks.
        macs: multiply-accumulates of the forward pass of one image.
        ranks: number of ranks, each with a device.
        peak_tflops: peak of a device, in 10^12 FLOPs per second.
    """
    return 6 * macs * images_per_second / (ranks * peak_tflops * 1e12)


def require_finite(value: float, what: str, when: str) -> None:
    """Raises DivergedError if `value`, which is the same on all ranks, is not finite."""
    if not math.isfinite(value):
        raise DivergedError(f"{what} is {value} {when}")
