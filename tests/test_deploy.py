"""ONNX, engine and latency of every architecture, each with its proof."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from data_prep import manifest
from data_prep.console import UserError, sha256_of
from runner import checkpoint, experiments
from runner.batches.protocol import model_input
from runner.deploy import engine, latency, parity, precision, predict
from runner.deploy import onnx as exporter
from runner.deploy.session import ProviderError, Session, usable_providers
from runner.recipe import to_json
from runner.runs import Run, write_json
from tests.conftest import runner


def untrained(name: str, data: Path, folder: Path) -> Run:
    """A run folder with random weights, whose batch norm has seen some images."""
    experiment = experiments.get(name)
    prepared = manifest.read(data)
    run = Run(folder / name / "seed-0")
    dataset = {
        key: getattr(prepared, key) for key in ("name", "fingerprint", "classes", "mean", "std", "image_shape")
    }
    write_json(
        run.record,
        {
            "experiment": name,
            "run": "seed-0",
            "architecture": to_json(experiment.architecture),
            "recipe": to_json(dataclasses.replace(experiment.recipe, validation=0)),
            "dataset": {**dataset, "folder": str(data)},
            "input": model_input(prepared, experiment.recipe),
            "git": {},
        },
    )
    torch.manual_seed(0)
    model = experiment.architecture.build()
    model(torch.randn(16 if experiment.recipe.resize else 64, *model_input(prepared, experiment.recipe)["shape"]))
    checkpoint.save(run, model.state_dict(), 0)
    return run


# One experiment of each architecture; those of one differ in depth, optimizer or epochs.
ARCHITECTURES = {e.architecture.factory: name for name, e in experiments.load().items()}


def shape_of(run: Run) -> list[int]:
    """(3, H, W) of an image."""
    return run.config()["input"]["shape"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "exported" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every")
        names = list(experiments.load() if every else ARCHITECTURES.values())
        metafunc.parametrize("exported", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """In three precisions, the fp32 one with a raw front end as well."""
    run = untrained(request.param, small_data, tmp_path_factory.mktemp("deploy"))
    exporter.export(run)
    images = precision.calibration_images(run, None, 8)
    for kind in ("fp16", "int8"):
        precision.convert(run, kind, images, "minmax")
    precision.raw(run, "fp32")
    return run


def test_fp32_agrees_with_the_model_by_either_front_end(exported: Run) -> None:
    files = [exporter.exported(exported, "fp32", raw) for raw in (False, True)]
    report = parity.compare(exported, files, None, "cpu")
    assert [row["front_end"] for row in report["rows"]] == ["normalised", "raw"]
    for row in report["rows"]:
        assert row["passed"]
        assert row["agreement"] == 1
        assert row["images"] == 200
        assert row["largest_logit_difference"] < 1e-4
        assert row["provider"] == "CPUExecutionProvider"


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_onnx_takes_any_batch(exported: Run, kind: str, request: pytest.FixtureRequest) -> None:
    """fp16 is held against fp32; int8 of random weights and 8 calibration images only has to be finite."""
    session = Session(exporter.exported(exported, kind).path, fp16=kind == "fp16")
    largest = 512 if request.config.getoption("--every") else 30  # as an engine's by default
    images = torch.randn(largest, *shape_of(exported), generator=torch.Generator().manual_seed(0))
    model = checkpoint.load_model(exported)
    with torch.no_grad():
        expected = torch.cat([model(part) for part in images.split(64)]).numpy()
    tolerance = {"fp32": 1e-4, "fp16": 1e-2, "int8": np.inf}[kind] * max(1, np.abs(expected).max())
    for size in (1, 7, largest):
        found = session(images[:size].numpy())
        assert found.dtype == np.float32
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, expected[:size], atol=tolerance)


def test_onnx_is_one_file_that_explains_itself(exported: Run, small_data: Path) -> None:
    names = {file.name for file in exported.deploy.iterdir() if "onnx" in file.name}
    assert names == {f"model.{kind}.onnx" for kind in ("fp32", "fp32.raw", "fp16", "int8")}
    prepared = manifest.read(small_data)
    for file in exporter.all_exported(exported):
        model, metadata = exporter.read(file.path)
        assert metadata["precision"] == file.precision
        assert metadata["classes"] == list(prepared.classes)
        assert metadata["mean"] == exported.config()["input"]["mean"]
        assert metadata["dataset"]["fingerprint"] == prepared.fingerprint
        given = model.graph.input[0]
        assert given.name == ("pixels" if file.raw else "images")
        assert given.type.tensor_type.shape.dim[0].dim_param
        assert model.graph.output[0].name == "logits"


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_a_real_engine_of_each_precision_is_built(exported: Run, kind: str) -> None:
    file = exporter.exported(exported, kind)
    sidecar = engine.build(exported, file, engine.Wish("tensorrt-rtx", (1, 64, 256)))
    path = exported.folder / sidecar["engine"]
    assert path.stat().st_size == sidecar["bytes"]
    assert sidecar["onnx_sha256"] == sha256_of(file.path)
    wanted = {"fp32": "FLOAT", "fp16": "HALF", "int8": "INT8"}[kind]
    for layers in ("CONVOLUTION", "MATRIX_MULTIPLY"):  # whatever they read: images, features or weights
        assert set(sidecar["layer_precisions"][layers]) == {wanted}
    if kind == "fp16":
        for layers in ("NORMALIZATION", "SOFTMAX"):  # where there are any
            assert set(sidecar["layer_precisions"].get(layers, ["FLOAT"])) == {"FLOAT"}
    # What the builder said of the engine itself: what its weights take. Of int8 it may count only some.
    parameters = sum(p.numel() for p in checkpoint.load_model(exported).parameters())
    each, size = sidecar["weights_bytes"] / parameters, {"fp32": 4, "fp16": 2, "int8": 1}[kind]
    assert (0.3 if kind == "int8" else 0.75) * size < each < 1.25 * size
    assert sidecar["batch"] == {"min": 1, "opt": 64, "max": 256}
    assert sidecar["dataset"] == exported.config()["dataset"]["name"]
    assert sidecar in engine.built(exported, file)


@pytest.fixture
def own(tiny_run: Path, tmp_path: Path) -> Run:
    """A copy of the finished tiny run, exported."""
    run = Run(Path(shutil.copytree(tiny_run, tmp_path / "tiny" / "own")))
    exporter.export(run)
    return run


def test_files_of_earlier_weights_are_not_taken_for_the_run(own: Run) -> None:
    """Training went on after the export."""
    precision.convert(own, "fp16", None)
    scored = parity.compare(own, [exporter.exported(own)], None, "cpu")
    parity.check(own, exporter.exported(own), "CPUExecutionProvider")
    elsewhere = [scored["rows"][0] | {"place": {"cpu": "another"}}]
    write_json(own.deploy / parity.FILE_NAME, scored | {"rows": elsewhere})
    with pytest.raises(UserError, match="not scored on CPUExecutionProvider"):
        parity.check(own, exporter.exported(own), "CPUExecutionProvider")
    weights = {name: tensor + 1 for name, tensor in checkpoint.load_model(own).state_dict().items()}
    checkpoint.save(own, weights, 10_000)
    with pytest.raises(UserError, match="found one of other weights; make it: runner export"):
        exporter.exported(own)
    assert exporter.all_exported(own) == []
    done = runner("export", own.folder, "--precision", "fp16", "--json")
    assert [row["name"] for row in json.loads(done.stdout)] == ["fp32", "fp16"]


def test_a_batch_beyond_the_engines_limits_goes_in_pieces() -> None:
    class Four(engine.RunningEngine):
        """Stands for an engine of 3 or 4 images."""

        def __init__(self) -> None:
            self.sidecar, self.torch = {"batch": {"min": 3, "max": 4}}, torch

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            assert 3 <= len(images) <= 4
            return images.flatten(1).sum(1, keepdim=True)

    images = torch.rand(9, 3, 2, 2)
    torch.testing.assert_close(Four().in_pieces(images), images.flatten(1).sum(1, keepdim=True))


def test_targets_and_the_raw_front_end_are_written_down(own: Run) -> None:
    file = precision.raw(own, "fp32")
    sidecar = engine.build(own, file, engine.Wish("tensorrt-rtx", (1, 8, 16), ("SM89", "SM120"), 3))
    assert sidecar["target"] == "SM89, SM120"
    assert sidecar["optimization_level"] == 3
    assert sidecar["inputs"] == [["pixels", [-1, 32, 32, 3], "UINT8"]]


def test_an_fp16_request_cannot_give_an_fp32_engine(own: Run) -> None:
    """A file that is fp16 by its name and fp32 by its graph; and an engine that is not as its network was."""
    proto, metadata = exporter.read(exporter.path_of(own, "fp32"))
    exporter.write(own, proto, "fp16", False, metadata["weights"])
    with pytest.raises(UserError, match=r"expected HALF arithmetic for fp16, found {'FLOAT'"):
        engine.build(own, exporter.exported(own, "fp16"), engine.Wish("tensorrt-rtx", (1, 2, 4)))
    assert not list(own.deploy.glob("*.engine*"))
    fp32 = [{"LayerType": "Conv", "Outputs": [{"Format/Datatype": "Row major linear FP32"}]}]
    fp16 = [*fp32, {"LayerType": "Conv", "Outputs": [{"Format/Datatype": "Channel major FP16 format"}]}]
    file = exporter.exported(own, "fp16")
    assert engine.inspected_precisions(fp16) == {"FLOAT": 1, "HALF": 1}
    engine.check_inspected(file, fp16)
    engine.check_inspected(file, [{"Outputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}])
    with pytest.raises(UserError, match=r"expected HALF in the engine for fp16, found {'FLOAT': 1}"):
        engine.check_inspected(file, fp32)


def spoiled(run: Run, change: Callable[[np.ndarray], np.ndarray]) -> str:
    """The run's fp16 file with a filter changed; returns the name of the convolution."""
    file = precision.convert(run, "fp16", None)
    model, metadata = exporter.read(file.path)
    second = [node for node in model.graph.node if node.op_type == "Conv"][1]
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == second.input[1]]
    weight.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(weight).copy()), weight.name))
    exporter.write(run, model, "fp16", False, metadata["weights"])
    return f"Conv {second.name}"


def test_a_layer_that_gives_no_number_is_named(own: Run) -> None:
    """And the row is kept, without a figure that JSON has no word for."""
    name = spoiled(own, lambda weight: np.where(weight > 0, np.float16(np.nan), weight))
    (row,) = parity.compare(own, [exporter.exported(own, "fp16")], None, "cpu")["rows"]
    assert not row["passed"]
    assert row["largest_logit_difference"] is None
    assert row["culprit"].startswith(name)


def test_the_gate_names_the_layer_that_fails(own: Run) -> None:
    name = spoiled(own, np.negative)
    file = exporter.exported(own, "fp16")
    (row,) = parity.compare(own, [file], None, "cpu")["rows"]
    assert not row["passed"]
    assert row["agreement"] < 0.999
    assert row["culprit"].startswith(name)
    done = runner("parity", own.folder, "--precision", "fp16", "--device", "cpu")
    assert done.returncode == 1
    assert "worst at Conv" in done.stderr
    done = runner("bench", own.folder, "--precision", "fp16", "--device", "cpu", "--backend", "onnxruntime")
    assert done.returncode == 2
    assert "failed the gate" in done.stderr


def test_commands_print_only_json(own: Run) -> None:
    done = runner("export", own.folder, "--precision", "fp32", "int8-cpu", "--calibration", 64, "--raw", "--json")
    assert [row["name"] for row in json.loads(done.stdout)] == ["fp32", "int8-cpu", "fp32.raw", "int8-cpu.raw"]
    unscored = runner("bench", own.folder, "--device", "cpu")
    assert unscored.returncode == 2
    assert "first: runner parity" in unscored.stderr
    report = json.loads(runner("parity", own.folder, "--json", "--device", "cpu").stdout)
    assert [row["onnx"].removeprefix("deploy/model.") for row in report["rows"]] == [
        "fp32.onnx", "int8-cpu.onnx", "fp32.raw.onnx", "int8-cpu.raw.onnx",
    ]  # fmt: skip
    by_front = {row["front_end"]: row["accuracy"] for row in report["rows"] if row["precision"] == "int8-cpu"}
    assert by_front["raw"] == pytest.approx(by_front["normalised"], abs=0.01)
    (sidecar,) = json.loads(runner("engine", own.folder, "--json", "--batch", 1, 2, 4).stdout)
    assert sidecar["batch"]["max"] == 4
    words = ["--batch", 1, 3, "--seconds", 0.05, "--repeats", 20, "--precision", "fp32", "int8-cpu", "--threads", 1]
    (result,) = json.loads(runner("bench", own.folder, "--json", *words).stdout)
    measured = [row for row in result["rows"] if "p50_ms" in row]
    assert [(row["backend"], row["precision"], row["batch"]) for row in measured] == [
        ("eager", "fp32", 1), ("eager", "fp32", 3),
        ("onnxruntime", "fp32", 1), ("onnxruntime", "fp32", 3),
        ("onnxruntime", "int8-cpu", 1), ("onnxruntime", "int8-cpu", 3),
    ]  # fmt: skip
    more = json.loads(runner("bench", own.folder, "--json", *words, "--batch", 2, "--backend", "eager").stdout)
    assert [row["batch"] for row in more[0]["rows"]] == [2]
    kept = json.loads((own.deploy / latency.FILE_NAME).read_text())["rows"]
    assert [row for row in kept if row.get("batch") != 2] == result["rows"]  # what was measured before stays
    other = precision.convert(own, "int8-cpu", precision.calibration_images(own, None, 32))
    runner("bench", own.folder, "--json", *words, "--batch", 2, "--backend", "eager")
    left = json.loads((own.deploy / latency.FILE_NAME).read_text())["rows"]
    assert {row["precision"] for row in left} == {"fp32"}  # nothing of the file that is gone, which is another now
    assert other.sha256 not in {row.get("onnx_sha256") for row in kept}
    for row in measured:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["calls"] >= 20
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["p50_ms"])
    assert result["hardware"]["cores"] >= 1
    if result["device"] == "cpu":
        assert result["threads"] == 1
        assert {row["not_measured"] for row in result["rows"] if "not_measured" in row} == {
            "an engine runs on a GPU, measured on the CPU here"
        }


def test_rows_of_different_hardware_are_not_mixed() -> None:
    places = [{"cpu": name, "cores": 2} for name in ("one", "other")]
    with pytest.raises(UserError, match="expected one machine"):
        latency.show([{"run": "r", "hardware": place, "rows": []} for place in places])


def test_predict_needs_nothing_but_the_file(own: Run, source, tmp_path: Path) -> None:
    from PIL import Image

    raw = precision.raw(own, "fp32").path
    chosen = [0, 7, 42, 99, 150]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in chosen:
        Image.fromarray(source.test.images[k]).save(pictures / f"{k:03}.png")
    (pictures / "note.txt").write_text("no image")
    said = {}
    for path in (shutil.copy(raw, tmp_path / "raw.onnx"), shutil.copy(exporter.path_of(own, "fp32"), tmp_path)):
        done = runner("predict", path, pictures, "--batch", 2, "--json", "--sheet", tmp_path / "sheet.jpg")
        assert done.returncode == 0, done.stderr
        said[path] = json.loads(done.stdout)
        (tmp_path / "sheet.jpg").unlink()
    one, other = said.values()
    assert [Path(p["image"]).name for p in one] == [f"{k:03}.png" for k in chosen]
    for a, b in zip(one, other, strict=True):
        assert (a["image"], a["label"]) == (b["image"], b["label"])
        assert a["probability"] == pytest.approx(b["probability"], abs=1e-4)


@pytest.mark.parametrize("where", ["/etc/passwd", "../outside.bin", "inside.bin"])
def test_a_file_that_keeps_data_outside_is_refused(own: Run, where: str, tmp_path: Path) -> None:
    """By an absolute path, one that leaves the folder, or a link: all the same, for none is read."""
    from PIL import Image

    model = onnx.load(exporter.path_of(own, "fp32"))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=where)
    (tmp_path / "inside.bin").symlink_to("/etc/passwd")
    path = tmp_path / "foreign.onnx"
    path.write_bytes(model.SerializeToString())
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    done = runner("predict", path, tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "found external data" in done.stderr
    with pytest.raises(UserError, match="found external data"):
        exporter.read(path)


def test_what_predict_refuses(own: Run, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "no.onnx").write_bytes(b"no model")
    (tmp_path / "broken.png").write_bytes(b"no image")
    model, picture = exporter.path_of(own, "fp32"), tmp_path / "picture.png"
    Image.new("RGB", (32, 32)).save(picture)

    def changed(key: str, value: object) -> Path:
        proto = onnx.load(model)
        told = {entry.key: entry.value for entry in proto.metadata_props} | {key: json.dumps(value)}
        onnx.helper.set_model_props(proto, told)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx"
        onnx.save(proto, path)
        return path

    proto = onnx.load(model)
    (weight, *_) = [tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4]
    array = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(array[:, :2].copy(), weight.name))  # of a channel less
    misshapen = tmp_path / "misshapen.onnx"
    onnx.save(proto, misshapen)
    for words, says in (
        ([tmp_path / "no.onnx", tmp_path / "broken.png"], "expected an ONNX file"),
        ([model, tmp_path / "broken.png"], "expected an image"),
        ([model, tmp_path / "none.png"], "there is none"),
        ([model, tmp_path / "broken.png", "--batch", 5000], "--batch 5000: expected at most 4096"),
        ([changed("classes", []), picture], "found none or others of classes"),
        ([changed("shape", 5), picture], "found none or others of shape"),
        ([changed("shape", [3, 16, 16]), picture], "takes images tensor(float) of ['batch', 3, 32, 32], found"),
        ([changed("classes", ["one", "two"]), picture], "names 2 classes, gives logits (1, 10)"),
        ([misshapen, picture], "onnxruntime cannot run it"),
        ([model, picture, "--sheet", tmp_path / "sheet.xyz"], "ends in .png or .jpg"),
        *(
            []
            if torch.cuda.is_available()
            else [([model, picture, "--device", "cuda"], "asked onnxruntime for CUDA")]
        ),
    ):
        done = runner("predict", *words)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert says in done.stderr


def test_a_file_that_was_changed_is_not_the_runs(own: Run, tmp_path: Path) -> None:
    """By a command that would build it, score it or measure it: one line, and nothing is made of it."""
    proto, _ = exporter.read(exporter.path_of(own, "fp32"))
    proto.graph.node[-1].name += "x"
    onnx.save(proto, exporter.path_of(own, "fp32"))
    for command, *options in (["engine"], ["parity", "--device", "cpu"], ["bench", "--device", "cpu"]):
        done = runner(command, own.folder, *options)
        assert done.returncode == 2
        assert "found one that is not as it was exported; make it: runner export" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    again = runner("export", own.folder, "--raw")
    assert again.returncode == 0, again.stderr
    assert not list(own.deploy.glob("*.engine*"))
    assert [file.name for file in exporter.all_exported(own)] == ["fp32", "fp32.raw"]


def test_data_outside_is_found_wherever_it_hides(own: Run, tmp_path: Path) -> None:
    """In a function of the model's, and in a sparse tensor."""
    for place in ("function", "sparse"):
        model = onnx.load(exporter.path_of(own, "fp32"))
        tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="data.bin")
        if place == "function":
            node = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
            opset = [onnx.helper.make_opsetid("", 18)]
            model.functions.append(onnx.helper.make_function("ours", "F", [], ["y"], [node], opset))
        else:
            indices = onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [1], [0])
            model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(tensor, indices, [4]))
        path = tmp_path / f"{place}.onnx"
        path.write_bytes(model.SerializeToString())
        with pytest.raises(UserError, match="found external data"):
            exporter.read(path)


def test_the_stated_largest_batch_is_taken(own: Run) -> None:
    precision.convert(own, "int8", precision.calibration_images(own, None, 64))
    precision.convert(own, "fp16", None)
    images = torch.randn(exporter.LARGEST_BATCH, *shape_of(own), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = checkpoint.load_model(own)(images).numpy()
    for file in exporter.all_exported(own):
        assert exporter.read(file.path)[1]["largest_batch"] == len(images)
        found = Session(file.path, fp16=file.precision == "fp16")(images.numpy())
        agreement = (found.argmax(1) == expected.argmax(1)).mean()
        assert agreement > {"fp32": 0.999, "fp16": 0.995, "int8": 0.9}[file.precision]


def test_int8_keeps_what_the_model_knows(own: Run) -> None:
    """TensorRT's graph, scored here by onnxruntime: weights per channel, biases not quantised, within the limit."""
    file = precision.convert(own, "int8", precision.calibration_images(own, None, 200))
    (row,) = parity.compare(own, [file], None, "cpu")["rows"]
    assert row["agreement"] > 0.95
    graph = onnx.load(file.path).graph
    scales = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    weights = [node.input[1] for node in graph.node if node.op_type == "Conv"]
    made_by = {node.output[0]: node for node in graph.node}
    for weight in weights:
        pair = made_by[weight]
        assert pair.op_type == "DequantizeLinear"
        assert sizes[scales[pair.input[0]]] == sizes[pair.input[0]][:1]  # one for each output channel
    assert not any(tensor.data_type == onnx.TensorProto.INT32 for tensor in graph.initializer)


def test_an_engine_of_another_version_or_of_a_damaged_sidecar_is_one_line(own: Run) -> None:
    sidecar = engine.build(own, exporter.exported(own), engine.Wish("tensorrt-rtx", (1, 2, 4)))
    (path,) = engine.sidecars(own)
    with pytest.raises(UserError, match=r"built by tensorrt-rtx 0\.1, here is .*; build it again: runner engine"):
        engine.RunningEngine(own, sidecar | {"version": "0.1"})
    write_json(path, {key: value for key, value in sidecar.items() if key != "version"})
    with pytest.raises(UserError, match="expected an engine's sidecar, found no version; build it again"):
        engine.built(own, exporter.exported(own))


def test_what_does_not_load_costs_no_other_its_row(own: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that this GPU does not take, say; asked for by name it is a mistake."""
    precision.convert(own, "fp16", None)
    files = exporter.all_exported(own)
    load = Session.__init__

    def refuses(self: Session, file: Path, *more: object, **options: object) -> None:
        if options.get("fp16"):
            raise ProviderError("asked for what is not there")
        load(self, file, *more, **options)

    monkeypatch.setattr(Session, "__init__", refuses)
    report = parity.compare(own, files, None, "cpu")
    assert [row["precision"] for row in report["rows"]] == ["fp32"]
    assert [entry["reason"] for entry in report["not_scored"]] == ["asked for what is not there"]
    with pytest.raises(UserError, match="asked for what is not there"):
        parity.compare(own, files, None, "cpu", ("onnxruntime",))


def test_predict_resizes_as_training_did() -> None:
    """For a model of larger images than the dataset's, from the dataset's size, which both front ends are given."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    metadata = {"mean": [120.0, 110.0, 100.0], "std": [60.0, 61.0, 62.0], "shape": [3, 20, 20]}
    mean, std = (torch.tensor(metadata[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    images = (torch.from_numpy(small).permute(0, 3, 1, 2) - mean) / std
    expected = torch.nn.functional.interpolate(images, size=(20, 20), mode="bilinear", antialias=False)
    torch.testing.assert_close(torch.from_numpy(predict._normalised(small, metadata)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("what", ["engine", "onnx"])
def test_an_engine_that_the_sidecar_does_not_speak_of_is_refused(own: Run, what: str) -> None:
    sidecar = engine.build(own, exporter.exported(own), engine.Wish("tensorrt-rtx", (1, 2, 4)))
    with (own.folder / sidecar[what]).open("ab") as file:
        file.write(b"x")
    (path,) = engine.sidecars(own)
    with pytest.raises(UserError, match=r"not the file that .* speaks of"):
        engine.check_sidecar(own, path)


def test_what_cannot_be_built_is_one_line(own: Run) -> None:
    file = exporter.exported(own)
    for wish, says in (
        (engine.Wish("tensorrt-rtx", (8, 4, 16)), "--batch 8 4 16"),
        (engine.Wish("tensorrt-rtx", (1, 2, 4), ("SM12345",)), "--target SM12345: expected one"),
        (engine.Wish("tensorrt-rtx", (1, 2, 4), (), 9), "--optimization-level 9: expected 0 to 5"),
    ):
        with pytest.raises(UserError, match=says):
            engine.build(own, file, wish)
    with pytest.raises(UserError, match=r"make it: runner export .* --precision fp16"):
        exporter.exported(own, "fp16")
    file.path.unlink()
    with pytest.raises(UserError, match="make it: runner export"):
        latency.bench(own, latency.Wish(), "cpu", {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_nothing_falls_back_to_the_cpu(own: Run) -> None:
    with pytest.raises(ProviderError, match="asked onnxruntime for CUDAExecutionProvider"):
        Session(exporter.path_of(own, "fp32"), "cuda")
    done = runner("bench", own.folder, "--device", "cuda")
    assert done.returncode == 2
    assert "--device cuda means 1 CUDA GPU(s) on this node, found 0" in done.stderr
    with pytest.raises(UserError, match="--backend engine: nothing here runs that on cpu; engines run on a GPU"):
        parity.compare(own, [exporter.exported(own)], None, "cpu", ("engine",))
    with pytest.raises(UserError, match="--backend tensorrt"):
        engine.load("tensorrt")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_the_engine_runs_on_a_gpu(own: Run, kind: str) -> None:
    try:
        engine.load("auto")
    except UserError as error:
        pytest.skip(str(error))
    if kind != "fp32":
        precision.convert(own, kind, precision.calibration_images(own, None, 64))
    file = exporter.exported(own, kind)
    sidecar = engine.build(own, file, engine.Wish("auto", (1, 32, 64)))
    running = engine.RunningEngine(own, sidecar)
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        expected = checkpoint.load_model(own)(images)
    tolerance = {"fp32": 1e-2, "fp16": 2e-2, "int8": 0.5}[kind]
    torch.testing.assert_close(running(images.cuda()).cpu(), expected, atol=tolerance, rtol=tolerance)
    with pytest.raises(UserError, match="expected 1 to 64 images"):
        running(torch.randn(65, 3, 32, 32).cuda())
    backends = ("onnxruntime", "engine") if "CUDAExecutionProvider" in usable_providers() else ("engine",)
    parity.compare(own, [file], None, "cuda", backends)
    wish = latency.Wish((1, 8), (kind,), ("eager", *backends), 0.1, 10)
    rows = latency.bench(own, wish, "cuda", {})["rows"]
    assert all(row["p50_ms"] > 0 for row in rows)
