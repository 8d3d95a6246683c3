"""Checkpoints: weights as safetensors with a manifest of hashes, in a folder that appears only when whole."""

import contextlib
import errno
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import nn

from data_prep.console import UserError, sha256_of
from runner.recipe import Architecture
from runner.runs import Run, read_json

WEIGHTS = "model.safetensors"
STATE = "state.pt"
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d+)")
REPLACED = re.compile(r"\.(step-\d+)\.replaced")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. The one before it stays."""


class Writer:
    """Writes checkpoints in a thread of its own, one after the other, while training goes on.

    What it is given must be copies: training changes its own tensors with the next step.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[Path] | None = None

    def save(self, weights: dict[str, torch.Tensor], step: int, state: dict[str, Any] | None = None) -> None:
        """Has a checkpoint written as `save` does; waits for the one before.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        self.pending = self.thread.submit(save, self.run, weights, step, state)

    def wait(self) -> None:
        """Until all that was given is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            reason = "no space left on the disk" if full else str(error)
            whole = _folders(self.run)
            stays = f"{whole[-1].name} stays; make room and" if whole else "there is none before it; make room and"
            raise CheckpointError(
                f"{self.run.checkpoints}: cannot write a checkpoint ({reason}); {stays}"
            ) from error


def save(run: Run, weights: dict[str, torch.Tensor], step: int, state: dict[str, Any] | None = None) -> Path:
    """Writes `checkpoints/step-N/` and then removes the others, but for the one before it.

    Everything is written and synced in a temporary folder first; the rename is the commit. Killed at any moment, it
    leaves a whole checkpoint behind, if there was one. The one before is for the day when the disk has damaged the
    newest.

    Args:
        run: whose.
        weights: the state that the architecture loads.
        step: optimizer steps done.
        state: what training needs to go on (runner.resume); None for weights alone.
    """
    folder = run.checkpoints / f"step-{step}"
    staging = run.checkpoints / f".step-{step}.writing"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    # Contiguous copies: safetensors knows shapes, not memory formats.
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # What the weights were trained on goes with them, also where the file is copied elsewhere.
    trained_on = run.config()["dataset"]["name"]
    _write(staging / WEIGHTS, serialised(weights, metadata={"dataset": trained_on}))
    if state is not None:
        buffer = io.BytesIO()  # torch's own writer calls a full disk an unexpected position
        torch.save(state, buffer)
        _write(staging / STATE, buffer.getbuffer())
    hashes = {file.name: sha256_of(file) for file in sorted(staging.iterdir())}
    manifest = {"step": step, "dataset": trained_on, "sha256": hashes}
    _write(staging / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    _sync(staging)
    if folder.exists():  # of a run that goes on from an earlier step
        folder.rename(run.checkpoints / f".{folder.name}.replaced")
    staging.rename(folder)
    _sync(run.checkpoints)
    keep_last(run, folder, *[other for other in _folders(run) if _step_of(other) < step][-1:])
    return folder


def keep_last(run: Run, *kept: Path) -> None:
    """Removes all checkpoints but `kept`; without these, all but the last, as a finished run has it."""
    kept = kept or (latest(run),)
    for other in run.checkpoints.iterdir():
        if other not in kept and re.match(r"\.?step-", other.name):
            shutil.rmtree(other)


def newest_whole(run: Run) -> tuple[dict[str, Any] | None, list[str]]:
    """The state of the newest checkpoint whose files have the hashes of its manifest, by step.

    Returns:
        The state, or None where no checkpoint is whole; and a line about each that is not.
    """
    for aside in run.checkpoints.glob(".step-*.replaced"):  # a save was killed between its two renames
        name = REPLACED.fullmatch(aside.name)
        if name and not (run.checkpoints / name[1]).exists():
            with contextlib.suppress(OSError):  # another rank was quicker
                aside.rename(run.checkpoints / name[1])
    damaged = []
    for folder in reversed(_folders(run)):
        try:
            return read_state(folder), damaged
        except (UserError, OSError) as error:
            damaged.append(str(error))
    return None, damaged


def read_state(folder: Path) -> dict[str, Any]:
    """What training needs to go on from a checkpoint folder.

    Raises:
        UserError: it is damaged, or holds weights alone.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: expected a checkpoint with {MANIFEST}, found none")
    _check(folder)
    if not (folder / STATE).is_file():
        raise UserError(f"{folder}: expected {STATE} to go on from, found weights alone")
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"{folder / STATE}: cannot be read: {error}") from None


def latest(run: Run) -> Path:
    """The checkpoint of the highest step, by its name and never by its time.

    Raises:
        UserError: there is none.
    """
    folders = _folders(run)
    if not folders:
        raise UserError(f"{run.folder}: expected a checkpoint, found none; has its training finished?")
    return folders[-1]


def load_model(run: Run) -> nn.Module:
    """The model of a run with its latest weights, on the CPU, in evaluation mode.

    Raises:
        UserError: no checkpoint, or its weights do not have the hash of its manifest.
    """
    folder = latest(run)
    _check(folder, (WEIGHTS,))
    architecture = Architecture(**run.config()["architecture"])
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are thrown away; leave no trace
        model = architecture.build()
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.to(memory_format=torch.channels_last).eval()


def _folders(run: Run) -> list[Path]:
    """The checkpoints of a run, in the order of their steps."""
    folders = [folder for folder in run.checkpoints.glob("step-*") if STEP_FOLDER.fullmatch(folder.name)]
    return sorted(folders, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(STEP_FOLDER.fullmatch(folder.name)[1])


def _check(folder: Path, names: Iterable[str] = ()) -> None:
    """Raises UserError where a file, or one of `names`, has not the hash that the manifest gives."""
    hashes = read_json(folder / MANIFEST).get("sha256")
    if not isinstance(hashes, dict) or not hashes or not set(names) <= hashes.keys():
        raise UserError(f"{folder / MANIFEST}: damaged: expected a SHA-256 of each file; train again")
    for name in names or hashes:
        expected = hashes[name]
        found = sha256_of(folder / name) if (folder / name).is_file() else "no such file"
        if found != expected:
            raise UserError(f"{folder / name}: damaged: expected SHA-256 {expected}, found {found}; train again")


def _write(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
