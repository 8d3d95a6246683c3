"""Exports a run's weights to one ONNX file with a dynamic batch."""

import contextlib
import io
import json
import logging
import os
import warnings
from pathlib import Path

from data_prep.console import UserError, sha256_of
from runner.runs import Run

FILE_NAME = "model.onnx"
INPUT, OUTPUT = "images", "logits"
LARGEST_BATCH = 4096


def export(run: Run) -> Path:
    """Writes `deploy/model.onnx`: `images` (batch, 3, H, W) float32, normalised, to `logits` (batch, classes).

    The file holds its weights, and as metadata what a server needs: class names, mean and deviation, run,
    experiment, dataset, commit.

    Returns:
        The file, which appears only when onnx's checker has passed it.
    """
    import onnx
    import torch

    from runner import checkpoint

    config = run.config()
    model = checkpoint.load_model(run)
    example = torch.zeros(2, *config["input"]["shape"])
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with _quiet():
        program = torch.onnx.export(
            model,
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: batch},),
            dynamo=True,
            verbose=False,
        )
    proto = program.model_proto
    metadata = {
        "classes": config["dataset"]["classes"],
        "mean": config["input"]["mean"],
        "std": config["input"]["std"],
        "experiment": config["experiment"],
        "run": config["run"],
        "dataset": {key: config["dataset"][key] for key in ("name", "fingerprint")},
        "commit": config["git"].get("commit"),
        "largest_batch": LARGEST_BATCH,
    }
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in metadata.items()})
    path = run.deploy / FILE_NAME
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(".model.part.onnx")
    try:
        onnx.save_model(proto, part, save_as_external_data=False)
        onnx.checker.check_model(part, full_check=True)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def exported(run: Run) -> tuple[Path, str]:
    """The run's ONNX file and its SHA-256.

    Raises:
        UserError: the run has not been exported.
    """
    run.config()
    path = run.deploy / FILE_NAME
    if not path.is_file():
        raise UserError(
            f"{run.folder}: expected {path.relative_to(run.folder)}, found none; make it: runner export"
        )
    return path, sha256_of(path)


@contextlib.contextmanager
def _quiet():
    """The exporter tells its progress on standard output, where only our result belongs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)
