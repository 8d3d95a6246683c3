"""Scores an exported model on the whole test set beside the model it came from."""

from pathlib import Path
from typing import Any

import torch

from data_prep.console import progress, sha256_of
from runner import checkpoint, cpu
from runner.batches.protocol import open_test_of_run
from runner.deploy.session import Session
from runner.evaluate import evaluate
from runner.runs import Run, write_json

FILE_NAME = "parity.json"
LIMIT = 0.9999  # top-1 agreement in fp32


class _InOnnxruntime(torch.nn.Module):
    """An onnxruntime session in the clothes of a module, so that `evaluate` scores it like any other."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.place = torch.nn.Parameter(torch.zeros(0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session(images.numpy()))


def compare(run: Run, path: Path, data: Path | None) -> dict[str, Any]:
    """Scores both on every test image in fp32 on the CPU, and writes `deploy/parity.json`.

    Args:
        run: with a checkpoint.
        path: the ONNX file made from it.
        data: the prepared dataset; None for the run's own.

    Returns:
        Accuracies, top-1 agreement, largest difference of a logit, and whether the limit is held.
    """
    cpu.prepare()
    config = run.config()
    batches = open_test_of_run(config, data, torch.device("cpu"))
    classes = len(config["dataset"]["classes"])
    session = Session(path)
    with progress("score model and ONNX", 2 * batches.samples) as advance:
        eager = evaluate(checkpoint.load_model(run), batches, classes, advance=advance)
        exported = evaluate(_InOnnxruntime(session), batches, classes, advance=advance)
    agreement = (eager.predicted == exported.predicted).double().mean().item()
    report = {
        "onnx": str(path.relative_to(run.folder)),
        "onnx_sha256": sha256_of(path),
        "dataset": config["dataset"]["name"],
        "images": eager.images,
        "precision": "fp32",
        "provider": session.provider,
        "accuracy": exported.accuracy,
        "eager_accuracy": eager.accuracy,
        "agreement": agreement,
        "largest_logit_difference": (eager.logits - exported.logits).abs().max().item(),
        "limit": LIMIT,
        "passed": agreement >= LIMIT,
    }
    write_json(run.deploy / FILE_NAME, report)
    return report
