"""Trains each case, and writes the losses of its steps; test_ranks.py runs it under `accelerate launch`.

python -m tests.support.programs.ranks_program DATA OUT {plain,norm}-{float32,float64}-STEPS...
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from runner.config.recipe import SGD, Augment, Recipe
from runner.data.open import RankInfo, open_manifest, open_split
from runner.models import norm
from tests.support.models.tiny import Tiny


def main(data: str, out: str, *cases: str) -> None:
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    found = {}
    for case in cases:
        kind, dtype, steps = case.split("-")
        found[case] = losses(accelerator, Path(data), getattr(torch, dtype), int(steps), kind)
        accelerator.free_memory()
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps(found))
    accelerator.wait_for_everyone()


def losses(accelerator: Accelerator, data: Path, dtype: torch.dtype, steps: int, kind: str) -> list[float]:
    recipe = Recipe(100, 48, SGD(0.05), augment=Augment(crop_padding=4, flip="random"))
    rank_info = RankInfo(torch.device("cpu"), accelerator.process_index, accelerator.num_processes)
    batches = open_split(data, open_manifest(data), "train", recipe, rank_info, seed=3)
    torch.manual_seed(0)
    model = norm.convert_sync_batch_norm(Tiny(norm=kind == "norm")).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    found: list[float] = []
    for epoch in range(recipe.epochs):
        for images, labels in batches.epoch(epoch):
            loss = F.cross_entropy(model(images.to(dtype)), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(accelerator.reduce(loss.detach().double(), "mean").item())
            if len(found) == steps:
                return found
    raise AssertionError("fewer batches than steps")


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # see runner.training.session.TrainingOutcome
