"""Builds the contents of run.json and summary.json, and checks whether a run may be resumed."""

import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate import Accelerator
from torch import nn

from data_prep.manifest import Manifest
from runner.common.errors import UserError
from runner.common.files import is_file, read_json
from runner.config.recipe import Experiment, differences
from runner.config.train_config import TrainConfig
from runner.data.open import RankInfo, model_input
from runner.run import schema
from runner.run.folder import MANIFEST, WEIGHTS, Run
from runner.run.schema import Dataset, Origin, Resumed, RunConfig, Summary, TrainPrecision
from runner.system import environment
from runner.training import checkpoint
from runner.training.loop import TrainResult
from runner.training.model import count_parameters_and_macs

MIXED_PRECISION: dict[TrainPrecision, str] = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # accelerate's names


def run_config(
    config: TrainConfig,
    registered: Experiment,
    manifest: Manifest,
    accelerator: Accelerator,
    rank_info: RankInfo,
    run: Run,
    seed: int,
    model: nn.Module,
    wandb_id: str,
    group: str,
) -> RunConfig:
    """Builds the contents of run.json for a new run.

    Args:
        config: the options of `runner train`.
        registered: the experiment without overrides.
        manifest: the manifest of the dataset.
        accelerator: provides device, ranks and precision.
        rank_info: selects the loader.
        run: the run folder.
        seed: the random seed of the run.
        model: its parameters and MACs are counted if the experiment does not state them.
        wandb_id, group: ID and group of the W&B run.
    """
    modules = [*config.trusted_code.experiments_from, config.architecture.factory.partition(":")[0]]
    before = Experiment(registered.architecture, registered.recipe, registered.paper)
    after = Experiment(config.architecture, config.recipe, registered.paper)
    shape = model_input(manifest, config.recipe)
    parameters, macs = registered.parameters, registered.macs
    channels, height, width = shape.shape
    stated_for = config.architecture == registered.architecture and len(manifest.classes) == 10
    stated_side = registered.recipe.resize or 32
    if not stated_for or [height, width] != [stated_side] * 2 or parameters is None or macs is None:
        parameters, macs = count_parameters_and_macs(model, (channels, height, width))
    return RunConfig(
        experiment=config.experiment,
        run=run.folder.name,
        paper=registered.paper,
        seed=seed,
        max_steps=config.max_steps,
        architecture=config.architecture,
        recipe=config.recipe,
        overrides=differences(before, after),
        reported=registered.reported,
        parameters=parameters,
        macs=macs,
        teacher=origin(config.teacher) if config.teacher else None,
        started_from=origin(config.start_from) if config.start_from else None,
        dataset=Dataset(
            name=manifest.name,
            folder=str(config.data.absolute()),
            fingerprint=manifest.fingerprint,
            classes=list(manifest.classes),
            image_shape=list(manifest.image_shape),
            mean=list(manifest.mean),
            std=list(manifest.std),
            source=manifest.source,
        ),
        input=shape,
        precision=next(ours for ours, name in MIXED_PRECISION.items() if name == accelerator.mixed_precision),
        device=accelerator.device.type,
        world_size=accelerator.num_processes,
        threads=torch.get_num_threads(),
        deterministic=config.deterministic,
        loader=rank_info.loader_for(manifest, manifest.splits["train"])[0],
        hardware=environment.describe_hardware(),
        versions=environment.package_versions(),
        git=environment.git_revision(),
        source_sha256=environment.source_sha256(modules),
        wandb_id=wandb_id,
        group=group,
        options=config,
    )


def origin(folder: Path) -> Origin:
    """Describes the latest weights of another run, which this run uses."""
    run = Run(folder)
    weights = checkpoint.latest(run)
    sha256 = read_json(weights / MANIFEST, schema.CheckpointManifest).sha256[WEIGHTS]
    return Origin(
        experiment=run.config().experiment, folder=str(folder.absolute()), checkpoint=weights.name, sha256=sha256
    )


def summary(config: TrainConfig, manifest: Manifest, run: Run, seed: int, result: TrainResult) -> Summary:
    """Builds the contents of summary.json for a finished run."""
    test, best, validation = result.test, result.best, result.validation
    held_out: dict[str, Any] = {}
    if validation is not None:
        held_out = {
            "validation_accuracy": validation.accuracy,
            "validation_loss": validation.loss,
            "validation_images": validation.num_images,
            "best_validation_accuracy": best.validation_accuracy,
            "test_accuracy_of_best_validation": best.test_accuracy,
        }
    return Summary(
        experiment=config.experiment,
        run=str(run.folder),
        dataset=manifest.name,
        seed=seed,
        epochs=result.epochs,
        steps=result.steps,
        stopped_early=result.stopped_early,
        test_accuracy=test.accuracy,
        test_loss=test.loss,
        test_top5=test.top5,
        test_calibration_error=test.calibration_error,
        test_images=test.num_images,
        best_epoch=best.epoch,
        best_test_accuracy=best.test_accuracy if validation is None else None,
        test_accuracy_augmented=result.augmented.accuracy if result.augmented else None,
        class_accuracy=test.class_accuracy,
        confusion=test.confusion,
        **held_out,
    )


# Fields that must be the same to resume a run; and those that must match the checkpoint even with --resume-anyway.
RESUME_FIELDS = ("experiment", "seed", "architecture", "recipe", "precision", "teacher", "started_from")
IMMUTABLE_PREFIXES = (
    "architecture.", "recipe.optimizer.kind", "recipe.optimizer.decay_vectors", "recipe.layer_decay", "recipe.ema",
    "recipe.prune",
)  # fmt: skip


PRETRAINED = "architecture.arguments.weights"  # a file that a resumed run does not read, and that may have moved


def resumed_config(config: TrainConfig, run: Run, current: RunConfig, state: dict[str, Any] | None) -> RunConfig:
    """Builds run.json of a resumed run: its own contents, and the step from which it resumes (0 without a checkpoint).

    Raises:
        UserError: this training differs from the one that was started, or from that of the checkpoint, and
            --resume-anyway was not given or does not allow it; or the record of the training is missing.
    """
    step, ranks = (state["step"], state["world_size"]) if state else (0, current.world_size)
    own = run.config() if is_file(run.run_json) else None
    before = config_of(state) if state and "run_config" in state else own
    if before is None:
        raise UserError(
            f"{run.run_json}: expected run.json of the run that wrote the checkpoint, found none; restore it"
        )
    changed = changes_since(own, current) | changes_since(before, current) if own else changes_since(before, current)
    if changed and not config.resume_anyway:
        lines = ", ".join(f"{name}: {old} → {new}" for name, (old, new) in changed.items())
        raise UserError(
            f"{run.folder}: expected the training that was started, found {lines}; restore these options, "
            "or use --resume-anyway"
        )
    if fixed := [name for name in changed if state and name.startswith(IMMUTABLE_PREFIXES)]:
        raise UserError(f"--resume-anyway: {', '.join(fixed)} cannot change within a run; choose another --name")
    before = own or before
    same_commit = before.git.commit == current.git.commit
    same_code = same_commit and before.source_sha256 == current.source_sha256
    deterministic = current.device == "cpu" or current.deterministic
    bitwise = same_code and deterministic and not changed and ranks == current.world_size
    bitwise = bitwise and same_summation_order(before, current) and not off_schedule(config, state)
    if not bitwise:
        print(f"runner: {run.folder}: resumed from step {step}, not bit-identical", file=sys.stderr)
    resumption = Resumed(
        step=step,
        world_size=current.world_size,
        bitwise=bitwise,
        changed=changed,
        commit=None if same_commit else current.git.commit,
    )
    return msgspec.structs.replace(
        own if own and not changed else current,
        max_steps=current.max_steps,
        # W&B accepts each step once, so another training needs another W&B run, which gets all rows.
        wandb_id=own.wandb_id if own and not changed else current.wandb_id,
        resumed=[*before.resumed, resumption],
    )


def off_schedule(config: TrainConfig, state: dict[str, Any] | None) -> bool:
    """Returns whether early stopping has seen an evaluation that an uninterrupted training would not have.

    It is that of the last step of a training whose --max-steps was lower.
    """
    best = state.get("best") if state and state.get("evaluated") else None
    if not state or not best or not config.recipe.patience or config.max_steps == state["step"]:
        return False
    steps_per_epoch = round(best["global_step"] / best["epoch"])
    return state["step"] % (steps_per_epoch * config.evaluate_every) != 0


def config_of(state: dict[str, Any]) -> RunConfig:
    """Reads the run.json of the training that wrote a checkpoint. Raises UserError if its version is not supported."""
    try:
        return schema.decode(state["run_config"].encode(), RunConfig)
    except ValueError as error:
        raise UserError(f"the checkpoint of step {state['step']}: its run.json cannot be read ({error})") from None


def changes_since(before: RunConfig, current: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the settings that differ between two trainings, as (before, current) by dotted name."""
    changed = differences(*({key: getattr(config, key) for key in RESUME_FIELDS} for config in (before, current)))
    changed.pop(PRETRAINED, None)
    if before.dataset.fingerprint != current.dataset.fingerprint:
        changed["dataset"] = (before.dataset.fingerprint, current.dataset.fingerprint)
    return changed


def same_summation_order(before: RunConfig, now: RunConfig) -> bool:
    """Returns whether sums are in the same order, which depends on ranks, threads, and the kernels of the machine."""
    keys = ("world_size", "device", "threads", "deterministic", "hardware", "versions")
    return all(getattr(before, key) == getattr(now, key) for key in keys)
