"""The gate: an exported model is scored on the whole test set beside the model it came from, before it is believed.

Each precision and each backend that can run here has a row of its own in `deploy/parity.json`; what has no passed
row is not measured by `runner bench`. Where a row fails, the layer is named at which its arithmetic leaves the
model's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from runner.deploy.session import PROVIDERS, Session
from runner.evaluate import Evaluation, evaluate
from runner.runs import Run, read_json, write_json

FILE_NAME = "parity.json"
AGREEMENT = {"fp32": 0.9999, "fp16": 0.999}  # least share of images on which the top class is the model's
ACCURACY_DROP = {"int8": 0.005, "int8-cpu": 0.005}  # most that quantising may cost
CULPRIT_IMAGES = 16
CULPRIT_LEAST = 1e-4  # relative error that an operator has to add, to be named
BACKENDS = ("onnxruntime", "engine")
Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """One way to run a file here.

    Attributes:
        file: which.
        backend, provider: by what.
        forward: images to logits.
        engine_sha256: of the engine, where it is one.
    """

    file: Exported
    backend: str
    provider: str
    forward: Forward
    engine_sha256: str | None = None


def compare(
    run: Run, files: list[Exported], data: Path | None, device: str, backends: Sequence[str] = ()
) -> dict[str, Any]:
    """Scores the model and its files on every test image, and writes their rows into `deploy/parity.json`.

    On the CPU onnxruntime runs the files; on a GPU its CUDA provider does, and engines that were built of them;
    there the model is scored in fp16 as well, as torch runs it.

    Args:
        run: with a checkpoint.
        files: what to score.
        data: the prepared dataset; None for the run's own.
        device: "cpu" or "cuda".
        backends: "onnxruntime" or "engine", which then have to run here; none for whatever does.

    Returns:
        The whole report: of the model in torch, in fp32 on the same device, its accuracy; a row for each file and
        backend; and what could not be scored, with the reason. Rows of files that were not asked for stay, while
        they speak of files that are there.

    Raises:
        UserError: the dataset is another one, or nothing that is asked for runs here.
    """
    if device == "cpu":
        cpu.prepare()
    else:
        cuda.exact_fp32()
    config = run.config()
    batches = open_test_of_run(config, data, torch.device(device))
    classes = len(config["dataset"]["classes"])
    subjects, not_scored = _subjects(run, files, device, backends)
    if not subjects:
        told = f"--backend {' '.join(backends or BACKENDS)}: nothing here runs that on {device}"
        reasons = "; ".join(entry["reason"] for entry in not_scored)
        raise UserError(reasons or f"{told}; engines run on a GPU, and are built by: runner engine {run.folder}")
    with progress("score model and exports", (1 + len(subjects)) * batches.samples) as advance:
        model = checkpoint.load_model(run).to(device)
        eager = evaluate(model, batches, classes, advance=advance)
        images = next(iter(batches.epoch(0)))[0][:CULPRIT_IMAGES]
        rows = []
        for subject in subjects:
            given = _Pixels(batches) if subject.file.raw else batches
            scored = evaluate(_AsModule(subject.forward, device), given, classes, advance=advance)
            rows.append(_row(run, subject, eager, scored, images, device))
        in_torch = []
        if device == "cuda":
            half = model.half()
            scored = evaluate(_AsModule(lambda images: half(images.half()).float(), device), batches, classes)
            weights = onnx.weights_of(run)
            in_torch = [
                _scores("fp16", eager, scored) | {"precision": "fp16", "weights": weights, "place": place()}
            ]
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
        "torch": in_torch or _read(run).get("torch", []),
        "not_scored": not_scored,
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


def check_torch(run: Run, precision: str) -> None:
    """Sees to it that the model, as torch runs it on the GPU in a precision below fp32, has passed the gate.

    Raises:
        UserError: it has not been scored here, or failed.
    """
    for row in _read(run).get("torch", []):
        if (row["precision"], row["weights"], row["place"]) == (precision, onnx.weights_of(run), place()):
            if row["passed"]:
                return
            raise UserError(f"{run.folder}: torch in {precision} failed the gate (limit: {row['limit']})")
    raise UserError(f"{run.folder}: torch in {precision} is not scored here yet; first: runner parity {run.folder}")


def told(row: dict[str, Any]) -> str:
    """One row in words."""
    line = f"agreement {row['agreement']:.4%}, accuracy {row['accuracy']:.2%} ({100 * row['accuracy_change']:+.2f})"
    return line if row["passed"] else f"{line}, limit: {row['limit']}; worst at {row['culprit']}"


def _rows(run: Run) -> list[dict[str, Any]]:
    return _read(run).get("rows", [])


def _read(run: Run) -> dict[str, Any]:
    path = run.deploy / FILE_NAME
    return read_json(path) if path.is_file() else {}


def _subjects(
    run: Run, files: list[Exported], device: str, backends: Sequence[str]
) -> tuple[list[Subject], list[dict[str, str]]]:
    """What can run files here; and what cannot, with the reason, unless it was asked for by name."""
    found, refused = [], []
    for file in files:
        openers: list[tuple[str, Callable[[], Subject]]] = []
        if "onnxruntime" in (backends or BACKENDS):
            openers.append(("onnxruntime", partial(_in_onnxruntime, file, device)))
        if "engine" in (backends or BACKENDS) and device == "cuda":
            for sidecar in engine.built(run, file):
                openers.append((sidecar["backend"], partial(_in_engine, run, file, sidecar)))
        for backend, opened in openers:
            try:
                found.append(opened())
            except UserError as error:
                if backends:
                    raise
                refused.append({"onnx": str(file.path), "backend": backend, "reason": str(error)})
    return found, refused


def _in_onnxruntime(file: Exported, device: str) -> Subject:
    session = Session(file.path, device, fp16=file.precision == "fp16")
    return Subject(
        file, "onnxruntime", session.provider, lambda images: torch.from_numpy(session(images.cpu().numpy()))
    )


def _in_engine(run: Run, file: Exported, sidecar: dict[str, Any]) -> Subject:
    running = engine.RunningEngine(run, sidecar)
    return Subject(file, sidecar["backend"], running.provider, running.in_pieces, sidecar["sha256"])


def _row(
    run: Run, subject: Subject, eager: Evaluation, scored: Evaluation, images: torch.Tensor, device: str
) -> dict[str, Any]:
    file, scores = subject.file, _scores(subject.file.precision, eager, scored)
    return {
        "onnx": str(file.path.relative_to(run.folder)),
        "onnx_sha256": file.sha256,
        "precision": file.precision,
        "front_end": "raw" if file.raw else "normalised",
        "backend": subject.backend,
        "provider": subject.provider,
        **scores,
        "culprit": None if scores["passed"] else culprit(run, subject, images, device),
        "engine_sha256": subject.engine_sha256,
        "place": place(),
    }


def _scores(precision: str, eager: Evaluation, scored: Evaluation) -> dict[str, Any]:
    """How far one is from the model in fp32, and whether that is within the limit of its precision."""
    agreement = (eager.predicted == scored.predicted).double().mean().item()
    change = scored.accuracy - eager.accuracy
    if precision in AGREEMENT:
        limit = f"agreement ≥ {AGREEMENT[precision]:.2%}"
        passed = agreement >= AGREEMENT[precision]
    else:
        limit = f"accuracy drop ≤ {100 * ACCURACY_DROP[precision]:g} points"
        passed = change >= -ACCURACY_DROP[precision]
    pairs = zip(eager.class_accuracy, scored.class_accuracy, strict=True)
    difference = (eager.logits - scored.logits).abs().max().item()
    finite = bool(scored.logits.isfinite().all())
    return {
        "images": scored.images,
        "accuracy": scored.accuracy,
        "accuracy_change": change,
        "agreement": agreement,
        "class_change": [None if before is None else after - before for before, after in pairs],
        "largest_logit_difference": difference if finite else None,
        "limit": limit if finite else f"{limit}, of finite logits",
        "passed": passed and finite,
    }


def culprit(run: Run, subject: Subject, images: torch.Tensor, device: str) -> str:
    """The operator at which a file's values leave those of the fp32 file most, in words; or why none can be named.

    Both graphs are run by onnxruntime with every tensor that they share as an output: the fp32 one on the CPU, the
    file where it was scored, or, for an engine, on the CPU as well. An operator's share is its output's relative
    error less that of its inputs.

    Args:
        run: of the file.
        subject: whose normalised front end is looked at; what is in front of it is the same in all.
        images: (n, 3, H, W) float32, normalised.
        device: where the file was scored.
    """
    from onnx import helper

    file = subject.file
    if file.precision == "fp32":
        if file.raw:
            return "the raw front end"
        if subject.provider == PROVIDERS["cpu"]:
            return "none: the fp32 file on the CPU is what operators are compared with; export it again"
    where = device if subject.backend == "onnxruntime" else "cpu"
    try:
        reference, _ = onnx.read(onnx.exported(run, "fp32").path)
        suspect, _ = onnx.read(onnx.exported(run, file.precision).path)
        names = {name for node in suspect.graph.node for name in node.output}
        shared = [name for node in reference.graph.node for name in node.output if name in names]
        arrays = []
        for proto, place in ((reference, "cpu"), (suspect, where)):
            known = {output.name for output in proto.graph.output}
            more = [helper.make_empty_tensor_value_info(name) for name in shared if name not in known]
            proto.graph.output.extend(more)
            arrays.append(Session(proto.SerializeToString(), place, plain=True).all(images.cpu().numpy()))
    except UserError as error:
        return f"none: the search failed ({error})"
    errors = {onnx.INPUT: 0.0}
    for name in shared:
        expected, found = (np.asarray(part[name], dtype=np.float64) for part in arrays)
        error = float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) + 1e-12))
        errors[name] = error if np.isfinite(error) else np.inf
    growth: dict[str, tuple[float, str]] = {}
    for node in reference.graph.node:
        before = max((errors.get(name, 0.0) for name in node.input), default=0.0)
        for name in node.output:
            if name in errors and np.isfinite(before):
                growth[name] = (errors[name] - before, f"{node.op_type} {node.name or name}")
    worst = max(growth, key=lambda name: growth[name][0], default=None)
    if worst is None or growth[worst][0] < CULPRIT_LEAST:
        return f"none: onnxruntime on {where} computes this graph as the fp32 one; it is {subject.provider}'s own"
    return (
        f"{growth[worst][1]} (relative error {errors[worst]:.2g}, {errors[worst] - growth[worst][0]:.2g} before it)"
    )


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
