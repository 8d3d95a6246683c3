"""ONNX files, engines and latencies of every architecture."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace
from PIL import Image, ImageDraw

from data_prep import beton, manifest, sources
from data_prep.sources import Source
from runner import experiments
from runner.common import memory
from runner.common.errors import UserError
from runner.common.files import read_json, sha256_of, write_json
from runner.config.recipe import Experiment
from runner.data.open import model_input, open_split_of_run
from runner.deploy import engine_build, engine_library, engine_run, latency, parity, precision, predict
from runner.deploy import onnx as exporter
from runner.deploy.session import OnnxSession, ProviderError, usable_providers
from runner.run.folder import Run
from runner.run.schema import BatchRange, Dataset, EngineSidecar, FrontEnd, LatencyReport, Machine, ParityReport
from runner.training import checkpoint
from tests.conftest import Once
from tests.support.configs import config_of, trusted
from tests.support.models import shallow, tiny
from tests.support.models.tiny import Tiny
from tests.support.processes import TINY, runner

ALL = experiments.load() | shallow.EXPERIMENTS
# One experiment of each architecture, and those that have other kinds of layers: global max pooling, no batch norm.
ONE_OF_EACH = {
    *{e.architecture.factory: name for name, e in reversed(ALL.items())}.values(), "sivva-1", "ghasemi-10",
}  # fmt: skip
# The first experiment of each network; those with the same arguments but for dropout export the same graph.
NETWORKS = {
    (e.architecture.factory, *sorted((key, v) for key, v in e.architecture.arguments.items() if key != "dropout")): name
    for name, e in reversed(ALL.items())
}.values()
# By default most kinds of layers, and one resized input: an export of a deep network takes up to a minute.
# With --every, every network in fp32, and one of each architecture in every precision and front end.
IN_EVERY_PRECISION = ("shallow-mobilenetv2", "soni-2")
DEFAULT = {
    "fp32": (*IN_EVERY_PRECISION, "shallow-vit"),
    "fp32.raw": IN_EVERY_PRECISION,
    "fp16": IN_EVERY_PRECISION,
    "int8": IN_EVERY_PRECISION,
}

# Root mean square error of logits, as a share of the logits' spread over images; 1 if images were ignored.
LOGIT_ERROR = {"fp32": 1e-3, "fp16": 0.25}
BETWEEN_BATCHES = 0.05  # for another order of summation, after which a lower precision rounds differently
# Largest relative error that one operator may add in int8; one that lost its input would add 1.
ADDED_BY_INT8 = 0.5


def of_every_network(*kinds: str) -> pytest.MarkDecorator:
    """Parameters `exported` and `kind`."""
    return pytest.mark.parametrize(
        ("exported", "kind"),
        [
            pytest.param(name, kind, marks=[] if name in DEFAULT[kind] else pytest.mark.every)
            for name in reversed(NETWORKS)
            for kind in kinds
            if kind == "fp32" or name in ONE_OF_EACH
        ],
        indirect=["exported"],
    )


def untrained(name: str, experiment: Experiment, data: Path, folder: Path) -> Run:
    """A run folder with random weights, and batch norm statistics of some images."""
    prepared = manifest.read(data)
    run = trusted(folder / name / "seed-0")
    dataset = Dataset(
        name=prepared.name,
        fingerprint=prepared.fingerprint,
        classes=list(prepared.classes),
        image_shape=list(prepared.image_shape),
        mean=list(prepared.mean),
        std=list(prepared.std),
        folder=str(data),
    )
    config = config_of(
        experiment=name,
        architecture=experiment.architecture,
        recipe=dataclasses.replace(experiment.recipe, validation=0),
        dataset=dataset,
        input=model_input(prepared, experiment.recipe),
    )
    write_json(run.run_json, config)
    torch.manual_seed(0)
    model = experiment.architecture.build()
    # Without this, some return the same logits for every image: a last layer is zero, or batch norm is far off.
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # plain averages
    images = torch.from_numpy(precision.calibration_images(run, None, 8 if experiment.recipe.resize else 16))
    with torch.no_grad():
        model(torch.cat([images, torch.randn(images.shape)]))  # with noise, which the export's check uses
    checkpoint.save(run, model.state_dict(), 0)
    return run


@pytest.fixture(scope="session")
def few(once: Once, source: Source) -> Path:
    """A dataset of 20 training and 6 test images of each class."""

    def make(folder: Path) -> None:
        train, test = sources.limit_split(source.train, 20), sources.limit_split(source.test, 6)
        provenance = {**source.provenance, "limited": True}
        beton.write(dataclasses.replace(source, train=train, test=test, provenance=provenance), folder / "data")

    return once("few", make) / "data"


@pytest.fixture
def exported(request: pytest.FixtureRequest, once: Once, few: Path) -> Run:
    """A run exported in fp32. One process runs all tests of an experiment, and they share the files they add."""

    def make(folder: Path) -> None:
        exporter.export(untrained(request.param, ALL[request.param], few, folder))

    return trusted(once(f"exported-{request.param}", make) / request.param / "seed-0")


def file_of(run: Run, kind: str) -> exporter.OnnxFile:
    """A run's file, exported on first use."""
    lower, raw = kind.removesuffix(".raw"), kind.endswith(".raw")
    if not exporter.is_current(run, lower):
        precision.convert(run, lower, precision.calibration_images(run, None, 8))
    if not exporter.is_current(run, lower, raw):
        precision.add_raw_front_end(run, lower)
    return exporter.exported(run, lower, raw)


def rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.square(array, dtype=np.float64).mean()))


def logits_of(run: Run, images: np.ndarray) -> tuple[np.ndarray, float]:
    """The model's logits, and their spread over images."""
    model = checkpoint.load_model(run)
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in torch.from_numpy(images).split(64)]).numpy()
    return logits, rms(logits - logits.mean(0))


@of_every_network("fp32", "fp32.raw")
def test_fp32_agrees_with_the_model_by_either_front_end(exported: Run, kind: str) -> None:
    file = file_of(exported, kind)
    report = parity.score(exported, [file], None, "cpu")[0]
    (row,) = [row for row in report.rows if row.onnx == f"deploy/{file.path.name}"]
    logits, _ = logits_of(exported, scored_images(exported).numpy())
    second, first = np.sort(logits, 1)[:, -2:].T
    assert row.largest_logit_difference < LOGIT_ERROR["fp32"] * np.abs(logits).max()
    assert row.agreement == 1 or (first - second).min() < 2 * row.largest_logit_difference
    assert row.passed == (row.agreement == 1)
    assert row.images == 60
    assert row.front_end == file.front_end
    assert row.provider == "CPUExecutionProvider"


@of_every_network("fp32", "fp16", "int8")
def test_onnx_takes_any_batch(exported: Run, kind: str) -> None:
    check_batches(exported, kind, largest=30)


@pytest.mark.every
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("exported", IN_EVERY_PRECISION, indirect=True)
def test_onnx_takes_the_default_largest_batch_of_an_engine(exported: Run, kind: str) -> None:
    """A graph that holds a batch size fails with others too, which the test above tries for every architecture."""
    check_batches(exported, kind, largest=512)


def check_batches(exported: Run, kind: str, largest: int) -> None:
    """The logits are the model's, except in int8, which is compared operator by operator below."""
    session = OnnxSession(file_of(exported, kind).path, fp16=kind == "fp16")
    images = precision.calibration_images(exported, None, 30)
    expected, spread = logits_of(exported, images)
    images, expected = (np.resize(array, (largest, *array.shape[1:])) for array in (images, expected))
    assert spread > 1e-3 * np.abs(expected).max()
    largest_batch = session(images)
    for logits in (session(images[:1]), session(images[:7]), largest_batch):
        assert logits.dtype == np.float32
        assert rms(logits - largest_batch[: len(logits)]) < BETWEEN_BATCHES * spread
        if kind in LOGIT_ERROR:
            assert rms(logits - expected[: len(logits)]) < LOGIT_ERROR[kind] * spread


@of_every_network("int8")
def test_each_int8_operator_is_close_to_fp32(exported: Run, kind: str) -> None:
    """Run without optimizations, so that the processor's kernels make no difference."""
    candidate = parity.Candidate(file_of(exported, kind), "onnxruntime", "CPUExecutionProvider", lambda images: images)
    images = torch.from_numpy(precision.calibration_images(exported, None, 12)[8:])
    culprit, _ = parity.find_culprit(exported, candidate, images, "cpu")
    error, before = map(float, re.search(r"relative error (\S+), (\S+) before it", culprit).groups())
    assert error - before < ADDED_BY_INT8, culprit


@of_every_network("fp32", "fp32.raw", "fp16", "int8")
def test_onnx_is_one_file_with_metadata(exported: Run, kind: str, few: Path) -> None:
    file = file_of(exported, kind)
    names = {path.name for path in exported.deploy.iterdir() if "onnx" in path.name}
    assert names == {f"model.{one.name}.onnx" for one in exporter.all_exported(exported)}
    prepared = manifest.read(few)
    model, metadata = exporter.read(file.path)
    assert exporter.name_of(metadata.precision, metadata.front_end == FrontEnd.RAW) == kind
    assert metadata.classes == list(prepared.classes)
    assert list(metadata.mean) == exported.config().input.mean
    assert metadata.dataset.fingerprint == prepared.fingerprint
    graph_input = model.graph.input[0]
    assert graph_input.name == ("pixels" if file.raw else "images")
    assert graph_input.type.tensor_type.shape.dim[0].dim_param
    assert model.graph.output[0].name == "logits"


@of_every_network("fp32", "fp16", "int8")
def test_a_real_engine_of_each_precision_is_built(exported: Run, kind: str) -> None:
    file = file_of(exported, kind)
    sidecar = engine_build.build(exported, file, engine_build.EngineOptions("tensorrt-rtx", (1, 64, 256)))
    assert (exported.folder / sidecar.engine).stat().st_size == sidecar.bytes
    assert sidecar.onnx_sha256 == sha256_of(file.path)
    expected = {"fp32": "FLOAT", "fp16": "HALF", "int8": "INT8"}[kind]
    for layers in ("CONVOLUTION", "MATRIX_MULTIPLY"):  # whether they read images, features or weights
        assert set(sidecar.layer_precisions[layers]) == {expected}
    if kind == "fp16":
        for layers in ("NORMALIZATION", "SOFTMAX"):  # if there are any
            assert set(sidecar.layer_precisions.get(layers, ["FLOAT"])) == {"FLOAT"}
    # What the builder reports of the engine itself: the size of its weights, in int8 perhaps only of some.
    parameters = sum(p.numel() for p in checkpoint.load_model(exported).parameters())
    each, size = sidecar.weights_bytes / parameters, {"fp32": 4, "fp16": 2, "int8": 1}[kind]
    assert (0.3 if kind == "int8" else 0.75) * size < each < 1.25 * size
    assert ("int8 convolutions" in sidecar.outside_matrix) == (kind == "int8")
    assert sidecar.batch == BatchRange(min=1, opt=64, max=256)
    assert sidecar.dataset == exported.config().dataset.name
    assert sidecar in engine_run.verified_engines(exported, file)


@pytest.fixture
def own(deployed_run: Path, tmp_path: Path) -> Run:
    """A copy of the tiny run: exported in fp32, scored, built and measured."""
    return trusted(shutil.copytree(deployed_run, tmp_path / "tiny" / "own"))


@pytest.fixture
def unbuilt(own: Run) -> Run:
    """As `own`, without the engine."""
    for path in own.deploy.glob("*.engine*"):
        path.unlink()
    return own


def with_weights_of(run: Run, model: torch.nn.Module) -> Run:
    """The run with other weights, exported again: its earlier files are no longer current."""
    checkpoint.save(run, model.state_dict(), 10_000)
    exporter.export(run)
    return run


@pytest.fixture
def varied(unbuilt: Run) -> Run:
    """A run with random weights that predicts various classes: the logits' mean over the test images is 0."""
    torch.manual_seed(0)
    model = Tiny()
    with torch.no_grad():
        model.layers[-1].bias -= model(scored_images(unbuilt)).mean(0)
    return with_weights_of(unbuilt, model)


@pytest.fixture
def confident(unbuilt: Run) -> Run:
    """A run that predicts one class for any image, by far, so that it passes the gate in any precision."""
    model = checkpoint.load_model(unbuilt)
    with torch.no_grad():
        model.layers[-1].bias[0] += 50
    return with_weights_of(unbuilt, model)


def scored_images(run: Run) -> torch.Tensor:
    """The test images as the model takes them."""
    batches = open_split_of_run(run.config(), None, "test", torch.device("cpu"))
    return torch.cat([images for images, _ in batches.epoch(0)])


def test_files_of_earlier_weights_are_refused(own: Run) -> None:
    """Training continued after the export."""
    precision.convert(own, "fp16", None)
    assert parity.require_passed(own, exporter.exported(own), "CPUExecutionProvider").passed
    report = own.read_parity()
    write_json(own.parity, replace(report, rows=[replace(report.rows[0], machine=Machine(cpu="another"))]))
    with pytest.raises(UserError, match="not scored on CPUExecutionProvider"):
        parity.require_passed(own, exporter.exported(own), "CPUExecutionProvider")
    weights = {name: tensor + 1 for name, tensor in checkpoint.load_model(own).state_dict().items()}
    checkpoint.save(own, weights, 10_000)
    with pytest.raises(UserError, match="found one exported from other weights; make it: runner export"):
        exporter.exported(own)
    assert exporter.all_exported(own) == []
    done = runner("export", own.folder, *TINY, "--precision", "fp16", "--json")
    assert [row["name"] for row in json.loads(done.stdout)] == ["fp32", "fp16"]


def test_an_engine_runs_on_any_number_of_images(own: Run) -> None:
    (sidecar,) = engine_run.verified_engines(own, exporter.exported(own))

    class Sum(engine_run.LoadedEngine):
        """Stands in for an engine that takes 3 or 4 images."""

        def __init__(self) -> None:
            self.sidecar, self.torch = replace(sidecar, batch=BatchRange(min=3, opt=4, max=4)), torch

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            assert 3 <= len(images) <= 4
            return images.flatten(1).sum(1, keepdim=True)

    images = torch.rand(9, 3, 2, 2)
    torch.testing.assert_close(Sum().run_in_batches(images), images.flatten(1).sum(1, keepdim=True))


def test_a_sidecar_has_targets_and_the_raw_front_end(own: Run) -> None:
    file = precision.add_raw_front_end(own, "fp32")
    options = engine_build.EngineOptions("tensorrt-rtx", (1, 8, 16), ("SM89", "SM120"), 3)
    sidecar = engine_build.build(own, file, options)
    assert sidecar.target == "SM89, SM120"
    assert sidecar.optimization_level == 3
    assert sidecar.inputs == [("pixels", [-1, 32, 32, 3], "UINT8")]


def test_an_fp16_request_cannot_give_an_fp32_engine(unbuilt: Run) -> None:
    """Neither from a file with fp16 in its name and fp32 in its graph, nor if the engine differs from its network."""
    proto, metadata = exporter.read(exporter.path_of(unbuilt, "fp32"))
    exporter.write(unbuilt, proto, "fp16", False, metadata.weights)
    with pytest.raises(UserError, match=r"expected HALF arithmetic for fp16, found {'FLOAT'"):
        engine_build.build(
            unbuilt, exporter.exported(unbuilt, "fp16"), engine_build.EngineOptions("tensorrt-rtx", (1, 2, 4))
        )
    assert not list(unbuilt.deploy.glob("*.engine*"))
    fp32 = [{"LayerType": "Conv", "Outputs": [{"Format/Datatype": "Row major linear FP32"}]}]
    fp16 = [*fp32, {"LayerType": "Conv", "Outputs": [{"Format/Datatype": "Channel major FP16 format"}]}]
    file = exporter.exported(unbuilt, "fp16")
    assert engine_build.inspected_precisions(fp16) == {"FLOAT": 1, "HALF": 1}
    engine_build.check_inspected(file, fp16)
    engine_build.check_inspected(file, [{"Outputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}])
    with pytest.raises(UserError, match=r"expected HALF in the engine for fp16, found {'FLOAT': 1}"):
        engine_build.check_inspected(file, fp32)


def spoil_fp16(run: Run, change: Callable[[np.ndarray], np.ndarray]) -> str:
    """Changes a filter in the run's fp16 file; returns the name of the convolution."""
    file = precision.convert(run, "fp16", None)
    model, metadata = exporter.read(file.path)
    second = [node for node in model.graph.node if node.op_type == "Conv"][1]
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == second.input[1]]
    weight.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(weight).copy()), weight.name))
    exporter.write(run, model, "fp16", False, metadata.weights)
    return f"Conv {second.name}"


def test_a_layer_that_returns_nan_is_named(varied: Run) -> None:
    """The row is written without the figure that JSON cannot express."""
    name = spoil_fp16(varied, lambda weight: np.where(weight > 0, np.float16(np.nan), weight))
    (row,) = parity.score(varied, [exporter.exported(varied, "fp16")], None, "cpu")[0].rows
    assert not row.passed
    assert row.largest_logit_difference is None
    assert row.culprit.startswith(name)


def test_the_gate_names_the_layer_that_fails(varied: Run) -> None:
    """With a filter of zeros, the model predicts the same class for all images."""
    name = spoil_fp16(varied, np.zeros_like)
    done = runner("parity", varied.folder, *TINY, "--precision", "fp16", "--device", "cpu", "--json")
    (row,) = msgspec.json.decode(done.stdout, type=ParityReport).rows
    assert not row.passed
    assert row.agreement < 0.999
    assert row.culprit.startswith(name)
    assert done.returncode == 1
    assert f"worst at {name}" in done.stderr
    done = runner("bench", varied.folder, *TINY, "--precision", "fp16", "--device", "cpu", "--backend", "onnxruntime")
    assert done.returncode == 2
    assert "failed the gate" in done.stderr


@pytest.mark.every
def test_commands_print_only_json(confident: Run) -> None:
    options = ("--precision", "fp32", "int8-cpu", "--calibration", 64, "--raw", "--json")
    done = runner("export", confident.folder, *TINY, *options)
    assert [row["name"] for row in json.loads(done.stdout)] == ["fp32", "int8-cpu", "fp32.raw", "int8-cpu.raw"]
    quick = ("--device", "cpu", "--seconds", 0.05, "--repeats", 3, "--json")
    unscored = runner("bench", confident.folder, *TINY, *quick)
    assert unscored.returncode == 1
    assert "first: runner parity" in unscored.stderr
    (report,) = msgspec.json.decode(unscored.stdout, type=list[LatencyReport])
    assert {row.backend for row in report.rows if row.measured} == {"eager"}  # which needs no file
    alone = runner("bench", confident.folder, *TINY, *quick, "--backend", "onnxruntime")
    assert alone.returncode == 2
    assert "first: runner parity" in alone.stderr
    done = runner("parity", confident.folder, *TINY, "--json", "--device", "cpu")
    rows = msgspec.json.decode(done.stdout, type=ParityReport).rows
    assert [row.onnx.removeprefix("deploy/model.") for row in rows] == [
        "fp32.onnx", "int8-cpu.onnx", "fp32.raw.onnx", "int8-cpu.raw.onnx",
    ]  # fmt: skip
    assert {row.classes_predicted for row in rows} == {1}
    assert done.stderr.count("but one class is predicted for all images") == 4
    normalized, raw = (row for row in rows if row.precision == "int8-cpu")
    assert raw.accuracy == normalized.accuracy
    assert raw.largest_logit_difference == pytest.approx(normalized.largest_logit_difference, rel=0.25)
    done = runner("engine", confident.folder, "--json", "--batch", 1, 2, 4)
    (sidecar,) = msgspec.json.decode(done.stdout, type=list[EngineSidecar])
    assert sidecar.batch.max == 4


def bench_on_one_thread(run: Run, *options: object) -> LatencyReport:
    """The report that `runner bench` prints."""
    quick = ("--device", "cpu", "--threads", 1, "--seconds", 0.05, "--repeats", 20)
    done = runner("bench", run.folder, *TINY, "--json", *quick, *options)
    (report,) = msgspec.json.decode(done.stdout, type=list[LatencyReport])
    return report


@pytest.mark.parametrize(("slow_calls", "warned"), [(0, False), (1, False), (3, True)])
def test_bench_warns_of_a_wide_spread(slow_calls: int, warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every ten calls some take four times as long, by a clock that only they advance."""
    now, calls = [0.0], [0]

    def compute() -> None:
        calls[0] += 1
        now[0] += 0.004 if calls[0] % 10 < slow_calls else 0.001

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    figures = latency.measure({"compute": compute}, 8, 1.0, 100, "cpu")
    assert figures["p50_ms"] == pytest.approx(1.0)
    assert figures["images_per_second"] == pytest.approx(8000)
    assert figures.get("warning") == ("p90 is 4.0 times p50: other programs were running" if warned else None)


def test_a_contact_sheet_names_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, **options: drawn.append(text))
    names = ["a.png", f"{'long-' * 20}1.png", f"{'long-' * 20}2.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    predict.draw([predict.Prediction(str(tmp_path / name), "cat", 0.5) for name in names], tmp_path / "sheet.png")
    assert drawn[:3] == ["cat", "50.0%", "a.png"]
    assert (drawn[5][0], drawn[5][-5:], drawn[8][-5:]) == ("…", "1.png", "2.png")


def test_logits_that_are_not_finite_are_refused(confident: Run, tmp_path: Path) -> None:
    """By export, and by predict of a file from elsewhere."""
    run = trusted(shutil.copytree(confident.folder, tmp_path / "run"))
    model = onnx.load(run.deploy / "model.fp32.onnx")
    bias = model.graph.initializer[0]
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full_like(onnx.numpy_helper.to_array(bias), np.nan), bias.name))
    onnx.save(model, tmp_path / "nan.onnx")
    picture = tmp_path / "x.png"
    Image.new("RGB", (32, 32)).save(picture)
    with pytest.raises(UserError, match=r"nan\.onnx: returned logits that are not finite for .*x\.png"):
        predict.predict(tmp_path / "nan.onnx", [picture], 1, "cpu", None)


def test_bench_keeps_the_rows_of_current_files(confident: Run) -> None:
    precision.convert(confident, "int8-cpu", precision.calibration_images(confident, None, 64))
    engine_build.build(confident, exporter.exported(confident), engine_build.EngineOptions("tensorrt-rtx", (1, 2, 4)))
    parity.score(confident, exporter.all_exported(confident), None, "cpu")[0]
    report = bench_on_one_thread(confident, "--batch", 1, 3, "--precision", "fp32", "int8-cpu")
    measured = [row for row in report.rows if row.measured]
    assert [(row.backend, row.precision, row.batch) for row in measured] == [
        ("eager", "fp32", 1), ("eager", "fp32", 3),
        ("onnxruntime", "fp32", 1), ("onnxruntime", "fp32", 3),
        ("onnxruntime", "int8-cpu", 1), ("onnxruntime", "int8-cpu", 3),
    ]  # fmt: skip
    for row in measured:
        assert 0 < row.p50_ms <= row.p90_ms <= row.p99_ms
        assert row.calls >= 20
        assert row.images_per_second == pytest.approx(1e3 * row.batch / row.p50_ms)
        assert row.backend == "eager" or row.gate.passed
    assert (report.device, report.threads) == ("cpu", 1)
    assert [row.not_measured for row in report.rows if not row.measured] == [
        "engines run on a GPU, but this measurement is on the CPU"
    ]
    more = bench_on_one_thread(confident, "--batch", 2, "--backend", "eager")
    assert [row.batch for row in more.rows] == [2]
    assert [row for row in confident.read_latency().rows if row.batch != 2] == report.rows
    precision.convert(confident, "int8-cpu", precision.calibration_images(confident, None, 32))  # replaces its file
    bench_on_one_thread(confident, "--batch", 2, "--backend", "eager")
    rows = [row for row in confident.read_latency().rows if row.batch != 2]
    assert rows == [row for row in report.rows if row.precision == "fp32"]


@pytest.mark.images
def test_predict_needs_only_the_file(small_data: Path, source: Source, tmp_path: Path) -> None:
    """Images are resized to the dataset's size, and then as in training, with either front end."""
    recipe = dataclasses.replace(tiny.EXPERIMENTS["tiny-norm"].recipe, resize=40)
    larger = dataclasses.replace(tiny.EXPERIMENTS["tiny-norm"], recipe=recipe)
    run = trusted(untrained("larger", larger, small_data, tmp_path / "runs").folder)
    files = [exporter.export(run), precision.add_raw_front_end(run, "fp32")]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    pixels = []
    for k, size in ((0, (32, 32)), (7, (32, 32)), (42, (32, 32)), (99, (64, 48)), (150, (20, 50))):
        picture = Image.fromarray(source.test.images[k]).resize(size, Image.Resampling.BICUBIC)
        picture.save(pictures / f"{k:03}.png")
        pixels.append(np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)))
    (pictures / "note.txt").write_text("no image")
    (pictures / "._000.png").write_bytes(b"not an image either")
    config = run.config()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.input.mean, config.input.std))
    images = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) - mean) / std
    images = torch.nn.functional.interpolate(images, size=(40, 40), mode="bilinear", antialias=False)
    with torch.no_grad():
        probabilities = checkpoint.load_model(run)(images).softmax(1)
    for file in files:
        path = shutil.copy(file.path, tmp_path)
        done = runner("predict", path, pictures, "--batch", 2, "--json", "--sheet", tmp_path / "sheet.jpg")
        assert done.returncode == 0, done.stderr
        (tmp_path / "sheet.jpg").unlink()
        assert f"hidden or not images: {pictures / '._000.png'}, {pictures / 'note.txt'}" in done.stderr
        predictions = json.loads(done.stdout)
        assert [Path(one["image"]).name for one in predictions] == [f"{k:03}.png" for k in (0, 7, 42, 99, 150)]
        assert [one["label"] for one in predictions] == [config.dataset.classes[k] for k in probabilities.argmax(1)]
        assert [one["probability"] for one in predictions] == pytest.approx(probabilities.amax(1).tolist(), abs=1e-4)


@pytest.mark.parametrize("where", ["/etc/passwd", "../outside.bin", "link.bin", "hard-link.bin"])
def test_external_data_is_refused(own: Run, where: str, tmp_path: Path) -> None:
    """By an absolute path, one outside the folder, or a link: none is read."""
    model = onnx.load(exporter.path_of(own, "fp32"))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=where)
    (tmp_path / "link.bin").symlink_to("/etc/passwd")
    (tmp_path / "hard-link.bin").hardlink_to(own.run_json)
    path = tmp_path / "untrusted.onnx"
    path.write_bytes(model.SerializeToString())
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    done = runner("predict", path, tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "found external data" in done.stderr
    with pytest.raises(UserError, match="found external data"):
        exporter.read(path)


def test_predict_of_a_run_takes_a_file_that_passed_and_no_other(own: Run, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    picture = tmp_path / "picture.png"
    assert runner("predict", own.folder, picture).returncode == 0
    report = own.read_parity()
    failed = [replace(row, passed=False) for row in report.rows]
    elsewhere = [replace(row, machine=Machine(cpu="another")) for row in report.rows]
    for rows, reason in ((failed, "failed the gate"), (elsewhere, "not scored"), ([], "not scored")):
        write_json(own.parity, replace(report, rows=rows))
        done = runner("predict", own.folder, picture)
        assert done.returncode == 2
        assert "expected an ONNX file that passed the gate on cpu on this machine, found none" in done.stderr
        assert reason in done.stderr


def test_what_predict_refuses(own: Run, tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model")
    (tmp_path / "broken.png").write_bytes(b"no image")
    model, picture = exporter.path_of(own, "fp32"), tmp_path / "picture.png"
    Image.new("RGB", (32, 32)).save(picture)

    def changed(key: str, value: object) -> Path:
        proto = onnx.load(model)
        metadata = {entry.key: entry.value for entry in proto.metadata_props} | {key: json.dumps(value)}
        onnx.helper.set_model_props(proto, metadata)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx"
        onnx.save(proto, path)
        return path

    proto = onnx.load(model)
    (weight, *_) = [tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4]
    array = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(array[:, :2].copy(), weight.name))  # one channel less
    misshapen = tmp_path / "misshapen.onnx"
    onnx.save(proto, misshapen)
    for words, message in (
        ([tmp_path / "no.onnx", tmp_path / "broken.png"], "expected an ONNX file"),
        ([model, tmp_path / "broken.png"], "broken.png: not a readable image"),
        ([model, tmp_path / "none.png"], "found no such file"),
        ([model, tmp_path / "broken.png", "--batch", 5000], "--batch 5000: expected at most 4096"),
        ([changed("classes", []), picture], "has 0 classes, but returns logits (1, 10)"),
        (
            [changed("shape", 5), picture],
            "metadata of runner export: Expected `array`, got `int` - at `$.shape`",
        ),
        ([changed("image_shape", [9000, 9000, 3]), picture], "Expected `int` <= 8192 - at `$.image_shape[0]`"),
        ([changed("shape", [3, 16, 16]), picture], "takes images tensor(float) of ['batch', 3, 32, 32], found"),
        ([changed("classes", ["one", "two"]), picture], "has 2 classes, but returns logits (1, 10)"),
        ([misshapen, picture], "onnxruntime cannot run it"),
        ([model, picture, "--sheet", tmp_path / "sheet.xyz"], "ends in .png or .jpg"),
        *([] if torch.cuda.is_available() else [([model, picture, "--device", "cuda"], "asked onnxruntime for CUDA")]),
    ):
        done = runner("predict", *words)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert message in done.stderr


def test_predict_reads_no_pipe_and_no_more_than_fits(own: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe would be read forever; images are fitted one after the other, so that only the sheet grows with them."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    os.mkfifo(pictures / "pipe.png")
    Image.new("RGB", (32, 32)).save(pictures / "picture.png")
    model = exporter.path_of(own, "fp32")
    (only,) = predict.predict(model, [pictures], 1, "cpu", None)
    assert only.image == str(pictures / "picture.png")
    monkeypatch.setattr(memory, "available", lambda: 2**10)
    with pytest.raises(UserError, match=r"--sheet .*: 1 images need .* GiB of memory, 0\.0 GiB free; leave it out"):
        predict.predict(model, [pictures], 1, "cpu", tmp_path / "sheet.png")
    with (pictures / "large.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"large\.png: expected an image file of at most"):
        predict.predict(model, [pictures], 1, "cpu", None)


def test_a_changed_file_is_refused(unbuilt: Run) -> None:
    """By each command that would build, score or measure it, in one line."""
    proto, _ = exporter.read(exporter.path_of(unbuilt, "fp32"))
    proto.graph.node[-1].name += "x"
    onnx.save(proto, exporter.path_of(unbuilt, "fp32"))
    for command, *options in (["engine"], ["parity", "--device", "cpu"], ["bench", "--device", "cpu"]):
        done = runner(command, unbuilt.folder, *options, *(TINY if command != "engine" else ()))
        assert done.returncode == 2
        assert "found one that was changed after its export; make it: runner export" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    again = runner("export", unbuilt.folder, *TINY, "--raw")
    assert again.returncode == 0, again.stderr
    assert not list(unbuilt.deploy.glob("*.engine*"))
    assert [file.name for file in exporter.all_exported(unbuilt)] == ["fp32", "fp32.raw"]


def test_external_data_is_found_everywhere(own: Run, tmp_path: Path) -> None:
    """In a function of the model, and in a sparse tensor."""
    for location in ("function", "sparse"):
        model = onnx.load(exporter.path_of(own, "fp32"))
        tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="data.bin")
        if location == "function":
            node = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
            opset = [onnx.helper.make_opsetid("", 18)]
            model.functions.append(onnx.helper.make_function("domain", "F", [], ["y"], [node], opset))
        else:
            indices = onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [1], [0])
            model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(tensor, indices, [4]))
        path = tmp_path / f"{location}.onnx"
        path.write_bytes(model.SerializeToString())
        with pytest.raises(UserError, match="found external data"):
            exporter.read(path)


def test_files_take_the_largest_batch_of_their_metadata(varied: Run) -> None:
    images = np.resize(scored_images(varied).numpy(), (exporter.LARGEST_BATCH, *varied.config().input.shape))
    expected, spread = logits_of(varied, images)
    for kind in ("fp32", "fp16", "int8"):
        file = file_of(varied, kind)
        assert exporter.read(file.path)[1].largest_batch == len(images)
        session = OnnxSession(file.path, fp16=kind == "fp16")
        logits = session(images)
        in_batches = np.concatenate([session(batch) for batch in np.split(images, 64)])
        assert rms(logits - in_batches) < BETWEEN_BATCHES * spread
        if kind in LOGIT_ERROR:
            assert rms(logits - expected) < LOGIT_ERROR[kind] * spread


@pytest.mark.images
def test_int8_is_close_to_the_model(varied: Run) -> None:
    """TensorRT's graph, without optimizations: weights are quantized per channel, biases not at all."""
    file = precision.convert(varied, "int8", precision.calibration_images(varied, None, 200))
    images = scored_images(varied).numpy()
    expected, spread = logits_of(varied, images)
    assert rms(OnnxSession(file.path, optimize=False)(images) - expected) < 0.15 * spread
    (row,) = parity.score(varied, [file], None, "cpu")[0].rows
    assert row.passed == (row.accuracy_change >= -parity.ACCURACY_DROP["int8"])
    graph = onnx.load(file.path).graph
    scales = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    weights = [node.input[1] for node in graph.node if node.op_type == "Conv"]
    producers = {node.output[0]: node for node in graph.node}
    for weight in weights:
        dequantize = producers[weight]
        assert dequantize.op_type == "DequantizeLinear"
        assert sizes[scales[dequantize.input[0]]] == sizes[dequantize.input[0]][:1]  # one for each output channel
    assert not any(tensor.data_type == onnx.TensorProto.INT32 for tensor in graph.initializer)


def test_an_engine_of_another_version_or_with_a_damaged_sidecar_is_refused(own: Run) -> None:
    (sidecar,) = engine_run.verified_engines(own, exporter.exported(own))
    (path,) = own.sidecars()
    with pytest.raises(UserError, match=rf"built by {sidecar.backend} 0\.1, but .* is installed; build it again"):
        engine_run.LoadedEngine(own, replace(sidecar, version="0.1"))
    content = msgspec.to_builtins(sidecar)
    del content["version"]
    write_json(path, content)
    with pytest.raises(UserError, match="missing required field `version`"):
        engine_run.verified_engines(own, exporter.exported(own))


def test_a_file_that_does_not_load_leaves_the_rows_of_others(own: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless its backend was requested by name: then it is an error."""
    precision.convert(own, "fp16", None)
    files = exporter.all_exported(own)
    load = OnnxSession.__init__

    def refuse_fp16(self: OnnxSession, file: Path, *more: object, **options: object) -> None:
        if options.get("fp16"):
            raise ProviderError("fp16 does not load")
        load(self, file, *more, **options)

    monkeypatch.setattr(OnnxSession, "__init__", refuse_fp16)
    report = parity.score(own, files, None, "cpu")[0]
    assert [row.precision for row in report.rows] == ["fp32"]
    assert [entry.reason for entry in report.not_scored] == ["fp16 does not load"]
    with pytest.raises(UserError, match="fp16 does not load"):
        parity.score(own, files, None, "cpu", ("onnxruntime",))[0]


@pytest.mark.parametrize("changed", ["engine", "onnx"])
def test_an_engine_that_does_not_match_its_sidecar_is_refused(own: Run, changed: str) -> None:
    (sidecar,) = engine_run.verified_engines(own, exporter.exported(own))
    with (own.folder / getattr(sidecar, changed)).open("ab") as file:
        file.write(b"x")
    (path,) = own.sidecars()
    with pytest.raises(
        UserError, match=r"expected SHA-256 .*, found [0-9a-f]{12}…; build the engine again: runner engine"
    ):
        engine_run.verify(own, read_json(path, EngineSidecar))


@pytest.mark.parametrize("name", ["engine", "onnx"])
def test_an_engine_outside_the_run_folder_is_refused(own: Run, name: str, tmp_path: Path) -> None:
    """By its path, or by a link; although its hash is right."""
    (sidecar,) = engine_run.verified_engines(own, exporter.exported(own))
    outside = Path(shutil.copy(own.folder / getattr(sidecar, name), tmp_path / "outside"))
    (own.deploy / "link").symlink_to(outside)
    for path in (str(outside), os.path.relpath(outside, own.folder), "deploy/link"):
        with pytest.raises(UserError, match=rf"expected an engine of this folder, found '{path}'"):
            engine_run.verify(own, replace(sidecar, **{name: path}))


def test_what_cannot_be_built_is_one_line(own: Run) -> None:
    file = exporter.exported(own)
    for options, message in (
        (engine_build.EngineOptions("tensorrt-rtx", (8, 4, 16)), "--batch 8 4 16"),
        (engine_build.EngineOptions("tensorrt-rtx", (1, 2, 4), ("SM12345",)), "--target SM12345: expected one"),
        (engine_build.EngineOptions("tensorrt-rtx", (1, 2, 4), (), 9), "--optimization-level 9: expected 0 to 5"),
    ):
        with pytest.raises(UserError, match=message):
            engine_build.build(own, file, options)
    with pytest.raises(UserError, match=r"make it: runner export .* --precision fp16"):
        exporter.exported(own, "fp16")
    file.path.unlink()
    with pytest.raises(UserError, match="make it: runner export"):
        latency.bench(own, latency.BenchOptions(), "cpu", {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_nothing_falls_back_to_the_cpu(own: Run) -> None:
    for device, provider in (("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")):
        with pytest.raises(ProviderError, match=f"asked onnxruntime for {provider}"):
            OnnxSession(exporter.path_of(own, "fp32"), device)
    with pytest.raises(
        UserError, match="--backend onnxruntime-tensorrt: expected a GPU, which is selected by --device"
    ):
        parity.score(own, [exporter.exported(own)], None, "cpu", ("onnxruntime-tensorrt",))[0]
    report = latency.bench(
        own, latency.BenchOptions((1,), backends=("eager", "onnxruntime-tensorrt"), seconds=0.01, repeats=1), "cpu", {}
    )
    assert [row.not_measured for row in report.rows] == [None, "runs on a GPU, but this measurement is on the CPU"]
    done = runner("bench", own.folder, *TINY, "--device", "cuda")
    assert done.returncode == 2
    assert "--device cuda requires 1 CUDA GPU(s) on this node, found 0" in done.stderr
    with pytest.raises(UserError, match="--backend engine: not available here on cpu; engines run on a GPU"):
        parity.score(own, [exporter.exported(own)], None, "cpu", ("engine",))[0]
    with pytest.raises(UserError, match="--backend tensorrt: builds only for the GPU of this machine, found none"):
        engine_library.select_library("tensorrt")


@pytest.fixture(scope="session")
def tensorrt_loads() -> None:
    """Skips where no TensorRT can be loaded; set up before the fixtures that build engines."""
    try:
        engine_library.select_library("auto")
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_the_engine_runs_on_a_gpu(tensorrt_loads: None, confident: Run, kind: str) -> None:
    if kind != "fp32":
        precision.convert(confident, kind, precision.calibration_images(confident, None, 64))
    file = exporter.exported(confident, kind)
    sidecar = engine_build.build(confident, file, engine_build.EngineOptions("auto", (1, 32, 64)))
    running = engine_run.LoadedEngine(confident, sidecar)
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        expected = checkpoint.load_model(confident)(images)
    tolerance = {"fp32": 1e-2, "fp16": 2e-2, "int8": 0.5}[kind]
    torch.testing.assert_close(running(images.cuda()).cpu(), expected, atol=tolerance, rtol=tolerance)
    with pytest.raises(UserError, match="expected 1 to 64 images"):
        running(torch.randn(65, 3, 32, 32).cuda())
    backends = ("onnxruntime", "engine") if "CUDAExecutionProvider" in usable_providers() else ("engine",)
    parity.score(confident, [file], None, "cuda", backends)[0]
    options = latency.BenchOptions((1, 8), (kind,), ("eager", *backends), 0.1, 10)
    assert all(row.p50_ms > 0 for row in latency.bench(confident, options, "cuda", {}).rows)
