"""The run folder: `runs/<experiment>/<run>/`, its files, and how they are written. Standard library only.

run.json         what was run: resolved config, versions, git commit, dataset, hardware
metrics.jsonl    every metric, one row a line: the truth that W&B is a view of
summary.json     the outcome; its presence means that the run is finished
ended.json       how the last attempt ended where that was before its time
predictions.npz  logits (N, classes) and labels (N,) on the test images at the end
checkpoints/     step-N/: weights, and a manifest with their hash
figures/         pictures of this run
deploy/          ONNX, engines, parity, latencies
wandb/           W&B's own files
lock             held by the process that trains
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from data_prep.console import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
FORMAT = 1
CLAIM_TIMEOUT = 60.0  # seconds that the process before may still be dying, on another node too
State = Literal["whole", "running", "stopped", "failed", "broken off", "missing"]


@dataclass(frozen=True)
class Run:
    """A run folder. Nothing is read or made until asked for."""

    folder: Path

    @property
    def record(self) -> Path:
        """run.json."""
        return self.folder / "run.json"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl."""
        return self.folder / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """summary.json."""
        return self.folder / "summary.json"

    @property
    def ended(self) -> Path:
        """ended.json."""
        return self.folder / "ended.json"

    @property
    def lock(self) -> Path:
        """lock."""
        return self.folder / "lock"

    @property
    def predictions(self) -> Path:
        """predictions.npz."""
        return self.folder / "predictions.npz"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def figures(self) -> Path:
        """Folder of pictures."""
        return self.folder / "figures"

    @property
    def deploy(self) -> Path:
        """Folder of ONNX files, engines and what was measured of them."""
        return self.folder / "deploy"

    def state(self) -> State:
        """How far it is. Stopped: on request, with a checkpoint. Broken off: it left no word, as when killed."""
        if self.summary.is_file():
            return "whole"
        if is_claimed(self):
            return "running"
        if self.ended.is_file():
            return "stopped" if read_json(self.ended)["stopped"] else "failed"
        return "broken off" if self.record.is_file() else "missing"

    def config(self) -> dict[str, Any]:
        """The contents of run.json.

        Raises:
            UserError: this is no run folder, or one of a later version.
        """
        if not self.record.is_file():
            raise UserError(f"{self.folder}: expected a run folder with run.json; make one with: runner train")
        config = read_json(self.record)
        if config.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"{self.record}: expected format {FORMAT}, found {config['format']}; use the version it is of"
            )
        return config


@contextlib.contextmanager
def claimed_runs(
    runs: Path, experiment: str, names: list[str], resuming: bool = False, overwrite: bool = False
) -> Iterator[list[Run]]:
    """The folders for new runs: made, still empty, and this process's own until the end of the context.

    None is made or emptied where one of them cannot be. With `resuming`, a folder may hold a run already; with
    `overwrite`, that run is deleted.

    Raises:
        UserError: a name is not plain, a folder holds a run already or is another process's, or cannot be made.
    """
    made = [Run(runs / experiment / name) for name in names]
    for name, run in zip(names, made, strict=True):
        check_name(name)
        if run.record.exists() and not resuming and not overwrite:
            state = "a finished" if run.summary.exists() else "an unfinished"
            raise UserError(
                f"{run.folder}: holds {state} run; choose another --name, --resume auto, or --overwrite it"
            )
    with contextlib.ExitStack() as stack:
        try:
            for run in made:
                run.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_claim(run, CLAIM_TIMEOUT if resuming else 1))
            for run in made:
                if overwrite:
                    _empty(run)
        except OSError as error:
            raise UserError(
                f"--runs {runs}: cannot write there ({error.strerror}); choose another folder"
            ) from None
        yield made


def _claim(run: Run, seconds: float) -> IO[str]:
    """The run's lock, held until it is closed or its process ends; waits so long for the one who has it."""
    lock = run.lock.open("a+")
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                lock.seek(0)
                raise UserError(
                    f"{run.folder}: {lock.read().strip() or 'another process'} trains it; wait for it, or choose "
                    "another --name"
                ) from None
            time.sleep(0.5)
        except OSError:  # a file system without locks
            break
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def is_claimed(run: Run) -> bool:
    """Whether a process trains it now."""
    try:
        with run.lock.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _empty(run: Run) -> None:
    for path in run.folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != run.lock:
            path.unlink()


def check_name(name: str) -> None:
    """Raises UserError where a run cannot be called so."""
    if not NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: expected letters, digits, '.', '_' and '-', at most 100")


def find_runs(paths: list[Path]) -> list[Run]:
    """Every run folder at or under the paths, sorted by path.

    Raises:
        UserError: a path does not exist, or there is no run under it.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: expected a run folder or a folder of runs, there is none")
        records = sorted(path.rglob("run.json"))
        if not records:
            raise UserError(
                f"{path}: expected a run folder or a folder of runs, found none; make one: runner train"
            )
        found |= {record.parent.resolve(): Run(record.parent) for record in records}
    return list(found.values())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: the file is damaged.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); restore or remove it") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object so that the file is either the old one or the new one, whole."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file beside its place, syncs it, and renames it into place; makes the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def trim_metrics(run: Run, step: int) -> None:
    """Takes the rows after `step` away: a resumed run writes them again."""
    kept = [row for row in read_metrics(run) if row["global_step"] <= step]
    write_atomically(run.metrics, "".join(json.dumps(row) + "\n" for row in kept).encode())


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that was cut short by a kill is left out."""
    rows = []
    if run.metrics.is_file():
        for line in run.metrics.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows
