"""Runs `runner train`: setup, one training run per seed, and the handling of failures.

Options, data, weights and device are checked before any folder is created.
"""

import contextlib
import io
import os
import re
import secrets
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, Protocol

import msgspec
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import nn

from data_prep import beton_reader
from data_prep.manifest import Manifest
from runner.common.console import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from runner.common.errors import DISK_FULL, TRANSIENT_ERRNOS, UserError
from runner.common.files import is_file, remove, write_atomically, write_json
from runner.common.text import first_line
from runner.config.recipe import Experiment, Recipe
from runner.config.train_config import TrainConfig, check_precision
from runner.data.kernels import crop
from runner.data.open import DTYPES, RankInfo, SplitName, model_input, open_manifest, open_split
from runner.data.stream import BatchStream
from runner.run.folder import MANIFEST, METRICS, Run, finished_run, locked_runs
from runner.run.metrics import truncate_metrics
from runner.run.schema import Ending, MetricRow, RunConfig, Summary, TrainPrecision
from runner.system import cpu, cuda, launcher, watchdog
from runner.training import checkpoint, record
from runner.training.evaluate import Evaluation
from runner.training.loop import (
    LoopOptions,
    Steps,
    StoppedError,
    TrainingData,
    TrainResult,
    any_rank_should_stop,
    has_ended,
    train,
)
from runner.training.meter import DivergedError, flops_utilization
from runner.training.model import build_model
from runner.training.profile import StepProfiler
from runner.training.progress import EpochPrinter
from runner.training.state import best_row

STOP_FILE = "stop"  # in the run folder; requests a checkpoint and a clean exit
STOP_FILE_INTERVAL = 0.25
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
FORWARDED_INTERRUPT_SECONDS = 1.0  # a second SIGINT within this time is a copy that the launcher forwarded
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later
LOST_RANK = "another rank exited and reports why, unless it was killed; rerun with --resume auto"
CHECKPOINT_VISIBLE_SECONDS = 60.0  # seconds for a checkpoint to become visible on the other nodes
COLLECTIVE_MARGIN_SECONDS = 60  # by which collectives wait longer than the watchdog, so that it reports first


class RunTracker(Protocol):
    """The tracker interface that training uses (see runner.tracking). Only rank 0 has one."""

    abandoned: bool
    """Whether it failed or did not finish in time; its exit handler would wait forever, so use `exit_at_once`."""

    @property
    def status(self) -> str:
        """A line that says where the tracker logs to."""

    def log(self, row: MetricRow) -> None:
        """Logs one row of metrics."""

    def log_results(self) -> None:
        """Logs the figures, tables and summary of the finished run."""

    def finish(self, failed: bool = False) -> None:
        """Closes the tracker, within a time limit; `failed` marks the run as failed."""

    def exit_at_once(self, code: int) -> NoReturn:
        """Ends this process, and what the tracker started."""


@dataclass(frozen=True)
class TrackingCallbacks:
    """Callbacks for logging and plotting, passed in by the command, so that training does not import them.

    Attributes:
        create_tracker: creates the tracker of a run.
        draw_figures: draws the figures of a finished run from its evaluation, with a function that reads test images by
            index.
    """

    create_tracker: Callable[[Run, RunConfig, MutableMapping[str, str]], RunTracker]
    draw_figures: Callable[[Run, RunConfig, Evaluation, Callable[[np.ndarray], np.ndarray]], None]


@dataclass(frozen=True)
class TrainingOutcome:
    """Summaries of the trained seeds, and how the process must exit.

    Attributes:
        summaries: one for each seed on rank 0; empty on the other ranks.
        exit_at_once: skip the interpreter's exit handlers. After a process group was used, thread pools of torch's
            libraries sometimes abort the process in their static destructors, and the launcher would report a failed
            run; and W&B's handler waits forever for a server that does not answer.
    """

    summaries: list[Summary]
    exit_at_once: bool


def run_training(
    config: TrainConfig, registered: Experiment, environ: MutableMapping[str, str], tracking: TrackingCallbacks
) -> TrainingOutcome:
    """Trains with the given options, once for each seed.

    Raises:
        UserError: data, name, weights or device are invalid (before any folder is created); or not all ranks joined,
            or the checkpoint cannot be loaded (after the run folders are locked).
        SystemExit: with the exit code of a failed or stopped run.
    """
    with catch_stop_signals() as stopped:
        try:
            return _run_training(config, registered, environ, tracking, stopped)
        except UserError:
            if stopped() and int(environ.get("LOCAL_RANK", 0)) > 0:
                raise SystemExit(EXIT_BAD_INPUT) from None  # the launcher ends this rank; the first prints the error
            raise
        except RuntimeError as error:  # before or after the training of a seed, which reports its own failures
            if not is_lost_rank(error, int(environ.get("WORLD_SIZE", 1))):
                raise
            print(f"runner: rank {environ.get('RANK', 0)}: {LOST_RANK} ({first_line(error)})", file=sys.stderr)
            raise SystemExit(1) from None


def _run_training(
    config: TrainConfig,
    registered: Experiment,
    environ: MutableMapping[str, str],
    tracking: TrackingCallbacks,
    stopped: Callable[[], bool],
) -> TrainingOutcome:
    """Prepares device and data, checks the options that depend on them, and trains each seed; see `run_training`."""
    launch = launcher.read(environ)
    device, message = launcher.select_device(config.device, launch, torch.cuda.device_count())
    rank_info = RankInfo(
        device=torch.device(device, launch.local_rank) if device == "cuda" else torch.device("cpu"),
        rank=launch.rank,
        world_size=launch.world_size,
        loader=config.loader,
        workers=config.workers,
        dtype=DTYPES[precision_of(config, environ)],  # rounded as autocast would at a first convolution
        local_world_size=launch.local_world_size,
    )
    prepare_device(config, launch, rank_info.device, environ)
    manifest = open_manifest(config.data)
    streams = open_streams(config, manifest, rank_info)
    steps = Steps.of(config.recipe, streams["train"], config.max_steps)
    if (profiled := config.profiled_steps) and profiled[1] > steps.last:
        raise UserError(f"--profile-steps {config.profile_steps}: expected steps up to {steps.last}, the last one")
    if profiled and (profiled[0] - 1) // steps.per_epoch != (profiled[1] - 1) // steps.per_epoch:
        raise UserError(
            f"--profile-steps {config.profile_steps}: expected steps within one epoch of {steps.per_epoch} steps, "
            "because an evaluation may run between epochs"
        )
    if config.pause_after and config.pause_after * steps.per_epoch >= steps.last:
        epochs = steps.last / steps.per_epoch
        raise UserError(f"--pause-after {config.pause_after}: expected fewer than the {epochs:g} epochs of the run")
    teacher = load_teacher(config, manifest) if config.teacher else None
    # Build the first model now, so that unusable weights are refused before anything is written.
    first_run = Run(config.runs / config.experiment / config.run_names()[config.all_seeds[0]])
    has_checkpoint = config.resume != "never" and bool(first_run.checkpoint_steps())
    first_model = initial_model(config, config.all_seeds[0], manifest, streams["train"], has_checkpoint)
    refuse_to_overwrite_sources(config)
    if config.resume_path and not is_file(config.resume_path / MANIFEST):
        raise UserError(f"--resume {config.resume}: expected auto, never, or the folder of a checkpoint, found none")
    with contextlib.ExitStack() as stack:
        if launch.rank == 0:
            names = list(config.run_names().values())
            resuming = config.resume != "never"
            job, requeues = environ.get("SLURM_JOB_ID", ""), int(environ.get("SLURM_RESTART_COUNT") or 0)
            stack.enter_context(
                locked_runs(config.runs, config.experiment, names, resuming, config.overwrite, job, requeues)
            )
        accelerator = create_accelerator(config, launch, device)
        stack.callback(destroy_process_group, accelerator)
        if accelerator.is_main_process:
            print(message, rank_info.loader_for(manifest, manifest.splits["train"])[1], sep="\n", file=sys.stderr)
        session = Session(
            config, registered, environ, tracking, manifest, rank_info, streams, teacher, accelerator,
            initial_scaler_state=accelerator.scaler and accelerator.scaler.state_dict(), stopped=stopped,
        )  # fmt: skip
        return session.train_seeds(first_model)


@dataclass(frozen=True)
class Session:
    """State shared by all seeds of one `runner train` on this rank.

    Created after all ranks have joined and the run folders are locked.
    """

    config: TrainConfig
    registered: Experiment
    environ: MutableMapping[str, str]
    tracking: TrackingCallbacks
    manifest: Manifest
    rank_info: RankInfo
    streams: dict[SplitName, BatchStream]
    teacher: nn.Module | None
    accelerator: Accelerator
    initial_scaler_state: dict[str, Any] | None
    stopped: Callable[[], bool]

    def train_seeds(self, first_model: nn.Module) -> TrainingOutcome:
        """Trains every seed in turn; `first_model` is the model of the first seed."""
        config = self.config
        runs = {seed: Run(config.runs / config.experiment / name) for seed, name in config.run_names().items()}
        states = {seed: resume_state(config, run, self.accelerator) for seed, run in runs.items()}
        models = {config.all_seeds[0]: first_model}
        summaries: list[Summary] = []
        abandoned, seed_run = False, None
        for index, (seed, run) in enumerate(runs.items()):
            if index and any_rank_should_stop(self.stopped, 0, self.accelerator):
                if self.accelerator.is_main_process:
                    print(f"runner: stopped before seed {seed}; resume with --resume auto", file=sys.stderr)
                if abandoned and seed_run and seed_run.tracker:
                    seed_run.tracker.exit_at_once(EXIT_STOPPED)
                raise SystemExit(EXIT_STOPPED)
            if self.initial_scaler_state:  # fp16: every seed starts with the same loss scale
                self.accelerator.scaler.load_state_dict(self.initial_scaler_state)
            model = models.pop(seed, None) or initial_model(
                config, seed, self.manifest, self.streams["train"], states[seed] is not None
            )
            seed_run = SeedRun(self, run, seed, self.make_run_config(run, seed, model, states[seed]), states[seed])
            seed_run.train(model)
            if seed_run.tracker:
                seed_run.report_early_stop()
                try:
                    summaries.append(seed_run.write_results())
                except Exception as error:
                    seed_run.handle_failure(error)
                    raise
                abandoned = abandoned or seed_run.tracker.abandoned
            self.accelerator.free_memory()
        return TrainingOutcome(summaries, exit_at_once=self.accelerator.num_processes > 1 or abandoned)

    def make_run_config(self, run: Run, seed: int, model: nn.Module, state: dict[str, Any] | None) -> RunConfig:
        """Builds the contents of run.json, from the existing file when resuming. All ranks must call it."""
        reserved = self.environ.get("WANDB_RUN_ID") if len(self.config.all_seeds) == 1 else None  # set by W&B's agent
        wandb_id = broadcast_object_list([reserved or secrets.token_hex(4)])[0]
        group = self.environ.get("WANDB_RUN_GROUP", self.registered.paper)
        new = record.run_config(
            self.config, self.registered, self.manifest, self.accelerator, self.rank_info, run, seed, model,
            wandb_id, group,
        )  # fmt: skip
        # Rank 0 decides, because it overwrites the file as soon as all have read it.
        resuming = state is not None or (self.config.resume != "never" and is_file(run.run_json))
        if not broadcast_object_list([resuming])[0]:
            return new
        resumed = record.resumed_config(self.config, run, new, state)
        self.accelerator.wait_for_everyone()
        return resumed


class SeedRun:
    """The run of one seed, from run.json to summary.json.

    Attributes:
        tracker: the tracker of the run on rank 0; None on the other ranks.
    """

    def __init__(
        self, session: Session, run: Run, seed: int, run_config: RunConfig, state: dict[str, Any] | None
    ) -> None:
        self.session, self.run, self.seed, self.run_config, self.state = session, run, seed, run_config, state
        self.steps = Steps.of(session.config.recipe, session.streams["train"], session.config.max_steps)
        # Results are always those of the newest checkpoint, so an older one must be followed by training.
        path = session.config.resume_path
        is_older = path is not None and not checkpoint.is_newest(run, path)
        if state and (state["step"] > self.steps.last or (is_older and state["step"] == self.steps.last)):
            raise UserError(
                f"{run.folder}: the checkpoint is at step {state['step']}, but training ends at step "
                f"{self.steps.last}; increase --max-steps or --recipe.epochs"
            )
        self.start_step = state["step"] if state else 0
        pause = session.config.pause_after
        self.pause_step = pause and pause * self.steps.per_epoch
        # Stopped in the evaluation of this step, which is still to be done.
        unevaluated = state and state["step"] == self.pause_step and state.get("evaluating")
        if state and self.pause_step and state["step"] >= self.pause_step and not unevaluated:
            raise UserError(
                f"--pause-after {pause}: expected more epochs than the {state['step'] / self.steps.per_epoch:g} that "
                f"{run.folder} has trained"
            )
        self.profiler = self.make_profiler()
        self.stop_files = [file for file in (session.config.stop_file, run.folder / STOP_FILE) if file]
        self.next_stop_file_check = 0.0
        self.tracker: RunTracker | None = None
        self.result: TrainResult | None = None

    def train(self, model: nn.Module) -> None:
        """Writes run.json and trains.

        Raises:
            SystemExit: training failed for a known reason, or was stopped; the reason is in ended.json.
        """
        session, config, accelerator = self.session, self.session.config, self.session.accelerator
        if accelerator.is_main_process:
            self.tracker = self.prepare_run()
        if session.teacher is not None:
            session.teacher.to(accelerator.device)
        streams = session.streams
        train_stream = streams["train"].with_seed(self.seed)
        data = TrainingData(train_stream, streams["test"], streams.get("validation"), len(session.manifest.classes))
        log = self.make_log_function(self.tracker) if self.tracker else lambda row: None
        name = f"rank {accelerator.process_index} of {accelerator.num_processes}"
        try:
            with watchdog.watch_progress(config.hang_timeout, name) as heartbeat:
                options = LoopOptions(
                    config.checkpoint_every, config.checkpoint_seconds, config.evaluate_every, self.state,
                    self.should_stop, self.pause_step, heartbeat,
                )  # fmt: skip
                if self.profiler is not None:
                    profiler = self.profiler
                    options = replace(options, before_step=profiler.before_step, after_step=profiler.after_step)
                self.result = train(
                    model, config.recipe, data, accelerator, self.run, self.seed, config.max_steps, session.teacher,
                    log, options,
                )  # fmt: skip
        except Exception as error:
            self.handle_failure(error)
            raise

    def make_profiler(self) -> StepProfiler | None:
        """Returns the profiler of --profile-steps on rank 0; None if an earlier attempt has trained the steps."""
        config = self.session.config
        if config.profiled_steps is None or not self.session.accelerator.is_main_process:
            return None
        device = self.session.accelerator.device.type
        profiler = StepProfiler(self.run.profile, self.run_config.name, device, *config.profiled_steps)
        if profiler.trace.is_file() and self.start_step >= profiler.first:
            return None
        if self.start_step >= profiler.last:
            print(
                f"profile: none, because {self.run.folder} resumes after these steps, at {self.start_step}",
                file=sys.stderr,
            )
            return None
        return profiler

    def should_stop(self) -> bool:
        """Returns whether this rank received a stop signal, or, on the first rank of a node, a stop file exists.

        Files are looked up a few times per second, because each lookup may be a request to a file server.
        """
        if self.session.stopped():
            return True
        if not self.session.accelerator.is_local_main_process or time.monotonic() < self.next_stop_file_check:
            return False
        self.next_stop_file_check = time.monotonic() + STOP_FILE_INTERVAL
        return any(os.path.exists(file) for file in self.stop_files)  # noqa: PTH110 - Path.exists raises some errors

    def prepare_run(self) -> RunTracker:
        """Writes run.json, discards metrics logged after the last checkpoint, and returns the tracker.

        Raises:
            UserError: metrics from before the checkpoint are missing, and --resume-anyway was not given.
        """
        checksum = self.state.get("metrics") if self.state else None
        patience = self.session.config.recipe.patience
        best = best_row(self.state, keeps_model=bool(patience)) if self.state else None
        extended = is_file(self.run.summary) and not has_ended(self.start_step, best, self.steps, patience)
        complete = truncate_metrics(self.run, self.start_step, checksum, self.session.config.resume_anyway)
        if extended or not complete:
            # W&B knows a row by its index in the file, and logs results after the last one: rows that follow results,
            # or that replace missing ones, need another W&B run.
            self.run_config = msgspec.structs.replace(self.run_config, wandb_id=secrets.token_hex(4))
        if self.start_step < self.steps.last or any(entry.changed for entry in self.run_config.resumed[-1:]):
            # Delete the summary first, so that it never exists beside the run.json of another training.
            remove(self.run.summary)
        write_json(self.run.run_json, self.run_config)
        remove(self.run.ended)
        return self.session.tracking.create_tracker(self.run, self.run_config, self.session.environ)

    def make_log_function(self, tracker: RunTracker) -> Callable[[MetricRow], None]:
        """Prints the run folder and tracker status; returns a function that logs rows and prints those of epochs."""
        macs, peak = self.run_config.macs, self.session.config.peak_tflops
        ranks = self.session.accelerator.num_processes
        print(f"run: {self.run.folder}", tracker.status, sep="\n", file=sys.stderr, flush=True)
        printer = EpochPrinter(self.session.config.recipe.epochs, self.start_step, self.steps.last)

        def log(row: MetricRow) -> None:
            if row.images_per_second and macs and peak:
                utilization = flops_utilization(row.images_per_second, macs, ranks, peak)
                row = msgspec.structs.replace(row, flops_utilization=utilization)
            tracker.log(row)
            printer.log(row)

        return log

    def handle_failure(self, error: Exception) -> None:
        """Records the failure in ended.json and exits if its cause is known; returns if it is unexpected."""
        accelerator, stopped = self.session.accelerator, isinstance(error, StoppedError)
        failure = diagnose_failure(error, self.session.config.recipe, accelerator.num_processes)
        if self.tracker:
            reason = failure.reason if failure else f"{type(error).__name__}: {first_line(error)}"
            with contextlib.suppress(OSError):
                write_json(
                    self.run.ended, Ending(stopped=stopped, reason=reason, diverged=isinstance(error, DivergedError))
                )
        if failure is None:
            if self.tracker:
                with contextlib.suppress(OSError):
                    self.tracker.finish(failed=True)
                if self.tracker.abandoned:
                    traceback.print_exception(error)
                    self.tracker.exit_at_once(1)
            return
        if not (self.tracker or isinstance(error, StoppedError | DivergedError)):  # only this rank failed
            rank = f"rank {accelerator.process_index} of {accelerator.num_processes}"
            print(f"runner: {self.run.folder}: {rank}: {failure.reason}", file=sys.stderr)
        if self.tracker:
            print(f"runner: {self.run.folder}: {failure.reason}", file=sys.stderr)
            with contextlib.suppress(OSError):
                for file in self.stop_files if stopped else ():
                    file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # on a full disk, the remaining rows may not fit
                self.tracker.finish(failed=not stopped)
        if isinstance(error, StoppedError | DivergedError):  # raised on all ranks
            # Wait for rank 0, which may still be writing: as soon as one rank exits, the launcher ends the others.
            with contextlib.suppress(RuntimeError):
                accelerator.wait_for_everyone()
        if self.tracker and self.tracker.abandoned:
            self.tracker.exit_at_once(failure.exit_code)
        raise SystemExit(failure.exit_code) from None

    def report_early_stop(self) -> None:
        """If early stopping ended training, prints why, and which epoch's weights are kept."""
        assert self.result
        if self.result.stopped_early:
            reason = f"no better validation accuracy in {self.session.config.recipe.patience} epochs"
            print(
                f"early stopping: {reason}; the weights are those of epoch {self.result.best.epoch:g}", file=sys.stderr
            )

    def write_results(self) -> Summary:
        """Writes predictions, figures and summary.json, keeps only the last checkpoint, and finishes the tracker."""
        assert self.tracker
        assert self.result
        session, run = self.session, self.run
        arrays: dict[str, Any] = self.result.test.arrays()
        np.savez_compressed(predictions := io.BytesIO(), **arrays)
        write_atomically(run.predictions, predictions.getvalue())  # synced before the summary, which marks the end
        test = session.manifest.splits["test"]

        def read_images(samples: np.ndarray) -> np.ndarray:
            return beton_reader.read_images(session.config.data / test.file, test, session.manifest, samples)

        session.tracking.draw_figures(run, self.run_config, self.result.test, read_images)
        summary = record.summary(session.config, session.manifest, run, self.seed, self.result)
        write_json(run.summary, summary)
        checkpoint.remove_others(run)
        self.tracker.log_results()
        self.tracker.finish()
        return summary


def prepare_device(
    config: TrainConfig, launch: launcher.Launch, device: torch.device, environ: MutableMapping[str, str]
) -> None:
    """Configures threads, kernels and memory. Raises UserError if fp16 is requested on the CPU."""
    if device.type == "cpu":
        cpu.prepare(launch.local_world_size)
        check_precision(precision_of(config, environ), device.type)
    cuda.prepare(device, config.deterministic, environ)
    crop.prepare(device)


def precision_of(config: TrainConfig, environ: Mapping[str, str]) -> TrainPrecision:
    """Returns the precision of training: --precision, or that of `accelerate launch`.

    Raises:
        UserError: the precision of `accelerate launch` is another one, such as fp8.
    """
    if config.precision != "launch":
        return config.precision
    launched = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    for precision, name in record.MIXED_PRECISION.items():
        if name == launched:
            return precision
    raise UserError(f"--mixed_precision {launched}: expected {', '.join(record.MIXED_PRECISION.values())}")


def open_streams(config: TrainConfig, manifest: Manifest, rank_info: RankInfo) -> dict[SplitName, BatchStream]:
    """Opens the splits that the recipe uses. Raises UserError as `open_split` does."""
    splits: list[SplitName] = ["train", "test"]
    if config.recipe.validation:
        splits.append("validation")
    return {split: open_split(config.data, manifest, split, config.recipe, rank_info) for split in splits}


def initial_model(
    config: TrainConfig, seed: int, manifest: Manifest, train_stream: BatchStream, resumed: bool
) -> nn.Module:
    """Builds the initial model of a seed; with `resumed`, a checkpoint replaces its weights.

    Raises:
        UserError: as `build_model` does.
    """
    start = finished_run("--start-from", config.start_from, config.trusted_code) if config.start_from else None
    channels, height, width = model_input(manifest, config.recipe).shape
    return build_model(
        config.architecture, config.recipe, seed, train_stream.first_images, start, len(manifest.classes),
        (channels, height, width), resumed,
    )  # fmt: skip


def refuse_to_overwrite_sources(config: TrainConfig) -> None:
    """Raises UserError if --overwrite would delete files that this run reads."""
    sources = [folder for folder in (config.data, config.start_from, config.teacher) if folder]
    for name in config.run_names().values() if config.overwrite else ():
        folder = config.runs / config.experiment / name
        if any(source.resolve().is_relative_to(folder.resolve()) for source in sources):
            raise UserError(f"--overwrite: {folder} contains files that this run reads; choose another --name")


def create_accelerator(config: TrainConfig, launch: launcher.Launch, device: str) -> Accelerator:
    """Creates the Accelerator with its precision and DDP options, and waits for all ranks to join.

    Raises:
        UserError: fewer ranks joined than were launched.
    """
    # torch 2.15 renames broadcast_buffers; accelerate does not know the new name yet.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    collective_timeout = watchdog.STARTUP_FACTOR * config.hang_timeout + COLLECTIVE_MARGIN_SECONDS
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=None if config.precision == "launch" else record.MIXED_PRECISION[config.precision],
        # Gradients are views of the all-reduce's buckets; the graph is the same every step, except with micro-batches,
        # of which only the last is reduced; and batch-norm statistics are averaged once before they are used
        # (loop.average_buffers) instead of being sent every step.
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True,
                static_graph=config.recipe.accumulate == 1,
                broadcast_buffers=False,
            ),
            InitProcessGroupKwargs(timeout=timedelta(seconds=collective_timeout)),
        ],
    )
    if accelerator.num_processes != launch.world_size:
        joined = accelerator.num_processes
        raise UserError(f"{launch.world_size} ranks were launched, but only {joined} joined; relaunch all ranks")
    return accelerator


def destroy_process_group(accelerator: Accelerator) -> None:
    """Destroys the process group, if one was created."""
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Failure:
    """Why training ended early, in one line with a remedy, and the exit code."""

    exit_code: int
    reason: str


def diagnose_failure(error: Exception, recipe: Recipe, world_size: int) -> Failure | None:
    """Describes a known failure and what to do about it; None for an unexpected exception."""
    if isinstance(error, StoppedError):
        return Failure(EXIT_STOPPED, f"{error}; resume with --resume auto")
    if isinstance(error, DivergedError):
        return Failure(1, f"{error}; lower the learning rate or use --precision fp32")
    if isinstance(error, checkpoint.CheckpointError):
        return Failure(1, str(error))
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        file = error.filename or METRICS
        return Failure(1, f"no space left on the disk for {file}; free some space and resume with --resume auto")
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
        file = error.filename or METRICS
        return Failure(1, f"{file}: cannot be read or written ({error.strerror}); resume with --resume auto")
    if is_lost_rank(error, world_size):
        return Failure(1, f"{LOST_RANK} ({first_line(error)})")
    if "does not have a deterministic implementation" in str(error):
        operator = str(error).split(" does not")[0]
        return Failure(1, f"--deterministic: {operator} has no deterministic kernel; train without it")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        images = recipe.batch_size // (world_size * recipe.accumulate)
        return Failure(
            1,
            f"out of memory with {images} images at a time (batch {recipe.batch_size} over {world_size} ranks); "
            "increase --recipe.accumulate (batch norm then sees fewer images at a time) or the number of ranks, or "
            "use --precision bf16",
        )
    return None


def is_lost_rank(error: Exception, world_size: int) -> bool:
    """Returns whether a collective failed because another rank has ended.

    Reads the message, because gloo and NCCL raise the same error for other failures, such as two ranks on one GPU.
    """
    if world_size == 1 or not isinstance(error, RuntimeError):  # such as an OSError of another connection
        return False
    without_peer = isinstance(error, torch.distributed.DistNetworkError | torch.distributed.DistStoreError)
    return without_peer or re.search("by peer|Connection refused|Broken pipe|ncclRemoteError", str(error)) is not None


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGUSR1, SIGTERM or Ctrl-C was received.

    A second Ctrl-C ends the process at once, without a checkpoint.
    """
    received: list[int] = []
    interrupted = 0.0

    def stop(number: int, frame: object) -> None:
        nonlocal interrupted
        received.append(number)
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if not interrupted:
            interrupted = now
            launcher.outlive_parent()
            os.write(
                2, b"runner: stopping with a checkpoint; press Ctrl-C again to exit at once\n"
            )  # print is not reentrant
        elif now - interrupted > FORWARDED_INTERRUPT_SECONDS:  # otherwise it is the first, forwarded by the launcher
            os.write(2, b"runner: interrupted\n")
            os._exit(EXIT_INTERRUPTED)

    previous_handlers = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def resume_state(config: TrainConfig, run: Run, accelerator: Accelerator) -> dict[str, Any] | None:
    """Returns the state to resume a run from, the same on all ranks; None for a new run. All ranks must call it.

    Rank 0 chooses the checkpoint, because ranks on other nodes may see other files.

    Raises:
        UserError: the given checkpoint is damaged, no checkpoint of the run is intact, or a rank cannot read it.
    """
    if config.resume == "never":
        return None
    selected: list[tuple[Path, str] | str | None] = [None]
    if accelerator.is_main_process:
        try:
            selected = [choose_checkpoint(config, run)]
        except UserError as error:
            selected = [str(error)]
    (found,) = broadcast_object_list(selected)
    if isinstance(found, str):
        raise UserError(found)
    return found and checkpoint.wait_for_state(found[0], found[1], CHECKPOINT_VISIBLE_SECONDS)


def choose_checkpoint(config: TrainConfig, run: Run) -> tuple[Path, str] | None:
    """Returns the folder of the checkpoint to resume from and the SHA-256 of its manifest; None for a new run."""
    if path := config.resume_path:
        return path, checkpoint.verify_resumable(path)
    folder, damaged = checkpoint.newest_intact(run)
    for line in damaged:
        print(f"runner: {line}", file=sys.stderr)
    if folder is None and damaged:
        raise UserError(
            f"{run.folder}: expected an intact checkpoint, found none; start over with --overwrite and without --resume"
        )
    return None if folder is None else (folder, checkpoint.verify_resumable(folder))


def load_teacher(config: TrainConfig, manifest: Manifest) -> nn.Module:
    """Loads the model of a finished run, `config.teacher`, as the teacher for distillation.

    Raises:
        UserError: the run has not finished, or was trained on other classes, or on images of another size or
            normalization.
    """
    assert config.teacher
    folder = config.teacher
    run = finished_run("--teacher", folder, config.trusted_code)
    teacher_config = run.config()
    if teacher_config.dataset.classes != list(manifest.classes):
        raise UserError(
            f"--teacher {folder}: expected a run on the classes of {manifest.name}, found one on "
            f"{teacher_config.dataset.name}"
        )
    expected = model_input(manifest, config.recipe)
    if teacher_config.input != expected:
        raise UserError(
            f"--teacher {folder}: expected a run on images of {expected}, found {teacher_config.input}; train it with "
            "the same --recipe.resize and --recipe.normalize"
        )
    return checkpoint.load_model(run).requires_grad_(False)
