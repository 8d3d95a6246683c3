"""Measures how fast experiments train on the CPU, and prints JSON.

python -m launch.speed PRECISIONS CLASSES HEIGHT WIDTH NAME...
"""

import json
import sys
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from runner import experiments
from runner.common.console import run_command
from runner.config.recipe import Experiment
from runner.system import cpu
from runner.training import optim
from runner.training.model import build_for

BATCH = 32
SECONDS = 1.0  # duration of the measurement, after one warm-up step


def images_per_second(experiment: Experiment, precision: str, classes: int, size: tuple[int, int]) -> float:
    """Measures the training speed of an experiment, with its optimizer, on random images.

    Args:
        experiment: what to train.
        precision: "fp32" or "bf16".
        classes: number of classes of the dataset.
        size: height and width of the dataset's images.
    """
    torch.manual_seed(0)
    size = (experiment.recipe.resize, experiment.recipe.resize) if experiment.recipe.resize else size
    model = build_for(experiment.architecture, classes, (3, *size)).to(memory_format=torch.channels_last)
    optimizer = optim.build_optimizer(experiment.recipe.optimizer, model)
    images = torch.randn(BATCH, 3, *size).to(memory_format=torch.channels_last)
    labels = torch.arange(BATCH) % classes
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


def main(precisions: str, classes: str, height: str, width: str, *names: str) -> None:
    """Prints the images per second of each experiment and precision as JSON."""
    size = (int(height), int(width))

    def measure() -> dict[str, dict[str, float]]:
        cpu.prepare()  # as training does
        return {
            name: {
                precision: images_per_second(experiments.get(name), precision, int(classes), size)
                for precision in precisions.split(",")
            }
            for name in names
        }

    print(json.dumps(run_command(lambda: measure, "quickstart")))


if __name__ == "__main__":
    main(*sys.argv[1:])
