"""Training on n ranks with B/n images each equals training on one rank with B images."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.processes import module, on_ranks

TOLERANCES = {"plain-float64": 1e-9, "plain-float32": 1e-5, "norm-float64": 1e-9, "norm-float32": 1e-4}
STEPS = {"float64": 100, "float32": 20}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("worlds", "most_steps"),
    # A step of many ranks waits for each of them several times, so beside other tests it takes seconds.
    [((2, 3), 100), pytest.param((4, 8), 10, marks=pytest.mark.every)],
)
def test_any_number_of_ranks_has_the_losses_of_one(
    worlds: tuple[int, ...], most_steps: int, small_data: Path, tmp_path: Path
) -> None:
    """Batch norm computes its statistics over all ranks (runner.models.norm)."""
    cases = {f"{case}-{min(STEPS[case[-7:]], most_steps)}": most for case, most in TOLERANCES.items()}
    results = []
    for ranks in (1, *worlds):
        out = tmp_path / str(ranks)
        done = module(*on_ranks(ranks), "tests.support.programs.ranks_program", small_data, out, *cases)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(out.read_text()))
    for case, tolerance in cases.items():
        one, *others = [losses[case] for losses in results]
        assert len(one) == int(case.rpartition("-")[2])
        assert min(one) < one[0]
        for losses in others:
            assert np.abs(np.subtract(losses, one)).max() < tolerance, case
