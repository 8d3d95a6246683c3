"""B images on one rank and B/n on each of n are the same training."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, module

pytestmark = pytest.mark.processes


def losses(data: Path, out: Path, processes: int, dtype: str, steps: int, kind: str) -> list[float]:
    config = ["--config_file", ROOT / "launch/cpu.yaml", "--num_processes", processes]
    program = ["-m", "tests.ranks_program", data, out, dtype, steps, kind]
    done = module("accelerate.commands.launch", *config, *program)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("kind", "dtype", "steps", "tolerance"),
    [
        ("plain", "float64", 100, 1e-9),
        ("plain", "float32", 20, 1e-5),
        ("norm", "float64", 100, 1e-9),
        ("norm", "float32", 20, 1e-4),
    ],
)
def test_two_and_three_ranks_have_the_losses_of_one(
    small_data: Path, tmp_path: Path, kind: str, dtype: str, steps: int, tolerance: float
) -> None:
    """With batch norm, its statistics are taken over all ranks (runner.models.norm)."""
    one = losses(small_data, tmp_path / "1", 1, dtype, steps, kind)
    assert len(one) == steps
    assert one[-1] < one[0]
    for processes in (2, 3):
        more = losses(small_data, tmp_path / str(processes), processes, dtype, steps, kind)
        assert np.abs(np.subtract(more, one)).max() < tolerance
