"""Checkpoints: weights as safetensors with a manifest of hashes, in a folder that appears only when whole."""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data_prep.console import UserError, sha256_of
from runner.recipe import Architecture
from runner.runs import Run, read_json

WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d+)")


def save(run: Run, state: dict[str, torch.Tensor], step: int, epoch: int) -> Path:
    """Writes `checkpoints/step-N/` and then removes the older ones.

    Everything is written and synced in a temporary folder first; the rename is the commit.
    """
    folder = run.checkpoints / f"step-{step}"
    staging = run.checkpoints / f".step-{step}.writing"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    # Contiguous copies: safetensors knows shapes, not memory formats.
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    # What the weights were trained on goes with them, also where the file is copied elsewhere.
    trained_on = run.config()["dataset"]["name"]
    save_file(weights, staging / WEIGHTS, metadata={"dataset": trained_on})
    manifest = {"step": step, "epoch": epoch, "dataset": trained_on}
    manifest["sha256"] = {WEIGHTS: sha256_of(staging / WEIGHTS)}
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for file in staging.iterdir():
        _sync(file)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
    _sync(run.checkpoints)
    for older in run.checkpoints.iterdir():
        if older != folder and STEP_FOLDER.fullmatch(older.name):
            shutil.rmtree(older)
    return folder


def latest(run: Run) -> Path:
    """The checkpoint of the highest step, by its name and never by its time.

    Raises:
        UserError: there is none.
    """
    folders = [f for f in run.checkpoints.glob("step-*") if STEP_FOLDER.fullmatch(f.name)]
    if not folders:
        raise UserError(f"{run.folder}: expected a checkpoint, found none; has its training finished?")
    return max(folders, key=lambda folder: int(STEP_FOLDER.fullmatch(folder.name)[1]))


def load_model(run: Run) -> nn.Module:
    """The model of a run with its latest weights, on the CPU, in evaluation mode.

    Raises:
        UserError: no checkpoint, or its files do not have the hashes of its manifest.
    """
    folder = latest(run)
    for name, expected in read_json(folder / MANIFEST)["sha256"].items():
        found = sha256_of(folder / name)
        if found != expected:
            raise UserError(f"{folder / name}: damaged: expected SHA-256 {expected}, found {found}; train again")
    architecture = Architecture(**run.config()["architecture"])
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are thrown away; leave no trace
        model = architecture.build()
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.to(memory_format=torch.channels_last).eval()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
