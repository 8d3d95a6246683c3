"""Trains trials on this machine, several at a time, each in its own processes; if one fails, the others continue."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from launch.plan import ROOT, training_command
from launch.train_arguments import job_environment, with_stop_file
from launch.trials import Trial
from runner.common.console import new_table
from runner.common.errors import UserError
from runner.common.files import remove
from runner.run.metrics import read_metrics
from runner.system import launcher

GRACE = 120.0  # seconds that a trial has to write its checkpoint
STOPPING = "stopping: each trial writes a checkpoint; press Ctrl-C again to kill them"


@dataclass(frozen=True)
class Slots:
    """How this machine is divided among concurrent trials.

    Attributes:
        count: number of trials that run at the same time.
        gpus: number of GPUs, of which each slot uses `ranks`; 0 for the CPU.
        threads: CPU threads per process.
        launcher: arguments of `accelerate launch`.
        ranks: number of processes per trial.
    """

    count: int
    gpus: int
    threads: int
    launcher: tuple[str, ...]
    ranks: int = 1


@dataclass(frozen=True)
class Job:
    """A trial, and what is to be done for it.

    Attributes:
        trial: the trial.
        arguments: the arguments of `runner train`; None if its training is already complete.
        commands: arguments of Python, run one after the other once it is trained.
    """

    trial: Trial
    arguments: tuple[str, ...] | None
    commands: tuple[tuple[str, ...], ...] = ()


class Source(Protocol):
    """Where a pool gets its jobs."""

    def next(self) -> Job | None:
        """Returns the next job; None if there is none at present."""

    def is_empty(self) -> bool:
        """Returns whether there are no more jobs, whatever the running ones lead to."""

    def ended(self, job: Job, failure: str) -> str:
        """Called when a job has ended, with the last message of its log; returns its outcome in one line."""

    def close(self) -> None:
        """Called when no more jobs may start."""

    def describe(self, done: int) -> str:
        """Returns how much is done, in a few words."""


class ListedTrials:
    """Source of trials that are all known, each of which is trained to its end."""

    def __init__(self, trials: list[Trial]) -> None:
        self.waiting = list(trials)
        self.total = len(trials)

    def next(self) -> Job | None:
        """Returns the next job; None if there is none at present."""
        while self.waiting:
            trial = self.waiting.pop(0)
            if trial.state() not in ("complete", "running"):
                return Job(trial, tuple(trial.arguments))
            self.total -= 1  # another call trains it, or has trained it
        return None

    def is_empty(self) -> bool:
        """Returns whether all trials have started."""
        return not self.waiting

    def close(self) -> None:
        """Drops the trials that have not started."""
        self.waiting.clear()

    def describe(self, done: int) -> str:
        """Returns how many trials are done, and how many have not started."""
        return f"{done} of {self.total} done, {len(self.waiting)} waiting"

    def ended(self, job: Job, failure: str) -> str:
        """Returns the test accuracy of a complete run, or why it is not complete."""
        state = job.trial.state()
        if state == "complete" and (summary := job.trial.run.read_summary()):
            return f"{summary.test_accuracy:.2%}"
        if state in ("failed", "stopped") and (ending := job.trial.run.read_ending()):
            return f"{state}: {ending.reason}"
        return f"failed: {failure}"


@dataclass
class RunningJob:
    """A job that occupies a slot, with its process, log and stop file; earlier attempts wrote the log's beginning."""

    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    stop_file: Path
    log_start: int
    commands: list[tuple[str, ...]]  # that follow
    start: float = field(default_factory=time.monotonic)


class Pool:
    """Schedules jobs on slots and records their outcomes.

    Attributes:
        running: the jobs that are running, by slot number.
        outcomes: result of each job that is done, by id of the trial.
        error: the error of the source, after which no more jobs start; None if there was none.
    """

    def __init__(self, source: Source, slots: Slots, logs: Path, environ: Mapping[str, str]) -> None:
        self.source, self.slots, self.logs, self.environ = source, slots, logs, environ
        self.running: dict[int, RunningJob] = {}
        self.outcomes: dict[str, str] = {}
        self.stopping = False
        self.error: Exception | None = None

    @property
    def is_done(self) -> bool:
        """Whether no job is running, and none will start."""
        return not self.running and (self.stopping or self.source.is_empty())

    def update(self) -> None:
        """Collects the jobs that have ended, and starts others in free slots."""
        for slot, running in list(self.running.items()):
            code = running.process.poll()
            if code == 0 and running.commands and not self.stopping:
                running.process = self._run(slot, running.commands.pop(0), running.log)
            elif code is not None:
                del self.running[slot]
                self._collect(running)
        try:
            for slot in range(self.slots.count):
                if slot not in self.running and not self.stopping and (job := self.source.next()):
                    self.running[slot] = self._start(slot, job)
        except (UserError, OSError) as error:  # the trials that are running write their checkpoints first
            self.error = error
            self.stop()

    def stop(self) -> None:
        """Asks every trial to write a checkpoint and exit, and starts no more."""
        self.stopping = True
        self.source.close()
        for running in self.running.values():
            if len(running.commands) < len(running.job.commands):
                running.process.terminate()  # it is not training
                continue
            try:
                running.stop_file.touch()
            except OSError:  # such as a full disk; the launcher ends its ranks, which then resume from a checkpoint
                running.process.terminate()

    def kill(self) -> None:
        """Kills every trial; its ranks die with it."""
        for running in self.running.values():
            running.process.kill()

    def _start(self, slot: int, job: Job) -> RunningJob:
        trial = job.trial
        trial.run.folder.mkdir(parents=True, exist_ok=True)
        stop_file = trial.run.folder / f".stop-{os.getpid()}"
        stop_file.unlink(missing_ok=True)
        log = (self.logs / f"{trial.id.replace('/', '-')}.log").open("ab")
        log_start = log.tell()
        commands = list(job.commands)
        if job.arguments is not None:
            remove(trial.run.ended)  # a refusal writes none, and would get the reason of the attempt before
            command = training_command(self.slots.launcher, self.slots.threads)
            commands.insert(0, (*command, *with_stop_file(job.arguments, stop_file)))
        process = self._run(slot, commands.pop(0), log)
        return RunningJob(job, process, log, stop_file, log_start, commands)

    def _run(self, slot: int, arguments: tuple[str, ...], log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Starts Python with these arguments."""
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**job_environment(self.environ), **self._visible_gpu(slot)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # only this process receives Ctrl-C
            preexec_fn=partial(_before_exec, os.getpid(), self._cores_of(slot)),
        )

    def _cores_of(self, slot: int) -> set[int]:
        """Returns the cores of a slot: on the CPU its share, because threads of several trials would slow each other.

        All slots have the same number, because a run that is resumed in another slot is bit-identical only with as many
        threads. More slots than cores share them.
        """
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // self.slots.count)
        if self.slots.gpus:
            return set(cores)
        return {cores[(slot * share + index) % len(cores)] for index in range(share)}

    def _visible_gpu(self, slot: int) -> dict[str, str]:
        if not self.slots.gpus:
            return {}
        visible = (self.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.slots.gpus)))).split(",")
        own = [visible[(slot * self.slots.ranks + rank) % self.slots.gpus] for rank in range(self.slots.ranks)]
        return {"CUDA_VISIBLE_DEVICES": ",".join(own)}

    def _collect(self, running: RunningJob) -> None:
        """Records and prints the outcome of a job that has ended."""
        running.log.close()
        with contextlib.suppress(OSError):
            running.stop_file.unlink()
        try:
            outcome = self.source.ended(running.job, _last_message(running))
        except (UserError, OSError) as error:  # the others continue
            outcome = f"failed: {error}"
        self.outcomes.pop(running.job.trial.id, None)  # the newest is last
        self.outcomes[running.job.trial.id] = outcome
        _print_without_table(f"{running.job.trial.id}: {outcome}")


def _before_exec(parent: int, cores: set[int]) -> None:
    """Called in a new process: it dies with its parent, and runs on these cores."""
    launcher.die_with_parent(parent)
    os.sched_setaffinity(0, cores)


def train_trials(source: Source, slots: Slots, logs: Path, environ: Mapping[str, str]) -> bool:
    """Trains all trials of a source. Returns True if it was interrupted.

    On the first Ctrl-C or SIGTERM every trial writes a checkpoint and exits; a second signal, or a timeout of 120
    seconds, kills the remaining trials. In both cases the same command resumes them. If this process is killed, its
    trials die with it.

    Raises:
        UserError, OSError: the source failed; all trials have stopped.

    Args:
        source: the trials to train; each resumes from its newest checkpoint.
        slots: how many trials run at the same time, and on what.
        logs: folder for the output of each trial.
        environ: environment of the trials.
    """
    logs.mkdir(parents=True, exist_ok=True)
    pool = Pool(source, slots, logs, environ)
    with _interrupts() as interrupts, _table(pool) as show:
        stopped_at = None
        while not pool.is_done:
            if interrupts and not pool.stopping:
                pool.stop()
            pool.update()
            if pool.stopping and stopped_at is None:
                stopped_at = time.monotonic()
                _print_without_table(STOPPING)
            if len(interrupts) > 1 or (stopped_at is not None and time.monotonic() - stopped_at > GRACE):
                pool.kill()
            show()
            time.sleep(0.2)
    if pool.error:
        raise pool.error
    return bool(interrupts)


def _last_message(running: RunningJob) -> str:
    """Returns the last message in the log of this attempt, and where the log is."""
    log = Path(running.log.name)
    lines = log.read_bytes()[running.log_start :].decode(errors="replace").split("\n")  # of this attempt
    messages = [line.removeprefix("runner: ") for line in lines if line.startswith("runner: ")] or ["no message"]
    return f"{messages[-1]} (log: {log})"


def _print_without_table(line: str) -> None:
    """Prints a line to stdout if no live table is shown, that is, if stderr is not a terminal."""
    if not sys.stderr.isatty():
        print(line, flush=True)


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list, in place of their default actions."""
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in signals}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _table(pool: Pool) -> Iterator[Callable[[], None]]:
    """Yields a function that redraws a live table at most once a second; without a terminal it does nothing."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, markup=False)
    with Live(console=console, auto_refresh=False) as live:
        drawn_at = 0.0

        def show() -> None:
            nonlocal drawn_at
            if time.monotonic() - drawn_at >= 1:
                drawn_at = time.monotonic()
                live.update(_draw(pool, console.height - 4), refresh=True)

        yield show
        live.update(_draw(pool, len(pool.outcomes) + 2), refresh=True)


def _draw(pool: Pool, height: int) -> Any:
    """Returns a table of the running trials, the finished trials (newest first) and the source's progress."""
    table = new_table("trial", "epoch", "loss", "accuracy", "outcome")
    for running in pool.running.values():
        table.add_row(
            running.job.trial.id,
            *_progress(running.job.trial),
            f"running for {int(time.monotonic() - running.start)} s",
        )
    for name, outcome in list(reversed(pool.outcomes.items()))[: max(1, height - len(pool.running) - 1)]:
        table.add_row(name, "", "", "", outcome, style="red" if outcome.startswith("failed") else None)
    table.add_row(pool.source.describe(len(pool.outcomes)), style="dim")
    if pool.stopping:
        table.add_row(STOPPING, style="dim")
    return table


def _progress(trial: Trial) -> tuple[str, str, str]:
    """Returns the newest epoch, training loss and test accuracy of a trial."""
    try:
        rows = read_metrics(trial.run)
    except (UserError, OSError):  # damaged, or unreadable now; the trial itself reports it
        return "unreadable", "", ""
    losses = [row.train_loss for row in rows if row.train_loss is not None]
    accuracies = [row.test_accuracy for row in rows if row.test_accuracy is not None]
    return (
        f"{rows[-1].epoch:.1f} of {trial.config.recipe.epochs}" if rows else "starting",
        f"{losses[-1]:.3f}" if losses else "",
        f"{accuracies[-1]:.2%}" if accuracies else "",
    )
