"""The training state: everything that changes while a model trains, saved and restored bit by bit."""

import copy
import hashlib
import random
from typing import Any

import msgspec
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from runner.common.errors import UserError
from runner.config.recipe import Recipe
from runner.data import Batches
from runner.models import norm
from runner.run.schema import MetricRow
from runner.training.loss import Loss
from runner.training.meter import Meter
from runner.training.optim import EMA, build_optimizer


class TrainState:
    """Model, optimizer, averaged weights, and progress of training.

    `load_state_dict` accepts state dicts loaded with torch.load(weights_only=True).

    Args:
        model: model with its initial weights, on the CPU; it is moved to the device.
        recipe: how the model is trained.
        accelerator: provides device, ranks and precision.

    Attributes:
        model: the module itself, neither compiled nor wrapped.
        ddp: the model as called in training: compiled if the recipe says so, and wrapped in DDP on several ranks.
        optimizer: the optimizer, as prepared by accelerate.
        ema: the averaged weights, or None.
        step: number of completed optimizer steps.
        best: the metrics of the best epoch so far.
        best_model: with early stopping, a copy of the model with the weights of that epoch; else None.
        meter: sums for the next row of metrics.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, accelerator: Accelerator) -> None:
        model = model.to(accelerator.device)
        self.model = norm.convert_sync_batch_norm(model) if recipe.sync_batch_norm else model
        self.ema = EMA(self.model, recipe.ema) if recipe.ema else None
        self.best_model = copy.deepcopy(self.model).requires_grad_(False) if recipe.patience else None
        optimizer = build_optimizer(recipe.optimizer, self.model, recipe.layer_decay)
        compiled = self.model if recipe.compile == "none" else torch.compile(self.model, mode=recipe.compile)
        self.ddp, self.optimizer = accelerator.prepare(compiled, optimizer)
        self.accelerator = accelerator
        self.meter = Meter(accelerator)
        self.step = 0
        self.best: MetricRow | None = None

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated after an epoch: with averaged weights if there are any."""
        return self.ema.module if self.ema else self.model

    @property
    def saved_model(self) -> nn.Module:
        """The model that is saved and exported: with early stopping the best one so far, else the one evaluated."""
        return self.eval_model if self.best_model is None or self.best is None else self.best_model

    def add_evaluation(self, row: MetricRow) -> None:
        """Receives the metrics of every evaluation of `eval_model`, to keep the best."""
        self.best = max(self.best or row, row, key=selection_accuracy)
        if self.best_model is not None and self.best is row:
            self.best_model.load_state_dict(self.eval_model.state_dict())

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the state on the CPU on rank 0, and {} on the others; all ranks must call it."""
        scaler = self.accelerator.scaler
        # Until the epoch ends, each rank has batch-norm statistics of its own.
        local = to_cpu({"meter": self.meter.state_dict(), "buffers": dict(trained_buffers(self.model))})
        ranks = gather_object([local | {"generators": rng_state(self.accelerator.device)}])
        if not self.accelerator.is_main_process:
            return {}
        return to_cpu(
            {
                "step": self.step,
                "world_size": self.accelerator.num_processes,
                "best": msgspec.to_builtins(self.best) if self.best else {},
                "best_model": self.best_model.state_dict() if self.best_model is not None else None,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.ema.module.state_dict() if self.ema else None,
                "scaler": scaler.state_dict() if scaler else None,
                "ranks": ranks,
            }
        )

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state; generators last, because the other steps may draw from them.

        With a different number of ranks than before, each rank takes generators and batch-norm statistics of one of the
        saved ranks, and dropout differs.
        """
        self.step = state["step"]
        self.best = best_row(state, keeps_model=self.best_model is not None)
        if self.best_model is not None and state.get("best_model") is not None:
            self.best_model.load_state_dict(state["best_model"])
        self.model.load_state_dict(state["model"])
        self._load_optimizer(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["average"])
            # If this step was evaluated, its buffers are the average over ranks; otherwise those of rank 0, which the
            # next evaluation replaces by this rank's.
            self.ema.buffers_current = state.get("evaluated", True) or state.get("evaluating", False)
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        rank, ranks = self.accelerator.process_index, state["ranks"]
        source = ranks[rank % len(ranks)]
        for name, buffer in trained_buffers(self.model):
            buffer.copy_(source["buffers"][name])
        meter = source["meter"]
        if state["world_size"] != self.accelerator.num_processes:
            # Rank 0 takes the sums of all ranks since the last row; what else there is, all ranks have.
            sums = _sum_meters([entry["meter"] for entry in ranks]) if rank == 0 else {}
            meter = sums | {"epoch_sums": meter["epoch_sums"], "grad_norm": meter.get("grad_norm")}
        self.meter = Meter(self.accelerator, meter)
        set_rng_state(source["generators"], self.accelerator.device)

    def require_same_on_ranks(self) -> None:
        """Compares step and weights over ranks, which loaded them from files of their own; all ranks must call it.

        Raises:
            UserError: they differ, so that ranks would average gradients of different models.
        """
        if self.accelerator.num_processes < 2:
            return
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
        found = gather_object([f"step {self.step} with weights {digest.hexdigest()[:12]}"])
        for rank, other in enumerate(found):
            if other != found[0]:
                raise UserError(
                    f"rank {rank} resumed at {other}, rank 0 at {found[0]}; their file systems show different files"
                )

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Restores the optimizer, but keeps this run's settings, which may have changed with --resume-anyway."""
        groups = self.optimizer.param_groups
        current = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        try:
            self.optimizer.load_state_dict(state)
        except ValueError as error:
            raise UserError(
                f"the checkpoint's optimizer does not match this version's ({error}); train from scratch, or resume "
                "with the version that wrote it"
            ) from None
        for group, settings in zip(self.optimizer.param_groups, current, strict=True):
            group.update(settings | {"lr": group["lr"], "peak_lr": settings["lr"]})


def best_row(state: dict[str, Any], keeps_model: bool) -> MetricRow | None:
    """Returns the metrics of the best epoch from a saved state; None if there are none yet.

    With early stopping (`keeps_model`), a state without that epoch's weights does not count: it is of other settings.
    """
    if not state["best"] or (keeps_model and state.get("best_model") is None):
        return None
    return msgspec.convert(state["best"], MetricRow)


def selection_accuracy(row: MetricRow) -> float:
    """Returns the accuracy that selects the best epoch: on the validation images, or else on the test images."""
    accuracy = row.test_accuracy if row.validation_accuracy is None else row.validation_accuracy
    assert accuracy is not None, "only rows of evaluations are compared"
    return accuracy


def rebuild_ddp_buckets(state: TrainState, loss_fn: Loss, batches: Batches, recipe: Recipe) -> None:
    """Makes DDP rebuild its gradient buckets, as it does in its first steps, before a state is loaded.

    DDP rebuilds its buckets after the first backward pass. If a resumed run did so only after its first
    step, that step would reduce gradients in the initial layout, in a different order than in the uninterrupted run,
    and differ in the last bits.
    """
    if state.accelerator.num_processes < 2:
        return
    state.ddp.train()
    for _ in range(2):
        # One micro-batch, because memory may not have room for more; buckets do not depend on the batch.
        images, targets = (part.tensor_split(recipe.accumulate)[0] for part in next(batches.epoch(0)))
        state.accelerator.backward(loss_fn(state.ddp(images), targets, images))
    state.ddp.zero_grad()


def trained_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Returns the buffers of a model, such as batch-norm statistics, without the masks of a pruned one."""
    masks = {f"{name.removesuffix('_orig')}_mask" for name, _ in model.named_parameters() if name.endswith("_orig")}
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in masks]


def rng_state(device: torch.device) -> dict[str, Any]:
    """Returns the states of the random number generators of Python, NumPy and torch, as tensors and plain values."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = legacy
    assert gauss is None
    return {
        "python": [version, torch.tensor(words, dtype=torch.int64)],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores the states that `rng_state` returns."""
    version, words = state["python"]
    random.setstate((version, tuple(words.tolist()), None))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def to_cpu(value: Any) -> Any:
    """Returns a deep copy of nested dicts and lists with every tensor on the CPU.

    From a GPU, all tensors are copied to pinned memory at once, and waited for once.
    """
    copy = _copied(value)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copy


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True, non_blocking=value.is_cuda)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def _sum_meters(meters: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "sums": torch.stack([meter["sums"] for meter in meters]).sum(0),
        "images": sum(meter["images"] for meter in meters),
    }
