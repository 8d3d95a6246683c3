"""Saves a checkpoint repeatedly, in processes that are killed just before their first change on disk, their second,
and so on, until one survives.

Prints as JSON how many changes there are, and after which of them no intact checkpoint was found. Runs with the library
built from killer.c preloaded. Arguments: a folder to work in, and optionally `replace` to save a step that already
exists.
"""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from runner.common.files import write_json
from runner.run.folder import Run
from runner.training import checkpoint
from tests.support.configs import config_of

torch.set_num_threads(1)
killer = ctypes.CDLL(None)


def contents(step: int) -> tuple[dict, dict]:
    return {"weight": torch.full((64, 64), float(step))}, {"step": step, "moments": torch.full((64, 64), step / 2)}


def main(folder: Path, replace: bool) -> None:
    template = Run(folder / "template")
    write_json(template.run_json, config_of(dataset="none"))
    weights, state = contents(1)
    checkpoint.save(template, weights, 1, state)
    lost, left, k = [], [], 0
    while True:
        k += 1
        run = Run(folder / "run")
        shutil.rmtree(run.folder, ignore_errors=True)
        shutil.copytree(template.folder, run.folder)
        weights, state = contents(2)
        child = os.fork()
        if child == 0:
            killer.arm(str(run.folder).encode(), k)
            checkpoint.save(run, weights, 1 if replace else 2, state)
            print("changes", killer.changes(), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        folder, damaged = checkpoint.newest_intact(run)
        found = folder and checkpoint.read_state(folder)
        right = found is not None and torch.equal(found["moments"], contents(found["step"])[1]["moments"])
        if not right or damaged:
            lost.append([k, damaged])
        if status == 0:
            break
        # Saving again from there leaves the new checkpoint and the previous one, and no other files.
        checkpoint.save(run, weights, 3, state)
        before = "step-1" if replace or not found else f"step-{found['step']}"
        expected = {before, "step-3"}
        left += sorted(expected ^ {path.name for path in run.checkpoints.iterdir()})
    print(json.dumps({"changes": k - 1, "lost": lost, "left": left}))


main(Path(sys.argv[1]), sys.argv[2:] == ["replace"])
