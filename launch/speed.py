"""Measures how fast experiments train on the CPU: `python -m launch.speed PRECISIONS NAME...` prints JSON."""

import json
import sys
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from runner import experiments
from runner.config.recipe import Experiment
from runner.training import optim

BATCH = 32
SECONDS = 1.0  # of measured steps, after one that is not measured


def images_per_second(experiment: Experiment, precision: str) -> float:
    """Training steps on random images of the recipe's size, with the experiment's optimizer."""
    torch.manual_seed(0)
    model = experiment.architecture.build().to(memory_format=torch.channels_last).train()
    optimizer = optim.build_optimizer(experiment.recipe.optimizer, model)
    side = experiment.recipe.resize or 32
    images = torch.randn(BATCH, 3, side, side).to(memory_format=torch.channels_last)
    labels = torch.arange(BATCH) % 10
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()

    def step() -> None:
        with autocast:
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    steps, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < SECONDS:
        step()
        steps += 1
    return BATCH * steps / seconds


def main(precisions: str, *names: str) -> None:
    """Prints images per second, by experiment and precision."""
    speeds = {
        name: {precision: images_per_second(experiments.get(name), precision) for precision in precisions.split(",")}
        for name in names
    }
    print(json.dumps(speeds))


if __name__ == "__main__":
    main(*sys.argv[1:])
