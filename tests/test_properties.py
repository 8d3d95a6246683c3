"""Properties of the pure parts, for any input that hypothesis draws: order and slices, schedules, resuming."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.common.files import write
from runner.config.recipe import SGD, Architecture, Constant, Cosine, Linear, OneCycle, Recipe, Schedule, Step
from runner.data.open import RankInfo, open_manifest, open_split
from runner.data.resident import ResidentBatches
from runner.data.stream import StreamOptions
from runner.training import checkpoint
from runner.training.loop import Data, LoopHooks, StoppedError, train
from runner.training.model import build_model
from runner.training.optim import lr_factor
from tests.support.configs import config_of, trusted

FRACTION = st.floats(0, 1)
FEW = settings(max_examples=100, deadline=None, derandomize=True)


@given(
    images=st.integers(1, 300), batch=st.integers(1, 64), world=st.integers(1, 17), training=st.booleans(),
    drop_last=st.booleans(), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000), start=st.integers(0, 300),
)  # fmt: skip
@FEW
def test_the_ranks_slices_partition_the_epoch(
    images: int, batch: int, world: int, training: bool, drop_last: bool, seed: int, epoch: int, start: int
) -> None:
    """Each image once, or never if the last partial batch is dropped; from any step on, the same as from the first."""
    options = StreamOptions(
        (0.0,) * 3, (1.0,) * 3, batch, 0, world, training=training, drop_last=drop_last, image_size=(1, 1), seed=seed
    )
    labels, pixels = np.arange(images), np.zeros((images, 1, 1, 3), np.uint8)
    ranks = [ResidentBatches(pixels, labels, replace(options, rank=rank)) for rank in range(world)]
    steps = len(ranks[0])
    seen: list[int] = []
    for step in range(steps):
        parts = [stream.order_of(epoch)[stream.slice_of(step)].tolist() for stream in ranks]
        sizes = [len(part) for part in parts]
        assert sum(sizes) == ranks[0].size_of(step) <= batch
        assert max(sizes) - min(sizes) <= 1
        seen += [sample for part in parts for sample in part]
    assert len(set(seen)) == len(seen) == (images - images % batch if drop_last else images)
    if not training:
        assert seen == sorted(seen)
    first = min(start, steps)
    for stream in ranks[:2]:
        whole = [targets.tolist() for _, targets in stream.epoch(epoch)]
        assert [targets.tolist() for _, targets in stream.epoch(epoch, first)] == whole[first:]


SCHEDULES = st.one_of(
    st.builds(Constant, warmup=FRACTION),
    st.builds(
        Step,
        milestones=st.lists(FRACTION, max_size=4).map(lambda milestones: tuple(sorted(milestones))),
        factor=FRACTION,
        warmup=FRACTION,
    ),
    st.builds(Cosine, warmup=FRACTION, final=FRACTION),
    st.builds(Linear, warmup=FRACTION, final=FRACTION),
    st.builds(OneCycle, warmup=FRACTION, initial=FRACTION, final=FRACTION),
)


@given(schedule=SCHEDULES, steps=st.integers(1, 400))
@FEW
def test_a_schedule_stays_within_its_bounds_and_has_no_jumps(schedule: Schedule, steps: int) -> None:
    """Except at the milestones of Step. The longest step of half a cosine is π/2 times that of a line."""
    factors = [lr_factor(schedule, step, steps) for step in range(steps)]
    assert all(-1e-12 <= factor <= 1 + 1e-12 for factor in factors)
    if isinstance(schedule, Step):
        allowed = [1.0] if schedule.milestones else [math.inf]
        drops = sum(after < before for before, after in pairwise(factors))
        assert drops <= len(schedule.milestones)
    else:
        warmup = schedule.warmup * steps
        allowed = [math.pi / 2 / max(1.0, length) for length in (warmup - 1, steps - warmup - 1)]
    changes = np.abs(np.diff(factors))
    assert changes.max(initial=0.0) <= max(allowed) + 1e-9


@pytest.mark.every
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_training_stopped_anywhere_ends_with_the_same_bits(small_data: Path, tmp_path: Path, ema: float) -> None:
    """In this process; killed processes and several ranks are in test_resume.py."""
    prepared = open_manifest(small_data)
    recipe = Recipe(3, 90, SGD(0.05), ema=ema, schedule=Cosine(), drop_last=False)
    splits = {s: open_split(small_data, prepared, s, recipe, RankInfo(torch.device("cpu"))) for s in ("train", "test")}
    architecture = Architecture("tests.support.models.tiny:Tiny", {"norm": True, "dropout": 0.2})
    data = Data(splits["train"], splits["test"], None, 10)
    accelerator = Accelerator(cpu=True)
    number = 0

    def weights(stops: list[int], **hooks: Any) -> dict[str, torch.Tensor]:
        """Trains, stopping after each of the given steps, and returns what is kept."""
        nonlocal number
        number += 1
        run = trusted(tmp_path / str(number))
        write(run.record, config_of(architecture=architecture, dataset=prepared.name))
        state = None
        for stop in [*stops, 10**9]:
            count = state["step"] if state else 0

            def should_stop(stop: int = stop) -> bool:
                nonlocal count
                count += 1
                return count >= stop

            model = build_model(architecture, recipe, 0, splits["train"].first_images, None)
            try:
                train(model, recipe, data, accelerator, run, 0, hooks=LoopHooks(
                    resume=state, should_stop=should_stop, **hooks))  # fmt: skip
            except StoppedError:
                state = checkpoint.read_state(checkpoint.latest(run))
            else:
                break
            finally:
                accelerator.free_memory()
        return checkpoint.load_model(run).state_dict()

    expected = weights([])
    steps = recipe.epochs * len(splits["train"])

    @given(
        stops=st.lists(st.integers(1, steps - 1), min_size=1, max_size=3, unique=True).map(sorted),
        evaluate_every=st.integers(1, 4), checkpoint_every=st.none() | st.integers(1, 5),
        checkpoint_seconds=st.sampled_from([0.0, 3600.0]),
    )  # fmt: skip
    @settings(max_examples=12, deadline=None, derandomize=True)
    def check(stops: list[int], **hooks: Any) -> None:
        found = weights(stops, **hooks)
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items()), (stops, hooks)

    check()
