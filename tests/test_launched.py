import pytest

from data_prep.console import UserError
from runner import launched

UNDER = {"ACCELERATE_MIXED_PRECISION": "no"}
RANKS = UNDER | {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}


def test_reads_ranks() -> None:
    assert launched.read(RANKS) == launched.Launch(True, False, 3, 1, 4, 2)
    assert launched.read({}) == launched.Launch(False, False, 0, 0, 1, 1)


def test_a_promise_of_ranks_that_is_not_kept() -> None:
    with pytest.raises(UserError, match="started one"):
        launched.read(UNDER | {"MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "True"})
    launched.read({"MASTER_PORT": "29500"})  # not under accelerate: someone's own variable


@pytest.mark.parametrize(
    ("requested", "environ", "gpus", "chosen"),
    [
        ("auto", {}, 0, "cpu"),
        ("auto", {}, 1, "cuda"),
        ("cpu", RANKS, 0, "cpu"),
        ("cpu", {}, 8, "cpu"),
        ("auto", UNDER | {"ACCELERATE_USE_CPU": "True"}, 8, "cpu"),
        ("auto", UNDER | {"ACCELERATE_USE_CPU": "False"}, 1, "cuda"),
        ("auto", RANKS, 2, "cuda"),
        ("cuda", {}, 1, "cuda"),
    ],
)
def test_device(requested: str, environ: dict[str, str], gpus: int, chosen: str) -> None:
    device, told = launched.device(requested, launched.read(environ), gpus)
    assert device == chosen
    assert chosen in told


@pytest.mark.parametrize(
    ("requested", "environ", "gpus"),
    [("cuda", {}, 0), ("auto", UNDER, 0), ("auto", RANKS, 0), ("auto", RANKS, 1), ("cuda", RANKS, 1)],
)
def test_gpus_that_are_not_there(requested: str, environ: dict[str, str], gpus: int) -> None:
    with pytest.raises(UserError, match=f"found {gpus}"):
        launched.device(requested, launched.read(environ), gpus)
