"""Compares two runs bit by bit."""

import json
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace
from safetensors.numpy import load_file

from runner.run.folder import Run
from runner.run.metrics import read_metrics
from runner.training import checkpoint

MEASURED = ("images_per_second", "data_seconds", "compute_seconds", "memory_gb", "flops_utilization")
"""Metrics that differ between two equal trainings."""


def assert_same_run(one: Path, other: Path) -> None:
    """Asserts that weights, optimizer, generators and metrics are bit-identical, except for speed and memory."""
    for name, tensor in weights(one).items():
        np.testing.assert_array_equal(tensor, weights(other)[name], err_msg=name)
    states = [checkpoint.read_state(checkpoint.latest(Run(run))) for run in (one, other)]
    for key in ("step", "best", "model", "optimizer", "average"):
        _assert_equal(states[0][key], states[1][key], key)
    for ranks in zip(*(state["ranks"] for state in states), strict=True):
        _assert_equal(*[rank["generators"]["torch"] for rank in ranks], "generators")
    rows = [[replace(row, **dict.fromkeys(MEASURED)) for row in read_metrics(Run(run))] for run in (one, other)]
    assert rows[0] == rows[1]
    summaries = [json.loads((run / "summary.json").read_text()) | {"run": ""} for run in (one, other)]
    assert summaries[0] == summaries[1]


def _assert_equal(one: object, other: object, where: str) -> None:
    """Asserts that nested dictionaries and lists of tensors are bit-identical."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        for k, pair in enumerate(zip(one, other, strict=True)):
            _assert_equal(*pair, f"{where}.{k}")
    else:
        assert one == other, where


def weights(run: Path) -> dict[str, np.ndarray]:
    """Returns the weights of a finished run by name, from its only checkpoint."""
    (folder,) = (run / "checkpoints").iterdir()
    return load_file(folder / "model.safetensors")
