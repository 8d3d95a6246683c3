"""One training or evaluation from the command line to the run folder: opens, refuses, records, concludes.

The algorithm is in train.py; here is everything around it that makes a run a record.
"""

import contextlib
import errno
import os
import secrets
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import nn

from data_prep.console import UserError, progress
from data_prep.manifest import Manifest
from runner import checkpoint, cpu, cuda, figures, launched, record, watchdog
from runner.batches import beton, pixels
from runner.batches.protocol import Place, Split, model_input, open_manifest, open_split, open_test_of_run
from runner.batches.stream import BatchStream
from runner.build import build
from runner.evaluate import Evaluation, evaluate
from runner.recipe import Experiment, Recipe
from runner.request import TrainRequest
from runner.runs import Run, claimed_runs, trim_metrics, write_json
from runner.tracking import Tracker
from runner.train import Control, Data, DivergedError, StoppedError, train

STOP_FILE = "stop"  # in the run folder; asks for a checkpoint and an end
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later
COLLECTIVE_GRACE = 60  # seconds that a collective has beyond --hang-timeout; our watchdog tells more, and is first


@dataclass(frozen=True)
class Finished:
    """What is left to do after training.

    Attributes:
        summaries: of each seed's run, on rank 0; none on the others.
        leave_at_once: skip the interpreter's exit handlers. After a process group, thread pools of torch's
            libraries now and then abort the process in their static destructors, all work done, and the
            launcher would call the run failed; and W&B's handler waits for ever for a server that is silent.
    """

    summaries: list[dict[str, Any]]
    leave_at_once: bool


def run_training(request: TrainRequest, registered: Experiment, environ: MutableMapping[str, str]) -> Finished:
    """Trains as the request says, once for each seed.

    Raises:
        UserError: data, name, weights, device or ranks that cannot be used; nothing has been written then.
        SystemExit: code 1 where training diverged.
    """
    launch = launched.read(environ)
    if launch.by_accelerate:
        launched.end_with_parent()
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
        if "fp16" in (request.precision, environ.get("ACCELERATE_MIXED_PRECISION")):
            raise UserError("--precision fp16: expected a GPU; on the CPU it would be fp32, or choose bf16")
    cuda.prepare(place.device, request.deterministic, environ)
    pixels.prepare(place.device)
    manifest = open_manifest(request.data)
    recipe = request.recipe

    def opened(split: Split) -> BatchStream:
        return open_split(request.data, manifest, split, recipe, place, request.seeds[0])

    training = opened("train")
    validation = opened("validation") if recipe.validation else None
    data = Data(training, opened("test"), validation, len(manifest.classes))
    start = request.start_from and Run(request.start_from)
    teacher = _teacher(request.teacher, manifest, recipe) if request.teacher else None
    models: dict[int, nn.Module | None] = dict.fromkeys(request.seeds)
    # The first now, so that weights which cannot be had are refused before anything is written.
    models[request.seeds[0]] = build(request.architecture, recipe, request.seeds[0], training.first, start)
    runs = {seed: Run(request.runs / request.experiment / name) for seed, name in request.run_names().items()}
    needed = {folder.resolve() for folder in (request.start_from, request.teacher) if folder}
    for run in runs.values():
        if request.overwrite and run.folder.resolve() in needed:
            raise UserError(f"--overwrite: expected another --name, {run.folder} is what this run learns from")
    resuming = request.resume != "never"
    names = list(request.run_names().values())
    summaries, hung = [], False
    with contextlib.ExitStack() as stack:
        if launch.rank == 0:
            stack.enter_context(claimed_runs(request.runs, request.experiment, names, resuming, request.overwrite))
        accelerator = _joined(request, launch, device)
        stack.callback(_leave, accelerator)
        if accelerator.is_main_process:
            print(told, file=sys.stderr)
            print(place.loader_for(manifest.splits["train"])[1], file=sys.stderr)
        # Not before all have joined: by then the folders are ours, and nobody else writes a checkpoint.
        states = {seed: _state_of(request, run) if resuming else None for seed, run in runs.items()}
        scale = accelerator.scaler and accelerator.scaler.state_dict()  # fp16's, which every seed begins with
        for seed, run in runs.items():
            training.seed = seed
            if scale:
                accelerator.scaler.load_state_dict(scale)
            model = models.pop(seed) or build(request.architecture, recipe, seed, training.first, start)
            wandb_id = broadcast_object_list([_wandb_id(request, environ)])[0]
            group = environ.get("WANDB_RUN_GROUP", registered.paper)
            config = record.config(
                request, registered, manifest, accelerator, place, run, seed, model, wandb_id, group
            )
            # Of the first rank, for it writes the record anew as soon as all have read it.
            if broadcast_object_list([resuming and run.record.exists()])[0]:
                config = record.continued(request, run, config, states[seed])
                accelerator.wait_for_everyone()
            summary, tracker_hung = _train_one(
                request, data, accelerator, manifest, run, seed, model, teacher, config, environ, states[seed]
            )
            summaries += [summary] if summary else []
            hung = hung or tracker_hung
            accelerator.free_memory()
    return Finished(summaries, leave_at_once=accelerator.num_processes > 1 or hung)


def _wandb_id(request: TrainRequest, environ: Mapping[str, str]) -> str:
    """A new one, or the one that W&B's agent has reserved for a run of its sweep."""
    given = environ.get("WANDB_RUN_ID") if len(request.seeds) == 1 else None
    return given or secrets.token_hex(4)


def _joined(request: TrainRequest, launch: launched.Launch, device: str) -> Accelerator:
    """Accelerate's view of all ranks, which have met when this returns.

    Raises:
        UserError: there are not as many as were launched.
    """
    # torch 2.15 renames it to an option that accelerate does not know yet.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=record.PRECISIONS.get(request.precision),
        # Gradients live in the all-reduce's own buckets, the graph is the same every step (but for parts of a
        # batch, of which only the last is reduced), and batch norm's statistics are averaged once before they are
        # used (train.sync_buffers) instead of sent every step.
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True,
                static_graph=request.recipe.accumulate == 1,
                broadcast_buffers=False,
            ),
            InitProcessGroupKwargs(timeout=timedelta(seconds=request.hang_timeout + COLLECTIVE_GRACE)),
        ],
    )
    if accelerator.num_processes != launch.world_size:
        raise UserError(
            f"{launch.world_size} ranks were launched, {accelerator.num_processes} joined; launch again"
        )
    return accelerator


def _leave(accelerator: Accelerator) -> None:
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


def _train_one(
    request: TrainRequest,
    data: Data,
    accelerator: Accelerator,
    manifest: Manifest,
    run: Run,
    seed: int,
    model: nn.Module,
    teacher: nn.Module | None,
    config: dict[str, Any],
    environ: MutableMapping[str, str],
    state: dict[str, Any] | None,
) -> tuple[dict[str, Any] | None, bool]:
    """One run from its record to its summary; also whether W&B hung. Without a summary on ranks other than 0."""
    tracker = None
    if accelerator.is_main_process:
        write_json(run.record, config)
        run.ended.unlink(missing_ok=True)
        if run.metrics.exists():  # of a run that goes on, or was ended before its first checkpoint
            trim_metrics(run, state["step"] if state else 0)
        tracker = Tracker(run, config, environ)
    log = tracker.log if tracker else lambda row: None
    if teacher is not None:
        teacher.to(accelerator.device)
    who = f"rank {accelerator.process_index} of {accelerator.num_processes}"
    stop_file = request.stop_file or run.folder / STOP_FILE
    try:
        with asked_to_stop(stop_file) as asked, watchdog.watching(request.hang_timeout, who) as alive:
            control = Control(request.checkpoint_every, request.evaluate_every, state, asked, alive)
            outcome = train(
                model, request.recipe, data, accelerator, run, seed, request.max_steps, teacher, log, control
            )
    except Exception as error:
        told = _ending(error, request.recipe, accelerator.num_processes)
        code, line = told or (1, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        if tracker:
            with contextlib.suppress(OSError):
                write_json(run.ended, {"stopped": isinstance(error, StoppedError), "told": line})
        if told is None:
            raise
        if tracker:
            print(f"runner: {run.folder}: {line}", file=sys.stderr)
            if isinstance(error, StoppedError):
                stop_file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # rows may be left that a full disk does not take
                tracker.finish()
        if isinstance(error, StoppedError | DivergedError):  # on all ranks
            # As soon as one has left, the launcher ends the others: the first may still write.
            with contextlib.suppress(RuntimeError):
                accelerator.wait_for_everyone()
        if tracker and tracker.hung:  # W&B's exit handler would wait for ever
            os._exit(code)
        raise SystemExit(code) from None
    if tracker is None:
        return None, False
    arrays = outcome.test.arrays()
    with run.predictions.open("wb") as file:
        np.savez_compressed(file, **arrays)
    summary = record.summary(request, manifest, run, seed, outcome)
    test = manifest.splits["test"]

    def seen(samples: np.ndarray) -> np.ndarray:
        return beton.read_some(request.data / test.file, test, manifest, samples)

    figures.write_mistakes(run, seen(figures.mistakes_of(arrays["logits"], arrays["labels"])))
    figures.draw(run, config, outcome.test.confusion, seen(figures.samples_of(test.images)))
    write_json(run.summary, summary)
    checkpoint.keep_last(run)
    tracker.conclude()
    tracker.finish()
    return summary, tracker.hung


def _ending(error: Exception, recipe: Recipe, ranks: int) -> tuple[int, str] | None:
    """Exit code and the line to tell, where training ended for a reason that is known; None for a fault of ours."""
    if isinstance(error, StoppedError):
        return EXIT_STOPPED, f"{error}; go on with --resume auto"
    if isinstance(error, DivergedError):
        return 1, f"{error}; lower the learning rate or use --precision fp32"
    if isinstance(error, checkpoint.CheckpointError):
        return 1, f"{error} go on with --resume auto"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            1,
            f"no space left on the disk for {error.filename or 'metrics'}; make room and go on with --resume auto",
        )
    if "does not have a deterministic implementation" in str(error):
        return (
            1,
            f"--deterministic: {str(error).split(' does not')[0]} has no kernel of that kind; train without it",
        )
    refused = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if refused:
        share = recipe.batch_size // (ranks * recipe.accumulate)
        return 1, (
            f"out of memory with {share} images at a time (batch {recipe.batch_size} over {ranks} ranks); "
            f"--recipe.accumulate {2 * recipe.accumulate} halves that and trains the same, so do more ranks, or "
            "--precision bf16"
        )
    return None


@contextlib.contextmanager
def asked_to_stop(file: Path) -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGUSR1 or SIGTERM has come since, or the stop file is there."""
    told = []
    before = {number: signal.signal(number, lambda *_: told.append(True)) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(told) or file.exists()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _state_of(request: TrainRequest, run: Run) -> dict[str, Any] | None:
    """The state that a run is resumed from; None where there is nothing yet, and it begins.

    Raises:
        UserError: a given checkpoint is damaged, or no checkpoint of the run is whole.
    """
    if request.resume != "auto":
        return checkpoint.read_state(Path(request.resume))
    state, damaged = checkpoint.newest_whole(run)
    for line in damaged:
        print(f"runner: {line}", file=sys.stderr)
    if state is None and damaged:
        raise UserError(f"{run.folder}: expected a whole checkpoint, found none; train it anew with --overwrite")
    return state


def _teacher(folder: Path, manifest: Manifest, recipe: Recipe) -> nn.Module:
    """The model of a finished run, for another to learn from.

    Raises:
        UserError: it was trained on other classes, or on images of another size or normalisation.
    """
    run = Run(folder)
    found = run.config()
    if found["dataset"]["classes"] != list(manifest.classes):
        raise UserError(f"--teacher {folder}: expected a run on the classes of {manifest.name}")
    wanted = model_input(manifest, recipe)
    if found["input"] != wanted:
        raise UserError(f"--teacher {folder}: expected a run on images like {wanted}, found {found['input']}")
    return checkpoint.load_model(run).requires_grad_(False)


def run_evaluation(
    run: Run,
    data: Path | None,
    device: launched.Device,
    precision: str,
    test_augmentation: str,
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

    def evaluated(views: str) -> Evaluation:
        with (
            torch.autocast(chosen, dtype, enabled=precision != "fp32"),
            progress("evaluate", batches.samples) as advance,
        ):
            return evaluate(model, batches, len(config["dataset"]["classes"]), advance=advance, views=views)

    views = config["recipe"]["test_augmentation"] if test_augmentation == "run" else test_augmentation
    figures_of = {"": evaluated("none")} | ({} if views == "none" else {"_augmented": evaluated(views)})
    return {
        "run": str(run.folder),
        "experiment": config["experiment"],
        "dataset": config["dataset"]["name"],
        "precision": precision,
        "test_augmentation": views,
        "test_images": figures_of[""].images,
        **{
            f"test_{name}{kind}": figure
            for kind, evaluation in figures_of.items()
            for name, figure in evaluation.figures().items()
        },
        "confusion": figures_of[""].confusion,
    }
