"""The plan of the quickstart's trainings (launch.plan)."""

import pytest

from launch.plan import Resources, TrainingPlan, launcher_for, plan_training
from runner import experiments

ALL = experiments.load()


@pytest.mark.parametrize("name", ALL)
def test_gpus_train_the_whole_recipe_on_as_many_as_divide_the_batch(name: str) -> None:
    plan = plan_training(ALL[name], Resources(gpus=8, cores=64), None, 50_000, 10_000, {})
    assert plan.options == ()
    launcher = "one_node.yaml", "--num_processes", plan.launcher[-1]
    if plan.launcher[-1] == "launch/one_process.yaml":
        launcher = ("one_process.yaml",)
    assert plan.launcher == ("--config_file", f"launch/{launcher[0]}", *launcher[1:])
    gpus = int(plan.launcher[-1]) if len(launcher) > 1 else 1
    divisors = [n for n in range(1, 9) if ALL[name].recipe.batch_size % n == 0]
    assert gpus == divisors[-1]
    assert ("GPUs, which divide" in plan.description) == (gpus < 8)
    assert plan.name == f"{ALL[name].recipe.epochs}-epochs"


def cpu_plan(name: str, images: int = 50_000, **speeds: float) -> TrainingPlan:
    return plan_training(ALL[name], Resources(0, 2), None, images, 10_000, speeds)


def test_the_cpu_trains_as_many_steps_as_the_measured_speed_allows_up_to_an_epoch() -> None:
    """In the faster precision; evaluating 10,000 images takes as long as training on a third of them."""
    plan = cpu_plan("merabishvili", fp32=50.0, bf16=100.0)
    assert plan.options == ("--recipe.epochs", "1", "--max-steps", "20", "--device", "cpu", "--precision", "bf16")
    assert plan.name == "20-steps"
    assert plan.description == "20 of the 390 steps of an epoch; the recipe has 60 epochs"
    assert cpu_plan("merabishvili", fp32=100.0, bf16=50.0).options[-1] == "fp32"
    assert cpu_plan("merabishvili", fp32=1.0).name == "1-steps"
    assert cpu_plan("merabishvili", fp32=1e6).name == "390-steps"
    assert cpu_plan("ghasemi-net", images=130, fp32=1e6).name == "3-steps"  # its last, partial batch is used
    assert cpu_plan("merabishvili", images=130, fp32=1e6).name == "1-steps"


def test_a_small_dataset_changes_what_is_held_out_and_the_batch_and_says_so() -> None:
    plan = cpu_plan("podeti-resnet18", images=100, fp32=1e6)
    assert plan.options[4:8] == ("--recipe.validation", "0", "--recipe.batch-size", "64")
    assert plan.description.endswith("; holds out no images, not 5,000; batches of 64 images, not 128")
    changes = ("--recipe.validation", "10", "--recipe.batch-size", "64")
    whole = plan_training(ALL["podeti-resnet18"], Resources(1, 8), 2, 100, 10, {})
    assert whole.options[2:6] == changes
    assert whole.description.endswith("not 128")


def test_requested_epochs_override_the_plan() -> None:
    plan = plan_training(ALL["merabishvili"], Resources(0, 2, bf16=True), 3, 50_000, 10_000, {})
    assert plan.options == ("--recipe.epochs", "3", "--device", "cpu", "--precision", "bf16")
    assert plan.description == "3 of 60 epochs"


def test_launchers() -> None:
    assert launcher_for(Resources(1, 8)) == ("--config_file", "launch/one_process.yaml")
    assert launcher_for(Resources(0, 8)) == ("--config_file", "launch/cpu.yaml", "--num_processes", "1")
