"""The training loop.

Read `train` top to bottom: that is the algorithm. Ranks and precision live in the Accelerator and in the
batches, which hand every rank its slice of the same global batches.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from data_prep.console import progress
from runner import checkpoint, optim
from runner import objective as objectives
from runner.batches import Batches
from runner.batches.order import rank_seed
from runner.build import kept_state
from runner.evaluate import Evaluation, Views, evaluate
from runner.models import norm
from runner.recipe import Recipe
from runner.resume import Resumable, copied, settle_buckets
from runner.runs import Run

LOG_EVERY = 20  # optimizer steps between two rows of training metrics


class DivergedError(RuntimeError):
    """The training loss is not a finite number any more. Raised on all ranks at the same step."""


class StoppedError(RuntimeError):
    """Training was asked to stop, and can be resumed. Raised on all ranks at the same step."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.step = step


@dataclass(frozen=True)
class Data:
    """This rank's slices of what a model is trained and scored on."""

    train: Batches
    test: Batches
    validation: Batches | None
    classes: int

    @property
    def scored(self) -> dict[str, Batches]:
        """The splits that are scored after every epoch."""
        return ({"validation": self.validation} if self.validation else {}) | {"test": self.test}


@dataclass(frozen=True)
class Control:
    """How a run is kept, ended and gone on with.

    Attributes:
        checkpoint_every: optimizer steps between checkpoints within an epoch; each evaluation comes with one.
        evaluate_every: epochs between evaluations; the last epoch always has one.
        resume: the state of a checkpoint, from which training goes on.
        asked_to_stop: whether this rank was told to stop.
        alive: called with every step and every evaluated batch.
    """

    checkpoint_every: int | None = None
    evaluate_every: int = 1
    resume: dict[str, Any] | None = None
    asked_to_stop: Callable[[], bool] = lambda: False
    alive: Callable[[], None] = lambda: None

    def keeps(self, step: int) -> bool:
        """Whether a checkpoint was asked for after so many steps."""
        return self.checkpoint_every is not None and step % self.checkpoint_every == 0


@dataclass(frozen=True)
class Outcome:
    """What training came to: the last evaluations, and the best epoch beside them.

    Attributes:
        test: on the test images, after the last epoch.
        augmented: the same with test-time augmentation, where the recipe asks for it.
        validation: on the held-out images, where the recipe holds some out.
        steps, epochs: how far training went.
        best: of all epochs the row of metrics with the best accuracy, on the held-out images where there are some,
            else on the test images.
    """

    test: Evaluation
    augmented: Evaluation | None
    validation: Evaluation | None
    steps: int
    epochs: float
    best: dict[str, float]


def train(
    bare: nn.Module,
    recipe: Recipe,
    data: Data,
    accelerator: Accelerator,
    run: Run,
    seed: int,
    max_steps: int | None = None,
    teacher: nn.Module | None = None,
    log: Callable[[dict[str, float]], None] = lambda row: None,
    control: Control = Control(),
) -> Outcome:
    """Trains a model; evaluates between epochs; leaves a checkpoint of the last.

    Args:
        bare: the model with its first weights (see runner.build), the same on every rank.
        recipe: how to train it.
        data: this rank's slices.
        accelerator: devices, ranks and precision.
        run: where checkpoints go.
        seed: of dropout; order and augmentation have it already.
        max_steps: stop after so many optimizer steps; the schedule is the whole recipe's all the same.
        teacher: a model to learn from beside the labels, on the device.
        log: receives the rows of metrics, which are the same on every rank; to be written on the first alone.
        control: how the run is kept, ended and gone on with.

    Raises:
        DivergedError: the loss is not finite.
        StoppedError: a rank was told to stop; all have stopped at the same step, and the checkpoint is written.
        CheckpointError: a checkpoint could not be written; the one before it stays.
    """
    bare = bare.to(accelerator.device)
    if recipe.sync_batch_norm:
        bare = norm.synchronised(bare)
    average = optim.Average(bare, recipe.ema) if recipe.ema else None
    kept = average.module if average else bare  # what is evaluated and saved
    optimizer = optim.build(recipe.optimizer, bare)
    model, optimizer = accelerator.prepare(torch.compile(bare) if recipe.compile else bare, optimizer)
    objective = objectives.of(recipe, teacher, accelerator.autocast)
    torch.manual_seed(rank_seed(seed, accelerator.process_index))  # a dropout of its own for every rank

    per_epoch = len(data.train)
    steps = recipe.epochs * per_epoch
    stop = min(steps, max_steps or steps)
    step, best, found, counted = 0, {}, {}, {}
    state = Resumable(bare, optimizer, average and average.module, accelerator)
    if control.resume is not None:
        settle_buckets(model, objective, data.train, accelerator, recipe.accumulate)
        step, best, counted = control.resume["step"], control.resume["best"], state.restore(control.resume)
    writer = checkpoint.Writer(run)

    def save(meter: Meter) -> None:
        meter.check(step)
        everything = state.state(step, best, meter.state())
        if accelerator.is_main_process:
            writer.save(copied(kept_state(kept)), step, everything)

    def scores(splits: dict[str, Batches], views: Views = "none") -> dict[str, Evaluation]:
        return {
            name: score(kept, batches, data.classes, accelerator, views, control.alive)
            for name, batches in splits.items()
        }

    with progress("train", stop, shown=accelerator.is_main_process) as advance:
        advance(step)
        for epoch in range(step // per_epoch, recipe.epochs if step < stop else 0):
            meter = Meter(accelerator, counted if step % per_epoch else {})
            model.train()
            for images, targets in data.train.epoch(epoch, step % per_epoch):
                lr = optim.set_rate(optimizer, recipe.schedule, step, steps)
                size = data.train.size_of(step % per_epoch)
                share = accelerator.num_processes / size
                count = min(recipe.accumulate, size // accelerator.num_processes)  # alike on all ranks
                for part, last in parts(images, targets, count):
                    with nullcontext() if last else accelerator.no_sync(model):
                        logits = model(part[0])
                        loss = objective(logits, part[1], part[0])
                        # DDP averages over ranks as if each had the same share; a last batch may not divide.
                        accelerator.backward(loss * len(part[1]) * share)
                    meter.add(loss, logits, part[1])
                if recipe.clip_gradient:
                    accelerator.clip_grad_norm_(bare.parameters(), recipe.clip_gradient)
                optimizer.step()
                optimizer.zero_grad()
                if average:
                    average.update(bare, step + 1)
                step += 1
                advance(1)
                control.alive()
                ended = step == stop or step % per_epoch == 0
                if ended or step % LOG_EVERY == 0:
                    log({"global_step": step, "epoch": step / per_epoch, "lr": lr, **meter.window(step)})
                if ended:
                    break
                stopping = agreed(control.asked_to_stop(), step, accelerator)
                if stopping or control.keeps(step):
                    save(meter)
                if stopping:
                    writer.wait()
                    raise StoppedError(step)

            sync_buffers(kept, accelerator)
            due = step == stop or (epoch + 1) % control.evaluate_every == 0
            found = scores(data.scored) if due else {}
            row = {"global_step": step, "epoch": step / per_epoch, **meter.epoch(), **named(found)}
            log(row)
            if due:
                best = max(best or row, row, key=lambda row: row.get("validation/accuracy", row["test/accuracy"]))
            stopping = step < stop and agreed(control.asked_to_stop(), step, accelerator)
            if due or stopping or control.keeps(step):
                save(meter)
            if stopping:
                writer.wait()
                raise StoppedError(step)
            if step == stop:
                break
    writer.wait()
    found = found or scores(data.scored)  # none yet where a run is resumed after its last step
    views = recipe.test_augmentation
    augmented = {} if views == "none" else scores({"test": data.test}, views)
    return Outcome(found["test"], augmented.get("test"), found.get("validation"), step, step / per_epoch, best)


def agreed(asked: bool, step: int, accelerator: Accelerator) -> bool:
    """Whether any rank was asked to stop; the same answer on all of them.

    Asked after every step on the CPU. On GPUs only where the metrics wait for the device anyway: no step may.
    """
    if accelerator.num_processes == 1:
        return asked
    if accelerator.device.type != "cpu" and step % LOG_EVERY:
        return False
    return bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum"))


def parts(
    images: torch.Tensor, targets: torch.Tensor, count: int
) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], bool]]:
    """Cuts a batch for gradient accumulation, and says which part is the last."""
    cut = list(zip(images.tensor_split(count), targets.tensor_split(count), strict=True))
    for k, part in enumerate(cut, 1):
        yield part, k == len(cut)


def score(
    model: nn.Module,
    batches: Batches,
    classes: int,
    accelerator: Accelerator,
    views: Views = "none",
    alive: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluates on all ranks together, in the precision of training.

    The bare model: DDP's forward would wait for ranks that have no images left.
    """
    ours = batches.samples / accelerator.num_processes
    with progress("evaluate", ours, shown=accelerator.is_main_process) as advance, accelerator.autocast():

        def scored(images: float) -> None:
            advance(images)
            alive()

        return evaluate(model, batches, classes, lambda tensor: accelerator.reduce(tensor, "sum"), scored, views)


def named(found: dict[str, Evaluation]) -> dict[str, float]:
    """The row of metrics of evaluations by split."""
    return {
        f"{split}/{name}": figure
        for split, evaluation in found.items()
        for name, figure in (("loss", evaluation.loss), ("accuracy", evaluation.accuracy))
    }


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

    def __init__(self, accelerator: Accelerator, state: dict[str, Any]) -> None:
        self.accelerator = accelerator
        zeros = torch.zeros(2, dtype=torch.float64)
        self.sums = state.get("sums", zeros).to(accelerator.device)  # of loss and hits, this rank's
        self.images = state.get("images", 0)
        self.epoch_sums = state.get("epoch_sums", [0.0, 0.0, 0.0])  # loss, hits and images, of all ranks
        self.since = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """The sums, to go on with."""
        return {"sums": self.sums.cpu(), "images": self.images, "epoch_sums": self.epoch_sums}

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
        self._finite(loss, step)
        self.epoch_sums = [total + part for total, part in zip(self.epoch_sums, sums, strict=True)]
        self.sums, self.images = torch.zeros_like(self.sums), 0
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return {"train/loss": loss / images, "train/accuracy": hits / images, "images_per_second": images / seconds}

    def check(self, step: int) -> None:
        """Sees to it that no checkpoint holds what has diverged.

        Raises:
            DivergedError: the loss since the last row is not finite, on any rank.
        """
        self._finite(self.accelerator.reduce(self.sums, "sum")[0].item(), step)

    def _finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise DivergedError(f"the training loss is {loss} within the {LOG_EVERY} steps before step {step}")

    def epoch(self) -> dict[str, float]:
        """Means over the windows of the epoch, over all ranks."""
        loss, hits, images = self.epoch_sums
        return {"train_epoch/loss": loss / images, "train_epoch/accuracy": hits / images}
