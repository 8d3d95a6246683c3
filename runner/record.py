"""What a run leaves behind in words: run.json, summary.json, and whether a run may be gone on with."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from data_prep.console import UserError
from data_prep.manifest import Manifest
from runner import checkpoint, environment
from runner.batches.protocol import Place, model_input
from runner.build import count
from runner.recipe import Experiment, differences, to_json
from runner.request import TrainRequest
from runner.runs import FORMAT, Run, read_json
from runner.train import Outcome

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # ours, and accelerate's names


def config(
    request: TrainRequest,
    registered: Experiment,
    manifest: Manifest,
    accelerator: Accelerator,
    place: Place,
    run: Run,
    seed: int,
    model: nn.Module,
    wandb_id: str,
    group: str,
) -> dict[str, Any]:
    """The contents of run.json."""
    given = Experiment(request.architecture, request.recipe, registered.paper)
    before = Experiment(registered.architecture, registered.recipe, registered.paper)
    shape = model_input(manifest, request.recipe)
    parameters, macs = registered.parameters, registered.macs
    known = parameters is not None and macs is not None and request.architecture == registered.architecture
    if not known or request.recipe.resize != registered.recipe.resize:
        parameters, macs = count(model, shape["shape"])
    precision = next(ours for ours, theirs in PRECISIONS.items() if theirs == accelerator.mixed_precision)
    return {
        "format": FORMAT,
        "experiment": request.experiment,
        "run": run.folder.name,
        "paper": registered.paper,
        "seed": seed,
        "max_steps": request.max_steps,
        "architecture": to_json(request.architecture),
        "recipe": to_json(request.recipe),
        "overrides": {name: list(pair) for name, pair in differences(before, given).items()},
        "reported": registered.reported and asdict(registered.reported),
        "parameters": parameters,
        "macs": macs,
        "teacher": request.teacher and origin(request.teacher),
        "started_from": request.start_from and origin(request.start_from),
        "dataset": {
            "name": manifest.name,
            "folder": str(request.data.absolute()),
            "fingerprint": manifest.fingerprint,
            "classes": list(manifest.classes),
            "image_shape": list(manifest.image_shape),
            "mean": list(manifest.mean),
            "std": list(manifest.std),
            "source": manifest.source,
        },
        "input": shape,
        "precision": precision,
        "device": accelerator.device.type,
        "world_size": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "deterministic": request.deterministic,
        "loader": place.loader_for(manifest.splits["train"])[0],
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        "git": environment.git_commit(),
        "wandb_id": wandb_id,
        "group": group,
    }


def origin(folder: Path) -> dict[str, str]:
    """Which weights another run gave, for run.json."""
    config, weights = Run(folder).config(), checkpoint.latest(Run(folder))
    manifest = read_json(weights / checkpoint.MANIFEST)
    return {
        "experiment": config["experiment"],
        "folder": str(folder.absolute()),
        "checkpoint": weights.name,
        "sha256": manifest["sha256"][checkpoint.WEIGHTS],
    }


def summary(request: TrainRequest, manifest: Manifest, run: Run, seed: int, outcome: Outcome) -> dict[str, Any]:
    """The contents of summary.json: figures of the last epoch, and of the best beside them."""
    test = outcome.test.figures()
    best = outcome.best
    summary = {
        "experiment": request.experiment,
        "run": str(run.folder),
        "dataset": manifest.name,
        "seed": seed,
        "epochs": outcome.epochs,
        "steps": outcome.steps,
        "test_accuracy": test["accuracy"],
        "test_loss": test["loss"],
        "test_top5": test["top5"],
        "test_calibration_error": test["calibration_error"],
        "test_images": outcome.test.images,
        "best_epoch": best["epoch"],
    }
    if outcome.validation is None:
        # Chosen on the test set, and so no estimate of anything; beside the last epoch for the papers' sake.
        summary["best_test_accuracy"] = best["test/accuracy"]
    else:
        summary |= {
            "validation_accuracy": outcome.validation.accuracy,
            "validation_loss": outcome.validation.loss,
            "validation_images": outcome.validation.images,
            "best_validation_accuracy": best["validation/accuracy"],
            "test_accuracy_of_best_validation": best["test/accuracy"],
        }
    if outcome.augmented is not None:
        summary["test_accuracy_augmented"] = outcome.augmented.accuracy
    return summary | {"class_accuracy": test["class_accuracy"], "confusion": outcome.test.confusion}


SAME = ("experiment", "seed", "architecture", "recipe", "precision", "teacher", "started_from")


# What a checkpoint's state only fits as it is.
FIXED = ("architecture.", "recipe.optimizer.kind", "recipe.ema", "recipe.prune")


def continued(
    request: TrainRequest, run: Run, config: dict[str, Any], state: dict[str, Any] | None
) -> dict[str, Any]:
    """The record of a run that is resumed: its own, with where it went on; at step 0 where there is no state yet.

    Raises:
        UserError: it is another training than the one that was begun, and --resume-anyway was not said or cannot
            help.
    """
    step, ranks = (state["step"], state["world_size"]) if state else (0, config["world_size"])
    before, config = run.config(), json.loads(json.dumps(config))  # tuples become lists on both sides
    changed = {key: (before[key], config[key]) for key in SAME if before[key] != config[key]}
    fingerprints = before["dataset"]["fingerprint"], config["dataset"]["fingerprint"]
    if fingerprints[0] != fingerprints[1]:
        changed["dataset"] = fingerprints
    told = {
        name: pair for key, values in changed.items() for name, pair in leaves_that_differ(key, *values).items()
    }
    if told and not request.resume_anyway:
        lines = ", ".join(f"{name}: {old} → {new}" for name, (old, new) in told.items())
        raise UserError(f"{run.folder}: expected the training that was begun, found {lines}; or --resume-anyway")
    if fixed := [name for name in told if state and name.startswith(FIXED)]:
        raise UserError(f"--resume-anyway: {', '.join(fixed)} cannot change under way; choose another --name")
    # The order of sums follows from the code, the ranks, their threads, and the kernels that a machine has.
    same = ("world_size", "device", "threads", "deterministic", "hardware", "versions")
    commits = [record["git"].get("commit") for record in (before, config)]
    bitwise = ranks == config["world_size"] and commits[0] == commits[1] and not told
    bitwise = bitwise and all(before.get(key, False) == config[key] for key in same)
    resumed = {"step": step, "world_size": config["world_size"], "bitwise": bitwise, "changed": told}
    if commits[0] != commits[1]:
        resumed["commit"] = commits[1]
    if not bitwise:
        print(f"runner: {run.folder}: goes on from step {step}, not to the bit", file=sys.stderr)
    return {
        **(config if told else before),
        "max_steps": config["max_steps"],
        "wandb_id": before["wandb_id"],
        "resumed": [*before.get("resumed", []), resumed],
    }


def leaves_that_differ(name: str, old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [leaves_that_differ(f"{name}.{key}", old.get(key), new.get(key)) for key in old.keys() | new.keys()]
        return {key: pair for part in parts for key, pair in part.items()}
    return {} if old == new else {name: (old, new)}
