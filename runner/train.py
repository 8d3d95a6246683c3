"""The training loop.

Read `train` top to bottom: that is the algorithm. Ranks and precision live in the Accelerator and in the
batches, which hand every rank its slice of the same global batches.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from data_prep.console import progress
from runner import checkpoint, optim
from runner.batches import Batches
from runner.evaluate import Evaluation, evaluate
from runner.recipe import Architecture, Recipe
from runner.runs import Run

LOG_EVERY = 20  # optimizer steps between two rows of training metrics


class DivergedError(RuntimeError):
    """The training loss is not a finite number any more. Raised on all ranks at the same step."""


@dataclass(frozen=True)
class Outcome:
    """What training came to: the last evaluation, and the best epoch's accuracy beside it."""

    evaluation: Evaluation
    steps: int
    epochs: float
    best_accuracy: float
    best_epoch: float


def train(
    architecture: Architecture,
    recipe: Recipe,
    train_batches: Batches,
    test_batches: Batches,
    accelerator: Accelerator,
    run: Run,
    classes: int,
    seed: int,
    max_steps: int | None = None,
    log: Callable[[dict[str, float]], None] = lambda row: None,
) -> Outcome:
    """Trains from random weights; evaluates after every epoch; leaves a checkpoint of the last.

    Args:
        architecture, recipe: what to train and how.
        train_batches, test_batches: this rank's slices.
        accelerator: devices, ranks and precision.
        run: where checkpoints go.
        classes: of the dataset.
        seed: of weights and dropout; order and augmentation have it already.
        max_steps: stop after so many optimizer steps; the schedule is the whole recipe's all the same.
        log: receives the rows of metrics, which are the same on every rank; to be written on the first alone.
    """
    torch.manual_seed(seed)  # the same weights on every rank
    model = architecture.build().to(memory_format=torch.channels_last)
    optimizer = optim.build(recipe.optimizer, list(model.parameters()))
    model, optimizer = accelerator.prepare(model, optimizer)
    torch.manual_seed(seed + 1 + accelerator.process_index)  # a dropout of its own for every rank

    steps = recipe.epochs * len(train_batches)
    stop = min(steps, max_steps or steps)
    step, best_accuracy, best_epoch = 0, -1.0, 0.0
    with progress("train", stop, shown=accelerator.is_main_process) as advance:
        for epoch in range(recipe.epochs):
            meter = Meter(accelerator)
            model.train()
            for images, labels in train_batches.epoch(epoch):
                lr = optim.learning_rate(recipe.schedule, recipe.optimizer.lr, step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                logits = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
                # DDP averages over ranks as if each had the same share; a last partial batch may not divide.
                weight = len(labels) * accelerator.num_processes / train_batches.size_of(step % len(train_batches))
                accelerator.backward(loss * weight)
                optimizer.step()
                optimizer.zero_grad()
                meter.add(loss, logits, labels)
                step += 1
                advance(1)
                last = step == stop or step % len(train_batches) == 0
                if last or step % LOG_EVERY == 0:
                    passes = step / len(train_batches)
                    log({"global_step": step, "epoch": passes, "lr": lr, **meter.window(step)})
                if step == stop:
                    break

            sync_buffers(model, accelerator)
            evaluation = score(model, test_batches, classes, accelerator)
            log({"global_step": step, "epoch": passes, **meter.epoch(), **named(evaluation)})
            if evaluation.accuracy > best_accuracy:
                best_accuracy, best_epoch = evaluation.accuracy, passes
            if accelerator.is_main_process:
                checkpoint.save(run, accelerator.unwrap_model(model), step, epoch)
            if step == stop:
                break
    return Outcome(evaluation, step, passes, best_accuracy, best_epoch)


def score(model: nn.Module, batches: Batches, classes: int, accelerator: Accelerator) -> Evaluation:
    """Evaluates on all ranks together, in the precision of training."""
    bare = accelerator.unwrap_model(model)  # DDP's forward would wait for ranks that have no images left
    ours = batches.samples / accelerator.num_processes
    with progress("evaluate", ours, shown=accelerator.is_main_process) as advance:
        return evaluate(bare, batches, classes, lambda tensor: accelerator.reduce(tensor, "sum"), advance)


def named(evaluation: Evaluation) -> dict[str, float]:
    """The row of metrics of an evaluation on the test images."""
    return {"test/loss": evaluation.loss, "test/accuracy": evaluation.accuracy}


def sync_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Averages batch-norm statistics over ranks.

    DDP would broadcast the first rank's before every forward; once before they are used is enough, and the
    average has seen all images.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer, "mean"))


class Meter:
    """Means of loss and hits since the last row and since the start of the epoch, without a wait in any step."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)  # of loss and hits, this rank's
        self.images = 0
        self.epoch_sums = [0.0, 0.0, 0.0]  # loss, hits and images, of all ranks
        self.since = time.perf_counter()

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds a step: loss (), logits (n, classes), labels (n,) or targets (n, classes)."""
        if labels.ndim == 2:  # mixed images; the class with the larger share counts
            labels = labels.argmax(1)
        hits = (logits.detach().argmax(1) == labels).sum()
        self.sums += torch.stack([loss.detach().double() * len(labels), hits.double()])
        self.images += len(labels)

    def window(self, step: int) -> dict[str, float]:
        """Means since the last call, over all ranks.

        Raises:
            DivergedError: the loss is not finite, on any rank.
        """
        ours = torch.cat([self.sums, self.sums.new_tensor([self.images])])
        loss, hits, images = sums = self.accelerator.reduce(ours, "sum").tolist()
        self.epoch_sums = [total + part for total, part in zip(self.epoch_sums, sums, strict=True)]
        self.sums, self.images = torch.zeros_like(self.sums), 0
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        if not math.isfinite(loss):
            raise DivergedError(f"the training loss is {loss} within the {LOG_EVERY} steps before step {step}")
        return {"train/loss": loss / images, "train/accuracy": hits / images, "images_per_second": images / seconds}

    def epoch(self) -> dict[str, float]:
        """Means over the windows of the epoch, over all ranks."""
        loss, hits, images = self.epoch_sums
        return {"train_epoch/loss": loss / images, "train_epoch/accuracy": hits / images}
