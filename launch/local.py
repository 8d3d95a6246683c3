"""Trains trials on this machine, some at a time, each in a process of its own; one failure stops no other."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from launch.plan import ROOT, training_command
from launch.trials import Trial
from runner import launched
from runner.runs import read_json, read_metrics

GRACE = 120.0  # seconds that a trial has for its checkpoint


@dataclass(frozen=True)
class Place:
    """Where trials run.

    Attributes:
        slots: trials at a time.
        gpus: of which each slot has one; 0 for the CPU.
        threads: cores of each slot.
        launcher: arguments of `accelerate launch`.
    """

    slots: int
    gpus: int
    threads: int
    launcher: tuple[str, ...]


@dataclass
class Slot:
    """One place for a trial, and who has it."""

    number: int
    trial: Trial | None = None
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    began: float = field(default_factory=time.monotonic)

    def stop_file(self) -> Path:
        """Asks the trial for a checkpoint and its end."""
        assert self.trial is not None
        return self.trial.run.folder / f".stop-{os.getpid()}"


def train(trials: list[Trial], common: list[str], place: Place, logs: Path, environ: Mapping[str, str]) -> bool:
    """Trains all; returns whether it was interrupted.

    The first Ctrl-C (or SIGTERM) has every trial write a checkpoint and end, the second kills them; either way the
    same command goes on. Killed itself, it takes its trials along.

    Args:
        trials: what to train; each resumes where it was.
        common: arguments of `runner train` for all of them.
        place: where.
        logs: folder for what each says.
        environ: of the trials.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, slots = list(trials), [Slot(number) for number in range(place.slots)]
    outcomes: dict[str, str] = {}
    with _interrupts() as interrupts, _table(trials, slots, outcomes) as show:
        asked = None
        while waiting or any(slot.process for slot in slots):
            if interrupts and asked is None:
                asked, waiting = time.monotonic(), []
                _say("stopping: each trial writes a checkpoint; again to kill them")
                for slot in slots:
                    if slot.process:
                        slot.stop_file().touch()
            for slot in slots:
                if slot.process and slot.process.poll() is not None:
                    _end(slot, outcomes)
                if slot.process is None and waiting:
                    _begin(slot, waiting.pop(0), common, place, logs, environ)
            late = asked is not None and time.monotonic() - asked > GRACE
            if len(interrupts) > 1 or late:
                for slot in slots:
                    if slot.process:
                        slot.process.kill()  # its ranks die with it
            show()
            time.sleep(0.2)
    return bool(interrupts)


def _begin(
    slot: Slot, trial: Trial, common: list[str], place: Place, logs: Path, environ: Mapping[str, str]
) -> None:
    trial.run.folder.mkdir(parents=True, exist_ok=True)
    slot.trial, slot.began = trial, time.monotonic()
    slot.stop_file().unlink(missing_ok=True)
    slot.log = (logs / f"{trial.id.replace('/', '-')}.log").open("ab")
    device = () if place.gpus or trial.request.device != "auto" else ("--device", "cpu")
    command = [
        *(sys.executable, *training_command(place.launcher, place.threads), *trial.words, *common, *device),
        *("--resume", "auto", "--stop-file", str(slot.stop_file().absolute())),
    ]
    ours = environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(place.gpus)))
    visible = {"CUDA_VISIBLE_DEVICES": ours.split(",")[slot.number % place.gpus]} if place.gpus else {}
    slot.process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environ, **visible},
        stdin=subprocess.DEVNULL,
        stdout=slot.log,
        stderr=slot.log,
        start_new_session=True,  # a Ctrl-C is for us alone
        preexec_fn=launched.end_with_parent,
    )


def _end(slot: Slot, outcomes: dict[str, str]) -> None:
    """Notes what became of a trial, and frees its slot."""
    assert slot.trial
    assert slot.log
    slot.log.close()
    slot.stop_file().unlink(missing_ok=True)
    run, state = slot.trial.run, slot.trial.state()
    if state == "whole":
        outcomes[slot.trial.id] = f"{read_json(run.summary)['test_accuracy']:.2%}"
    elif state in ("failed", "stopped"):
        outcomes[slot.trial.id] = f"{state}: {read_json(run.ended)['told']}"
    else:
        lines = Path(slot.log.name).read_text(errors="replace").split("\n")
        said = [line for line in lines if line.startswith("runner: ")] or ["no word"]
        outcomes[slot.trial.id] = f"failed: {said[-1].removeprefix('runner: ')} (log: {slot.log.name})"
    _say(f"{slot.trial.id}: {outcomes[slot.trial.id]}")
    slot.trial = slot.process = slot.log = None


def _say(line: str) -> None:
    """One line, where no table is drawn."""
    if not sys.stderr.isatty():
        print(line, flush=True)


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The Ctrl-Cs and SIGTERMs since; they end nothing by themselves meanwhile."""
    told: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: told.append(number)) for number in numbers}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _table(trials: list[Trial], slots: list[Slot], outcomes: dict[str, str]) -> Iterator[Any]:
    """A live table on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False) as live:
        shown = 0.0

        def show() -> None:
            nonlocal shown
            if time.monotonic() - shown >= 1:
                shown = time.monotonic()
                live.update(_drawn(trials, slots, outcomes, console.height - 4), refresh=True)

        yield show
        live.update(_drawn(trials, slots, outcomes, len(trials) + 2), refresh=True)


def _drawn(trials: list[Trial], slots: list[Slot], outcomes: dict[str, str], height: int) -> Any:
    """What runs, first; then what is done, newest first; then how many wait."""
    from rich.table import Table

    table = Table("trial", "epoch", "loss", "accuracy", "outcome", box=None)
    going = [slot for slot in slots if slot.trial]
    for slot in going:
        rows = read_metrics(slot.trial.run)
        last = {key: value for row in rows for key, value in row.items()}
        epochs = slot.trial.request.recipe.epochs
        table.add_row(
            slot.trial.id,
            f"{last['epoch']:.1f} of {epochs}" if "epoch" in last else "starting",
            f"{last['train/loss']:.3f}" if "train/loss" in last else "",
            f"{last['test/accuracy']:.2%}" if "test/accuracy" in last else "",
            f"running for {int(time.monotonic() - slot.began)} s",
        )
    for name, outcome in list(reversed(outcomes.items()))[: max(1, height - len(going) - 1)]:
        table.add_row(name, "", "", "", outcome, style="red" if outcome.startswith("failed") else None)
    left = len(trials) - len(outcomes) - len(going)
    table.add_row(f"{len(outcomes)} of {len(trials)} done, {left} waiting", style="dim")
    return table
