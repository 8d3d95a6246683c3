import pytest

from launch.plan import Hardware, launcher_for, quick_job
from runner import experiments

ALL = experiments.load()


@pytest.mark.parametrize("name", ALL)
def test_gpus_get_the_whole_recipe_and_as_many_as_divide_a_batch_are_used(name: str) -> None:
    job = quick_job(ALL[name], Hardware(gpus=8, cores=64), None, 50_000)
    assert job.options == ()
    launcher = "one_node.yaml", "--num_processes", job.launcher[-1]
    if job.launcher[-1] == "launch/one_process.yaml":
        launcher = ("one_process.yaml",)
    assert job.launcher == ("--config_file", f"launch/{launcher[0]}", *launcher[1:])
    gpus = int(job.launcher[-1]) if len(launcher) > 1 else 1
    divisors = [n for n in range(1, 9) if ALL[name].recipe.batch_size % n == 0]
    assert gpus == divisors[-1]
    assert ("GPUs, among which" in job.told) == (gpus < 8)
    assert job.name == f"{ALL[name].recipe.epochs}-epochs"


def test_the_cpu_gets_steps_by_its_cores_and_never_more_than_an_epoch() -> None:
    steps = []
    for cores in (1, 2, 4, 64):
        options = quick_job(ALL["merabishvili"], Hardware(0, cores, bf16=True), None, 50_000).options
        assert options[:2] == ("--recipe.epochs", "1")
        assert options[4:6] == ("--device", "cpu")
        steps.append(int(options[3]))
    assert steps[0] < steps[1] < steps[2] < steps[3] == 390
    assert int(quick_job(ALL["merabishvili"], Hardware(0, 1), None, 128).options[3]) == 1
    assert int(quick_job(ALL["merabishvili"], Hardware(0, 2), None, 50_000).options[3]) < steps[1]  # in fp32


def test_memory_bound_networks_get_fewer() -> None:
    dense, depthwise = (
        quick_job(ALL[n], Hardware(0, 2), None, 50_000) for n in ("podeti-alexnet", "podeti-mobilenetv2")
    )
    assert int(depthwise.options[3]) < int(dense.options[3]) / 2


def test_a_wish_wins() -> None:
    job = quick_job(ALL["merabishvili"], Hardware(0, 2, bf16=True), 3, 50_000)
    assert job.options == ("--recipe.epochs", "3", "--device", "cpu", "--precision", "bf16")
    assert job.told == "3 of 60 epochs"


def test_launchers() -> None:
    assert launcher_for(Hardware(1, 8)) == ("--config_file", "launch/one_process.yaml")
    assert launcher_for(Hardware(0, 8)) == ("--config_file", "launch/cpu.yaml", "--num_processes", "1")
