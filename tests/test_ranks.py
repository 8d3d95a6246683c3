"""Training on n ranks with B/n images each equals training on one rank with B images."""

import json
from pathlib import Path

import numpy as np
import pytest

from runner.training.session import is_lost_rank
from tests.support.processes import module, on_ranks

TOLERANCES = {"plain-float64": 1e-9, "norm-float64": 1e-9, "plain-float32": 1e-5, "norm-float32": 1e-4}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("worlds", "cases"),  # each case with its number of steps
    # A step of many ranks waits for each of them several times, so beside other tests it takes seconds.
    [
        ((2,), ["plain-float64-20", "norm-float64-20", "plain-float32-20", "norm-float32-20"]),
        pytest.param(
            (2, 3),
            ["plain-float64-100", "norm-float64-100", "plain-float32-20", "norm-float32-20"],
            marks=pytest.mark.every,
        ),
        pytest.param((4, 8), ["plain-float64-6", "norm-float64-6"], marks=pytest.mark.every),
        pytest.param((16,), ["plain-float64-3", "norm-float64-3"], marks=pytest.mark.every),
    ],
    ids=["2", "2 and 3", "4 and 8", "16"],
)
def test_any_number_of_ranks_is_like_one(
    worlds: tuple[int, ...], cases: list[str], small_data: Path, tmp_path: Path
) -> None:
    """The losses, with batch norm over all ranks (runner.models.norm); batches, evaluation, and a resumed training."""
    results = []
    for ranks in (1, *worlds):
        out = tmp_path / str(ranks)
        done = module(*on_ranks(ranks), "tests.support.programs.ranks_program", small_data, out, *cases)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(out.read_text()))
    one, *others = results
    for case in cases:
        kind, _, steps = case.rpartition("-")
        assert len(one[case]) == int(steps)
        assert len(set(one[case])) > 1
        for other in others:
            assert np.abs(np.subtract(other[case], one[case])).max() < TOLERANCES[kind], case
    assert len(set(one["batches"])) == 12
    for other in others:
        assert other["batches"] == one["batches"]
        assert other["evaluation"]["labels"] == one["evaluation"]["labels"]
        assert other["evaluation"]["images"] == one["evaluation"]["images"] == 200
        np.testing.assert_allclose(other["evaluation"]["logits"], one["evaluation"]["logits"], atol=1e-5)
        for name, weights in one["weights"].items():
            assert other["resumed"][name] == other["weights"][name], name
            np.testing.assert_allclose(other["resumed"][name], weights, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] writev [127.0.0.1]:4242: Broken pipe"), True),
        (RuntimeError("Connection refused"), True),
        (RuntimeError("NCCL error: ncclRemoteError: a call failed possibly due to a network error"), True),
        (RuntimeError("NCCL error: ncclInvalidUsage: duplicate GPU detected"), False),
        (BrokenPipeError(32, "Broken pipe"), False),  # such as that of a closed terminal
    ],
)
def test_a_lost_rank_is_recognized_by_the_message(error: Exception, lost: bool) -> None:
    assert is_lost_rank(error, world_size=2) == lost
    assert not is_lost_rank(error, world_size=1)
