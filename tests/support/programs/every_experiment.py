"""Trains experiments for two steps and evaluates them; test_experiments.py runs it under `accelerate launch`.

python -m tests.support.programs.every_experiment DATA FOLDER {fp32,bf16} NAME...

Batches of four images keep it short; architecture, optimizer, schedule and everything else are the experiment's. In
bf16, which processors without its instructions compute up to 30 times slower, batches have two.
Random weights replace the ImageNet weights, because this tests training, not the download.
"""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torchvision import models

from runner import experiments
from runner.common.files import write_json
from runner.data.open import DTYPES, RankInfo, open_manifest, open_split
from runner.models import transfer
from runner.run.folder import Run
from runner.system import cpu
from runner.training import checkpoint
from runner.training.evaluate import evaluate
from runner.training.loop import TrainingData, train
from runner.training.model import build_model
from runner.training.record import MIXED_PRECISION
from tests.support.configs import config_of


def main(data: str, out: str, precision: str, *names: str) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=MIXED_PRECISION[precision])
    cpu.prepare(accelerator.num_processes)
    folder, prepared, manifest = Path(out), Path(data), open_manifest(Path(data))
    rank, world_size = accelerator.process_index, accelerator.num_processes
    rank_info = RankInfo(torch.device("cpu"), rank, world_size, dtype=DTYPES[precision])
    transfer.weight_file = lambda name, given: random_weights(folder, name)
    if accelerator.is_main_process:
        for name in transfer.WEIGHTS:
            random_weights(folder, name)
    accelerator.wait_for_everyone()
    batch_size = {"fp32": 4, "bf16": 2}[precision]
    found = {}
    for name in names:
        experiment = experiments.get(name)
        recipe = experiment.recipe
        recipe = dataclasses.replace(recipe, batch_size=batch_size, validation=min(4, recipe.validation))
        splits = {split: open_split(prepared, manifest, split, recipe, rank_info) for split in ("train", "test")}
        if recipe.validation:
            splits["validation"] = open_split(prepared, manifest, "validation", recipe, rank_info)
        model = build_model(experiment.architecture, recipe, 0, splits["train"].first_images, None)
        run = Run(folder / name)
        if accelerator.is_main_process:
            write_json(run.run_json, config_of(architecture=experiment.architecture, dataset=manifest.name))
        whole = TrainingData(splits["train"], splits["test"], splits.get("validation"), 10)
        outcome = train(model, recipe, whole, accelerator, run, seed=0, max_steps=2)
        found[name] = {"images": outcome.test.num_images, "loss": outcome.test.loss, "steps": outcome.steps}
        if accelerator.num_processes == 1 and precision == "fp32":
            again = evaluate(checkpoint.load_model(run), splits["test"], 10)
            found[name]["change"] = (again.logits - outcome.test.logits).abs().max().item()
        if accelerator.is_main_process:
            shutil.rmtree(run.folder)  # all runs together take gigabytes
        accelerator.free_memory()
    if accelerator.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()


def random_weights(folder: Path, name: str) -> Path:
    """Returns a file of random weights in the layout of torchvision's ImageNet weights."""
    path = folder / f"{name}.pth"
    if not path.exists():
        torch.manual_seed(0)
        torch.save(getattr(models, name)().state_dict(), path)
    return path


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # see runner.training.session.TrainingOutcome
