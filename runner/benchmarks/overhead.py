"""What does the runner cost? `runner train` against the shortest loop one could write by hand.

The same model, optimizer, precision, batch size and process settings (threads, memory that is kept), each in a
fresh process, in turn. The hand-written loop has its batches ready in memory and does nothing but train: no
augmentation, no metrics, no ranks. What counts is the wall time from the second step to the last, and, apart from
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
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import tyro

from data_prep.console import UserError, run_command
from runner import experiments
from runner.benchmarks import measure

GOALS = {"ratio_runner_to_shortest_loop": "≤ 1.02", "seconds_to_first_step_beyond_imports": "≤ 1.5"}
PARTS = Literal["runner", "loop", "imports"]


@dataclass(frozen=True)
class OverheadBenchmark:
    """Compare `runner train` with the shortest loop, in turn, and print the ratio of their wall times."""

    data: Path
    """Folder made by `python -m data_prep prepare`."""
    experiment: str = "podeti-mobilenetv2"
    """What is trained."""
    steps: int = 20
    """Optimizer steps of each turn."""
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
            print(json_format.dumps({"runner": self.runner, "loop": self.loop, "imports": imports}[self.part]()))
            return
        clocks: dict[str, list[list[float]]] = {"runner": [], "loop": [], "imports": []}
        subjects = {part: lambda part=part: self.timed(part, clocks[part]) for part in clocks}
        measure.in_turn(subjects, self.rounds, "measure overhead")
        walls = {part: [clock[-1] - clock[1] for clock in clocks[part]] for part in ("runner", "loop")}
        starts = [ours[0] - theirs[0] for ours, theirs in zip(clocks["runner"], clocks["imports"], strict=True)]
        first = {part: [clock[0] for clock in clocks[part]] for part in ("runner", "imports")}
        ratios = {
            "ratio_runner_to_shortest_loop": measure.ratio(walls["runner"], walls["loop"]),
            "ratio_first_step_to_imports": measure.ratio(first["runner"], first["imports"]),
        }
        seconds = {
            "seconds_to_first_step_beyond_imports": measure.Ratio(
                median(starts), min(starts), max(starts), len(starts)
            )
        }
        settings = {"experiment": self.experiment, "steps": self.steps, "cores": len(os.sched_getaffinity(0))}
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
        command += ["--experiment", self.experiment, "--steps", str(self.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        clocks.append([at - began for at in json_format.loads(done.stdout.splitlines()[-1])])
        return clocks[-1][-1]

    def runner(self) -> list[float]:
        """Trains by the command itself; every step asks once for its learning rate, and the clock is read there."""
        from runner import cli, optim

        clock, set_rate = [], optim.set_rate

        def clocked(*arguments: object) -> float:
            clock.append(time.time())
            return set_rate(*arguments)

        optim.set_rate = clocked
        with tempfile.TemporaryDirectory() as runs:
            words = ["train", self.experiment, "--data", str(self.data), "--runs", runs, "--device", "cpu"]
            try:
                cli.main([*words, "--max-steps", str(self.steps)])
            except SystemExit as leaving:
                if leaving.code:
                    raise
        return clock

    def loop(self) -> list[float]:
        """The shortest loop."""
        import torch
        import torch.nn.functional as F

        from runner import cpu, optim
        from runner.batches.protocol import Place, open_manifest, open_split

        cpu.prepare()
        experiment = experiments.get(self.experiment)
        stream = open_split(
            self.data, open_manifest(self.data), "train", experiment.recipe, Place(torch.device("cpu"))
        )
        batches = [batch for batch, _ in zip(stream.epoch(0), range(self.steps), strict=False)]
        model = experiment.architecture.build().to(memory_format=torch.channels_last)
        optimizer = optim.build(experiment.recipe.optimizer, model)
        model.train()
        clock = []
        for images, labels in batches:
            clock.append(time.time())
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        return clock


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
