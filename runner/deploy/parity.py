"""The parity gate: compares exported files with the model in torch on the whole test set.

`deploy/parity.json` has a row for each file and each engine that runs here; `runner bench` measures only those whose
row passed. A failed row names the operator at which the values diverge from those of the fp32 file.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import asdict, replace

from runner.common.console import progress
from runner.common.errors import UserError
from runner.common.files import write_json
from runner.data.open import open_split_of_run
from runner.data.stream import BatchStream
from runner.deploy import engine_run, onnx, package, precision
from runner.deploy.onnx import OnnxFile
from runner.deploy.sensitivity import added_errors
from runner.deploy.session import PROVIDERS, OnnxSession
from runner.run.folder import Run
from runner.run.schema import (
    EngineSidecar,
    GateResult,
    Machine,
    NotScored,
    ParityReport,
    ParityRow,
    Precision,
    ScoredBackend,
    Scores,
    TorchRow,
)
from runner.system import cpu, cuda, environment
from runner.training import checkpoint
from runner.training.evaluate import Evaluation, evaluate

AGREEMENT = {"fp32": 0.9999, "fp16": 0.999}  # minimum share of images with the same top class
ACCURACY_DROP = {"int8": 0.005, "int8-cpu": 0.005}  # maximum drop that quantization may cause
CULPRIT_IMAGES = 16
PROPOSED = 3  # most operators that a failed int8 file proposes to keep in fp32
TF32_CAVEAT = "may use TF32, which onnxruntime's TensorRT provider cannot turn off"
MIN_CULPRIT_ERROR = 1e-4  # an operator is named only if it adds at least this relative error
BACKENDS: tuple[ScoredBackend, ...] = ("onnxruntime", "engine")  # by default; a package runs code from the run's folder
Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """A file to score, and what runs it.

    Attributes:
        file: the ONNX file.
        backend: what runs it.
        provider: onnxruntime's execution provider, the engine's library and version, or the package's device.
        forward: maps images to logits.
        engine_sha256: SHA-256 of the engine; None for onnxruntime.
        caveat: what of its arithmetic is outside NVIDIA's support matrix, or less precise than the file's.
    """

    file: OnnxFile
    backend: ScoredBackend
    provider: str
    forward: Forward
    engine_sha256: str | None = None
    caveat: str | None = None


def score(
    run: Run, files: list[OnnxFile], data: Path | None, device: str, backends: Sequence[ScoredBackend] = ()
) -> tuple[ParityReport, list[ParityRow]]:
    """Scores the model and its exported files on every test image, and writes the report to `deploy/parity.json`.

    On the CPU, onnxruntime runs the files. On a GPU, onnxruntime's CUDA provider runs them, the engines built from them
    are scored too, and so is the torch model in fp16.

    Args:
        run: run with a checkpoint.
        files: files to score.
        data: prepared dataset; None for the run's own.
        device: "cpu" or "cuda".
        backends: backends that must run here; if empty, all that can run.

    Returns:
        The report, which keeps earlier rows of other files that still exist, and the rows that were scored now.

    Raises:
        UserError: the dataset is not the run's, or a requested backend does not run here, or none does on the CPU.
    """
    if device == "cpu":
        cpu.prepare()
    else:
        cuda.disable_tf32()
    config = run.config()
    batches = open_split_of_run(config, data, "test", torch.device(device))
    classes = len(config.dataset.classes)
    candidates, not_scored = _open_candidates(run, files, device, backends)
    if (not candidates and (backends or device == "cpu")) or (
        "engine" in backends and device == "cpu"
    ):  # on a GPU, torch in fp16 can be scored without any
        message = (
            f"--backend {' '.join(backends or BACKENDS)}: not available here on {device}; engines run on a GPU, and "
            f"are built with: runner engine {run.folder}"
        )
        raise UserError("; ".join(entry.reason for entry in not_scored) or message)
    evaluations = 1 + len(candidates) + (device == "cuda")
    with progress("score model and exports", evaluations * batches.num_images) as advance:
        model = checkpoint.load_model(run).to(device)
        baseline = evaluate(model, batches, classes, advance=advance)
        images = next(iter(batches.epoch(0)))[0][:CULPRIT_IMAGES]
        earlier = run.read_parity()
        torch_rows = earlier.torch if earlier else []
        if device == "cuda":
            half = model.half()
            measured = evaluate(lambda images: half(images.half()), batches, classes, advance=advance)
            scores = asdict(compare_scores("fp16", baseline, measured))
            weights = onnx.weights_sha256(run)
            torch_rows = [TorchRow(**scores, precision="fp16", weights=weights, machine=this_machine())]
        rows = []
        for candidate in candidates:
            inputs = _RawBatches(batches) if candidate.file.raw else batches
            measured = evaluate(candidate.forward, inputs, classes, advance=advance)
            rows.append(_row(run, candidate, baseline, measured, images, device))
    report = ParityReport(
        run=str(run.folder),
        dataset=config.dataset.name,
        images=baseline.num_images,
        eager_accuracy=baseline.accuracy,
        hardware=environment.describe_hardware(),
        versions=environment.package_versions(*environment.TENSORRT_PACKAGES),
        rows=[*_other_rows(run, earlier.rows if earlier else [], rows), *rows],
        torch=torch_rows,
        not_scored=not_scored,
    )
    write_json(run.parity, report)
    return report, rows


def _other_rows(run: Run, earlier: list[ParityRow], rows: list[ParityRow]) -> list[ParityRow]:
    """Returns the earlier rows that `rows` do not replace and whose files are current.

    A row replaces those of the same machine with another version of onnxruntime.
    """
    replaced = {_scored_as(row) for row in rows}
    exported = [*onnx.all_exported(run), *package.all_compiled(run)]
    current = {str(file.path.relative_to(run.folder)): file.sha256 for file in exported}
    return [row for row in earlier if _scored_as(row) not in replaced and current.get(row.onnx) == row.onnx_sha256]


def _scored_as(row: ParityRow) -> tuple[str, str, str]:
    hardware = replace(row.machine, onnxruntime=None) if row.machine else None
    return row.onnx, row.provider, str(hardware)


def this_machine() -> Machine:
    """Returns this machine and its onnxruntime version, for which new rows are valid."""
    hardware, versions = environment.describe_hardware(), environment.package_versions()
    return Machine(cpu=hardware.cpu, gpus=hardware.gpus, onnxruntime=versions.get("onnxruntime-gpu"))


def require_passed(run: Run, file: OnnxFile, provider: str, engine_sha256: str | None = None) -> GateResult:
    """Returns the gate's result for a file, or for an engine built from it, on a provider and this kind of machine.

    Raises:
        UserError: the file or engine has not been scored, or has failed.
    """
    wanted = file.sha256, provider, engine_sha256, this_machine()
    report = run.read_parity()
    for row in report.rows if report else []:
        if (row.onnx_sha256, row.provider, row.engine_sha256, row.machine) == wanted:
            if row.passed:
                return row.gate
            raise UserError(f"{file.path}: failed the gate on {provider} ({row}), so it is not used")
    named = " --backend aotinductor" if file.path.suffix == package.SUFFIX else ""  # never scored by default
    named = " --backend onnxruntime-tensorrt" if provider == PROVIDERS["tensorrt"] else named
    named += " --device cpu" if provider in (PROVIDERS["cpu"], package.provider_of("cpu")) else ""
    raise UserError(f"{file.path}: not scored on {provider} yet; first: runner parity {run.folder}{named}")


def require_torch_passed(run: Run, precision: Precision) -> None:
    """Checks that the model in torch, in a precision below fp32, has passed the gate on this kind of machine.

    Raises:
        UserError: the model has not been scored, or has failed.
    """
    wanted = precision, onnx.weights_sha256(run), this_machine()
    report = run.read_parity()
    for row in report.torch if report else []:
        if (row.precision, row.weights, row.machine) == wanted:
            if row.passed:
                return
            raise UserError(f"{run.folder}: torch in {precision} failed the gate (limit: {row.limit})")
    raise UserError(f"{run.folder}: torch in {precision} has not been scored here; first: runner parity {run.folder}")


def _open_candidates(
    run: Run, files: list[OnnxFile], device: str, backends: Sequence[ScoredBackend]
) -> tuple[list[Candidate], list[NotScored]]:
    """Opens each file with every backend that runs here, and lists those that do not run, with the reason.

    Raises:
        UserError: a backend in `backends` does not run here.
    """
    candidates: list[Candidate] = []
    not_scored: list[NotScored] = []
    for file in files:
        openers: list[tuple[ScoredBackend, Callable[[], Candidate]]] = []
        if "onnxruntime" in (backends or BACKENDS):
            openers.append(("onnxruntime", partial(_open_session, file, device)))
        if "onnxruntime-tensorrt" in backends:
            if device == "cpu":
                raise UserError("--backend onnxruntime-tensorrt: expected a GPU, which is selected by --device cuda")
            openers.append(("onnxruntime-tensorrt", partial(_open_session, file, "tensorrt")))
        if "engine" in (backends or BACKENDS) and device == "cuda":
            sidecars = engine_run.verified_engines(run, file)
            here = [sidecar for sidecar in sidecars if engine_run.incompatibility(sidecar) is None]
            if here:  # engines for other GPUs are an error only where none is for this one
                others = [sidecar for sidecar in sidecars if sidecar not in here]
                not_scored += [_not_for_this_gpu(file, sidecar) for sidecar in others]
            openers += [("engine", partial(_open_engine, run, file, sidecar)) for sidecar in here or sidecars]
        for backend, open_candidate in openers:
            try:
                candidates.append(open_candidate())
            except UserError as error:
                if backends:
                    raise
                not_scored.append(NotScored(onnx=str(file.path), backend=backend, reason=str(error)))
    if "aotinductor" in backends:
        file = package.compiled(run, "cuda" if device == "cuda" else "cpu")
        provider = package.provider_of(device)
        candidates.append(Candidate(file, "aotinductor", provider, package.load(file.path)))
    return candidates, not_scored


def _not_for_this_gpu(file: OnnxFile, sidecar: EngineSidecar) -> NotScored:
    return NotScored(onnx=str(file.path), backend="engine", reason=str(engine_run.incompatibility(sidecar)))


def _open_session(file: OnnxFile, device: str) -> Candidate:
    session = OnnxSession(file.path, device, fp16=file.precision == "fp16")
    backend: ScoredBackend = "onnxruntime-tensorrt" if device == "tensorrt" else "onnxruntime"
    return Candidate(
        file, backend, session.provider, lambda images: torch.from_numpy(session(images.cpu().numpy())),
        caveat=TF32_CAVEAT if (device, file.precision) == ("tensorrt", "fp32") else None,
    )  # fmt: skip


def _open_engine(run: Run, file: OnnxFile, sidecar: EngineSidecar) -> Candidate:
    loaded = engine_run.LoadedEngine(run, sidecar)
    return Candidate(file, "engine", sidecar.provider, loaded.run_in_batches, sidecar.sha256, sidecar.caveat)


def _row(
    run: Run, candidate: Candidate, baseline: Evaluation, measured: Evaluation, images: torch.Tensor, device: str
) -> ParityRow:
    file, scores = candidate.file, compare_scores(candidate.file.precision, baseline, measured)
    culprit, proposed = (None, []) if scores.passed else find_culprit(run, candidate, images, device)
    return ParityRow(
        **asdict(scores),
        backend=candidate.backend,
        onnx=str(file.path.relative_to(run.folder)),
        onnx_sha256=file.sha256,
        engine_sha256=candidate.engine_sha256,
        precision=file.precision,
        front_end=file.front_end,
        provider=candidate.provider,
        caveat=candidate.caveat,
        classes_predicted=measured.num_predicted_classes,
        culprit=culprit,
        proposed=proposed,
        machine=this_machine(),
    )


def compare_scores(precision: Precision, baseline: Evaluation, measured: Evaluation) -> Scores:
    """Compares an evaluation with the baseline, the fp32 model in torch, and applies the limit for the precision."""
    agreement = (baseline.predicted == measured.predicted).double().mean().item()
    change = measured.accuracy - baseline.accuracy
    if precision in AGREEMENT:
        limit = f"agreement ≥ {AGREEMENT[precision]:.2%}"
        passed = agreement >= AGREEMENT[precision]
    else:
        limit = f"accuracy drop ≤ {100 * ACCURACY_DROP[precision]:g} points"
        # Fractions are rounded: without a tolerance, a drop of exactly the limit would fail.
        passed = change >= -ACCURACY_DROP[precision] - 1e-9
    accuracies = zip(baseline.class_accuracy, measured.class_accuracy, strict=True)
    difference = (baseline.logits - measured.logits).abs().max().item()
    finite = bool(measured.logits.isfinite().all())
    return Scores(
        images=measured.num_images,
        accuracy=measured.accuracy,
        accuracy_change=change,
        agreement=agreement,
        class_change=[None if old is None or new is None else new - old for old, new in accuracies],
        largest_logit_difference=difference if finite else None,
        limit=limit if finite else f"{limit}, and finite logits",
        passed=passed and finite,
    )


def find_culprit(run: Run, candidate: Candidate, images: torch.Tensor, device: str) -> tuple[str, list[str]]:
    """Describes the operator that adds the largest error to a file's values, or why none can be named.

    Returns it with the names of the quantized operators that add the largest errors, which `export --keep` takes.

    Args:
        run: the run that the file belongs to.
        candidate: the failed candidate. The search uses the file with the normalized front end, whose graph is part of
            the raw one.
        images: (n, 3, H, W) float32, normalized.
        device: device on which the file was scored. For an engine, the ONNX file is searched, on the CPU.
    """
    file = candidate.file
    if file.precision == "fp32":
        if file.raw:
            return "the raw front end", []
        if candidate.provider == PROVIDERS["cpu"]:
            return "none: the fp32 file on the CPU is the reference of the search; export it again", []
    search_device = device if candidate.backend == "onnxruntime" else "cpu"
    try:
        reference, _ = onnx.read(onnx.exported(run, "fp32").path)
        suspect, _ = onnx.read(onnx.exported(run, file.precision).path)
        errors = added_errors(reference, suspect, images.cpu().numpy(), search_device)
    except UserError as error:
        return f"none: the search failed ({error})", []
    if not errors or errors[0].added < MIN_CULPRIT_ERROR:
        provider = candidate.provider
        return f"none: onnxruntime on {search_device} agrees with the fp32 file; the error is in {provider}", []
    quantized = precision.quantized_operators(suspect, file.precision)
    worst = [error.operator for error in errors if error.added >= MIN_CULPRIT_ERROR]
    return str(errors[0]), [name for name in dict.fromkeys(worst) if name in quantized][:PROPOSED]


class _RawBatches:
    """The batches of a stream for the raw front end: images (n, H, W, 3) uint8, as stored."""

    def __init__(self, stream: BatchStream) -> None:
        self.stream, self.num_images, self.device = stream, stream.num_images, stream.device
        self.slice_of = stream.slice_of

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = self.stream.order_of(epoch)
        batches = [order[self.slice_of(step)] for step in range(len(self.stream))]
        sources = self.stream.read(np.concatenate(batches), [len(batch) for batch in batches])
        for (source, index), batch in zip(sources, batches, strict=True):
            yield source[index], self.stream.labels[torch.from_numpy(batch).to(source.device)]
