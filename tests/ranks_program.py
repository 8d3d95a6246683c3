"""Started by test_ranks.py under `accelerate launch`: trains and writes the global loss of every step.

python -m tests.ranks_program DATA OUT {float32,float64} STEPS {plain,norm}
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from runner.batches.protocol import Place, open_manifest, open_split
from runner.models import norm
from runner.recipe import SGD, Augment, Recipe
from tests.tiny import Tiny


def main(data: str, out: str, dtype: str, steps: str, kind: str) -> None:
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    recipe = Recipe(100, 60, SGD(0.05), augment=Augment(crop_padding=4, flip="random"))
    place = Place(torch.device("cpu"), accelerator.process_index, accelerator.num_processes)
    batches = open_split(Path(data), open_manifest(Path(data)), "train", recipe, place, seed=3)
    batches.dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    model = norm.synchronised(Tiny(norm=kind == "norm")).to(batches.dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses: list[float] = []
    for epoch in range(recipe.epochs):
        for images, labels in batches.epoch(epoch):
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach().double(), "mean").item())
            if len(losses) == int(steps):
                if accelerator.is_main_process:
                    Path(out).write_text(json.dumps(losses))
                accelerator.wait_for_everyone()
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # see runner.job.Finished
