"""Part 5: seconds from the first weights to a scored model, over many seeds, beside another project's script."""

import gc
import re
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from data_prep.console import track
from runner import experiments
from runner.benchmarks import measure as measured
from runner.benchmarks.gpu.part import Context, Ledger, MissingError, OutOfTimeError
from runner.recipe import to_json
from runner.runs import Run, write_json

NAME = "speedrun"
BLOCKS = 2  # into which the seeds are cut, so that we and the peer take turns
# A row of airbench's table: its last columns are the accuracy with test-time augmentation and the seconds.
AIRBENCH_ROW = r"eval\s*\|[^|]*\|[^|]*\|\s*(?P<accuracy>[\d.]+)\s*\|\s*(?P<seconds>[\d.]+)"


def measure(context: Context, ledger: Ledger) -> None:
    """Ours eager and compiled, and the peer, in turn."""
    size = -(-context.scale.seeds // BLOCKS)
    for block in range(BLOCKS):
        seeds = range(block * size, (block + 1) * size)
        for mode in context.scale.modes[:2]:
            ledger.once(f"ours/{mode}/{block}", lambda seeds=seeds, mode=mode: ours(context, seeds, mode))
        ledger.once(f"peer/{block}", lambda seeds=seeds: peer(context, len(seeds)))
    ledger.once("together", lambda: together(ledger), derived=True)


def ours(context: Context, seeds: range, mode: str) -> dict[str, Any]:
    """Trains by the runner's own loop, once to warm up and once for each seed.

    The data lies on the device. A clock runs from before the model is built until it has been scored with test-time
    augmentation. Building it, scoring it without augmentation, and writing the checkpoint belong to our time, and
    not to airbench's.
    """
    import torch
    from accelerate import Accelerator

    from runner import cpu, cuda
    from runner.batches.protocol import Place, open_split
    from runner.build import build
    from runner.train import Control, Data, train

    experiment = experiments.get(NAME)
    recipe = replace(experiment.recipe, compile=mode == "compiled", **dict(context.scale.speedrun))
    device = torch.device(context.device)
    if context.rehearse:
        cpu.prepare()
    cuda.prepare(device, False, {})
    accelerator = Accelerator(cpu=context.rehearse, mixed_precision="no" if context.rehearse else "bf16")
    train_split, test_split = (
        open_split(context.data, context.manifest, split, recipe, Place(device)) for split in ("train", "test")
    )
    data = Data(train_split, test_split, None, len(context.manifest.classes))
    run = Run(context.out / "runs" / NAME / "clocked")
    dataset = {"name": context.manifest.name}
    write_json(run.record, {"architecture": to_json(experiment.architecture), "dataset": dataset})
    control = Control(evaluate_every=recipe.epochs)

    def once(seed: int) -> tuple[float, float]:
        train_split.seed = seed
        if not context.rehearse:
            torch.cuda.synchronize()
        began = time.perf_counter()
        model = build(experiment.architecture, recipe, seed, train_split.first, None)
        outcome = train(model, recipe, data, accelerator, run, seed, control=control)
        seconds = time.perf_counter() - began  # the scores are on the host
        # Not free_memory, which gives the GPU's memory back, for the next training to ask for it again.
        accelerator._models.clear()
        accelerator._optimizers.clear()
        gc.collect()
        return seconds, (outcome.augmented or outcome.test).accuracy

    once(2**31)
    results = []
    for seed in track(seeds, "speed run", len(seeds)):
        if context.left() < 0:
            raise OutOfTimeError
        results.append(once(seed))
    return {
        "seeds": list(seeds),
        "epochs": recipe.epochs,
        "seconds": [seconds for seconds, _ in results],
        "accuracy": [accuracy for _, accuracy in results],
    }


def peer(context: Context, trainings: int) -> dict[str, Any]:
    """The other project's script, for as many trainings; its own clock, as it prints it.

    It is run in a folder that holds the same images where airbench's scripts look for them: `cifar10/train.pt` and
    `test.pt`, dictionaries of images (N, 32, 32, 3) uint8, labels (N,) and classes. Its first training warms up and
    does not count.
    """
    if context.peer is None:
        raise MissingError("no --peer")
    folder = context.out / "peer"
    give_images(context, folder)
    row = re.compile(context.peer_row or AIRBENCH_ROW)
    results: list[tuple[float, float]] = []
    with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads would stop it
        process = context.begin("-u", context.peer.absolute(), cwd=folder, errors=errors)
        timer = threading.Timer(max(0.0, context.left()), process.kill)
        timer.start()
        try:
            for line in process.stdout:
                if found := row.search(line):
                    results.append((float(found["seconds"]), float(found["accuracy"])))
                if len(results) == trainings + 1:
                    break
        finally:
            timer.cancel()
            process.kill()
            process.communicate()
        errors.seek(0)
        told = errors.read()
    if context.left() <= 0:
        raise OutOfTimeError
    if len(results) < trainings + 1:
        reason = (told.strip().splitlines() or ["nothing on standard error"])[-1]
        raise RuntimeError(f"{context.peer} gave {len(results)} of {trainings + 1} rows: {reason}")
    return {
        "script": context.peer.name,
        "seconds": [seconds for seconds, _ in results[1:]],
        "accuracy": [accuracy for _, accuracy in results[1:]],
    }


def give_images(context: Context, folder: Path) -> None:
    """Writes the dataset where airbench's scripts look for it."""
    import torch

    from runner.batches import beton

    (folder / "cifar10").mkdir(parents=True, exist_ok=True)
    for name, split in context.manifest.splits.items():
        images, labels = beton.read(context.data / split.file, split, context.manifest)
        content = {
            "images": torch.from_numpy(np.array(images)),
            "labels": torch.from_numpy(np.array(labels)).long(),
            "classes": list(context.manifest.classes),
        }
        torch.save(content, folder / "cifar10" / f"{name}.pt")


def together(ledger: Ledger) -> dict[str, Any]:
    """Seconds and accuracy of each over all blocks, and ours divided by the peer's seconds, block by block."""
    found: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {}
    for who in ("ours/eager", "ours/compiled", "peer"):
        blocks = [ledger.found[name] for name in (f"{who}/{k}" for k in range(BLOCKS)) if name in ledger.found]
        if len(blocks) < BLOCKS:
            continue
        every = [each for block in blocks for each in block["seconds"]]
        accuracies = [each for block in blocks for each in block["accuracy"]]
        found[who] = {
            "trainings": len(every),
            "accuracy": mean(accuracies),
            "accuracy_std": stdev(accuracies),
            "seconds": mean(every),
            "seconds_std": stdev(every),
        }
        seconds[who] = [mean(block["seconds"]) for block in blocks]
    if not found:
        raise MissingError("no whole series of trainings")
    for who in found:
        if "peer" in found and who != "peer":
            found[who]["ratio_to_peer"] = vars(measured.ratio(seconds[who], seconds["peer"]))
    return found
