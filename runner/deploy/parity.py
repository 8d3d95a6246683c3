"""The gate: an exported model is scored on the whole test set beside the model it came from, before it is believed.

Each precision and each backend that can run here has a row of its own in `deploy/parity.json`; what has no passed
row is not measured by `runner bench`. Where a row fails, the layer is named at which its arithmetic leaves the
model's.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.console import UserError, progress
from runner import checkpoint, cpu, cuda, environment
from runner.batches.protocol import open_test_of_run
from runner.deploy import engine, onnx
from runner.deploy.onnx import Exported
from runner.deploy.session import Session
from runner.evaluate import Evaluation, evaluate
from runner.runs import Run, read_json, write_json

FILE_NAME = "parity.json"
AGREEMENT = {"fp32": 0.9999, "fp16": 0.999}  # least share of images on which the top class is the model's
ACCURACY_DROP = {"int8": 0.005, "int8-cpu": 0.005}  # most that quantising may cost
CULPRIT_IMAGES = 16
BACKENDS = ("onnxruntime", "engine")
Forward = Callable[[torch.Tensor], torch.Tensor]


def compare(
    run: Run, files: list[Exported], data: Path | None, device: str, backends: Sequence[str] = BACKENDS
) -> dict[str, Any]:
    """Scores the model and its files on every test image, and writes their rows into `deploy/parity.json`.

    On the CPU onnxruntime runs the files; on a GPU its CUDA provider does, and engines that were built of them.

    Args:
        run: with a checkpoint.
        files: what to score.
        data: the prepared dataset; None for the run's own.
        device: "cpu" or "cuda".
        backends: "onnxruntime" and "engine", or one of them.

    Returns:
        The whole report: of the model in torch, in fp32 on the same device, its accuracy; and a row for each file
        and backend. Rows of files that were not asked for stay, while they speak of files that are there.

    Raises:
        UserError: the dataset is another one, or none of the backends runs here.
    """
    if device == "cpu":
        cpu.prepare()
    else:
        cuda.exact_fp32()
    config = run.config()
    batches = open_test_of_run(config, data, torch.device(device))
    classes = len(config["dataset"]["classes"])
    subjects = [(file, *subject) for file in files for subject in _subjects(run, file, device, backends)]
    if not subjects:
        told = f"--backend {' '.join(backends)}: nothing here runs that on {device}"
        raise UserError(f"{told}; engines run on a GPU, and are built by: runner engine {run.folder}")
    with progress("score model and exports", (1 + len(subjects)) * batches.samples) as advance:
        eager = evaluate(checkpoint.load_model(run).to(device), batches, classes, advance=advance)
        rows = []
        for file, backend, provider, forward, engine_sha256 in subjects:
            given = _Pixels(batches) if file.raw else batches
            scored = evaluate(_AsModule(forward, device), given, classes, advance=advance)
            row = _row(run, file, backend, provider, eager, scored, next(iter(batches.epoch(0)))[0])
            rows.append(row | {"engine_sha256": engine_sha256, "place": place()})
    made = {(row["onnx"], row["provider"]) for row in rows}
    there = {str(file.path.relative_to(run.folder)): file.sha256 for file in onnx.all_exported(run)}
    kept = [
        row
        for row in _rows(run)
        if (row["onnx"], row["provider"]) not in made and there.get(row["onnx"]) == row["onnx_sha256"]
    ]
    report = {
        "run": str(run.folder),
        "dataset": config["dataset"]["name"],
        "images": eager.images,
        "eager_accuracy": eager.accuracy,
        "hardware": environment.hardware(),
        "versions": environment.versions("tensorrt", "tensorrt-rtx"),
        "rows": [*kept, *rows],
    }
    write_json(run.deploy / FILE_NAME, report)
    return report


def place() -> dict[str, Any]:
    """What a row is true of, beside file and engine: the processor, the GPUs, and the library."""
    hardware, versions = environment.hardware(), environment.versions()
    return {"cpu": hardware["cpu"], "gpus": hardware.get("gpus"), "onnxruntime": versions.get("onnxruntime-gpu")}


def check(run: Run, file: Exported, provider: str, engine_sha256: str | None = None) -> None:
    """Sees to it that a file, or an engine of it, has passed the gate on a provider on this kind of machine.

    Raises:
        UserError: it has not been scored there, or failed.
    """
    wanted = file.sha256, provider, engine_sha256, place()
    for row in _rows(run):
        if (row["onnx_sha256"], row["provider"], row.get("engine_sha256"), row.get("place")) == wanted:
            if row["passed"]:
                return
            raise UserError(f"{file.path}: failed the gate on {provider} ({told(row)}); it is not measured")
    raise UserError(f"{file.path}: not scored on {provider} yet; first: runner parity {run.folder}")


def told(row: dict[str, Any]) -> str:
    """One row in words."""
    line = f"agreement {row['agreement']:.4%}, accuracy {row['accuracy']:.2%} ({100 * row['accuracy_change']:+.2f})"
    return line if row["passed"] else f"{line}, limit: {row['limit']}; worst at {row['culprit']}"


def _rows(run: Run) -> list[dict[str, Any]]:
    path = run.deploy / FILE_NAME
    return read_json(path).get("rows", []) if path.is_file() else []


def _subjects(
    run: Run, file: Exported, device: str, backends: Sequence[str]
) -> Iterator[tuple[str, str, Forward, str | None]]:
    """What can run a file here: backend, provider, a function from images to logits, and an engine's SHA-256."""
    if "onnxruntime" in backends:
        session = Session(file.path, device, fp16=file.precision == "fp16")
        yield "onnxruntime", session.provider, partial(_by_host, session), None
    if "engine" in backends and device == "cuda":
        for sidecar in engine.built(run, file):
            running = engine.RunningEngine(run, sidecar)
            yield sidecar["backend"], running.provider, partial(_in_pieces, running), sidecar["sha256"]


def _row(
    run: Run,
    file: Exported,
    backend: str,
    provider: str,
    eager: Evaluation,
    scored: Evaluation,
    images: torch.Tensor,
) -> dict[str, Any]:
    agreement = (eager.predicted == scored.predicted).double().mean().item()
    change = scored.accuracy - eager.accuracy
    if file.precision in AGREEMENT:
        limit = f"agreement ≥ {AGREEMENT[file.precision]:.2%}"
        passed = agreement >= AGREEMENT[file.precision]
    else:
        limit = f"accuracy drop ≤ {100 * ACCURACY_DROP[file.precision]:g} points"
        passed = change >= -ACCURACY_DROP[file.precision]
    pairs = zip(eager.class_accuracy, scored.class_accuracy, strict=True)
    return {
        "onnx": str(file.path.relative_to(run.folder)),
        "onnx_sha256": file.sha256,
        "precision": file.precision,
        "front_end": "raw" if file.raw else "normalised",
        "backend": backend,
        "provider": provider,
        "images": scored.images,
        "accuracy": scored.accuracy,
        "accuracy_change": change,
        "agreement": agreement,
        "class_change": [None if before is None else after - before for before, after in pairs],
        "largest_logit_difference": (eager.logits - scored.logits).abs().max().item(),
        "limit": limit,
        "passed": passed,
        "culprit": None if passed else culprit(run, file, images[:CULPRIT_IMAGES]),
    }


def culprit(run: Run, file: Exported, images: torch.Tensor) -> str:
    """The operator at which a file's values leave those of the fp32 file most, in words.

    Both graphs are run with every tensor that they share as an output. An operator's share is its output's relative
    error less that of its inputs.

    Args:
        run: of the file.
        file: whose normalised front end is looked at; what is in front of it is the same in all.
        images: (n, 3, H, W) float32, normalised.
    """
    from onnx import helper

    reference, _ = onnx.read(onnx.exported(run, "fp32").path)
    suspect, _ = onnx.read(onnx.path_of(run, file.precision) if file.precision != "fp32" else file.path)
    if file.raw and file.precision == "fp32":
        return "the raw front end"
    names = {name for node in suspect.graph.node for name in node.output}
    shared = [name for node in reference.graph.node for name in node.output if name in names]
    arrays = []
    for proto in (reference, suspect):
        known = {output.name for output in proto.graph.output}
        proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in shared if name not in known)
        session = Session(proto.SerializeToString(), "cpu", plain=True)
        arrays.append(session.all(images.cpu().numpy()))
    errors = {onnx.INPUT: 0.0}
    for name in shared:
        expected, found = (np.asarray(part[name], dtype=np.float64) for part in arrays)
        errors[name] = float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) + 1e-12))
    growth = {}
    for node in reference.graph.node:
        before = max((errors.get(name, 0.0) for name in node.input), default=0.0)
        for name in node.output:
            if name in errors:
                growth[name] = (errors[name] - before, f"{node.op_type} {node.name or name}")
    worst = max(growth, key=lambda name: growth[name][0])
    return (
        f"{growth[worst][1]} (relative error {errors[worst]:.2g}, {errors[worst] - growth[worst][0]:.2g} before it)"
    )


def _by_host(session: Session, images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session(images.cpu().numpy()))


def _in_pieces(running: engine.RunningEngine, images: torch.Tensor) -> torch.Tensor:
    """Any number of images through an engine that takes so many; a last piece that is too small is filled up."""
    limits = running.sidecar["batch"]
    pieces = []
    for piece in images.split(limits["max"]):
        missing = max(0, limits["min"] - len(piece))
        filled = torch.cat([piece, piece[:1].expand(missing, *piece.shape[1:])]) if missing else piece
        pieces.append(running(filled)[: len(piece)])
    return torch.cat(pieces)


class _AsModule(torch.nn.Module):
    """A function from images to logits in the clothes of a module, so that `evaluate` scores it like any other."""

    def __init__(self, forward: Forward, device: str) -> None:
        super().__init__()
        self.call = forward
        self.place = torch.nn.Parameter(torch.zeros(0, device=device))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.call(images).to(self.place.device)


class _Pixels:
    """The same split for a raw front end: (n, H, W, 3) uint8, as they lie in the file."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.samples, self.slice_of = batches, batches.samples, batches.slice_of

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = self.batches.order_of(epoch)
        sizes = [self.batches.size_of(step) for step in range(len(self.batches))]
        labels = self.batches.labels[torch.from_numpy(order)].split(sizes)
        for ours, (source, index) in zip(labels, self.batches.read(order, sizes), strict=True):
            yield source[index], ours
