"""Part 5 of the GPU benchmark: seconds to train from scratch, over many seeds, compared with a peer's script."""

import gc
import re
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from runner import experiments
from runner.benchmarks.gpu.context import Context, MissingError, OutOfTimeError
from runner.benchmarks.gpu.ledger import Ledger
from runner.benchmarks.gpu.speed import MODES
from runner.benchmarks.measure import ratio, synchronize
from runner.common.console import track
from runner.common.files import write_json
from runner.config.train_config import TrainConfig
from runner.run.folder import Run

NAME = "speedrun"
WARMUP_SEED = 2**31
BLOCKS = 2  # blocks of seeds, between which the runner and the peer take turns
# A row of airbench's table; its last columns are the accuracy with test-time augmentation and the seconds.
AIRBENCH_ROW = r"eval\s*\|[^|]*\|[^|]*\|\s*(?P<accuracy>[\d.]+)\s*\|\s*(?P<seconds>[\d.]+)"


def measure(context: Context, ledger: Ledger) -> None:
    """Trains in eager mode, with CUDA graphs, and with the peer's script, in turn."""
    size = -(-context.scale.speedrun_seeds // BLOCKS)
    for block in range(BLOCKS):
        seeds = range(block * size, (block + 1) * size)
        for mode in (*context.scale.modes[:1], *context.scale.modes[2:]):
            ledger.once(f"ours/{mode}/{block}", partial(run_seeds, context, seeds, mode))
        ledger.once(f"peer/{block}", partial(run_peer, context, size))
    ledger.once("together", lambda: compare(ledger), remeasure=True)


class SpeedRun:
    """Trains with the runner's own loop and the data on the device.

    The clock runs from before the model is built until it has been scored with test-time augmentation. Unlike
    airbench's, the time includes building the model, scoring it without augmentation, and writing the checkpoint.
    """

    def __init__(self, context: Context, mode: str) -> None:
        import torch
        from accelerate import Accelerator

        from runner.data.open import RankInfo, open_split
        from runner.system import cpu, cuda
        from runner.training.loop import TrainingData
        from runner.training.record import run_config

        self.context = context
        self.experiment = experiments.get(NAME)
        changes = {"compile": MODES[mode] or "none"} | dict(context.scale.speedrun_overrides)
        self.recipe = replace(self.experiment.recipe, **changes)
        dtype = torch.float32 if context.rehearse else torch.bfloat16
        rank_info = RankInfo(torch.device(context.device), dtype=dtype)
        if context.rehearse:
            cpu.prepare()
        cuda.prepare(rank_info.device, False, {})
        self.accelerator = Accelerator(cpu=context.rehearse, mixed_precision="no" if context.rehearse else "bf16")
        self.train_split, test_split = (
            open_split(context.data, context.manifest, split, self.recipe, rank_info) for split in ("train", "test")
        )
        self.data = TrainingData(self.train_split, test_split, None, len(context.manifest.classes))
        self.run = Run(context.out / "runs" / NAME / "clocked")
        config = TrainConfig(NAME, context.data, self.experiment.architecture, self.recipe)
        record = run_config(
            config, self.experiment, context.manifest, self.accelerator, rank_info, self.run, seed=0,
            model=self.experiment.architecture.build(),
            wandb_id="", group="",
        )  # fmt: skip
        write_json(self.run.run_json, record)  # checkpoints read this file

    def __call__(self, seed: int) -> tuple[float, float]:
        """Trains one seed; returns the seconds and the accuracy."""
        from runner.training.loop import LoopOptions, train
        from runner.training.model import build_model

        train_split = self.train_split.with_seed(seed)
        options = LoopOptions(evaluate_every=self.recipe.epochs)
        synchronize(self.context.device)
        start = time.perf_counter()
        model = build_model(self.experiment.architecture, self.recipe, seed, train_split.first_images, None)
        result = train(
            model, self.recipe, replace(self.data, train=train_split), self.accelerator, self.run, seed, options=options
        )
        seconds = time.perf_counter() - start  # without synchronizing, as the scores are on the host
        # Not free_memory, which returns the GPU's memory, so that the next training would have to allocate it again.
        self.accelerator._models.clear()
        self.accelerator._optimizers.clear()
        gc.collect()
        return seconds, (result.augmented or result.test).accuracy


def run_seeds(context: Context, seeds: range, mode: str) -> dict[str, Any]:
    """Trains once to warm up and once for each seed for which there is time; returns the seconds and accuracies.

    Raises:
        OutOfTimeError: there was time for none.
    """
    speed_run = SpeedRun(context, mode)
    speed_run(WARMUP_SEED)
    results: list[tuple[float, float]] = []
    for seed in track(seeds, "speed run", len(seeds)):
        if context.seconds_left() < 0:
            break
        results.append(speed_run(seed))
    if not results:
        raise OutOfTimeError
    return {
        "seeds": list(seeds)[: len(results)],
        "epochs": speed_run.recipe.epochs,
        "seconds": [seconds for seconds, _ in results],
        "accuracy": [accuracy for _, accuracy in results],
    }


def run_peer(context: Context, trainings: int) -> dict[str, Any]:
    """Runs the peer's script for a number of trainings, or as many as there is time for; returns what it prints.

    It runs in a folder with the same images where airbench's scripts expect them: `cifar10/train.pt` and `test.pt`,
    dictionaries of images (N, 32, 32, 3) uint8, labels (N,) and classes. Its first training warms up and does not
    count.

    Raises:
        MissingError: there is no peer, or the time was up before its second training.
        RuntimeError: the script printed fewer results.
    """
    if context.peer is None:
        raise MissingError("no --peer")
    folder = context.out / "peer"
    write_images(context, folder)
    row = re.compile(context.peer_row or AIRBENCH_ROW)
    results: list[tuple[float, float]] = []
    with tempfile.TemporaryFile("w+") as stderr:  # an unread pipe would block the script
        process = context.start_python("-u", context.peer.absolute(), cwd=folder, stderr=stderr)
        timer = threading.Timer(max(0.0, context.seconds_left()), process.kill)
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if match := row.search(line):
                    results.append((float(match["seconds"]), float(match["accuracy"])))
                if len(results) == trainings + 1:
                    break
        finally:
            timer.cancel()
            process.kill()
            process.communicate()
        stderr.seek(0)
        messages = stderr.read().strip().splitlines() or ["nothing on standard error"]
    late = context.seconds_left() <= 0
    if len(results) < trainings + 1 and not (late and len(results) >= 3):  # of which one warms up
        if late:
            raise OutOfTimeError
        raise RuntimeError(f"{context.peer} gave {len(results)} of {trainings + 1} rows: {messages[-1]}")
    return {
        "script": context.peer.name,
        "seconds": [seconds for seconds, _ in results[1:]],
        "accuracy": [accuracy for _, accuracy in results[1:]],
    }


def write_images(context: Context, folder: Path) -> None:
    """Writes the dataset where airbench's scripts expect it."""
    import torch

    from data_prep import beton_reader

    (folder / "cifar10").mkdir(parents=True, exist_ok=True)
    for name, split in context.manifest.splits.items():
        images, labels = beton_reader.read_split(context.data / split.file, split, context.manifest)
        content = {
            "images": torch.from_numpy(np.array(images)),
            "labels": torch.from_numpy(np.array(labels)).long(),
            "classes": list(context.manifest.classes),
        }
        torch.save(content, folder / "cifar10" / f"{name}.pt")


def compare(ledger: Ledger) -> dict[str, Any]:
    """Returns the seconds and accuracy of each series, and the ratios to the peer's seconds, block by block.

    Raises:
        MissingError: nothing was measured.
    """
    results: dict[str, Any] = {}
    block_seconds: dict[str, list[float]] = {}
    for series in ("ours/eager", "ours/graphs", "peer"):
        blocks = [ledger.measured[name] for k in range(BLOCKS) if (name := f"{series}/{k}") in ledger.measured]
        if not blocks:
            continue
        seconds = [value for block in blocks for value in block["seconds"]]
        accuracies = [value for block in blocks for value in block["accuracy"]]
        results[series] = {
            "blocks": len(blocks),
            "trainings": len(seconds),
            "accuracy": mean(accuracies),
            "accuracy_std": stdev(accuracies) if len(accuracies) > 1 else 0.0,
            "seconds": mean(seconds),
            "seconds_std": stdev(seconds) if len(seconds) > 1 else 0.0,
        }
        block_seconds[series] = [mean(block["seconds"]) for block in blocks]
    if not results:
        raise MissingError("no block of trainings")
    for series in results.keys() - {"peer"} if "peer" in results else ():
        pairs = list(zip(block_seconds[series], block_seconds["peer"], strict=False))
        results[series]["ratio_to_peer"] = ratio(*map(list, zip(*pairs, strict=True)))
    return results
