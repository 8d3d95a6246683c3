"""The context of a part of the GPU benchmark: its data, scale and time, and how it runs commands."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from data_prep.manifest import Manifest
from runner.benchmarks.measure import accelerate_launch_args
from runner.common.console import EXIT_BAD_INPUT
from runner.config.recipe import Experiment
from runner.run.folder import Run
from runner.system import environment, launcher

ROOT = Path(__file__).parents[3]
GRACE = 45.0  # seconds that a command has to exit by itself, with a checkpoint, when its time is up


class MissingError(RuntimeError):
    """Something that a measurement needs is missing: a package, a second GPU, time."""


class RefusedError(RuntimeError):
    """A command refused its arguments (exit code 2)."""


class OutOfTimeError(MissingError):
    """The part's share of the time is used up."""

    def __init__(self) -> None:
        super().__init__("out of time")


@dataclass(frozen=True)
class Scale:
    """The size of the measurements.

    Attributes:
        rounds: number of measurements per candidate.
        steps: optimizer steps per measurement.
        batch: images per training step.
        comparison_steps: optimizer steps over which precisions and ranks are compared.
        train_precisions: precisions to train in; fp16 needs a GPU.
        kill_test_steps: optimizer steps of the run that is killed and resumed.
        matmul_size: side of the square matrices whose product measures the peak.
        step_experiments: experiments whose steps are measured; empty for one of every architecture.
        modes: modes of torch.compile, see `speed.MODES`.
        all_mode_experiments: experiments that are measured in every mode before the others.
        other_benchmarks: other benchmarks to run; none in a rehearsal, because their own tests cover them.
        speedrun_seeds: number of trainings in the speed run.
        speedrun_overrides: changes to the recipe of the speed run.
        paper_experiments: experiments that the part `papers` trains; empty for all.
        paper_options: options for training them.
        concurrent_trainings: number of experiments that one GPU trains at once.
        deploy_experiments: experiments that are exported and measured.
        brief_steps: optimizer steps for deployed experiments that have not been trained in full.
        export_precisions, latency_batches: precisions and batch sizes of exported models.
        latency_seconds: minimum time of each latency measurement.
    """

    rounds: int = 7
    steps: int = 20
    batch: int = 512
    comparison_steps: int = 200
    train_precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")
    kill_test_steps: int = 600
    matmul_size: int = 8192
    step_experiments: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("eager", "compiled", "graphs")
    all_mode_experiments: tuple[str, ...] = ("speedrun", "podeti-mobilenetv2", "podeti-alexnet", "vit-tiny-4")
    other_benchmarks: tuple[str, ...] = ("overhead", "scaling")
    speedrun_seeds: int = 20
    speedrun_overrides: tuple[tuple[str, Any], ...] = ()
    paper_experiments: tuple[str, ...] = ()
    paper_options: tuple[str, ...] = ()
    concurrent_trainings: int = 6
    deploy_experiments: tuple[str, ...] = (
        "podeti-resnet18",
        "podeti-mobilenetv2",
        "merabishvili",
        "vit-tiny-4",
        "podeti-alexnet",
    )
    brief_steps: int = 200
    export_precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    latency_batches: tuple[int, ...] = (1, 8, 32, 128, 256, 512)
    latency_seconds: float = 3.0


REHEARSAL_SCALE = Scale(
    rounds=2,
    steps=2,
    batch=8,
    comparison_steps=2,
    train_precisions=("fp32", "bf16"),
    kill_test_steps=40,
    matmul_size=128,
    step_experiments=("soni-2", "efficientnet-b0"),
    modes=("eager",),
    other_benchmarks=(),
    speedrun_seeds=2,
    speedrun_overrides=(("epochs", 1), ("batch_size", 100)),
    paper_experiments=("soni-2",),
    paper_options=("--max-steps", "1", "--recipe.batch-size", "50"),
    deploy_experiments=("soni-2",),
    brief_steps=1,
    export_precisions=("fp16",),
    latency_batches=(1, 2),
    latency_seconds=0.05,
)


@dataclass(frozen=True)
class Context:
    """The inputs of a part of the GPU benchmark.

    Attributes:
        data, manifest: the prepared dataset.
        out: folder of the results and of the runs that are trained for them.
        rehearse: whether everything runs in miniature on the CPU.
        deadline: when the part's time is up, on the monotonic clock.
        peer: a script of another project to compare the speed run with.
        peer_row: regular expression of its result lines, with the groups `accuracy` and `seconds`.
        commit: the commit of the code, instead of that of the git checkout.
    """

    data: Path
    manifest: Manifest
    out: Path
    rehearse: bool
    deadline: float
    peer: Path | None = None
    peer_row: str = ""
    commit: str | None = None

    @property
    def scale(self) -> Scale:
        """The size of the measurements."""
        return REHEARSAL_SCALE if self.rehearse else Scale()

    @property
    def device(self) -> str:
        """ "cuda", or "cpu" in a rehearsal."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def max_ranks(self) -> int:
        """Number of ranks that training can use: one per GPU, or two on the CPU."""
        return 2 if self.rehearse else environment.count_gpus()

    @property
    def scratch(self) -> Path:
        """Folder of intermediate files, such as the reports of other programs; created if needed."""
        folder = self.out / "work"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def seconds_left(self) -> float:
        """Returns the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def run_python(self, *argv: object, cwd: Path | None = None) -> str:
        """Runs `python ARGV` with W&B disabled, and returns its standard output.

        Raises:
            OutOfTimeError: the time was up, and the command was stopped; training has written a checkpoint.
            RefusedError: the command refused its arguments.
            RuntimeError: the command failed; the message is the end of its output.
        """
        process = self.start_python(*argv, cwd=cwd)
        try:
            out, err = process.communicate(timeout=max(0.1, self.seconds_left()))
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.communicate(timeout=GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            raise OutOfTimeError from None
        if process.returncode != 0:
            kind = RefusedError if process.returncode == EXIT_BAD_INPUT else RuntimeError
            raise kind(" ".join((err or out).split())[-300:])  # as much as a finding keeps
        return out

    def start_python(
        self, *argv: object, cwd: Path | None = None, stderr: IO[str] | int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """Starts `python ARGV` with W&B disabled; it dies with this process."""
        variables = ["env", "WANDB_MODE=disabled", f"PYTHONPATH={':'.join([str(ROOT), *sys.path[1:]])}"]
        variables += ["ACCELERATE_USE_CPU=true"] if self.rehearse else []
        return subprocess.Popen(
            [*variables, sys.executable, *map(str, argv)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=cwd,
            preexec_fn=partial(launcher.die_with_parent, os.getpid()),
        )

    def train_command(self, name: str, run: str, *options: object, processes: int = 1) -> tuple[Run, list[object]]:
        """Returns a run, and the arguments of Python that train it, or resume it if it exists."""
        runs = self.out / "runs"
        argv = ["-m", "runner", "train", name, "--data", self.data, "--runs", runs, "--name", run]
        argv += ["--resume", "auto", "--device", self.device, *options]
        if processes > 1:
            argv = [*accelerate_launch_args(processes, "no"), *argv]
        return Run(runs / name / run), argv

    def train(self, name: str, run: str, *options: object, processes: int = 1) -> Run:
        """Trains, and returns the finished run; raises the exceptions of `run_python`."""
        trained, argv = self.train_command(name, run, *options, processes=processes)
        self.run_python(*argv)
        return trained


def validation_options(experiment: Experiment, images: int) -> list[str]:
    """Returns the options that hold out fewer images if the training split of `images` images is small."""
    return ["--recipe.validation", str(images // 10)] if experiment.recipe.validation * 2 > images else []
