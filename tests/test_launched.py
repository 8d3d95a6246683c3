"""Reading the launcher's environment, and the choice of the device (runner.system.launcher)."""

import ctypes
from typing import Any

import pytest

from runner.common.errors import UserError
from runner.system import environment, launcher

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
RANKS = ACCELERATE | {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}


def test_reads_ranks() -> None:
    assert launcher.read(RANKS) == launcher.Launch(True, False, 3, 1, 4, 2)
    assert launcher.read({}) == launcher.Launch(False, False, 0, 0, 1, 1)


def test_a_launcher_that_started_one_process_instead_of_several_is_an_error() -> None:
    with pytest.raises(UserError, match="started one"):
        launcher.read(ACCELERATE | {"MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "True"})
    launcher.read({"MASTER_PORT": "29500"})  # without accelerate the variable means nothing


@pytest.mark.parametrize(
    ("requested", "environ", "gpus", "expected"),
    [
        ("auto", {}, 0, "cpu"),
        ("auto", {}, 1, "cuda"),
        ("cpu", RANKS, 0, "cpu"),
        ("cpu", {}, 8, "cpu"),
        ("auto", ACCELERATE | {"ACCELERATE_USE_CPU": "True"}, 8, "cpu"),
        ("auto", ACCELERATE | {"ACCELERATE_USE_CPU": "False"}, 1, "cuda"),
        ("auto", RANKS, 2, "cuda"),
        ("cuda", {}, 1, "cuda"),
    ],
)
def test_device(requested: str, environ: dict[str, str], gpus: int, expected: str) -> None:
    device, message = launcher.select_device(requested, launcher.read(environ), gpus)
    assert device == expected
    assert expected in message


@pytest.mark.parametrize(
    ("requested", "environ", "gpus"),
    [("cuda", {}, 0), ("auto", ACCELERATE, 0), ("auto", RANKS, 0), ("auto", RANKS, 1), ("cuda", RANKS, 1)],
)
def test_too_few_gpus_are_an_error(requested: str, environ: dict[str, str], gpus: int) -> None:
    with pytest.raises(UserError, match=f"found {gpus}"):
        launcher.select_device(requested, launcher.read(environ), gpus)


def test_a_gpu_is_refused_with_a_launch_configuration_for_the_cpu() -> None:
    """Else accelerate would put the model on the CPU."""
    launch = launcher.read(ACCELERATE | {"ACCELERATE_USE_CPU": "True"})
    with pytest.raises(UserError, match="--device cuda: expected a launch configuration for GPUs"):
        launcher.select_device("cuda", launch, 8)


@pytest.mark.parametrize(("error", "count"), [(0, 3), (100, 0), (34, 0), (803, None), (999, None)])
def test_a_driver_that_fails_is_not_a_machine_without_gpus(
    error: int, count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Driver:
        @staticmethod
        def cuInit(flags: int) -> int:  # noqa: N802
            return error

        @staticmethod
        def cuDeviceGetCount(pointer: Any) -> int:  # noqa: N802
            pointer._obj.value = 3
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver)
    if count is None:
        with pytest.raises(UserError, match=f"the CUDA driver failed .error {error}.; check it with nvidia-smi"):
            environment.count_gpus()
    else:
        assert environment.count_gpus() == count
