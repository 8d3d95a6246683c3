"""Everything that training needs to go on as if it had never stopped, to the bit.

Weights and buffers as training holds them, optimizer with its rates, gradient scaler, average of the weights,
position, best epoch, the sums behind the next row of metrics, and every rank's generators. Loaded with
weights_only=True.
"""

import random
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from runner.batches import Batches
from runner.objective import Objective


class Resumable:
    """What of a training run changes with its steps.

    Args:
        bare: the model itself, without DDP's or the compiler's wrapper.
        optimizer: as accelerate prepared it.
        average: of the weights, an nn.Module; None without.
        accelerator: whose scaler and ranks.
    """

    def __init__(
        self,
        bare: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: nn.Module | None,
        accelerator: Accelerator,
    ) -> None:
        self.bare, self.optimizer, self.average, self.accelerator = bare, optimizer, average, accelerator

    @torch.no_grad()
    def state(self, step: int, best: dict[str, float], meter: dict[str, Any]) -> dict[str, Any]:
        """A copy of everything on the CPU, whole on every rank; a collective call.

        Args:
            step: optimizer steps done.
            best: the best epoch's row of metrics so far.
            meter: this rank's sums.
        """
        scaler = self.accelerator.scaler
        # Batch norm's statistics are each rank's own until the epoch's end.
        own = copied({"meter": meter, "buffers": dict(statistics_of(self.bare))})  # for the others have other GPUs
        ranks = gather_object([own | {"generators": generators(self.accelerator.device)}])
        return copied(
            {
                "step": step,
                "world_size": self.accelerator.num_processes,
                "best": best,
                "model": self.bare.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict() if self.average else None,
                "scaler": scaler.state_dict() if scaler else None,
                "ranks": ranks,
            }
        )

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> dict[str, Any]:
        """Puts everything back; generators last, for all else may draw from them. Returns this rank's meter sums.

        With another number of ranks, the generators are those of the ranks that there are; dropout then differs.
        """
        self.bare.load_state_dict(state["model"])
        ours = [{key: value for key, value in group.items() if key != "params"} for group in self._groups()]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self._groups(), ours, strict=True):  # with --resume-anyway they may be others
            group.update(own | {"lr": group["lr"], "peak_lr": own["lr"]})
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        rank, ranks = self.accelerator.process_index, state["ranks"]
        buffers = ranks[rank % len(ranks)]["buffers"]
        for name, buffer in statistics_of(self.bare):
            buffer.copy_(buffers[name])
        set_generators(ranks[rank % len(ranks)]["generators"], self.accelerator.device)
        if state["world_size"] == self.accelerator.num_processes:
            return ranks[rank]["meter"]
        # The sums since the last row, over all ranks, belong to the first.
        return _summed([entry["meter"] for entry in ranks]) if rank == 0 else {}


def settle_buckets(
    model: nn.Module, objective: Objective, batches: Batches, accelerator: Accelerator, accumulate: int
) -> None:
    """Brings DDP to where it is after its first steps, before a state is loaded.

    DDP lays its gradient buckets out anew after the first backward pass. A resumed run's first step would still
    sum in the old layout, in another order than the run that never stopped, and differ in the last bits.
    """
    if accelerator.num_processes < 2:
        return
    model.train()
    for _ in range(2):
        # Only as many as memory has room for: buckets know nothing of the batch.
        images, targets = (part.tensor_split(accumulate)[0] for part in next(batches.epoch(0)))
        accelerator.backward(objective(model(images), targets, images))
    model.zero_grad()


def statistics_of(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The buffers that training changes: batch norm's statistics, but not a pruned model's masks."""
    masks = {f"{name.removesuffix('_orig')}_mask" for name, _ in model.named_parameters() if name.endswith("_orig")}
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in masks]


def generators(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, as tensors and integers."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert gauss is None
    return {
        "python": [version, torch.tensor(words, dtype=torch.int64)],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_generators(state: dict[str, Any], device: torch.device) -> None:
    """Puts the states of `generators` back."""
    version, words = state["python"]
    random.setstate((version, tuple(words.tolist()), None))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def copied(value: Any) -> Any:
    """A deep copy of nested dictionaries and lists, with every tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(part) for part in value)
    return value


def _summed(meters: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "sums": torch.stack([meter["sums"] for meter in meters]).sum(0),
        "images": sum(meter["images"] for meter in meters),
        "epoch_sums": meters[0]["epoch_sums"],
    }
