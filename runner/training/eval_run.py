"""Evaluates the weights of a finished run on the test images."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from runner.common.console import progress
from runner.config.train_config import Device
from runner.data.open import DTYPES, open_split_of_run
from runner.run.folder import Run
from runner.run.schema import TrainPrecision
from runner.system import cpu, cuda, launcher
from runner.training import checkpoint
from runner.training.evaluate import Evaluation, Views, evaluate


def evaluate_run(
    run: Run,
    data: Path | None,
    device: Device,
    precision: TrainPrecision | Literal["run"],
    views: Views | Literal["run"],
    environ: Mapping[str, str],
) -> dict[str, Any]:
    """Evaluates the latest checkpoint of a run on all test images, in this process.

    Args:
        run: the run folder.
        data: folder of the prepared dataset; None for the dataset of the run.
        device: device to evaluate on.
        precision: autocast precision; "run" for the precision of training.
        views: views for test-time augmentation; "run" for those of the recipe.
        environ: the process environment.

    Returns:
        The metrics by name, for printing and for JSON; names of those with test-time augmentation end in `_augmented`.
    """
    config = run.config()
    selected, message = launcher.select_device(device, launcher.read(environ), torch.cuda.device_count())
    print(message, file=sys.stderr)
    if selected == "cpu":
        cpu.prepare()
    else:
        cuda.disable_tf32()
    model = checkpoint.load_model(run).to(selected)
    used: TrainPrecision = config.precision if precision == "run" else precision
    tta: Views = config.recipe.test_augmentation if views == "run" else views
    batches = open_split_of_run(config, data, "test", torch.device(selected), DTYPES[used])

    def evaluate_views(views: Views) -> Evaluation:
        autocast = torch.autocast(selected, DTYPES[used], enabled=used != "fp32")
        with autocast, progress("evaluate", batches.num_images) as advance:
            return evaluate(model, batches, len(config.dataset.classes), advance=advance, views=views)

    test = evaluate_views("none")
    metrics = {f"test_{name}": value for name, value in test.metrics().items()}
    if tta != "none":
        metrics |= {f"test_{name}_augmented": value for name, value in evaluate_views(tta).metrics().items()}
    return {
        "run": str(run.folder),
        "experiment": config.experiment,
        "dataset": config.dataset.name,
        "precision": used,
        "test_augmentation": tta,
        "test_images": test.num_images,
        **metrics,
        "confusion": test.confusion,
    }
