"""What only a GPU can show: determinism, loaders, compiled modes, and batches made on the device."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read before the first call of cuBLAS

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from runner import experiments
from runner.config.recipe import Experiment
from runner.data import color
from runner.data.open import RankInfo, open_manifest, open_split
from runner.data.resident import ResidentBatches
from runner.data.stream import StreamOptions
from runner.system import cuda
from runner.training.loss import make_loss
from runner.training.optim import build_optimizer
from tests.test_batches import CPU, RECIPES, random_jitter

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
IMAGES = 32
STEPS = 3


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Refuses operations without a deterministic kernel, as `--deterministic` does."""
    cuda.prepare(GPU, True, os.environ)
    yield
    torch.use_deterministic_algorithms(False)


def losses_and_weights(experiment: Experiment, compiled: str = "none") -> tuple[list[float], list[torch.Tensor]]:
    """Trains a few steps in bf16 on images of noise, from one seed."""
    recipe = replace(experiment.recipe, batch_size=IMAGES, validation=0)
    pixels = np.random.default_rng(0).integers(0, 256, (STEPS * IMAGES, 32, 32, 3), np.uint8)
    options = StreamOptions(
        (120.0,) * 3, (60.0,) * 3, IMAGES, device=GPU, training=True, augment=recipe.augment, resize=recipe.resize,
        dtype=torch.bfloat16,
    )  # fmt: skip
    stream = ResidentBatches(pixels, np.arange(len(pixels)) % 10, options)
    torch.manual_seed(0)
    model = experiment.architecture.build().to(GPU).train()
    model = model.to(memory_format=torch.channels_last) if recipe.channels_last else model
    optimizer, loss_fn, losses = build_optimizer(recipe.optimizer, model), make_loss(recipe, None), []
    called = model if compiled == "none" else torch.compile(model, mode=compiled)
    for images, targets in stream.epoch(0):
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_fn(called(images), targets, images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", experiments.load())
def test_every_experiment_trains_deterministically(name: str, deterministic: None) -> None:
    """Twice the same steps give the same bits, and no operation lacks a deterministic kernel."""
    (losses, weights), (again, same) = (losses_and_weights(experiments.get(name)) for _ in range(2))
    assert losses == again
    assert all(map(torch.equal, weights, same))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_alike(mode: str) -> None:
    experiment = experiments.get("speedrun")
    torch.compiler.reset()
    expected, found = (losses_and_weights(experiment, compiled)[0] for compiled in ("none", mode))
    assert found == pytest.approx(expected, rel=0.05)  # in bf16, whose roundings differ


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("loader", ["resident", "streaming"])
def test_batches_match_the_cpus(small_data: Path, recipe: str, loader: str) -> None:
    """Up to the last bits of the normalization, a pixel that color jitter rounds the other way, and resizing."""
    streams = [
        open_split(small_data, open_manifest(small_data), "train", RECIPES[recipe], RankInfo(device, loader=each))
        for device, each in ((GPU, loader), (CPU, "resident"))
    ]
    for (images, targets), (expected, expected_targets) in islice(zip(*(s.epoch(1) for s in streams), strict=True), 4):
        assert images.device == GPU
        difference = (images.cpu() - expected).abs()
        assert difference.mean() < 1e-4
        assert difference.max() < 0.05
        torch.testing.assert_close(targets.cpu(), expected_targets)


@pytest.mark.parametrize("side", [(32, 32), (20, 28), (40, 50)])
def test_jitter_matches_the_cpus(side: tuple[int, int]) -> None:
    images, factors, order = random_jitter(side)
    jittered = color.jitter(images.to(GPU), factors.to(GPU), order.to(GPU))
    assert torch.equal(jittered.cpu(), color.jitter(images, factors, order))


def test_fp32_is_not_tf32() -> None:
    """A convolution's float32 error stays that of float32."""
    cuda.prepare(GPU, False, {})
    torch.manual_seed(0)
    images, weights = torch.randn(8, 64, 16, 16, dtype=torch.float64), torch.randn(64, 64, 3, 3, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(images, weights)
    found = torch.nn.functional.conv2d(images.float().to(GPU), weights.float().to(GPU)).double().cpu()
    assert (found - expected).norm() / expected.norm() < 1e-5
