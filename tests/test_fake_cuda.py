"""Training on fake CUDA tensors: no path of a step waits for the GPU (runner.benchmarks.fake_cuda)."""

import json
import queue
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from data_prep import manifest
from runner import experiments
from runner.benchmarks import fake_cuda, operators
from runner.benchmarks.fake_cuda import DEVICE, watch_step
from runner.config.recipe import SGD, AdamW, Augment, Muon, Optimizer, Recipe, RMSprop
from runner.data.open import RankInfo, open_split
from runner.data.resident import ResidentBatches
from runner.data.stream import BatchStream, StreamOptions
from runner.run.folder import Run
from runner.training import checkpoint, state
from runner.training.loop import LoopOptions, TrainingData, train
from runner.training.meter import Meter
from tests.support.configs import EVERY_AUGMENTATION
from tests.support.models.tiny import Tiny

RECIPE = Recipe(2, 20, SGD(0.1), augment=Augment(crop_padding=4, flip="random"))
COMMITTED = json.loads(operators.RESULT.read_text())
ALL = experiments.load()
FIRST = {(e.architecture.factory, type(e.recipe.optimizer)): name for name, e in reversed(ALL.items())}.values()


def resident(recipe: Recipe, split: str = "train", count: int = 60) -> Callable[[torch.device], BatchStream]:
    """Opens images in memory."""
    options = StreamOptions(
        (120.0,) * 3, (60.0,) * 3, recipe.batch_size, training=split == "train", augment=recipe.augment,
        resize=recipe.resize,
    )  # fmt: skip
    images, labels = np.zeros((count, 32, 32, 3), np.uint8), np.zeros(count, np.int64)
    return lambda device: ResidentBatches(images, labels, replace(options, device=device))


def step(recipe: Recipe, teacher: torch.nn.Module | None = None) -> fake_cuda.Watch:
    return watch_step(Tiny(norm=True, dropout=0.1), recipe, resident(recipe), teacher)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FIRST else pytest.mark.every) for n in ALL])
def test_a_step_issues_the_committed_operators_and_never_waits(name: str) -> None:
    """After an intended change: python -m runner.benchmarks.operators --json {operators.RESULT}"""
    watch = operators.watched(ALL[name])
    assert not watch.waits
    (row,) = [row for row in COMMITTED["rows"] if row["experiment"] == name]
    if torch.__version__.partition("+")[0] == COMMITTED["torch"]:  # the count depends on torch as well
        assert (watch.operators.total(), watch.waits.total()) == (row["operators"], row["waits"])
    assert watch.operators["triton"] == 1 + any(ALL[name].recipe.augment.jitter)


def test_the_committed_table_has_every_experiment() -> None:
    assert [row["experiment"] for row in COMMITTED["rows"]] == list(ALL)


PATHS = {
    "plain": replace(RECIPE, augment=Augment()),
    "reflected": replace(RECIPE, augment=Augment(crop_padding=4, crop_fill="reflect", flip="alternating")),
    "resized crop": replace(RECIPE, resize=24, augment=Augment(random_resized_crop=0.3, flip="random")),
    "resized crop and RandAugment": replace(RECIPE, augment=Augment(random_resized_crop=0.3, policy="rand")),
    "jitter": replace(RECIPE, augment=Augment(crop_padding=4, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)),
    "RandAugment": replace(RECIPE, augment=Augment(policy="rand", rand_ops=3)),
    "TrivialAugment": replace(RECIPE, augment=Augment(policy="trivial", repeats=2)),
    "cutout": replace(RECIPE, augment=Augment(cutout=8)),
    "erasing": replace(RECIPE, augment=Augment(erase=0.5)),
    "mixup": replace(RECIPE, augment=Augment(mixup=0.2)),
    "cutmix": replace(RECIPE, augment=Augment(cutmix=1.0), label_smoothing=0.1),
    "resized": replace(RECIPE, resize=40),
    "EMA": replace(RECIPE, ema=0.9),
    "clipped": replace(RECIPE, clip_gradient=1.0),
    "accumulated": replace(RECIPE, accumulate=3),
    "contiguous": replace(RECIPE, channels_last=False),
    "everything": replace(
        RECIPE, ema=0.9, accumulate=2, clip_gradient=1.0, resize=40, label_smoothing=0.1, optimizer=AdamW(0.1),
        augment=EVERY_AUGMENTATION,
    ),
    **{kind.__name__: replace(RECIPE, optimizer=kind(0.1)) for kind in get_args(Optimizer)},
    "RMSprop with momentum": replace(RECIPE, optimizer=RMSprop(0.1, momentum=0.9)),
    "Muon with unit rows": replace(RECIPE, optimizer=Muon(0.1, unit_rows=True)),
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_path_waits(path: str) -> None:
    watch = step(PATHS[path])
    assert not watch.waits
    kernels = (not PATHS[path].augment.random_resized_crop) + any(PATHS[path].augment.jitter)
    assert watch.operators["triton"] == kernels
    assert watch.operators.total() > 30


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_row_of_metrics_adds_the_norm_of_the_gradient_to_its_step(limit: float) -> None:
    """Without a wait, and nothing where clipping has computed it; a step without a row has none of it."""
    recipe = replace(RECIPE, clip_gradient=limit)
    without, logged = (
        watch_step(Tiny(norm=True), recipe, resident(recipe, count=steps * recipe.batch_size)) for steps in (3, 2)
    )
    parameters = len(list(Tiny(norm=True).parameters()))  # which is one operator on a GPU, for which fake ones are many
    norm = {"aten.stack": 1, "aten.linalg_vector_norm": parameters + 1}
    assert dict(logged.operators - without.operators) == ({} if limit else norm)
    assert not without.operators - logged.operators
    assert bool(limit) == ("aten.linalg_vector_norm" in without.operators)
    assert not logged.waits


def test_a_teacher_adds_no_waits() -> None:
    recipe = replace(RECIPE, teacher_weight=0.5)
    watch, without = step(recipe, teacher=Tiny(channels=16)), step(RECIPE)
    assert not watch.waits
    assert watch.operators["aten.convolution"] == 2 * without.operators["aten.convolution"] > 0


def test_the_streaming_loader_copies_one_batch_a_step(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for the copy, which is from pinned memory: fake tensors cannot tell."""

    class Loader:
        """Replaces FFCV's Loader, which allocates its buffers by torch and needs real memory."""

        def __init__(self, *_: object, batch_size: int, **__: object) -> None:
            self.traversal_order, self.output_queue = SimpleNamespace(), queue.Queue[Any]()
            for _ in range(3):
                self.output_queue.put((None, (np.zeros((batch_size, 32, 32, 3), np.uint8),)))

        def __iter__(self) -> "Loader":
            return self

        def __next__(self) -> None:
            raise AssertionError("batches come from the queue")

        def is_alive(self) -> bool:
            return True

        def close(self) -> None: ...

    monkeypatch.setattr("ffcv.loader.loader.Loader", Loader)
    prepared = manifest.read(small_data)
    rank_info = RankInfo(DEVICE, loader="streaming")
    watch = watch_step(Tiny(), RECIPE, lambda _: open_split(small_data, prepared, "train", RECIPE, rank_info))
    assert watch.waits == {"non-blocking copy aten._to_copy in data/streaming.py:upload": 1}


# Where a run may wait for the GPU outside its steps.
ALLOWED = {
    "wait aten._local_scalar_dense in training/meter.py:window",  # metrics, every 20th step and at the end of an epoch
    "copy aten._to_copy in training/meter.py:window",
    "wait aten._local_scalar_dense in training/meter.py:check",  # before a checkpoint
    "copy aten._to_copy in training/meter.py:state_dict",
    "non-blocking copy aten._to_copy in training/state.py:_copied",  # a checkpoint
    "copy aten._to_copy in training/state.py:_load_optimizer",
    "copy aten.copy_ in training/state.py:load_state_dict",
    "copy aten._to_copy in training/meter.py:__init__",
    "copy aten._to_copy in training/evaluate.py:evaluate",  # the logits, once per split
    "copy aten._to_copy in data/augment.py:<lambda>",  # an epoch's random parameters, labels and indices
    "copy aten._to_copy in data/stream.py:epoch",
    "copy aten._to_copy in data/resident.py:read",
}


def test_a_run_waits_only_where_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Includes evaluation, checkpoints, and resuming from a checkpoint."""
    recipe = replace(RECIPE, ema=0.9)
    saved: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr(state, "rng_state", lambda _: {})
    monkeypatch.setattr(state, "set_rng_state", lambda *_: None)
    monkeypatch.setattr(checkpoint, "save", lambda _, __, step, state: saved.append((step, state)))
    with fake_cuda.fake_cuda() as (watch, accelerator):
        streams = [resident(recipe, split)(DEVICE) for split in ("train", "test", "validation")]
        data = TrainingData(*streams, 10)
        for stop in (1, None):
            model = fake_cuda.on_fake_cuda(Tiny(norm=True))
            watch.on = True
            options = LoopOptions(1, resume=saved[-1][1] if saved else None)
            result = train(model, recipe, data, accelerator, Run(tmp_path), 0, stop, options=options)
            watch.on = False
    assert result.steps == 6
    assert [step for step, _ in saved] == [1, 2, 3, 4, 5, 6]
    assert watch.waits.keys() == ALLOWED


FAULTS: dict[str, tuple[str, Callable[[torch.Tensor], object]]] = {
    ".item()": ("wait aten._local_scalar_dense", lambda loss: loss.item()),
    ".cpu()": ("copy aten._to_copy", lambda loss: loss.cpu()),
    "a scalar from the host": ("copy aten._to_copy", lambda loss: torch.tensor(1.0, device=loss.device)),
    "a tensor on the CPU": ("mixed aten.mul", lambda loss: loss * torch.ones(3)),
    "a boolean index": ("wait aten.index", lambda loss: loss.view(1)[loss.view(1) > 0]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wait_in_the_meter_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wait, cause = FAULTS[fault]
    add = Meter.add
    monkeypatch.setattr(Meter, "add", lambda self, loss, *more: (cause(loss.detach()), add(self, loss, *more)))
    assert list(step(RECIPE).waits) == [f"{wait} in training/loop.py:train_step"]
