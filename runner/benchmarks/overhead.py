"""What does the runner cost, and what does it save? `runner train` against two loops written by hand.

The same model, optimizer, precision, batch size and process settings (threads, memory that is kept), each in a
fresh process, in turn. The hand-written loop has its batches ready in memory and does nothing but train: no
augmentation, no metrics, no ranks: the shortest there is. The other is the usual one, accelerate and torchvision's
DataLoader with worker processes. What counts is the wall time from the second step to the last, and, apart from
it, the time from the start of the process to its first step beyond that of one which only imports torch and
torchvision.

    python -m runner.benchmarks.overhead --data data/cifar10 --json overhead.json
"""

import json as json_format
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, get_args

import tyro

from data_prep.console import UserError, run_command
from runner import experiments, launched
from runner.benchmarks import measure
from runner.recipe import Recipe

GOALS = {
    "ratio_runner_to_shortest_loop": "≤ 1.02",
    "ratio_accelerate_loop_to_runner": "≥ 3 on a GPU",
    "seconds_to_first_step_beyond_imports": "≤ 1.5",
}
PARTS = Literal["runner", "loop", "accelerate", "imports"]


@dataclass(frozen=True)
class OverheadBenchmark:
    """Compare `runner train` with the shortest loop, in turn, and print the ratio of their wall times."""

    data: Path
    """Folder made by `python -m data_prep prepare`."""
    experiment: str = "podeti-mobilenetv2"
    """What is trained."""
    steps: int = 20
    """Optimizer steps of each turn."""
    batch: int | None = None
    """Images of a step; by default the recipe's."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where: in fp32 on the CPU, in bf16 on a GPU."""
    rounds: int = measure.LEAST_ROUNDS
    """Turns that each takes."""
    json: Path | None = None
    """File for the ratios, with hardware and versions."""
    part: Annotated[PARTS | None, tyro.conf.arg(help="Run one part in this process and print its clock.")] = None

    def __call__(self) -> None:
        if self.steps < 3:
            raise UserError(f"--steps {self.steps}: expected 3 or more")
        if self.rounds < measure.LEAST_ROUNDS:
            raise UserError(f"--rounds {self.rounds}: expected {measure.LEAST_ROUNDS} or more, for a spread")
        experiments.get(self.experiment)
        if self.part is not None:
            parts = {"runner": self.runner, "loop": self.loop, "accelerate": self.accelerate, "imports": imports}
            print(json_format.dumps(parts[self.part]()))
            return
        clocks: dict[str, list[list[float]]] = {part: [] for part in get_args(PARTS)}
        subjects = {part: lambda part=part: self.timed(part, clocks[part]) for part in clocks}
        measure.in_turn(subjects, self.rounds, "measure overhead")
        trained = [part for part in clocks if part != "imports"]
        walls = {part: [clock[-1] - clock[1] for clock in clocks[part]] for part in trained}
        starts = [ours[0] - theirs[0] for ours, theirs in zip(clocks["runner"], clocks["imports"], strict=True)]
        first = {part: [clock[0] for clock in clocks[part]] for part in ("runner", "imports")}
        ratios = {
            "ratio_runner_to_shortest_loop": measure.ratio(walls["runner"], walls["loop"]),
            "ratio_accelerate_loop_to_runner": measure.ratio(walls["accelerate"], walls["runner"]),
            "ratio_first_step_to_imports": measure.ratio(first["runner"], first["imports"]),
        }
        seconds = {
            "seconds_to_first_step_beyond_imports": measure.Ratio(
                median(starts), min(starts), max(starts), len(starts)
            )
        }
        settings = {"experiment": self.experiment, "steps": self.steps, "cores": len(os.sched_getaffinity(0))}
        settings |= {"batch": self.recipe().batch_size, "device": self.device}
        measure.conclude("overhead of the runner", ratios, GOALS, {"settings": settings}, self.json, seconds)

    def timed(self, part: str, clocks: list[list[float]]) -> float:
        """Runs a part in a fresh process; keeps the times of its steps, in seconds since its start."""
        began = time.time()
        command = [
            "env",
            "WANDB_MODE=offline",
            sys.executable,
            "-m",
            "runner.benchmarks.overhead",
            "--data",
            str(self.data),
            "--part",
            part,
        ]
        command += ["--experiment", self.experiment, "--steps", str(self.steps), "--device", self.device]
        command += ["--batch", str(self.recipe().batch_size)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=launched.end_with_parent
        )
        clocks.append([at - began for at in json_format.loads(done.stdout.splitlines()[-1])])
        return clocks[-1][-1]

    def runner(self) -> list[float]:
        """Trains by the command itself; every step asks once for its learning rate, and the clock is read there."""
        from runner import cli, optim

        clock, set_rate = [], optim.set_rate

        def clocked(*arguments: object) -> float:
            self.tick(clock)
            return set_rate(*arguments)

        optim.set_rate = clocked
        with tempfile.TemporaryDirectory() as runs:
            words = ["train", self.experiment, "--data", str(self.data), "--runs", runs, "--device", self.device]
            words += ["--precision", "bf16" if self.device == "cuda" else "fp32"]
            words += ["--recipe.batch-size", str(self.recipe().batch_size), "--evaluate-every", "1000"]
            try:
                cli.main([*words, "--max-steps", str(self.steps)])
            except SystemExit as leaving:
                if leaving.code:
                    raise
        return clock

    def loop(self) -> list[float]:
        """The shortest loop."""
        from runner.batches.protocol import Place, open_manifest, open_split

        model, optimizer, device = self.prepared()
        place = Place(device)
        stream = open_split(self.data, open_manifest(self.data), "train", self.recipe(), place)
        batches = list(islice((batch for epoch in count() for batch in stream.epoch(epoch)), self.steps))
        return self.trained(model, optimizer, batches, lambda loss: loss.backward())

    def accelerate(self) -> list[float]:
        """The usual loop."""
        import torch
        from accelerate import Accelerator

        from runner.batches.protocol import open_manifest
        from runner.benchmarks.loader import LoaderBenchmark, torchvision_loader

        model, optimizer, _ = self.prepared()
        workers = min(8, len(os.sched_getaffinity(0)))
        benchmark = LoaderBenchmark(self.data, self.recipe().batch_size, workers)
        epoch = torchvision_loader(benchmark, open_manifest(self.data))
        gpu = self.device == "cuda"
        accelerator = Accelerator(cpu=not gpu, mixed_precision="bf16" if gpu else "no")
        model, optimizer = accelerator.prepare(model, optimizer)

        def batches() -> Iterator[Any]:
            while True:
                for images, labels in epoch(0):
                    yield (
                        images.to(accelerator.device, non_blocking=True, memory_format=torch.channels_last),
                        labels.to(accelerator.device, non_blocking=True),
                    )

        return self.trained(model, optimizer, islice(batches(), self.steps), accelerator.backward)

    def recipe(self) -> Recipe:
        """The experiment's, with the batch that was asked for."""
        recipe = experiments.get(self.experiment).recipe
        return replace(recipe, batch_size=self.batch or recipe.batch_size)

    def prepared(self) -> tuple[Any, Any, Any]:
        """Model and optimizer as the runner makes them, and the device on which they are."""
        import torch

        from runner import cpu, cuda, optim

        device = torch.device(self.device)
        if self.device == "cpu":
            cpu.prepare()
        cuda.prepare(device, False, {})
        model = experiments.get(self.experiment).architecture.build().to(device, memory_format=torch.channels_last)
        return model.train(), optim.build(self.recipe().optimizer, model), device

    def trained(
        self, model: Any, optimizer: Any, batches: Iterable[Any], backward: Callable[[Any], None]
    ) -> list[float]:
        """The times at which each of the steps on these batches began."""
        import torch
        import torch.nn.functional as F

        clock: list[float] = []
        for images, labels in batches:
            self.tick(clock)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                loss = F.cross_entropy(model(images), labels)
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return clock

    def tick(self, clock: list[float]) -> None:
        """Reads the clock; where time is taken between, after the GPU has done what it was given."""
        if self.device == "cuda" and len(clock) in (1, self.steps - 1):
            import torch

            torch.cuda.synchronize()
        clock.append(time.time())


def imports() -> list[float]:
    """Imports torch and torchvision, and nothing else of weight."""
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    return [time.time()]


def main() -> None:
    """Entry point of `python -m runner.benchmarks.overhead`."""
    run_command(
        lambda: tyro.cli(OverheadBenchmark, prog="python -m runner.benchmarks.overhead", config=()), "overhead"
    )


if __name__ == "__main__":
    main()
