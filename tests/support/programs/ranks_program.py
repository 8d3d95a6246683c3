"""Trains each case and writes the losses of its steps, then a resumed training; test_ranks.py runs it under
`accelerate launch`.

python -m tests.support.programs.ranks_program DATA OUT {plain,norm}-{float32,float64}-STEPS...

OUT also holds a digest of each batch, the evaluation of the test set, and the weights of a training of three steps: one
that was not interrupted, and one that stopped after the first and was resumed from its checkpoint.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object

from runner.common.files import write_json
from runner.config.recipe import SGD, Architecture, Augment, Recipe
from runner.data.open import RankInfo, open_manifest, open_split
from runner.data.stream import BatchStream
from runner.models import norm
from runner.training import checkpoint
from runner.training.evaluate import evaluate
from runner.training.loop import LoopOptions, StoppedError, TrainingData, train
from tests.support.configs import config_of, trusted
from tests.support.models.tiny import Tiny

RECIPE = Recipe(100, 48, SGD(0.05), augment=Augment(crop_padding=4, flip="random"))
STREAMED = 12  # steps: one epoch has 10


def main(data: str, out: str, *cases: str) -> None:
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for case in cases:
        kind, dtype, steps = case.split("-")
        found[case] = losses(accelerator, Path(data), getattr(torch, dtype), int(steps), kind)
        accelerator.free_memory()
    found["batches"] = digests(open_stream(accelerator, Path(data), "train"))
    found["evaluation"] = evaluation(accelerator, Path(data))
    found["weights"], found["resumed"] = (
        train_and_stop(accelerator, Path(data), Path(f"{out}-{name}"), stops)
        for name, stops in (("straight", False), ("resumed", True))
    )
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps(found))
    accelerator.wait_for_everyone()


def open_stream(accelerator: Accelerator, data: Path, split: str) -> BatchStream:
    rank_info = RankInfo(torch.device("cpu"), accelerator.process_index, accelerator.num_processes)
    return open_split(data, open_manifest(data), split, RECIPE, rank_info, seed=3)


def losses(accelerator: Accelerator, data: Path, dtype: torch.dtype, steps: int, kind: str) -> list[float]:
    batches = open_stream(accelerator, data, "train")
    torch.manual_seed(0)
    model = norm.convert_sync_batch_norm(Tiny(norm=kind == "norm")).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    found: list[float] = []
    for epoch in range(RECIPE.epochs):
        for images, labels in batches.epoch(epoch):
            loss = F.cross_entropy(model(images.to(dtype)), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(accelerator.reduce(loss.detach().double(), "mean").item())
            if len(found) == steps:
                return found
    raise AssertionError("fewer batches than steps")


def digests(batches: BatchStream) -> list[str]:
    """Returns a hash of the images and labels of all ranks for each step, in the order of the ranks."""
    own = [(i.numpy().tobytes(), y.numpy().tobytes()) for epoch in (0, 1) for i, y in batches.epoch(epoch)][:STREAMED]
    ranks = gather_object([own])
    return [
        hashlib.sha256(b"".join(part for parts in zip(*step, strict=True) for part in parts)).hexdigest()
        for step in zip(*ranks, strict=True)
    ]


def evaluation(accelerator: Accelerator, data: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    reduce = lambda table: accelerator.reduce(table, "sum")  # noqa: E731
    result = evaluate(Tiny(norm=True), open_stream(accelerator, data, "test"), 10, reduce)
    return {"labels": result.labels.tolist(), "logits": result.logits.tolist(), "images": result.num_images}


def train_and_stop(accelerator: Accelerator, data: Path, folder: Path, stops: bool) -> dict[str, Any]:
    """Trains three steps; with `stops`, the last rank asks to stop after the first, and training is resumed."""
    run, architecture = trusted(folder), Architecture("tests.support.models.tiny:Tiny")
    if accelerator.is_main_process:
        write_json(run.run_json, config_of(architecture=architecture, dataset=open_manifest(data).name))
    batches = TrainingData(open_stream(accelerator, data, "train"), open_stream(accelerator, data, "test"), None, 10)
    state = None
    for stop in (True, False) if stops else (False,):
        accelerator.wait_for_everyone()
        if stops and not stop:
            state = checkpoint.read_state(checkpoint.latest(run))
        torch.manual_seed(0)
        options = LoopOptions(resume=state, should_stop=lambda stop=stop: stop and accelerator.is_last_process)
        try:
            train(
                architecture.build(10, (32, 32)),
                RECIPE,
                batches,
                accelerator,
                run,
                seed=3,
                max_steps=3,
                options=options,
            )
        except StoppedError:
            assert stop
        accelerator.free_memory()
    accelerator.wait_for_everyone()
    steps = [1, 3] if stops else [3]
    assert [int(path.name.removeprefix("step-")) for path in sorted(run.checkpoints.glob("step-*"))] == steps
    return {name: tensor.flatten().tolist() for name, tensor in checkpoint.load_model(run).state_dict().items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # see runner.training.session.TrainingOutcome
