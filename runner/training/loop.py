"""The training loop: read `train`, then `train_step`.

The Accelerator handles ranks and precision; the batches give every rank its slice of the same global batches.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from msgspec.structs import replace
from torch import nn

from runner.common.console import progress
from runner.config.recipe import Recipe
from runner.data import Batches
from runner.data.order import rank_seed
from runner.run.folder import Run
from runner.run.metrics import sync_metrics
from runner.run.schema import MetricRow
from runner.training import checkpoint, optim
from runner.training.evaluate import Evaluation, Views, evaluate
from runner.training.loss import Loss, make_loss
from runner.training.meter import LOG_EVERY, Meter, require_finite
from runner.training.model import masked_state_dict
from runner.training.state import TrainState, rebuild_ddp_buckets, to_cpu


class StoppedError(RuntimeError):
    """Training was asked to stop and can be resumed. Raised on all ranks at the same step."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}")


@dataclass(frozen=True)
class Data:
    """This rank's slices of the images that a model is trained and evaluated on."""

    train: Batches
    test: Batches
    validation: Batches | None
    classes: int

    @property
    def evaluated(self) -> dict[str, Batches]:
        """The splits that are evaluated after an epoch."""
        return ({"validation": self.validation} if self.validation else {}) | {"test": self.test}


@dataclass(frozen=True)
class LoopHooks:
    """How a run is checkpointed, stopped and resumed.

    Attributes:
        checkpoint_every: optimizer steps between checkpoints.
        checkpoint_seconds: each evaluation is followed by a checkpoint as well, but not sooner than these seconds
            after another, because a short epoch would wait for the disk.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        resume: the state of the checkpoint to resume from; None for a new run.
        should_stop: returns whether this rank was asked to stop.
        heartbeat: called after every step and every evaluated batch.
    """

    checkpoint_every: int | None = None
    checkpoint_seconds: float = 0.0
    evaluate_every: int = 1
    resume: dict[str, Any] | None = None
    should_stop: Callable[[], bool] = lambda: False
    heartbeat: Callable[[], None] = lambda: None

    def checkpoint_due(self, step: int) -> bool:
        """Returns whether `checkpoint_every` requires a checkpoint after `step` steps."""
        return self.checkpoint_every is not None and step % self.checkpoint_every == 0


class Pause:
    """A minimum time between two events, by the clock of rank 0."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = -math.inf

    def start(self) -> None:
        """Starts the time anew."""
        self.end = time.monotonic() + self.seconds

    def over(self, accelerator: Accelerator) -> bool:
        """Returns whether the time is over, the same on all ranks, which must all call it."""
        over = time.monotonic() >= self.end
        if accelerator.num_processes == 1:
            return over
        by_rank_0 = torch.tensor(float(over and accelerator.is_main_process), device=accelerator.device)
        return bool(accelerator.reduce(by_rank_0, "sum"))


@dataclass(frozen=True)
class TrainResult:
    """The evaluations after the last epoch, and the best epoch.

    Attributes:
        test: the evaluation on the test images.
        augmented: the same with test-time augmentation; None if the recipe does not use it.
        validation: the evaluation on the validation images; None if the recipe holds out none.
        steps, epochs: number of optimizer steps and epochs trained.
        best: the metrics of the epoch with the best accuracy, on the validation images if there are any.
    """

    test: Evaluation
    augmented: Evaluation | None
    validation: Evaluation | None
    steps: int
    epochs: float
    best: MetricRow


def train(
    model: nn.Module,
    recipe: Recipe,
    data: Data,
    accelerator: Accelerator,
    run: Run,
    seed: int,
    max_steps: int | None = None,
    teacher: nn.Module | None = None,
    log: Callable[[MetricRow], None] = lambda row: None,
    hooks: LoopHooks = LoopHooks(),
) -> TrainResult:
    """Trains a model, evaluates it after epochs as `hooks` say, and saves a checkpoint after the last epoch.

    Args:
        model: model with its initial weights (see runner.training.model), the same on every rank.
        recipe: how to train it.
        data: this rank's slices of the splits.
        accelerator: device, ranks and precision.
        run: the run folder, for checkpoints.
        seed: random seed for dropout; `data` already has the seed of order and augmentation.
        max_steps: stop after this many optimizer steps; the learning rate is scheduled for the whole recipe.
        teacher: model on the device for knowledge distillation, in addition to the labels; None for none.
        log: called with each row of metrics, on every rank.
        hooks: how the run is checkpointed, stopped and resumed.

    Raises:
        DivergedError: a loss or a weight is not finite.
        StoppedError: a rank was asked to stop; all ranks stopped at the same step, after a checkpoint was written.
        CheckpointError: a checkpoint could not be written; the previous one is intact.
    """
    state = TrainState(model, recipe, accelerator)
    loss_fn = make_loss(recipe, teacher, accelerator.autocast)
    torch.manual_seed(rank_seed(seed, accelerator.process_index))  # dropout differs between ranks
    steps_per_epoch = len(data.train)
    total_steps = recipe.epochs * steps_per_epoch
    last_step = min(total_steps, max_steps or total_steps)
    if hooks.resume is not None:
        restore(state, hooks.resume, loss_fn, data.train, recipe, last_step)

    def evaluate_splits(splits: dict[str, Batches], views: Views = "none") -> dict[str, Evaluation]:
        found = {name: evaluate_split(state.eval_model, split, data.classes, accelerator, views, hooks.heartbeat)
                 for name, split in splits.items()}  # fmt: skip
        for name, evaluation in found.items():
            require_finite(evaluation.loss, f"the {name} loss", f"at step {state.step}")
        return found

    def save_or_stop(evaluated: bool = False) -> None:
        stopping = state.step < last_step and any_rank_stops(hooks.should_stop, state.step, accelerator)
        ended = state.step == last_step
        if ended or stopping or hooks.checkpoint_due(state.step) or (evaluated and pause.over(accelerator)):
            save(state, writer, evaluated)
            pause.start()
        if stopping:
            writer.wait()
            raise StoppedError(state.step)

    evaluations: dict[str, Evaluation] = {}
    writer, pause = checkpoint.CheckpointWriter(run), Pause(hooks.checkpoint_seconds)
    with writer, progress("train", last_step, shown=accelerator.is_main_process) as advance:
        advance(state.step)
        while state.step < last_step:
            epoch, step_of_epoch = divmod(state.step, steps_per_epoch)
            if step_of_epoch == 0:
                state.meter = Meter(accelerator)
            state.ddp.train()
            for images, targets in data.train.epoch(epoch, step_of_epoch):
                lr = optim.set_lr(state.optimizer, recipe.schedule, state.step, total_steps)
                train_step(state, images, targets, data.train.size_of(state.step % steps_per_epoch), loss_fn, recipe)
                advance(1)
                hooks.heartbeat()
                row = row_at(state, steps_per_epoch)
                epoch_ends = state.step == last_step or state.step % steps_per_epoch == 0
                if epoch_ends or state.step % LOG_EVERY == 0:
                    log(replace(row, lr=lr, **state.meter.window(state.step)))
                if epoch_ends:
                    break
                save_or_stop()
            average_buffers(state.eval_model, accelerator)
            evaluate_now = state.step == last_step or (epoch + 1) % hooks.evaluate_every == 0
            evaluations = evaluate_splits(data.evaluated) if evaluate_now else {}
            row = replace(row, **state.meter.epoch(), **metrics_of(evaluations))
            log(row)
            if evaluate_now:
                state.best = max(state.best or row, row, key=selection_accuracy)
            save_or_stop(evaluate_now)
        # Within the block, at whose end the last checkpoint is waited for.
        if not evaluations:  # resumed at the last step
            evaluations = evaluate_splits(data.evaluated)
            state.best = state.best or replace(row_at(state, steps_per_epoch), **metrics_of(evaluations))
        augmented = evaluate_splits({"test": data.test}, views) if (views := recipe.test_augmentation) != "none" else {}
    assert state.best is not None, "the last epoch is always evaluated"
    return TrainResult(evaluations["test"], augmented.get("test"), evaluations.get("validation"), state.step,
                       state.step / steps_per_epoch, state.best)  # fmt: skip


def row_at(state: TrainState, steps_per_epoch: int) -> MetricRow:
    """Returns an empty row of metrics for the current step."""
    return MetricRow(global_step=state.step, epoch=state.step / steps_per_epoch)


def restore(
    state: TrainState, saved: dict[str, Any], loss_fn: Loss, batches: Batches, recipe: Recipe, last_step: int
) -> None:
    """Restores the state of a checkpoint.

    A checkpoint of the last step may have been written before buffers were averaged for evaluation; they are averaged
    here.
    """
    rebuild_ddp_buckets(state, loss_fn, batches, recipe)
    state.load_state_dict(saved)
    if state.step == last_step and not saved.get("evaluated", True):
        average_buffers(state.eval_model, state.accelerator)


def train_step(
    state: TrainState, images: torch.Tensor, targets: torch.Tensor, batch_size: int, loss_fn: Loss, recipe: Recipe
) -> None:
    """One optimizer step on this rank's slice of a global batch: images (n, 3, H, W), targets (n,) or (n, classes)."""
    accelerator = state.accelerator
    ranks = accelerator.num_processes
    count = min(recipe.accumulate, batch_size // ranks)  # the same on all ranks
    for micro_images, micro_targets, is_last in micro_batches(images, targets, count):
        with nullcontext() if is_last else accelerator.no_sync(state.ddp):
            logits = state.ddp(micro_images)
            loss = loss_fn(logits, micro_targets, micro_images)
            # DDP averages over ranks as if all had the same number of images; in a last batch they may not.
            accelerator.backward(loss * len(micro_targets) * (ranks / batch_size))
        state.meter.add(loss, logits, micro_targets)
    if recipe.clip_gradient:
        accelerator.clip_grad_norm_(state.model.parameters(), recipe.clip_gradient)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    if state.ema:
        state.ema.update(state.step)


def micro_batches(
    images: torch.Tensor, targets: torch.Tensor, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
    """Splits a batch into `count` micro-batches; yields the images and targets of each, and whether it is the last."""
    pairs = zip(images.tensor_split(count), targets.tensor_split(count), strict=True)
    for number, (micro_images, micro_targets) in enumerate(pairs, 1):
        yield micro_images, micro_targets, number == count


def save(state: TrainState, writer: checkpoint.CheckpointWriter, evaluated: bool) -> None:
    """Starts writing a checkpoint in the background; all ranks must call it.

    Raises:
        DivergedError: a loss or a weight is not finite; nothing was written.
    """
    state.meter.check(state.step, state.eval_model)
    everything = state.state_dict() | {"evaluated": evaluated}
    if state.accelerator.is_main_process:
        everything["metrics"] = dict(sync_metrics(writer.run))  # synced to disk before the checkpoint
        writer.save(to_cpu(masked_state_dict(state.eval_model)), state.step, everything)


def any_rank_stops(should_stop: Callable[[], bool], step: int, accelerator: Accelerator) -> bool:
    """Returns whether any rank was asked to stop; the answer is the same on all ranks.

    Checked after every step; on several GPUs, only at steps at which metrics wait for the device anyway.
    """
    if accelerator.num_processes == 1:
        return should_stop()
    if accelerator.device.type != "cpu" and step % LOG_EVERY:
        return False
    return bool(accelerator.reduce(torch.tensor(float(should_stop()), device=accelerator.device), "sum"))


def evaluate_split(
    model: nn.Module,
    batches: Batches,
    classes: int,
    accelerator: Accelerator,
    views: Views = "none",
    heartbeat: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluates a model on a split, on all ranks together, in the precision of training.

    Calls the model without DDP, whose forward would wait for ranks that have no images left.
    """
    images = batches.num_images / accelerator.num_processes
    with progress("evaluate", images, shown=accelerator.is_main_process) as advance, accelerator.autocast():

        def evaluated(count: float) -> None:
            advance(count)
            heartbeat()

        return evaluate(model, batches, classes, lambda tensor: accelerator.reduce(tensor, "sum"), evaluated, views)


def metrics_of(evaluations: dict[str, Evaluation]) -> dict[str, float]:
    """Returns the loss and accuracy of each split, by their names in MetricRow."""
    return {
        f"{split}_{name}": value
        for split, evaluation in evaluations.items()
        for name, value in (("loss", evaluation.loss), ("accuracy", evaluation.accuracy))
    }


def selection_accuracy(row: MetricRow) -> float:
    """Returns the accuracy that selects the best epoch: on the validation images, or else on the test images."""
    accuracy = row.test_accuracy if row.validation_accuracy is None else row.validation_accuracy
    assert accuracy is not None, "only rows of evaluations are compared"
    return accuracy


def average_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Averages batch-norm statistics over ranks.

    DDP would broadcast those of the first rank before every forward; averaging once before they are used is enough,
    and covers all images.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer, "mean"))
