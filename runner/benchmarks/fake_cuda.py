"""Runs training on fake CUDA tensors to find which operators a step issues and where it would wait for the GPU.

A fake tensor has a shape, a dtype and a device, but no data, so this needs no GPU. It runs the actual training loop,
with its batches, mixing, loss, metrics, optimizer and EMA. Instead of the backward pass, which is torch's own, every
parameter gets a gradient. DDP, compilation and values are not covered.
"""

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runner.config.recipe import Recipe
from runner.data.kernels import color_gpu, gpu
from runner.data.stream import BatchStream
from runner.run.folder import Run
from runner.training.loop import LoopOptions, TrainingData, train

DEVICE = torch.device("cuda", 0)
PACKAGE = Path(__file__).parents[1]
# Operators whose result (or its shape) the host needs before it can continue.
WAITS = {
    f"aten.{name}"
    for name in (
        "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive",
        "unique_dim", "repeat_interleave",
    )
}  # fmt: skip
COPIES = {"aten._to_copy", "aten.copy_", "aten._foreach_copy_"}


class Watch(TorchDispatchMode):
    """Counts operators, and synchronizations of the host with the device, while `on` is set.

    Attributes:
        on: whether operators are counted.
        operators: counts by name. Views and allocations do not count; the launch of a Triton kernel counts as one.
        waits: counts by kind, operator and the calling function of this package. The kinds are "wait": the host needs
            a value; "copy": a copy between host and device, for which the host waits; "non-blocking copy": one for
            which it waits only if its memory is not pinned; "mixed": tensors on several devices, which raises an error
            on a GPU; and "fused": a Triton kernel that may contract a product and a sum, so that its result differs
            from the CPU's.
        error: the exception by which an operator of the kinds "wait" or "mixed" ended the step; None if none did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.error: Exception | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func).rpartition(".")[0]
        waits = name in WAITS and _devices((args, kwargs)) == {"cuda"}
        try:
            if name == "aten._fused_sgd_":  # has no fake kernel; it works in place and returns nothing
                out = None
            elif name == "aten._local_scalar_dense":
                out = 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1
            else:
                out = func(*args, **kwargs)
        except Exception as error:
            unknown = isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
            if unknown or len(_devices((args, kwargs))) > 1:
                self.note("wait" if unknown else "mixed", name, always=True)
                self.error = error
            raise
        devices = _devices((args, kwargs), scalars=name in COPIES)
        if waits:
            self.note("wait", name)
        elif name in COPIES and len(devices | _devices(out, scalars=True)) > 1:
            positional = name != "aten._to_copy" and True in args[2:]
            self.note("non-blocking copy" if positional or kwargs.get("non_blocking") else "copy", name)
        elif len(devices) > 1:
            self.note("mixed", name)
        if self.on and name.startswith("aten.") and not name.startswith("aten.empty") and not func.is_view:
            self.operators[name] += 1
        return out

    def note(self, kind: str, name: str, always: bool = False) -> None:
        """Counts a wait, with the nearest calling function of this package."""
        if self.on or always:
            self.waits[f"{kind} {name} in {_caller()}"] += 1

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """Replaces a Triton kernel: `kernel[grid](...)` counts one launch."""

        def launch(*args: Any, **constants: Any) -> None:
            self.operators["triton"] += self.on
            if _devices(args, scalars=True) != {"cuda"}:
                self.note("mixed", "triton")
            if constants.get("enable_fp_fusion", True):
                self.note("fused", "triton")

        return launch


def _devices(values: Any, scalars: bool = False) -> set[str]:
    """Returns the device types of all tensors in nested values.

    Scalars on the CPU are ignored unless `scalars` is set: operators accept them beside CUDA tensors.
    """
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    return {t.device.type for t in tensors if scalars or t.device.type != "cpu" or t.ndim > 0}


def _caller() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and path.parent != PACKAGE / "benchmarks":
            return f"{path.relative_to(PACKAGE)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


@contextlib.contextmanager
def fake_cuda() -> Iterator[tuple[Watch, Accelerator]]:
    """Makes new CUDA tensors fake within the block; yields the watch and a bf16 accelerator with a fake GPU."""
    import torch.cuda.amp.common as amp_common

    watch = Watch()
    _reset_accelerator()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    for state in (PartialState, AcceleratorState):
        state._shared_state["device"] = DEVICE
    accelerator.backward = _fill_gradients(accelerator)
    replacements: list[tuple[Any, str, Any]] = [
        (gpu, "_make", watch),
        (color_gpu, "_jitter", watch),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "Stream", mock.MagicMock()),
        (torch.cuda, "Event", mock.MagicMock()),
        (torch.cuda, "current_stream", mock.MagicMock()),
        (torch.cuda, "stream", lambda _: contextlib.nullcontext()),
        (torch.Tensor, "pin_memory", lambda tensor: tensor),
        (torch.Tensor, "record_stream", lambda *_: None),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)),
        (torch.cuda, "set_rng_state", lambda *_: None),
        (amp_common, "amp_definitely_not_available", lambda: False),
        (F, "scaled_dot_product_attention", _attention),  # torch's queries the GPU to choose a kernel
        # torch's version reads the memory, which a fake tensor does not have.
        (torch.Tensor, "__deepcopy__", lambda tensor, memo: memo.setdefault(id(tensor), tensor.detach().clone())),
        (nn.Module, "to", lambda module, *_, **__: module),  # on_fake_cuda has already moved it
    ]
    try:
        with contextlib.ExitStack() as stack:
            for where, name, replacement in replacements:
                stack.enter_context(mock.patch.object(where, name, replacement))
            # allow_non_fake_inputs: converts CPU tensors itself, unless CUDA was available when it was created.
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(watch)
            yield watch, accelerator
    finally:
        _reset_accelerator()


def _reset_accelerator() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return (query @ key.transpose(-2, -1)).softmax(-1) @ value


def _fill_gradients(accelerator: Accelerator) -> Callable[[torch.Tensor], None]:
    def backward(loss: torch.Tensor) -> None:
        for model in accelerator._models:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)

    return backward


def on_fake_cuda(model: nn.Module) -> nn.Module:
    """Replaces a model's tensors with fake ones of the same shape, stride and dtype; call it within `fake_cuda`."""
    fakes: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> Any:
        if id(tensor) not in fakes:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
            fakes[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return fakes[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
    return model


class _StepsDoneError(Exception):
    """Ends training after the watched step."""


def watch_step(
    model: nn.Module,
    recipe: Recipe,
    open_stream: Callable[[torch.device], BatchStream],
    teacher: nn.Module | None = None,
    classes: int = 10,
) -> Watch:
    """Watches the second step of training; the first creates the optimizer's state.

    Metrics are logged after this step only if it is the last of the epoch.

    Args:
        model: a model on the CPU (see `runner.training.model`); it is modified.
        recipe: how it is trained; `compile` must be "none".
        open_stream: opens the training batches on a device; there must be at least two.
        teacher: see `runner.training.loop.train`; it is modified.
        classes: number of classes of the dataset.
    """
    steps = itertools.count(1)
    with fake_cuda() as (watch, accelerator):

        def heartbeat() -> None:
            step = next(steps)
            watch.on = step == 1
            if step == 2:
                raise _StepsDoneError

        batches = open_stream(DEVICE)
        data = TrainingData(batches, batches, None, classes)  # never evaluated
        on_fake_cuda(model)
        if teacher is not None:
            on_fake_cuda(teacher)
        try:
            train(
                model,
                recipe,
                data,
                accelerator,
                Run(Path()),
                0,
                teacher=teacher,
                options=LoopOptions(heartbeat=heartbeat),
            )
        except _StepsDoneError:
            pass
        except Exception as error:
            if error is not watch.error:  # otherwise it is noted
                raise
    return watch
