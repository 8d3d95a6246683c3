"""One training or evaluation from the command line to the run folder: opens, refuses, records, concludes.

The algorithm is in train.py; here is everything around it that makes a run a record.
"""

import secrets
import shutil
import sys
import warnings
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list

from data_prep.console import UserError, progress
from data_prep.manifest import Manifest
from runner import checkpoint, cpu, environment, figures, launched
from runner.batches import beton, pixels
from runner.batches.protocol import Place, model_input, open_manifest, open_split, open_test_of_run
from runner.evaluate import evaluate
from runner.recipe import Experiment, differences, to_json
from runner.request import TrainRequest
from runner.runs import FORMAT, Run, new_run, write_json
from runner.tracking import Tracker
from runner.train import DivergedError, train

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # ours, and accelerate's names


@dataclass(frozen=True)
class Finished:
    """What is left to do after training.

    Attributes:
        summary: on rank 0; None on the others.
        leave_at_once: skip the interpreter's exit handlers. After a process group, thread pools of torch's
            libraries now and then abort the process in their static destructors, all work done, and the
            launcher would call the run failed; and W&B's handler waits for ever for a server that is silent.
    """

    summary: dict[str, Any] | None
    leave_at_once: bool


def run_training(request: TrainRequest, registered: Experiment, environ: MutableMapping[str, str]) -> Finished:
    """Trains as the request says.

    Raises:
        UserError: data, name, device or ranks that cannot be used; nothing has been written then.
        SystemExit: code 1 where training diverged.
    """
    launch = launched.read(environ)
    device, told = launched.device(request.device, launch, torch.cuda.device_count())
    place = Place(
        device=torch.device(device, launch.local_rank if device == "cuda" else None),
        rank=launch.rank,
        world_size=launch.world_size,
        loader=request.loader,
        workers=request.workers,
    )
    if device == "cpu":
        cpu.prepare(launch.local_world_size)
    pixels.prepare(place.device)
    manifest = open_manifest(request.data)
    name = request.name or f"seed-{request.seed}"
    run = Run(request.runs / request.experiment / name)
    train_batches = open_split(request.data, manifest, "train", request.recipe, place, request.seed)
    test_batches = open_split(request.data, manifest, "test", request.recipe, place)
    if launch.rank == 0:
        if request.overwrite and run.record.exists():
            shutil.rmtree(run.folder)
        run = new_run(request.runs, request.experiment, name)

    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=PRECISIONS.get(request.precision),
        # Gradients live in the all-reduce's own buckets, the graph is the same every step, and batch norm's
        # statistics are averaged once before they are used (train.sync_buffers) instead of sent every step.
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, static_graph=True, broadcast_buffers=False)
        ],
    )
    if accelerator.num_processes != launch.world_size:
        raise UserError(
            f"{launch.world_size} ranks were launched, {accelerator.num_processes} joined; launch again"
        )
    first = accelerator.is_main_process
    if first:
        print(told, file=sys.stderr)
        print(place.loader_for(manifest.splits["train"])[1], file=sys.stderr)
    wandb_id = broadcast_object_list([secrets.token_hex(4)])[0]
    # torch 2.15 renames it to an option that accelerate does not know yet.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    config = _config(request, registered, manifest, accelerator, place, run, wandb_id)
    tracker = None
    if first:
        write_json(run.record, config)
        tags = [config["architecture"]["factory"].rpartition(":")[2], manifest.name, config["precision"]]
        tracker = Tracker(run, config, environ, tags)
    try:
        outcome = train(
            request.architecture,
            request.recipe,
            train_batches,
            test_batches,
            accelerator,
            run,
            len(manifest.classes),
            request.seed,
            request.max_steps,
            tracker.log if tracker else lambda row: None,
        )
    except DivergedError as error:
        if tracker:
            tracker.finish()
            print(
                f"runner: {run.folder}: {error}; lower the learning rate or use --precision fp32",
                file=sys.stderr,
            )
        raise SystemExit(1) from None
    finally:
        if accelerator.num_processes > 1:
            torch.distributed.destroy_process_group()
    ranked = accelerator.num_processes > 1
    if tracker is None:
        return Finished(None, leave_at_once=ranked)
    evaluation = outcome.evaluation
    with run.predictions.open("wb") as file:
        np.savez_compressed(file, **evaluation.arrays())
    summary = {
        "experiment": request.experiment,
        "run": str(run.folder),
        "dataset": manifest.name,
        "seed": request.seed,
        "epochs": outcome.epochs,
        "steps": outcome.steps,
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "test_images": evaluation.images,
        # Chosen on the test set, and so no estimate of anything; beside the last epoch for the papers' sake.
        "best_test_accuracy": outcome.best_accuracy,
        "best_epoch": outcome.best_epoch,
        "confusion": evaluation.confusion,
    }
    test = manifest.splits["test"]
    shown = beton.read_some(request.data / test.file, test, manifest, figures.samples_of(test.images))
    pictures = figures.draw(run, config, evaluation.confusion, shown)
    tracker.figures(pictures, outcome.steps)
    tracker.summarise({key: value for key, value in summary.items() if key != "confusion"})
    write_json(run.summary, summary)
    tracker.finish()
    return Finished(summary, leave_at_once=ranked or tracker.hung)


def _config(
    request: TrainRequest,
    registered: Experiment,
    manifest: Manifest,
    accelerator: Accelerator,
    place: Place,
    run: Run,
    wandb_id: str,
) -> dict[str, Any]:
    """The contents of run.json."""
    given = Experiment(request.architecture, request.recipe, registered.paper)
    before = Experiment(registered.architecture, registered.recipe, registered.paper)
    unchanged = request.architecture == registered.architecture
    precision = next(ours for ours, theirs in PRECISIONS.items() if theirs == accelerator.mixed_precision)
    return {
        "format": FORMAT,
        "experiment": request.experiment,
        "run": run.folder.name,
        "paper": registered.paper,
        "seed": request.seed,
        "max_steps": request.max_steps,
        "architecture": to_json(request.architecture),
        "recipe": to_json(request.recipe),
        "overrides": {name: list(pair) for name, pair in differences(before, given).items()},
        "reported": registered.reported and asdict(registered.reported),
        "parameters": registered.parameters if unchanged else None,
        "macs": registered.macs if unchanged else None,
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
        "input": model_input(manifest, request.recipe),
        "precision": precision,
        "device": accelerator.device.type,
        "world_size": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "loader": place.loader_for(manifest.splits["train"])[0],
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        "git": environment.git_commit(),
        "wandb_id": wandb_id,
    }


def run_evaluation(
    run: Run,
    data: Path | None,
    device: launched.Device,
    precision: str,
    environ: MutableMapping[str, str],
) -> dict[str, Any]:
    """Scores the latest checkpoint of a run on the whole test set, on this process alone."""
    config = run.config()
    chosen, told = launched.device(device, launched.read(environ), torch.cuda.device_count())
    print(told, file=sys.stderr)
    if chosen == "cpu":
        cpu.prepare()
    model = checkpoint.load_model(run).to(chosen)
    precision = config["precision"] if precision == "run" else precision
    batches = open_test_of_run(config, data, torch.device(chosen))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with (
        torch.autocast(chosen, dtype, enabled=precision != "fp32"),
        progress("evaluate", batches.samples) as advance,
    ):
        result = evaluate(model, batches, len(config["dataset"]["classes"]), advance=advance)
    return {
        "run": str(run.folder),
        "experiment": config["experiment"],
        "dataset": config["dataset"]["name"],
        "precision": precision,
        "test_accuracy": result.accuracy,
        "test_loss": result.loss,
        "test_images": result.images,
        "confusion": result.confusion,
    }
