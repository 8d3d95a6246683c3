"""What do ranks cost? Two processes against one with the same cores, and DDP with one process against none.

Both train the same global batches by `runner train` itself, under `accelerate launch`; what counts is the time from
the second step to the last. Two gloo processes with one thread each share the cores that one process has for
itself; with GPUs it is all of them against one, by NCCL, with as many images for each. DDP with one process is the
price of
the wrapper: the same loop on the same fixed batch, with and without.

    python -m runner.benchmarks.scaling --data data/cifar10 --json scaling.json
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_prep.console import UserError, run_command
from runner import environment, experiments, launched
from runner.benchmarks import measure

GOALS = {"ratio_ranks_to_one_process": "≤ 1.10", "ratio_ddp_of_one_to_none": "≤ 1.03"}
DDP_STEPS = {"cpu": 5, "cuda": 50}  # of each turn with the wrapper and without
TOLD = "seconds: "


@dataclass(frozen=True)
class ScalingBenchmark:
    """Compare several processes with one, and DDP with one process with none, in turn."""

    data: Path
    """Folder made by `python -m data_prep prepare`."""
    experiment: str = "podeti-mobilenetv2"
    """What is trained."""
    steps: int = 12
    """Optimizer steps of each turn."""
    rounds: int = measure.LEAST_ROUNDS
    """Turns that each takes."""
    json: Path | None = None
    """File for the ratios, with hardware and versions."""
    batch: Annotated[int | None, tyro.conf.arg(help="Train as one rank of a turn, with this global batch.")] = None

    def __call__(self) -> None:
        if self.steps < 3:
            raise UserError(f"--steps {self.steps}: expected 3 or more")
        if self.rounds < measure.LEAST_ROUNDS:
            raise UserError(f"--rounds {self.rounds}: expected {measure.LEAST_ROUNDS} or more, for a spread")
        batch = experiments.get(self.experiment).recipe.batch_size
        if self.batch is not None:
            self.train(self.batch)
            return
        gpus = environment.count_gpus()
        ranks = max(gpus, 2)
        ratios = {}
        if gpus != 1:
            # GPUs keep their images each and should take as long; cores share the same work.
            together = batch * ranks if gpus else batch
            subjects = {"one": lambda: self.launched(1, batch), "ranks": lambda: self.launched(ranks, together)}
            walls = measure.in_turn(subjects, self.rounds, "measure ranks")
            ratios["ratio_ranks_to_one_process"] = measure.ratio(walls["ranks"], walls["one"])
        walls = ddp_of_one(self.experiment, self.data, self.rounds, "cuda" if gpus else "cpu")
        ratios["ratio_ddp_of_one_to_none"] = measure.ratio(walls["ddp"], walls["none"])
        settings = {
            "experiment": self.experiment,
            "steps": self.steps,
            "ranks": ranks if gpus != 1 else 1,
            "backend": "nccl" if gpus else "gloo",
            "images": "as many for each rank" if gpus else "the same global batch",
            "cores": len(os.sched_getaffinity(0)),
        }
        measure.conclude("price of ranks", ratios, GOALS, {"settings": settings}, self.json)

    def launched(self, processes: int, batch: int) -> float:
        """Seconds from the second step to the last of `runner train` on so many processes."""
        gpus = environment.count_gpus()
        launcher = [sys.executable, *measure.accelerate_launch(processes, "bf16" if gpus else "no")]
        # Threads that spin for work take it from the other rank's.
        variables = ["WANDB_MODE=disabled", *([] if gpus else ["ACCELERATE_USE_CPU=true", "GOMP_SPINCOUNT=1000"])]
        words = ["--data", self.data, "--experiment", self.experiment, "--steps", self.steps, "--batch", batch]
        command = ["env", *variables, *launcher, "-m", "runner.benchmarks.scaling", *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, preexec_fn=launched.end_with_parent
        )
        told = [line for line in done.stdout.splitlines() if line.startswith(TOLD)]
        if not told:
            raise RuntimeError(done.stderr)
        return float(told[0].removeprefix(TOLD))

    def train(self, batch: int) -> None:
        """One rank of `launched`. Every step asks once for its learning rate, and the clock is read there."""
        import torch

        from runner import cli, optim

        clock, set_rate = [], optim.set_rate

        def clocked(*arguments: Any) -> float:
            clock.append(time.perf_counter())
            alone = not torch.distributed.is_initialized()
            if len(clock) == self.steps and (alone or torch.distributed.get_rank() == 0):
                print(f"{TOLD}{clock[-1] - clock[1]}", flush=True)
            return set_rate(*arguments)

        optim.set_rate = clocked
        device = [] if environment.count_gpus() else ["--device", "cpu"]
        with tempfile.TemporaryDirectory() as runs:
            words = ["train", self.experiment, "--data", str(self.data), "--runs", runs, *device]
            cli.main([*words, "--max-steps", str(self.steps), "--recipe.batch-size", str(batch)])


def ddp_of_one(name: str, data: Path, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of some steps on a fixed batch, with DDP around the model and without, in turn."""
    import torch
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    from runner import cpu, optim
    from runner.batches.protocol import Place, open_manifest, open_split

    if device == "cpu":
        cpu.prepare()
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    recipe = experiments.get(name).recipe
    stream = open_split(data, open_manifest(data), "train", recipe, Place(torch.device(device)))
    images, labels = next(stream.epoch(0))
    subjects: dict[str, Callable[[], float]] = {}
    for kind in ("none", "ddp"):
        torch.manual_seed(0)
        bare = experiments.get(name).architecture.build().to(device, memory_format=torch.channels_last)
        optimizer = optim.build(recipe.optimizer, bare)
        model = bare
        if kind == "ddp":
            model = DistributedDataParallel(
                bare, gradient_as_bucket_view=True, static_graph=True, broadcast_buffers=False
            )

        def steps(model: torch.nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> float:
            for counted in (False, True):  # a step to warm up, then those that count
                _finish(device)
                began = time.perf_counter()
                for _ in range(DDP_STEPS[device] if counted else 1):
                    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                        loss = F.cross_entropy(model(images), labels)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                _finish(device)
            return time.perf_counter() - began

        subjects[kind] = steps
    walls = measure.in_turn(subjects, rounds, "measure DDP")
    torch.distributed.destroy_process_group()
    return walls


def _finish(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def main() -> None:
    """Entry point of `python -m runner.benchmarks.scaling`."""
    run_command(
        lambda: tyro.cli(ScalingBenchmark, prog="python -m runner.benchmarks.scaling", config=()), "scaling"
    )


if __name__ == "__main__":
    main()
