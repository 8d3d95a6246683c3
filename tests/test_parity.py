"""The parity gate, on graphs written operator by operator (`support/graphs.py`), which takes no export."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace

from data_prep import manifest
from runner.common.errors import UserError
from runner.common.files import read_json, write_json
from runner.data.open import model_input, open_split_of_run
from runner.deploy import onnx as exporter
from runner.deploy import parity, precision, sensitivity
from runner.deploy.onnx import OnnxFile
from runner.deploy.session import OnnxSession, ProviderError
from runner.run.folder import Run
from runner.run.schema import Dataset, FrontEnd, GateResult, Machine, ParityReport, TorchRow
from runner.training import checkpoint
from runner.training.evaluate import Evaluation, evaluate
from tests.support.configs import config_of, trusted
from tests.support.graphs import graph_of
from tests.support.models.tiny import Tiny

CPU = "CPUExecutionProvider"
Change = Callable[[dict[str, np.ndarray]], object]


def add_file(
    run: Run,
    precision: str,
    change: Change = lambda weights: None,
    raw: bool = False,
    scale: float = 1.0,
    first: str = "x",
) -> OnnxFile:
    """Writes an ONNX file of a run, with some of its weights changed in place.

    Below fp32, the output of its first operator is named `first`; in fp32, it is `a`.
    """
    model = checkpoint.load_model(run)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    change(weights)
    proto = graph_of(model, scale)
    for node in proto.graph.node if precision != "fp32" else ():
        for names in (node.input, node.output):
            names[:] = [first if name == "a" else name for name in names]
    proto = exporter.with_raw_input(proto, run.config()) if raw else proto
    return exporter.write(run, proto, precision, raw, exporter.weights_sha256(run))


def scale_second(factor: float) -> Change:
    """Scales what the second convolution computes."""

    def change(weights: dict[str, np.ndarray]) -> None:
        weights["layers.3.weight"] *= factor
        weights["layers.3.bias"] *= factor

    return change


@pytest.fixture
def run(small_data: Path, tmp_path: Path) -> Run:
    """A run with random weights that predicts various classes, and its fp32 file."""
    run, prepared = trusted(tmp_path / "tiny" / "seed-0"), manifest.read(small_data)
    dataset = Dataset(
        name=prepared.name, fingerprint=prepared.fingerprint, classes=list(prepared.classes),
        image_shape=list(prepared.image_shape), mean=list(prepared.mean), std=list(prepared.std),
        folder=str(small_data),
    )  # fmt: skip
    config = config_of(dataset=dataset)
    write_json(run.run_json, replace(config, input=model_input(prepared, config.recipe)))
    torch.manual_seed(0)
    model = Tiny().requires_grad_(False)
    batches = open_split_of_run(run.config(), None, "test", torch.device("cpu"))
    images = torch.cat([images for images, _ in batches.epoch(0)])
    model.layers[-1].bias -= model(images).mean(0)
    checkpoint.save(run, model.state_dict(), 1)
    add_file(run, "fp32")
    return run


def test_a_report_has_a_row_for_each_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either front end; progress is of every image, once for the model and once for each file."""
    add_file(run, "fp32", raw=True)
    counted: list[float] = []

    class Progress:
        def __init__(self, text: str, total: float) -> None:
            counted.append(-total)

        def __enter__(self) -> Callable[[float], None]:
            return counted.append

        def __exit__(self, *_: object) -> None: ...

    prepared: list[str] = []
    monkeypatch.setattr(parity, "progress", Progress)
    monkeypatch.setattr(parity.cpu, "prepare", lambda: prepared.append("cpu"))
    monkeypatch.setattr(parity.cuda, "disable_tf32", lambda: prepared.append("no TF32"))
    report = parity.score(run, exporter.all_exported(run), None, "cpu")[0]
    assert counted[0] == -600
    assert sum(counted) == 0
    assert read_json(run.parity, ParityReport) == report
    batches = open_split_of_run(run.config(), None, "test", torch.device("cpu"))
    expected = evaluate(checkpoint.load_model(run), batches, 10)
    assert (report.images, report.eager_accuracy) == (200, expected.accuracy)
    assert (report.torch, report.not_scored) == ([], [])
    normalized, raw = report.rows
    for row in (normalized, raw):
        assert (row.images, row.accuracy, row.accuracy_change, row.agreement) == (200, expected.accuracy, 0.0, 1.0)
        assert row.class_change == [0.0] * 10
        assert (row.passed, row.limit, row.culprit, row.caveat) == (True, "agreement ≥ 99.99%", None, None)
        assert (row.backend, row.provider, row.engine_sha256) == ("onnxruntime", CPU, None)
        assert row.classes_predicted == expected.num_predicted_classes > 1
        assert row.machine == parity.this_machine()
        assert row.largest_logit_difference < 1e-4
    assert normalized.onnx_sha256 == exporter.exported(run).sha256
    assert [row.onnx for row in report.rows] == ["deploy/model.fp32.onnx", "deploy/model.fp32.raw.onnx"]
    assert [row.front_end for row in report.rows] == [FrontEnd.NORMALIZED, FrontEnd.RAW]
    assert prepared == ["cpu"]

    # On a GPU, for which this processor stands in, the model is scored in fp16 too, also without any file.
    monkeypatch.setattr(parity, "open_split_of_run", lambda config, data, split, device: batches)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(parity, "OnnxSession", lambda path, device, fp16: OnnxSession(path, "cpu"))
    counted.clear()
    for files in ([exporter.exported(run)], []):
        report = parity.score(run, files, None, "cuda")[0]
        (row,) = report.torch
        assert (row.precision, row.weights, row.machine) == (
            "fp16",
            exporter.weights_sha256(run),
            parity.this_machine(),
        )
        assert (row.limit, row.images) == ("agreement ≥ 99.90%", 200)
        assert row.largest_logit_difference > 1e-5
        assert sum(counted) == 0
    assert counted[0] == -600
    assert prepared == ["cpu", "no TF32", "no TF32"]


def test_a_report_keeps_the_rows_of_other_files_that_are_current(run: Run) -> None:
    fp32, fp16 = exporter.exported(run), add_file(run, "fp16")
    first = parity.score(run, [fp32, fp16], None, "cpu")[0]
    elsewhere = replace(first.rows[0], provider="tensorrt-rtx 1.2")
    torch_row = TorchRow(**_scores(), precision="fp16", weights="w", machine=Machine(cpu="x"))
    write_json(run.parity, replace(first, rows=[*first.rows, elsewhere], torch=[torch_row]))
    second = parity.score(run, [fp32], None, "cpu")[0]
    assert [(row.precision, row.provider) for row in second.rows] == [
        ("fp16", CPU), ("fp32", "tensorrt-rtx 1.2"), ("fp32", CPU),
    ]  # fmt: skip
    assert second.torch == [torch_row]
    add_file(run, "fp16", scale_second(1.0001))
    assert [row.precision for row in parity.score(run, [fp32], None, "cpu")[0].rows] == ["fp32", "fp32"]


def test_without_anything_to_score_there_is_no_report(run: Run) -> None:
    message = f"not available here on cpu; engines run on a GPU, and are built with: runner engine {run.folder}"
    for backends, listed in (((), "onnxruntime engine"), (("engine",), "engine")):
        with pytest.raises(UserError, match=f"^--backend {listed}: {message}$"):
            parity.score(run, [] if not backends else [exporter.exported(run)], None, "cpu", backends)[0]
    assert not run.parity.exists()


@pytest.mark.parametrize(
    ("kind", "images", "passes"),
    [("fp32", 10_000, 1), ("fp16", 1000, 1), ("int8", 10_000, 50), ("int8-cpu", 200, 1), ("int8", 1000, 5)],
)
@pytest.mark.parametrize("correct", [1.0, 0.9])
def test_a_file_at_its_limit_passes_and_one_image_beyond_fails(
    kind: str, images: int, passes: int, correct: float
) -> None:
    """Of images of which the model is right about all or some, so many get another class and become wrong."""
    labels = torch.arange(images) % 10
    model = torch.where(torch.arange(images) < correct * images, labels, (labels + 1) % 10)
    for wrong in (passes, passes + 1):
        predicted = torch.cat([(labels[:wrong] + 1) % 10, model[wrong:]])
        scores = parity.compare_scores(
            kind, *(Evaluation(torch.eye(10)[classes], labels) for classes in (model, predicted))
        )
        assert scores.passed == (wrong == passes)
        assert scores.agreement == pytest.approx(1 - wrong / images)
        assert scores.accuracy_change == pytest.approx(-wrong / images)
        assert scores.accuracy == pytest.approx(correct - wrong / images)
        assert sum(scores.class_change) == pytest.approx(-10 * wrong / images)
        assert (scores.images, scores.largest_logit_difference) == (images, 1.0)


def test_an_infinite_logit_fails_the_gate() -> None:
    """Although its class is the right one; a class without images has no accuracy to compare."""
    labels = torch.zeros(10, dtype=torch.int64)
    logits = torch.eye(2)[labels]
    infinite = logits.clone()
    infinite[0, 0] = torch.inf
    for kind, limit in (("fp32", "agreement ≥ 99.99%"), ("int8", "accuracy drop ≤ 0.5 points")):
        scores = parity.compare_scores(kind, Evaluation(logits, labels), Evaluation(infinite, labels))
        assert (scores.passed, scores.largest_logit_difference) == (False, None)
        assert scores.limit == f"{limit}, and finite logits"
        assert scores.class_change == [0.0, None]
        assert parity.compare_scores(kind, Evaluation(logits, labels), Evaluation(logits, labels)).limit == limit


def _scores(passed: bool = True) -> dict[str, Any]:
    return {
        "images": 9, "accuracy": 0.5, "accuracy_change": -0.1, "agreement": 0.9, "class_change": [0.0],
        "largest_logit_difference": 0.1, "limit": "x", "passed": passed,
    }  # fmt: skip


def test_only_a_row_of_the_same_file_provider_engine_and_machine_counts(run: Run) -> None:
    file = exporter.exported(run)
    unscored = f"{file.path}: not scored on {CPU} yet; first: runner parity {run.folder} --device cpu"
    with pytest.raises(UserError, match=f"^{unscored}$"):
        parity.require_passed(run, file, CPU)
    report = parity.score(run, [file], None, "cpu")[0]
    (row,) = report.rows
    assert parity.require_passed(run, file, CPU) == GateResult(accuracy_change=0.0, agreement=1.0, passed=True)
    others = [replace(row, **change) for change in (
        {"onnx_sha256": "0"}, {"provider": "other"}, {"engine_sha256": "0"}, {"machine": Machine(cpu="other")},
    )]  # fmt: skip
    write_json(run.parity, replace(report, rows=others))
    with pytest.raises(UserError, match=f"^{unscored}$"):
        parity.require_passed(run, file, CPU)
    assert parity.require_passed(run, file, CPU, "0").passed
    failed = replace(row, passed=False)
    write_json(run.parity, replace(report, rows=[*others, failed, row]))
    with pytest.raises(UserError, match=f"{file.path}: failed the gate on {CPU} .*, so it is not used"):
        parity.require_passed(run, file, CPU)


def test_only_a_row_of_the_same_precision_weights_and_machine_counts_for_torch(run: Run) -> None:
    report = parity.score(run, [exporter.exported(run)], None, "cpu")[0]
    row = TorchRow(**_scores(), precision="fp16", weights=exporter.weights_sha256(run), machine=parity.this_machine())
    others = [
        replace(row, **change) for change in ({"precision": "fp32"}, {"weights": "0"}, {"machine": Machine(cpu="x")})
    ]
    unscored = f"{run.folder}: torch in fp16 has not been scored here; first: runner parity {run.folder}"
    for rows, message in (
        ([], unscored),
        (others, unscored),
        ([*others, replace(row, passed=False), row], f"{run.folder}: torch in fp16 failed the gate .limit: x."),
    ):
        write_json(run.parity, replace(report, torch=rows))
        with pytest.raises(UserError, match=f"^{message}$"):
            parity.require_torch_passed(run, "fp16")
    write_json(run.parity, replace(report, torch=[*others, row]))
    parity.require_torch_passed(run, "fp16")
    run.parity.unlink()
    with pytest.raises(UserError, match=f"^{unscored}$"):
        parity.require_torch_passed(run, "fp16")


def test_a_new_version_of_onnxruntime_replaces_the_results_of_the_earlier_one(run: Run) -> None:
    file = exporter.exported(run)
    report = parity.score(run, [file], None, "cpu")[0]
    (row,) = report.rows
    earlier = replace(row, passed=False, machine=replace(row.machine, onnxruntime="1.0"))
    elsewhere = replace(earlier, machine=Machine(cpu="another"))
    write_json(run.parity, replace(report, rows=[earlier, elsewhere]))
    assert parity.score(run, [file], None, "cpu")[0].rows == [elsewhere, row]


@pytest.fixture
def without_bias(run: Run) -> Run:
    """A run whose last operator passes a relative error on as it is."""
    weights = checkpoint.load_model(run).state_dict()
    checkpoint.save(run, weights | {"layers.8.bias": torch.zeros(10)}, 2)
    add_file(run, "fp32")
    return run


def culprit_of(run: Run, file: OnnxFile, backend: str = "onnxruntime", provider: str = CPU, **options: Any) -> str:
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    candidate = parity.Candidate(file, backend, provider, lambda images: images)
    return parity.find_culprit(run, candidate, images, options.get("device", "cpu"))[0]


@pytest.mark.parametrize(
    ("factor", "culprit"),
    [
        (0.0, "Conv second (relative error 1, 0 before it)"),
        (np.nan, "Conv second (relative error inf, 0 before it)"),
        (3.0, "Conv second (relative error 2, 0 before it)"),
        (1 + 2e-4, "Conv second (relative error 0.0002, 0 before it)"),
        (1 + 5e-5, "none: onnxruntime on cpu agrees with the fp32 file; the error is in CPUExecutionProvider"),
    ],
)
def test_the_culprit_is_the_operator_that_adds_the_largest_error(
    without_bias: Run, factor: float, culprit: str
) -> None:
    assert culprit_of(without_bias, add_file(without_bias, "fp16", scale_second(factor))) == culprit


def test_an_error_before_an_operator_is_not_its_own(without_bias: Run) -> None:
    """The first convolution doubles, the second adds more: both errors are reported."""

    def change(weights: dict[str, np.ndarray]) -> None:
        scale_second(4.0)(weights)
        for name in ("layers.0.weight", "layers.0.bias"):
            weights[name] *= 2
        weights["layers.3.bias"] *= 2

    culprit = culprit_of(without_bias, add_file(without_bias, "fp16", change))
    assert culprit == "Conv second (relative error 7, 1 before it)"


def test_any_operator_may_be_the_culprit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one, a constant, or one that should compute zeros; all run as written, without optimizations."""
    options: list[dict[str, Any]] = []

    def session(*arguments: Any, **more: Any) -> OnnxSession:
        options.append(more)
        return OnnxSession(*arguments, **more)

    monkeypatch.setattr(sensitivity, "OnnxSession", session)

    def change(weights: dict[str, np.ndarray]) -> None:
        weights["layers.0.weight"] *= 1.5
        weights["layers.0.bias"] *= 1.5
        weights["layers.3.bias"] *= 1.5
        weights["layers.8.bias"] *= 1.5

    culprit = culprit_of(run, add_file(run, "fp16", change, first="a"))
    assert culprit == "Conv first (relative error 0.5, 0 before it)"
    culprit = culprit_of(run, add_file(run, "fp16", scale=1.5))
    assert culprit == "Constant scale (relative error 0.5, 0 before it)"
    add_file(run, "fp32", scale=0.0)
    assert not culprit_of(run, add_file(run, "fp16")).startswith("none")
    assert options == [{"optimize": False}] * 6


def test_a_failed_file_proposes_the_quantized_operators_that_add_the_largest_errors(run: Run) -> None:
    """At most three of them, in the order of their errors, and none that is not quantized."""
    proto, metadata = exporter.read(exporter.exported(run).path)
    proto.graph.node[-1].output[0] = "before"
    proto.graph.node.append(onnx.helper.make_node("MatMul", ["before", "turn"], ["logits"], name="fourth"))
    turn = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(0)))[0].numpy()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(turn, "turn"))
    fp32 = exporter.write(run, proto, "fp32", False, metadata.weights)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def search(file: OnnxFile) -> tuple[str, list[str]]:
        return parity.find_culprit(run, parity.Candidate(file, "onnxruntime", CPU, lambda x: x), images, "cpu")

    for kept, number in (((), 3), (("first", "second"), 2)):
        quantized, metadata = exporter.read(precision.convert(run, "int8", images.numpy(), kept=kept).path)
        (scale,) = [entry for entry in quantized.graph.initializer if entry.name == "turn_scale"]
        scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
        int8 = exporter.write(run, quantized, "int8", False, metadata.weights)
        errors = sensitivity.added_errors(*(exporter.read(file.path)[0] for file in (fp32, int8)), images.numpy())
        names = ("first", "second", "last", "fourth")
        worst = [error for error in errors if error.operator in names and error.operator not in kept]
        assert worst[0].operator == "fourth"
        assert worst[-1].added > parity.MIN_CULPRIT_ERROR
        assert search(int8) == (str(errors[0]), [error.operator for error in worst[:number]])
    assert search(add_file(run, "fp16", scale_second(2.0)))[1] == []


def test_an_activation_that_the_quantizer_leaves_to_the_limits_of_uint8_adds_no_error(without_bias: Run) -> None:
    """Its tensor is computed by the operator before it, and is compared after it was quantized."""
    run = without_bias
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    file = precision.convert(run, "int8-cpu", images.numpy())
    proto, metadata = exporter.read(file.path)
    assert not any(node.op_type == "Relu" for node in proto.graph.node)
    errors = sensitivity.added_errors(exporter.read(exporter.exported(run).path)[0], proto, images.numpy())
    assert {"first", "second", "last", "pool", "flatten", "times"} <= {error.operator for error in errors}
    assert 0 < errors[0].added < 0.1
    proto, _ = exporter.read(file.path)
    for entry in proto.graph.initializer:
        if entry.name == "layers.3.weight_quantized":
            entry.CopyFrom(onnx.numpy_helper.from_array(0 * onnx.numpy_helper.to_array(entry), entry.name))
    spoiled = exporter.write(run, proto, "int8-cpu", False, metadata.weights)
    candidate = parity.Candidate(spoiled, "onnxruntime", CPU, lambda images: images)
    culprit, proposed = parity.find_culprit(run, candidate, images, "cpu")
    assert culprit.startswith("Conv second")
    assert proposed[0] == "second"


def test_where_no_culprit_can_be_named(run: Run) -> None:
    fp16, fp32, raw = add_file(run, "fp16"), exporter.exported(run), add_file(run, "fp32", raw=True)
    assert culprit_of(run, raw) == "the raw front end"
    assert culprit_of(run, fp32) == "none: the fp32 file on the CPU is the reference of the search; export it again"
    agrees = "none: onnxruntime on cpu agrees with the fp32 file; the error is in "
    for file in (fp16, fp32):  # an engine's file is searched on the CPU
        assert culprit_of(run, file, "engine", "tensorrt 1", device="cuda") == f"{agrees}tensorrt 1"
    assert culprit_of(run, fp16, device="cuda").startswith("none: the search failed (")  # onnxruntime has no GPU here
    fp32.path.unlink()
    assert "none: the search failed (" in culprit_of(run, fp16)


def test_a_named_backend_that_does_not_run_here_is_refused_beside_others(run: Run) -> None:
    with pytest.raises(UserError, match="--backend onnxruntime engine: not available here on cpu"):
        parity.score(run, [exporter.exported(run)], None, "cpu", ("onnxruntime", "engine"))


def test_only_what_was_scored_now_is_returned(run: Run) -> None:
    """The report keeps the rest: of other files, and of other machines."""
    first, _ = parity.score(run, [exporter.exported(run)], None, "cpu")
    elsewhere = [msgspec.structs.replace(row, machine=Machine(cpu="another"), passed=False) for row in first.rows]
    write_json(run.parity, msgspec.structs.replace(first, rows=elsewhere))
    report, scored = parity.score(run, [exporter.exported(run)], None, "cpu")
    assert [row.passed for row in scored] == [True]
    assert report.rows == [*elsewhere, *scored]


def test_a_failed_row_names_its_culprit(run: Run) -> None:
    (row,) = parity.score(run, [add_file(run, "fp16", scale_second(0.0))], None, "cpu")[0].rows
    assert not row.passed
    assert row.culprit.startswith("Conv second")
    assert row.agreement < 0.999


@pytest.mark.parametrize(
    ("device", "backends", "opened", "left"),
    [
        ("cpu", (), ["onnxruntime"], []),
        ("cpu", ("engine",), [], []),
        ("cuda", (), ["onnxruntime", "here 1"], ["another GPU"]),
        ("cuda", ("engine",), ["here 1"], ["another GPU"]),
        ("cuda", ("onnxruntime",), ["onnxruntime"], []),
        ("cuda", ("onnxruntime-tensorrt",), ["onnxruntime"], []),
        ("cpu", ("aotinductor",), ["AOTInductor on the cpu"], []),
        ("cuda", ("aotinductor", "engine"), ["here 1", "AOTInductor on the cuda"], ["another GPU"]),
    ],
)
def test_each_backend_opens_what_runs_here(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    backends: tuple[str, ...],
    opened: list[str],
    left: list[str],
) -> None:
    """Engines for other GPUs are left out only where there is one for this GPU."""
    sidecars = [
        SimpleNamespace(provider=f"{name} 1", here=here, sha256=name, caveat=None)
        for name, here in (("here", True), ("there", False))
    ]
    sessions: list[tuple[str, bool]] = []

    def session(path: Path, device: str, fp16: bool) -> SimpleNamespace:
        sessions.append((device, fp16))
        return SimpleNamespace(provider="onnxruntime")

    def running(run: Run, sidecar: Any) -> SimpleNamespace:
        if not sidecar.here:
            raise ProviderError("another GPU")
        return SimpleNamespace(run_in_batches=None)

    file = dataclasses.replace(exporter.exported(run), precision="fp16")
    monkeypatch.setattr(parity, "OnnxSession", session)
    monkeypatch.setattr(parity.package, "compiled", lambda run, device: dataclasses.replace(file, sha256=device))
    monkeypatch.setattr(parity.package, "provider_of", lambda device: f"AOTInductor on the {device}")
    monkeypatch.setattr(parity.package, "load", lambda path: None)
    monkeypatch.setattr(parity.engine_run, "verified_engines", lambda run, file: sidecars)
    monkeypatch.setattr(parity.engine_run, "incompatibility", lambda sidecar: None if sidecar.here else "another GPU")
    monkeypatch.setattr(parity.engine_run, "LoadedEngine", running)
    candidates, not_scored = parity._open_candidates(run, [file], device, backends)
    assert [candidate.provider for candidate in candidates] == opened
    assert [(entry.onnx, entry.backend, entry.reason) for entry in not_scored] == [
        (str(file.path), "engine", reason) for reason in left
    ]
    provider = "tensorrt" if "onnxruntime-tensorrt" in backends else device
    assert sessions == [(provider, True)] * opened.count("onnxruntime")
    packages = [candidate.file.sha256 for candidate in candidates if candidate.backend == "aotinductor"]
    assert packages == [device] * ("aotinductor" in backends)
    assert [candidate.engine_sha256 for candidate in candidates if candidate.backend == "engine"] == ["here"] * (
        "here 1" in opened
    )
    if device == "cuda" and backends in ((), ("engine",)):
        sidecars[0].here = False
        if backends:
            with pytest.raises(UserError, match="another GPU"):
                parity._open_candidates(run, [file], device, backends)
        else:
            candidates, not_scored = parity._open_candidates(run, [file], device, backends)
            assert [candidate.provider for candidate in candidates] == ["onnxruntime"]
            assert [entry.reason for entry in not_scored] == ["another GPU"] * 2
