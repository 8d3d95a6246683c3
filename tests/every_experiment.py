"""Started by test_experiments.py under `accelerate launch`: trains every experiment two steps and evaluates it.

python -m tests.every_experiment DATA FOLDER {fp32,bf16}

Batches of four images keep it short; architecture, optimizer, schedule and everything else are the experiment's.
The files with ImageNet weights stand in as random ones: this is about training, not about the download.
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

from runner import checkpoint, cpu, experiments
from runner.batches.protocol import Place, open_manifest, open_split
from runner.build import build
from runner.evaluate import evaluate
from runner.models import transfer
from runner.recipe import to_json
from runner.record import PRECISIONS
from runner.runs import Run, write_json
from runner.train import Data, train


def main(data: str, out: str, precision: str) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=PRECISIONS[precision])
    cpu.prepare(accelerator.num_processes)
    folder, prepared, manifest = Path(out), Path(data), open_manifest(Path(data))
    place = Place(torch.device("cpu"), accelerator.process_index, accelerator.num_processes)
    transfer.weight_file = lambda name, given: random_weights(folder, name)
    if accelerator.is_main_process:
        for name in transfer.WEIGHTS:
            random_weights(folder, name)
    accelerator.wait_for_everyone()
    found = {}
    for name, experiment in experiments.load().items():
        recipe = dataclasses.replace(
            experiment.recipe, batch_size=4, validation=min(4, experiment.recipe.validation)
        )
        splits = {split: open_split(prepared, manifest, split, recipe, place) for split in ("train", "test")}
        if recipe.validation:
            splits["validation"] = open_split(prepared, manifest, "validation", recipe, place)
        model = build(experiment.architecture, recipe, 0, splits["train"].first, None)
        run = Run(folder / name)
        if accelerator.is_main_process:
            architecture = to_json(experiment.architecture)
            write_json(run.record, {"architecture": architecture, "dataset": {"name": manifest.name}})
        whole = Data(splits["train"], splits["test"], splits.get("validation"), 10)
        outcome = train(model, recipe, whole, accelerator, run, seed=0, max_steps=2)
        found[name] = {"images": outcome.test.images, "loss": outcome.test.loss, "steps": outcome.steps}
        if accelerator.num_processes == 1 and precision == "fp32":
            again = evaluate(checkpoint.load_model(run), splits["test"], 10)
            found[name]["change"] = (again.logits - outcome.test.logits).abs().max().item()
        if accelerator.is_main_process:
            shutil.rmtree(run.folder)  # all of them are gigabytes
        accelerator.free_memory()
    if accelerator.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()


def random_weights(folder: Path, name: str) -> Path:
    """A file of the layout of torchvision's ImageNet weights."""
    path = folder / f"{name}.pth"
    if not path.exists():
        torch.manual_seed(0)
        torch.save(getattr(models, name)().state_dict(), path)
    return path


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # see runner.job.Finished
