"""The training loop: read `train`, then `train_step`.

The Accelerator handles ranks and precision; the batches give every rank its slice of the same global batches.
"""

import math
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from msgspec.structs import replace
from torch import nn

from runner.common.console import progress
from runner.config.recipe import Recipe
from runner.data import Batches
from runner.data.order import rank_seed
from runner.run.folder import Run
from runner.run.metrics import fsync_metrics
from runner.run.schema import MetricRow
from runner.training import checkpoint, optim
from runner.training.evaluate import Evaluation, Views, evaluate
from runner.training.loss import Loss, make_loss
from runner.training.meter import LOG_EVERY, Meter, gradient_norm, require_finite
from runner.training.model import masked_state_dict
from runner.training.state import TrainState, rebuild_ddp_buckets, to_cpu


class StoppedError(RuntimeError):
    """Training was asked to stop and can be resumed. Raised on all ranks at the same step."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}")


@dataclass(frozen=True)
class TrainingData:
    """This rank's slices of the images that a model is trained and evaluated on."""

    train: Batches
    test: Batches
    validation: Batches | None
    classes: int

    @property
    def eval_splits(self) -> dict[str, Batches]:
        """The splits that are evaluated after an epoch."""
        return ({"validation": self.validation} if self.validation else {}) | {"test": self.test}


@dataclass(frozen=True)
class Steps:
    """Numbers of optimizer steps: per epoch, for the whole recipe, and of the step at which training ends."""

    per_epoch: int
    total: int
    last: int

    @classmethod
    def of(cls, recipe: Recipe, train: Sized, max_steps: int | None) -> "Steps":
        """Counts the steps; `train` has the batches of an epoch, and `max_steps` may end training earlier."""
        total = recipe.epochs * len(train)
        return cls(len(train), total, min(total, max_steps or total))

    def is_epoch_end(self, step: int) -> bool:
        """Returns whether this step, counted from 1, is the last of an epoch or of training."""
        return step == self.last or step % self.per_epoch == 0

    def is_logged(self, step: int) -> bool:
        """Returns whether a row of metrics follows this step."""
        return step % LOG_EVERY == 0 or self.is_epoch_end(step)


@dataclass(frozen=True)
class LoopOptions:
    """How a run is checkpointed, evaluated, stopped and resumed, and what is called meanwhile.

    Attributes:
        checkpoint_every: optimizer steps between checkpoints.
        checkpoint_seconds: minimum number of seconds between the previous checkpoint and one that follows an
            evaluation, so that short epochs do not wait for the disk.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        resume: the state of the checkpoint to resume from; None for a new run.
        should_stop: returns whether this rank was asked to stop.
        stop_after_step: step after which all ranks stop, as if they were asked to; None to train to the end.
        heartbeat: called after every step and every evaluated batch.
        before_step, after_step: called with the number of the optimizer step, counted from 1, before its batch is read
            and after the weights are updated.
    """

    checkpoint_every: int | None = None
    checkpoint_seconds: float = 0.0
    evaluate_every: int = 1
    resume: dict[str, Any] | None = None
    should_stop: Callable[[], bool] = lambda: False
    stop_after_step: int | None = None
    heartbeat: Callable[[], None] = lambda: None
    before_step: Callable[[int], None] = lambda step: None
    after_step: Callable[[int], None] = lambda step: None

    def checkpoint_due(self, step: int) -> bool:
        """Returns whether `checkpoint_every` requires a checkpoint after `step` steps."""
        return self.checkpoint_every is not None and step % self.checkpoint_every == 0


class CheckpointManager:
    """Saves the state of training when a checkpoint is due, and stops training when a rank was asked to.

    Used as a context manager; on exit, waits until the last checkpoint is written.
    """

    def __init__(self, run: Run, options: LoopOptions, accelerator: Accelerator) -> None:
        self.options, self.accelerator = options, accelerator
        self.writer = checkpoint.CheckpointWriter(run)
        self.next_save_time = -math.inf  # by the clock of this rank

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *error: Any) -> None:
        self.writer.__exit__(*error)

    def save_or_stop(self, state: TrainState, evaluated: bool = False, ended: bool = False) -> None:
        """Called after every step but the last of an epoch, and after every epoch; all ranks must call it.

        Args:
            state: the state to save.
            evaluated: whether the state was evaluated.
            ended: whether training has ended, which is always followed by a checkpoint.

        Raises:
            StoppedError: training was asked to stop; the checkpoint is on disk.
        """
        options = self.options
        paused = state.step == options.stop_after_step
        stopping = not ended and (paused or any_rank_should_stop(options.should_stop, state.step, self.accelerator))
        if stopping:
            self.save_and_stop(state, evaluated)
        if ended or options.checkpoint_due(state.step) or (evaluated and self.interval_elapsed()):
            save(state, self.writer, evaluated)
            self.next_save_time = time.monotonic() + options.checkpoint_seconds

    def stop_if_requested(self, state: TrainState, batch: int, evaluated: bool) -> None:
        """Called before each batch of an evaluation, which can take long; all ranks must call it.

        Args:
            state: the state that is evaluated.
            batch: number of the batch.
            evaluated: whether the metrics of this step are already logged. If not, a run that resumes repeats this
                evaluation first.

        Raises:
            StoppedError: training was asked to stop; the checkpoint is on disk.
        """
        if any_rank_should_stop(self.options.should_stop, batch, self.accelerator):
            self.save_and_stop(state, evaluated, evaluating=not evaluated)

    def save_and_stop(self, state: TrainState, evaluated: bool, evaluating: bool = False) -> NoReturn:
        """Writes a checkpoint (see `save`), waits until it is on disk, and raises StoppedError."""
        save(state, self.writer, evaluated, evaluating)
        self.writer.wait()
        raise StoppedError(state.step)

    def interval_elapsed(self) -> bool:
        """Returns whether the last checkpoint is old enough, by the clock of rank 0; the same on all ranks."""
        over = time.monotonic() >= self.next_save_time
        if self.accelerator.num_processes == 1:
            return over
        by_rank_0 = torch.tensor(float(over and self.accelerator.is_main_process), device=self.accelerator.device)
        return bool(self.accelerator.reduce(by_rank_0, "sum"))


@dataclass(frozen=True)
class TrainResult:
    """The evaluations after the last epoch, or with early stopping those of the best one.

    Attributes:
        test: the evaluation on the test images.
        augmented: the same with test-time augmentation; None if the recipe does not use it.
        validation: the evaluation on the validation images; None if the recipe holds out none.
        steps, epochs: number of optimizer steps and epochs trained.
        stopped_early: whether early stopping ended training before the last epoch.
        best: the metrics of the epoch with the best accuracy, on the validation images if there are any.
    """

    test: Evaluation
    augmented: Evaluation | None
    validation: Evaluation | None
    steps: int
    epochs: float
    stopped_early: bool
    best: MetricRow


def train(
    model: nn.Module,
    recipe: Recipe,
    data: TrainingData,
    accelerator: Accelerator,
    run: Run,
    seed: int,
    max_steps: int | None = None,
    teacher: nn.Module | None = None,
    log: Callable[[MetricRow], None] = lambda row: None,
    options: LoopOptions = LoopOptions(),
) -> TrainResult:
    """Trains a model, evaluates it every `options.evaluate_every` epochs, and saves a checkpoint after the last one.

    Args:
        model: model with its initial weights (see runner.training.model), the same on every rank.
        recipe: how to train it.
        data: this rank's slices of the splits.
        accelerator: device, ranks and precision.
        run: the run folder, for checkpoints.
        seed: random seed for dropout; `data` already has the seed of order and augmentation.
        max_steps: stop after this many optimizer steps; the learning rate is scheduled for the whole recipe.
        teacher: model on the device for knowledge distillation, in addition to the labels; None to train without one.
        log: called with each row of metrics, on every rank.
        options: how the run is checkpointed, stopped and resumed.

    Raises:
        DivergedError: a loss or a weight is not finite.
        StoppedError: a rank was asked to stop; all ranks stopped at the same step, after a checkpoint was written.
        CheckpointError: a checkpoint could not be written; the previous one is intact.
    """
    state = TrainState(model, recipe, accelerator)
    loss_fn = make_loss(recipe, teacher, accelerator.autocast)
    torch.manual_seed(rank_seed(seed, accelerator.process_index))  # dropout differs between ranks
    steps = Steps.of(recipe, data.train, max_steps)
    if options.resume is not None:
        rebuild_ddp_buckets(state, loss_fn, data.train, recipe)
        state.load_state_dict(options.resume)
        state.require_same_on_ranks()

    evaluations: dict[str, Evaluation] = {}
    with (
        CheckpointManager(run, options, accelerator) as checkpoints,
        progress("train", steps.last, shown=accelerator.is_main_process) as advance,
    ):
        evaluator = Evaluator(state, data, steps, recipe.patience, log, options, checkpoints)
        advance(state.step)
        if options.resume and options.resume.get("evaluating"):  # stopped during the evaluation of this step
            evaluations = evaluator.end_epoch(evaluate_now=True, buffers_averaged=True)
        while not evaluator.training_ended:
            epoch, start = divmod(state.step, steps.per_epoch)
            if start == 0:
                state.meter = Meter(accelerator)
            state.ddp.train()
            for batch in state.meter.timed(data.train.epoch(epoch, start), state.step + 1, options.before_step):
                optim.set_lr(state.optimizer, recipe.schedule, state.step, steps.total)
                size, logged = data.train.size_of(state.step % steps.per_epoch), steps.is_logged(state.step + 1)
                train_step(state, *batch, size, loss_fn, recipe, logged or options.checkpoint_due(state.step + 1))
                advance(1)
                options.heartbeat()
                options.after_step(state.step)
                if logged:
                    evaluator.log_window()
                if steps.is_epoch_end(state.step):
                    break
                checkpoints.save_or_stop(state)
            evaluations = evaluator.end_epoch(evaluator.training_ended or (epoch + 1) % options.evaluate_every == 0)
        if not evaluations:
            assert options.resume is not None, "an epoch was trained, and the last one is evaluated"
            evaluations = evaluator.evaluate_without_training(options.resume)
        # In this block, at whose end training waits for the last checkpoint.
        best_is_last = state.best is not None and state.best.global_step == state.step
        if state.saved_model is not state.eval_model and not best_is_last:
            evaluations = evaluator.evaluate(state.saved_model, data.eval_splits, already_logged=True)
        augmented = {}
        if (views := recipe.test_augmentation) != "none":
            augmented = evaluator.evaluate(state.saved_model, {"test": data.test}, already_logged=True, views=views)
    assert state.best is not None, "the last epoch is always evaluated"
    return TrainResult(evaluations["test"], augmented.get("test"), evaluations.get("validation"), state.step,
                       state.step / steps.per_epoch, state.step < steps.last, state.best)  # fmt: skip


@dataclass(frozen=True)
class Evaluator:
    """Evaluates and logs, during and after training, and saves at the end of an epoch."""

    state: TrainState
    data: TrainingData
    steps: Steps
    patience: int
    log: Callable[[MetricRow], None]
    options: LoopOptions
    checkpoints: CheckpointManager

    @property
    def training_ended(self) -> bool:
        """Whether training has ended: after the last step, or by early stopping after the last evaluation."""
        return has_ended(self.state.step, self.state.best, self.steps, self.patience)

    def log_window(self) -> None:
        """Logs the metrics of the steps since the last row."""
        rates, window = optim.learning_rates(self.state.optimizer), self.state.meter.window(self.state.step)
        self.log(replace(row_at(self.state, self.steps.per_epoch), **rates, **window))

    def end_epoch(self, evaluate_now: bool, buffers_averaged: bool = False) -> dict[str, Evaluation]:
        """Ends an epoch; returns the evaluations of all splits by name, or {} if they are not evaluated now.

        `buffers_averaged` says whether batch-norm statistics are already averaged over ranks; averaging them again
        could change the last bit.
        """
        state = self.state
        if not buffers_averaged:
            average_buffers(state.eval_model, state.accelerator)
        evaluations = self.evaluate(state.eval_model, self.data.eval_splits) if evaluate_now else {}
        for split, evaluation in evaluations.items():
            require_finite(evaluation.loss, f"the {split} loss", f"at step {state.step}")
        row = replace(row_at(state, self.steps.per_epoch), **state.meter.epoch(), **metrics_of(evaluations))
        self.log(row)
        if evaluate_now:
            state.add_evaluation(row)
        self.checkpoints.save_or_stop(state, evaluate_now, self.training_ended)
        return evaluations

    def evaluate_without_training(self, resumed: dict[str, Any]) -> dict[str, Evaluation]:
        """Evaluates a run that was resumed at its last step, so that no training is left.

        This step may lie within an epoch, if `max_steps` was larger before.
        """
        if not resumed.get("evaluated", True):
            if self.state.meter.pending():
                self.log_window()
            return self.end_epoch(evaluate_now=True)
        evaluations = self.evaluate(self.state.eval_model, self.data.eval_splits, already_logged=True)
        if self.state.best is None:
            self.state.add_evaluation(replace(row_at(self.state, self.steps.per_epoch), **metrics_of(evaluations)))
        if (resumed.get("best_model") is None) != (self.state.best_model is None):  # early stopping was set or unset
            self.checkpoints.save_or_stop(self.state, evaluated=True, ended=True)
        return evaluations

    def evaluate(
        self, model: nn.Module, splits: dict[str, Batches], already_logged: bool = False, views: Views = "none"
    ) -> dict[str, Evaluation]:
        """Evaluates a model on splits, on all ranks together, in the precision of training.

        Calls the model without DDP, whose forward would wait for ranks that have no images left. `already_logged` says
        whether the metrics of this step are logged.
        """
        accelerator = self.state.accelerator
        before_batch = partial(self.checkpoints.stop_if_requested, self.state, evaluated=already_logged)
        evaluations = {}
        for name, split in splits.items():
            images = split.num_images / accelerator.num_processes
            with progress("evaluate", images, shown=accelerator.is_main_process) as advance, accelerator.autocast():

                def after_batch(count: float, advance: Callable[[float], None] = advance) -> None:
                    advance(count)
                    self.options.heartbeat()

                evaluations[name] = evaluate(
                    model, split, self.data.classes, partial(accelerator.reduce, reduction="sum"), after_batch, views,
                    before_batch,
                )  # fmt: skip
        return evaluations


def has_ended(step: int, best: MetricRow | None, steps: Steps, patience: int) -> bool:
    """Returns whether training ends after a step, by early stopping if `best` is too many epochs ago."""
    if patience and best and step // steps.per_epoch - math.ceil(best.epoch) >= patience:
        return True
    return step >= steps.last


def row_at(state: TrainState, steps_per_epoch: int) -> MetricRow:
    """Returns an empty row of metrics for the current step."""
    return MetricRow(global_step=state.step, epoch=state.step / steps_per_epoch)


def train_step(
    state: TrainState,
    images: torch.Tensor,
    targets: torch.Tensor,
    global_batch_size: int,
    loss_fn: Loss,
    recipe: Recipe,
    record_grad_norm: bool,
) -> None:
    """Runs one optimizer step on this rank's slice of a global batch.

    Args:
        state: model, optimizer and meter.
        images, targets: (n, 3, H, W), and (n,) or (n, classes).
        global_batch_size: number of images of all ranks.
        loss_fn: the loss.
        recipe: how to train.
        record_grad_norm: whether the meter needs the norm of the gradient, for a row of metrics, or for a checkpoint
            from which a resumed run may log it.
    """
    accelerator = state.accelerator
    world_size = accelerator.num_processes
    num_micro_batches = min(recipe.accumulate, global_batch_size // world_size)  # the same on all ranks
    for micro_images, micro_targets, is_last in micro_batches(images, targets, num_micro_batches):
        with nullcontext() if is_last else accelerator.no_sync(state.ddp):
            logits = state.ddp(micro_images)
            loss = loss_fn(logits, micro_targets, micro_images)
            # DDP averages over ranks as if all had the same number of images; in a last batch they may not.
            accelerator.backward(loss * len(micro_targets) * (world_size / global_batch_size))
        state.meter.add(loss, logits, micro_targets)
    if recipe.clip_gradient:
        state.meter.grad_norm = accelerator.clip_grad_norm_(state.model.parameters(), recipe.clip_gradient)
    elif record_grad_norm:
        state.meter.grad_norm = gradient_norm(state.model, accelerator.scaler)
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


def save(state: TrainState, writer: checkpoint.CheckpointWriter, evaluated: bool, evaluating: bool = False) -> None:
    """Starts writing a checkpoint in the background; all ranks must call it.

    Args:
        state: the state to save.
        writer: the writer of the run.
        evaluated: whether the metrics of this step's evaluation are logged.
        evaluating: whether training stops during that evaluation, for which batch-norm statistics are already averaged
            over ranks.

    Raises:
        DivergedError: a loss or a weight is not finite; nothing was written.
    """
    state.meter.check(state.step, state.eval_model)
    checkpoint_state = state.state_dict() | {"evaluated": evaluated, "evaluating": evaluating}
    if state.accelerator.is_main_process:
        checkpoint_state["metrics"] = dict(fsync_metrics(writer.run))  # synced to disk before the checkpoint
        writer.save(to_cpu(masked_state_dict(state.saved_model)), state.step, checkpoint_state)


def any_rank_should_stop(should_stop: Callable[[], bool], index: int, accelerator: Accelerator) -> bool:
    """Returns whether any rank was asked to stop; the answer is the same on all ranks.

    Checked at every step or batch of an evaluation; on several GPUs only at every `LOG_EVERY`th, because the reduction
    waits for the device.
    """
    if accelerator.num_processes == 1:
        return should_stop()
    if accelerator.device.type != "cpu" and index % LOG_EVERY:
        return False
    return bool(accelerator.reduce(torch.tensor(float(should_stop()), device=accelerator.device), "sum"))


def metrics_of(evaluations: dict[str, Evaluation]) -> dict[str, float]:
    """Returns the loss and accuracy of each split, by their names in MetricRow."""
    return {
        f"{split}_{name}": value
        for split, evaluation in evaluations.items()
        for name, value in (("loss", evaluation.loss), ("accuracy", evaluation.accuracy))
    }


def average_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Averages batch-norm statistics over ranks.

    DDP would broadcast those of the first rank before every forward; averaging once before they are used is enough,
    and covers all images.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer, "mean"))
