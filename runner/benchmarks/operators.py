"""Counts the operators that a training step of each experiment issues on a GPU, and its synchronizations.

python -m runner.benchmarks.operators --json runner/benchmarks/results/operators.json

Counted on fake CUDA tensors (runner.benchmarks.fake_cuda): the resident loader's next batch, the forward pass in
bf16 autocast, loss, metrics, gradient clipping, optimizer and EMA; not the backward pass, nor the row of metrics after
every 20th step. Views are not counted, and the launch of a Triton kernel counts as one operator. Fake tensors have no
fused attention and no fused norm of the gradients, so where a step uses them, the count exceeds the launches on a GPU.
A test compares it with the committed file, so that new synchronizations and operators show up in review.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runner import experiments
from runner.benchmarks import fake_cuda, measure, program
from runner.common.console import new_table, print_table, track
from runner.config.recipe import Experiment
from runner.data.resident import ResidentBatches
from runner.data.stream import BatchStream, StreamOptions

RESULT = Path(__file__).parent / "results" / "operators.json"
BATCH = 128  # maximum batch size; the counts do not depend on it


@dataclass(frozen=True)
class Operators:
    """Count the operators and synchronizations of a training step of each experiment, on fake CUDA tensors."""

    json: Path | None = None
    """JSON file to write the counts to."""

    def __call__(self) -> None:
        known = experiments.load()
        rows = [row(name, experiment) for name, experiment in track(known.items(), "count", len(known))]
        table = new_table("experiment", "operators", "waits")
        for values in rows:
            table.add_row(*map(str, values.values()))
        print_table(table)
        if self.json is not None:
            measure.write({"torch": torch.__version__.partition("+")[0], "rows": rows}, self.json)


def row(name: str, experiment: Experiment) -> dict[str, Any]:
    """Returns the row of an experiment: its name, and its number of operators and waits."""
    watch = watched(experiment)
    return {"experiment": name, "operators": watch.operators.total(), "waits": watch.waits.total()}


def watched(experiment: Experiment) -> fake_cuda.Watch:
    """Watches one training step of an experiment, with the resident loader."""
    recipe = dataclasses.replace(
        experiment.recipe, validation=0, batch_size=min(BATCH, experiment.recipe.batch_size), compile="none"
    )

    def open_stream(device: torch.device) -> BatchStream:
        images = np.zeros((3 * recipe.batch_size, 32, 32, 3), np.uint8)
        options = StreamOptions(
            mean=(120.0,) * 3,
            std=(60.0,) * 3,
            batch_size=recipe.batch_size,
            device=device,
            training=True,
            drop_last=recipe.drop_last,
            augment=recipe.augment,
            resize=recipe.resize,
            dtype=torch.bfloat16,
        )
        return ResidentBatches(images, np.zeros(len(images), np.int64), options)

    model = experiment.architecture.build()
    model = model.to(memory_format=torch.channels_last) if recipe.channels_last else model
    return fake_cuda.watch_step(model, recipe, open_stream)


if __name__ == "__main__":
    program.run(Operators, "operators")
