"""Measures the cost of ranks: several processes against one, and DDP with one process against no DDP.

The processes run `runner train` under `accelerate launch`; the ratio is of the wall time from the second step to the
last. On the CPU, two gloo processes with one thread each share the cores of the single process, and train the same
global batches. With GPUs, all of them train with NCCL against one, with the same number of images per GPU. DDP
with one process measures the wrapper alone: the same loop on the same fixed batch, with and without it.

    python -m runner.benchmarks.scaling --data data/cifar10 --json scaling.json
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from runner import experiments
from runner.benchmarks import measure, program
from runner.common.errors import UserError
from runner.config.recipe import Count
from runner.system import environment, launcher

GOALS = {"ratio_ranks_to_one_process": "≤ 1.10", "ratio_ddp_of_one_to_none": "≤ 1.03"}
DDP_STEPS = {"cpu": 5, "cuda": 50}  # steps per measurement, with the wrapper and without
SECONDS = "seconds: "  # prefix of the line in which the first rank reports its time


@dataclass(frozen=True)
class ScalingBenchmark:
    """Compare several processes with one, and DDP with one process with none, in turn."""

    data: Path
    """Dataset folder written by `python -m data_prep prepare`."""
    experiment: str = "podeti-mobilenetv2"
    """Name of the experiment to train."""
    steps: measure.Steps = 12
    """Optimizer steps per measurement."""
    rounds: measure.Rounds = measure.MIN_ROUNDS
    """Number of measurements per candidate."""
    json: Path | None = None
    """File for the ratios, with hardware and versions."""
    batch: Annotated[Count | None, tyro.conf.arg(help="Train as one rank, with this global batch size.")] = None

    def __call__(self) -> None:
        from runner.data.open import open_manifest

        batch = experiments.get(self.experiment).recipe.batch_size
        if self.batch is not None:
            if self.json is not None:
                raise UserError(f"--json {self.json}: expected without --batch, which measures no ratios")
            self.train(self.batch)
            return
        open_manifest(self.data)  # reports a missing or damaged dataset before any rank starts
        gpus = environment.count_gpus()
        ranks = max(gpus, 2)
        settings = {
            "experiment": self.experiment,
            "steps": self.steps,
            "ranks": ranks if gpus != 1 else 1,
            "backend": "nccl" if gpus else "gloo",
            "images": "as many for each rank" if gpus else "the same global batch",
            "cores": environment.usable_cores(),
        }
        ratios, more = {}, {"settings": settings}
        if gpus != 1:
            # Each GPU keeps the same number of images, and should take as long; CPU ranks share the same work.
            global_batch = batch * ranks if gpus else batch
            candidates = {"one": lambda: self.launched(1, batch), "ranks": lambda: self.launched(ranks, global_batch)}
            walls = measure.interleaved(candidates, self.rounds, "measure ranks")
            ratios["ratio_ranks_to_one_process"] = measure.ratio(walls["ranks"], walls["one"])
            measure.write_ratios(ratios, GOALS, more, self.json)
        walls = ddp_of_one(self.experiment, self.data, self.rounds, "cuda" if gpus else "cpu")
        ratios["ratio_ddp_of_one_to_none"] = measure.ratio(walls["ddp"], walls["none"])
        measure.report_ratios("cost of ranks", ratios, GOALS, more, self.json)

    def launched(self, processes: int, batch: int) -> float:
        """Trains with several processes; returns the seconds from the second step to the last.

        Args:
            processes: number of ranks.
            batch: global batch size.
        """
        gpus = environment.count_gpus()
        # Without a limit, OpenMP threads that spin while they wait take cores from the other rank.
        variables = ["WANDB_MODE=disabled", *([] if gpus else ["ACCELERATE_USE_CPU=true", "GOMP_SPINCOUNT=1000"])]
        launch = measure.accelerate_launch_args(processes, "bf16" if gpus else "no")
        argv = ["--data", self.data, "--experiment", self.experiment, "--steps", self.steps, "--batch", batch]
        command = ["env", *variables, sys.executable, *launch, "-m", "runner.benchmarks.scaling", *map(str, argv)]
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=partial(launcher.die_with_parent, os.getpid()),
        )
        reported = [line for line in result.stdout.splitlines() if line.startswith(SECONDS)]
        if not reported:
            raise RuntimeError(result.stderr)
        return float(reported[0].removeprefix(SECONDS))

    def train(self, batch: int) -> None:
        """Trains as one rank of `launched`; the first rank prints its time at the start of the last step."""
        import torch

        from runner import cli

        clock: list[float] = []

        def tick() -> None:
            if len(clock) in (1, self.steps - 1) and environment.count_gpus():
                torch.cuda.synchronize()
            clock.append(time.perf_counter())
            first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
            if len(clock) == self.steps and first:
                print(f"{SECONDS}{clock[-1] - clock[1]}", flush=True)

        device = [] if environment.count_gpus() else ["--device", "cpu"]
        with tempfile.TemporaryDirectory() as runs, measure.before_every_step(tick):
            argv = ["train", self.experiment, "--data", str(self.data), "--runs", runs, *device]
            cli.main([*argv, "--max-steps", str(self.steps), "--recipe.batch-size", str(batch)])


def ddp_of_one(name: str, data: Path, rounds: int, device: str) -> dict[str, list[float]]:
    """Measures steps on a fixed batch with DDP around the model ("ddp") and without ("none"), in turn.

    Args:
        name: experiment to train.
        data: prepared dataset.
        rounds: number of rounds.
        device: "cuda" or "cpu".

    Returns:
        The seconds per round, by name.
    """
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from runner.data.open import RankInfo, open_manifest, open_split
    from runner.system import cpu
    from runner.training import optim

    if device == "cpu":
        cpu.prepare()
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    recipe = experiments.get(name).recipe
    stream = open_split(data, open_manifest(data), "train", recipe, RankInfo(torch.device(device)))
    batch = next(stream.epoch(0))
    candidates: dict[str, Callable[[], float]] = {}
    for kind in ("none", "ddp"):
        torch.manual_seed(0)
        model = experiments.get(name).architecture.build().to(device, memory_format=torch.channels_last)
        optimizer = optim.build_optimizer(recipe.optimizer, model)
        if kind == "ddp":
            model = DistributedDataParallel(
                model, gradient_as_bucket_view=True, static_graph=True, broadcast_buffers=False
            )
        candidates[kind] = _timed(measure.make_step(model, optimizer, device), batch, device)
    walls = measure.interleaved(candidates, rounds, "measure DDP")
    torch.distributed.destroy_process_group()
    return walls


def _timed(step: Callable, batch: tuple, device: str) -> Callable[[], float]:
    """Returns a function that measures the seconds of DDP_STEPS steps on a batch, after one step of warm-up."""

    def seconds() -> float:
        step(*batch)
        measure.synchronize(device)
        start = time.perf_counter()
        for _ in range(DDP_STEPS[device]):
            step(*batch)
        measure.synchronize(device)
        return time.perf_counter() - start

    return seconds


if __name__ == "__main__":
    program.run(ScalingBenchmark, "scaling")
