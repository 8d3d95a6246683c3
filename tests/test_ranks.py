"""Training on n ranks with B/n images each equals training on one rank with B images."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.processes import module, on_ranks

TOLERANCES = {
    "plain-float64-100": 1e-9,
    "plain-float32-20": 1e-5,
    "norm-float64-100": 1e-9,
    "norm-float32-20": 1e-4,
}


@pytest.mark.processes
def test_two_and_three_ranks_have_the_losses_of_one_rank(small_data: Path, tmp_path: Path) -> None:
    """Batch norm computes its statistics over all ranks (runner.models.norm)."""
    results = []
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        done = module(*on_ranks(ranks), "tests.support.programs.ranks_program", small_data, out, *TOLERANCES)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(out.read_text()))
    for case, tolerance in TOLERANCES.items():
        one, *others = [losses[case] for losses in results]
        assert len(one) == int(case.rpartition("-")[2])
        assert one[-1] < one[0]
        for losses in others:
            assert np.abs(np.subtract(losses, one)).max() < tolerance, case
