"""Writes and reads checkpoints: folders with weights as safetensors and a manifest of hashes, written atomically."""

import contextlib
import hashlib
import io
import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn

from runner import experiments
from runner.common.errors import DISK_FULL, UserError
from runner.common.files import (
    TransientReadError,
    is_file,
    names_in,
    read_bytes,
    read_json,
    retried,
    sha256_of,
    unreadable,
)
from runner.run.folder import MANIFEST, STEP_FOLDER, WEIGHTS, Run
from runner.run.schema import CheckpointManifest

STATE = "state.pt"
REPLACED_FOLDER = re.compile(r"\.(step-\d+)\.replaced")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. The previous one is intact."""


class CheckpointWriter:
    """Writes checkpoints in a background thread, one at a time, during training.

    The tensors to save must be copies, because the next training step changes the originals.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[Path] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the last checkpoint, even after a failure of training, so that its progress is kept."""
        with contextlib.suppress(CheckpointError) if kind else contextlib.nullcontext():
            self.wait()

    def save(self, weights: dict[str, torch.Tensor], step: int, state: dict[str, Any] | None = None) -> None:
        """Waits for the previous checkpoint, then starts `save` in the background.

        Raises:
            CheckpointError: the previous checkpoint could not be written.
        """
        self.wait()
        self.pending = self.executor.submit(save, self.run, weights, step, state)

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (OSError, RuntimeError, UserError, MemoryError) as error:  # torch.save raises RuntimeError
            full = isinstance(error, OSError) and error.errno in DISK_FULL
            reason = "no space left on the disk" if full else getattr(error, "strerror", None) or str(error)
            folders: list[Path] = []
            with contextlib.suppress(OSError):
                folders = _checkpoint_folders(self.run)
            previous = f"{folders[-1].name} stays" if folders else "there is no earlier one"
            remedy = "make room, then resume" if full else "resume"
            message = f"{self.run.checkpoints}: cannot write a checkpoint ({reason}); {previous}; {remedy}"
            raise CheckpointError(f"{message} with --resume auto") from error


def save(run: Run, weights: dict[str, torch.Tensor], step: int, state: dict[str, Any] | None = None) -> Path:
    """Writes `checkpoints/step-N/`, then removes all others except the previous one. Returns the new folder.

    All files are written and synced in a temporary folder, which is then renamed; a process killed at any point
    leaves an intact checkpoint, if there was one. The previous checkpoint is a fallback for damage to the newest.

    Args:
        run: the run folder.
        weights: state dict of the model.
        step: number of completed optimizer steps.
        state: training state for resuming (runner.training.state); None to save only the weights.
    """
    folder = run.step_folder(step)
    _write_folder(folder, run, weights, step, state)
    remove_others(run, step)
    return folder


@retried
def _write_folder(
    folder: Path, run: Run, weights: dict[str, torch.Tensor], step: int, state: dict[str, Any] | None
) -> None:
    """Writes a checkpoint without removing others. Arguments as in `save`."""
    staging = run.checkpoints / f".step-{step}.writing"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        _write_files(staging, run, weights, step, state)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # on a full disk, also makes room to record the reason
        raise
    if folder.exists():  # in a run that was resumed from an earlier step
        replaced = run.checkpoints / f".{folder.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    staging.rename(folder)
    _sync(run.checkpoints)


def _write_files(
    staging: Path, run: Run, weights: dict[str, torch.Tensor], step: int, state: dict[str, Any] | None
) -> None:
    """Writes and syncs the files of a checkpoint. Arguments as in `save`."""
    # safetensors does not store memory formats, so tensors must be contiguous.
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    dataset = run.config().dataset.name  # also stored in the file, which may be copied elsewhere
    hashes = {WEIGHTS: _write_synced(staging / WEIGHTS, serialize(weights, metadata={"dataset": dataset}))}
    if state is not None:
        buffer = io.BytesIO()  # when writing to a file, torch.save reports a full disk as an unexpected position
        torch.save(state | {"run_config": run.run_json.read_text()}, buffer)  # identifies the training that wrote it
        hashes[STATE] = _write_synced(staging / STATE, buffer.getbuffer())
    manifest = CheckpointManifest(step=step, dataset=dataset, sha256=hashes)
    _write_synced(staging / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    _sync(staging)


def remove_others(run: Run, step: int | None = None) -> None:
    """Removes all checkpoints but the latest; with `step`, all but that of this step and the one before it.

    What cannot be removed stays, because the new checkpoint is complete; the next save tries again.
    """
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = names_in(run.checkpoints)
    # Reuse one listing, because a second one may differ on a network file system.
    steps = sorted(int(name[1]) for name in map(STEP_FOLDER.fullmatch, names) if name)
    keep = steps[-1:] if step is None else [step, *[other for other in steps if other < step][-1:]]
    for name in names:
        folder = run.checkpoints / name
        if not re.match(r"\.?step-", name) or name in [f"step-{kept}" for kept in keep]:
            continue
        # Rename first: on NFS, a file that another process has open is not removed, and would leave half a checkpoint.
        is_renamed = name.endswith(".removed")
        removed = folder if is_renamed else folder.with_name(f".{name.removeprefix('.')}.removed")
        with contextlib.suppress(OSError):
            if not is_renamed:
                folder.rename(removed)
            shutil.rmtree(removed)


def newest_intact(run: Run) -> tuple[Path | None, list[str]]:
    """Finds the newest checkpoint, by step, that can be resumed from and whose files match its manifest.

    Returns:
        Its folder, or None if there is no checkpoint or all are damaged; and a message about each damaged one.

    Raises:
        UserError: no checkpoint is intact, and at least one could not be read because of an error of the file server.
    """
    names = names_in(run.checkpoints)
    for name in map(REPLACED_FOLDER.fullmatch, names):  # a save was killed between its two renames
        if name and name[1] not in names:
            (run.checkpoints / name[0]).rename(run.checkpoints / name[1])
    damaged: list[UserError] = []
    for folder in reversed(_checkpoint_folders(run)):
        try:
            verify_resumable(folder)
            return folder, [str(reason) for reason in damaged]
        except UserError as error:
            damaged.append(error)
        except OSError as error:
            damaged.append(unreadable(Path(error.filename), error))
    if unreadable_now := [reason for reason in damaged if isinstance(reason, TransientReadError)]:
        raise unreadable_now[0]
    return None, [str(reason) for reason in damaged]


def verify_resumable(folder: Path) -> str:
    """Checks all files of a checkpoint against its manifest; returns the SHA-256 of the manifest. Raises UserError."""
    if not is_file(folder / MANIFEST):
        raise UserError(f"{folder}: expected a checkpoint with {MANIFEST}, found none")
    _verify_hashes(folder)
    if not is_file(folder / STATE):
        raise UserError(f"{folder}: expected {STATE} to resume from, found only weights")
    return sha256_of(folder / MANIFEST)


def wait_for_state(folder: Path, manifest_sha256: str, seconds: float) -> dict[str, Any]:
    """Reads the state of the checkpoint that rank 0 chose; on a shared file system, it may become visible with a delay.

    Args:
        folder: the checkpoint folder.
        manifest_sha256: SHA-256 of its manifest, as read by rank 0.
        seconds: how long to retry.

    Raises:
        UserError: the checkpoint could not be read in time, or differs from the one on rank 0.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            found = verify_resumable(folder)
            if found == manifest_sha256:
                break
            problem = f"{folder / MANIFEST}: expected SHA-256 {manifest_sha256}, as on rank 0, found {found}"
        except (UserError, OSError) as error:
            problem = str(error)
        if time.monotonic() > end:
            raise UserError(f"rank 0 resumes from a checkpoint that cannot be read here after {seconds:g} s: {problem}")
        time.sleep(0.2)
    return _load_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """Reads the training state of a checkpoint folder.

    Raises:
        UserError: the checkpoint is damaged or contains only weights.
    """
    verify_resumable(folder)
    return _load_state(folder)


def _load_state(folder: Path) -> dict[str, Any]:
    try:
        return torch.load(io.BytesIO(read_bytes(folder / STATE, sys.maxsize)), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"{folder / STATE}: cannot be read: {error}") from None


def latest(run: Run) -> Path:
    """Returns the checkpoint folder with the highest step in its name.

    Raises:
        UserError: the run has no checkpoint.
    """
    folders = _checkpoint_folders(run)
    if not folders:
        raise UserError(f"{run.folder}: expected a checkpoint, found none; has its training finished?")
    return folders[-1]


def is_newest(run: Run, folder: Path) -> bool:
    """Returns whether a folder is the checkpoint of a run with the highest step."""
    return any(newest.resolve() == folder.resolve() for newest in _checkpoint_folders(run)[-1:])


def load_model(run: Run) -> nn.Module:
    """Builds the model of a run with its latest weights, on the CPU, in evaluation mode.

    Raises:
        UserError: the run has no checkpoint, the weights do not match the manifest, or the model is not trusted.
    """
    folder = latest(run)
    _verify_hashes(folder, (WEIGHTS,))
    config = run.config()
    experiments.check_trusted(config.architecture, run.trusted_code, run.run_json)
    _, height, width = config.input.shape
    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten
        model = config.architecture.build(len(config.dataset.classes), (height, width))
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{run.run_json}: expected a model, found that {config.architecture.factory} makes {type(model)}"
        )
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.to(memory_format=torch.channels_last).eval()


def _checkpoint_folders(run: Run) -> list[Path]:
    """The checkpoint folders of a run, ordered by step."""
    return [run.step_folder(step) for step in run.checkpoint_steps()]


def _verify_hashes(folder: Path, names: Iterable[str] = ()) -> None:
    """Raises UserError if a file, or one of `names` if given, does not match its hash in the manifest."""
    hashes = read_json(folder / MANIFEST, CheckpointManifest).sha256
    if not hashes or not set(names) <= hashes.keys():
        raise UserError(f"{folder / MANIFEST}: damaged: expected a SHA-256 of each file; train again")
    for name in names or hashes:
        expected = hashes[name]
        actual = sha256_of(folder / name) if is_file(folder / name) else "no such file"
        if actual != expected:
            raise UserError(f"{folder / name}: damaged: expected SHA-256 {expected}, found {actual}; train again")


def _write_synced(path: Path, content: bytes | memoryview) -> str:
    """Writes and syncs a file; returns the SHA-256 of its content."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
