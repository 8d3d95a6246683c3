"""Measures the overhead of the runner: `runner train` against two hand-written loops.

All use the same model, optimizer, precision, batch size and process settings (threads, memory reuse), each in a fresh
process, in turn. The shortest loop has its batches ready in memory and only trains: no augmentation, no metrics, no
ranks. The usual loop uses accelerate and torchvision's DataLoader with worker processes. The ratios are of the wall
time from the second step to the last. The time from the start of the process to its first step is measured separately,
minus that of a process that only imports torch and torchvision.

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
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from runner import experiments
from runner.benchmarks import measure, program
from runner.common.console import EXIT_BAD_INPUT
from runner.common.errors import UserError
from runner.config.recipe import Count, Recipe
from runner.system import launcher
from runner.system.environment import usable_cores

GOALS = {
    "ratio_runner_to_shortest_loop": "≤ 1.02",
    "ratio_accelerate_loop_to_runner": "≥ 3 on a GPU",
    "seconds_to_first_step_beyond_imports": "≤ 1.5",
}
Program = Literal["runner", "loop", "accelerate", "imports"]


def ratios_of(clocks: dict[str, list[list[float]]]) -> dict[str, measure.Spread]:
    """Returns the ratios of programs, from the times of each program's steps in each round."""
    walls = {program: [clock[-1] - clock[1] for clock in clocks[program]] for program in clocks if program != "imports"}
    first = {program: [clock[0] for clock in clocks[program]] for program in ("runner", "imports")}
    return {
        "ratio_runner_to_shortest_loop": measure.ratio(walls["runner"], walls["loop"]),
        "ratio_accelerate_loop_to_runner": measure.ratio(walls["accelerate"], walls["runner"]),
        "ratio_first_step_to_imports": measure.ratio(first["runner"], first["imports"]),
    }


@dataclass(frozen=True)
class OverheadBenchmark:
    """Compare `runner train` with the shortest loop, in turn, and print the ratio of their wall times."""

    data: Path
    """Dataset folder written by `python -m data_prep prepare`."""
    experiment: str = "podeti-mobilenetv2"
    """Name of the experiment to train."""
    steps: measure.Steps = 20
    """Optimizer steps per measurement."""
    batch: Count | None = None
    """Images per step; by default the recipe's batch size."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to train on: in fp32 on the CPU, in bf16 on a GPU."""
    rounds: measure.Rounds = measure.MIN_ROUNDS
    """Number of measurements per candidate."""
    json: Path | None = None
    """File for the ratios, with hardware and versions."""
    part: Annotated[Program | None, tyro.conf.arg(help="Run one part in this process and print its times.")] = None

    def __call__(self) -> None:
        experiments.get(self.experiment)
        if self.part is not None:
            if self.json is not None:
                raise UserError(f"--json {self.json}: expected without --part, which measures no ratios")
            programs = {"runner": self.runner, "loop": self.loop, "accelerate": self.accelerate, "imports": imports}
            print(json_format.dumps(programs[self.part]()))
            return
        clocks: dict[str, list[list[float]]] = {program: [] for program in get_args(Program)}
        candidates = {program: partial(self.timed, program, clocks[program]) for program in clocks}
        settings = {"experiment": self.experiment, "steps": self.steps, "cores": usable_cores()}
        settings |= {"batch": self.recipe().batch_size, "device": self.device}
        more = {"settings": settings}
        # Written after each round, so that an interruption loses only that round.
        measure.interleaved(
            candidates, self.rounds, "measure overhead",
            lambda: measure.write_ratios(ratios_of(clocks), GOALS, more, self.json),
        )  # fmt: skip
        first = zip(clocks["runner"], clocks["imports"], strict=True)
        beyond_imports = [runner[0] - imports[0] for runner, imports in first]
        seconds = {"seconds_to_first_step_beyond_imports": measure.spread(beyond_imports)}
        measure.report_ratios("overhead of the runner", ratios_of(clocks), GOALS, more, self.json, seconds)

    def timed(self, program: str, clocks: list[list[float]]) -> float:
        """Runs a program in a fresh process, appends the times of its steps to `clocks`, and returns the last.

        Times are in seconds since the start of the process.
        """
        start = time.time()
        command = ["env", "WANDB_MODE=offline", sys.executable, "-m", "runner.benchmarks.overhead", "--part", program]
        command += ["--data", str(self.data), "--experiment", self.experiment, "--steps", str(self.steps)]
        command += ["--device", self.device, "--batch", str(self.recipe().batch_size)]
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            preexec_fn=partial(launcher.die_with_parent, os.getpid()),
        )
        if result.returncode == EXIT_BAD_INPUT:
            raise SystemExit(EXIT_BAD_INPUT)  # the program has printed why
        result.check_returncode()
        clocks.append([seconds - start for seconds in json_format.loads(result.stdout.splitlines()[-1])])
        return clocks[-1][-1]

    def runner(self) -> list[float]:
        """Trains with `runner train`; returns the time of each step."""
        from runner import cli

        clock: list[float] = []
        with tempfile.TemporaryDirectory() as runs, measure.before_every_step(lambda: self.tick(clock)):
            argv = ["train", self.experiment, "--data", str(self.data), "--runs", runs, "--device", self.device]
            argv += ["--precision", "bf16" if self.device == "cuda" else "fp32"]
            argv += ["--recipe.batch-size", str(self.recipe().batch_size), "--evaluate-every", "1000"]
            try:
                cli.main([*argv, "--max-steps", str(self.steps)])
            except SystemExit as stop:
                if stop.code:
                    raise
        return clock

    def loop(self) -> list[float]:
        """Trains with the shortest loop; returns the time of each step."""
        import torch

        from runner.data.open import RankInfo, open_manifest, open_split

        model, optimizer, device = self.prepare()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # as in `runner train`
        rank_info = RankInfo(device, dtype=dtype)
        stream = open_split(self.data, open_manifest(self.data), "train", self.recipe(), rank_info)
        batches = list(islice((batch for epoch in count() for batch in stream.epoch(epoch)), self.steps))
        return self.train(model, optimizer, batches)

    def accelerate(self) -> list[float]:
        """Trains with the usual loop; returns the time of each step."""
        import torch
        from accelerate import Accelerator

        from runner.benchmarks.loader import LoaderBenchmark, torchvision_loader
        from runner.data.open import open_manifest

        model, optimizer, _ = self.prepare()
        workers = min(8, usable_cores())
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

        return self.train(model, optimizer, islice(batches(), self.steps), accelerator.backward)

    def recipe(self) -> Recipe:
        """Returns the experiment's recipe with the requested batch size."""
        recipe = experiments.get(self.experiment).recipe
        return replace(recipe, batch_size=self.batch or recipe.batch_size)

    def prepare(self) -> tuple[Any, Any, Any]:
        """Returns model and optimizer as the runner builds them, and the device."""
        import torch

        from runner.system import cpu, cuda
        from runner.training import optim

        device = torch.device(self.device)
        if self.device == "cpu":
            cpu.prepare()
        cuda.prepare(device, False, {})
        model = experiments.get(self.experiment).architecture.build().to(device, memory_format=torch.channels_last)
        return model.train(), optim.build_optimizer(self.recipe().optimizer, model), device

    def train(
        self, model: Any, optimizer: Any, batches: Iterable[Any], backward: Callable[[Any], None] | None = None
    ) -> list[float]:
        """Trains on the batches; returns the time at which each step started."""
        clock: list[float] = []
        step = measure.make_step(model, optimizer, self.device, backward)
        for images, labels in batches:
            self.tick(clock)
            step(images, labels)
        return clock

    def tick(self, clock: list[float]) -> None:
        """Appends the current time; synchronizes the GPU at the two steps between which wall time is measured."""
        if len(clock) in (1, self.steps - 1):
            measure.synchronize(self.device)
        clock.append(time.time())


def imports() -> list[float]:
    """Imports torch and torchvision; returns the time afterwards."""
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    return [time.time()]


if __name__ == "__main__":
    program.run(OverheadBenchmark, "overhead")
