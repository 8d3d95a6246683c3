"""ONNX files: what is in them, which of them are current, and which are refused; most graphs here are small."""

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from runner import cli
from runner.common.errors import UserError
from runner.common.files import sha256_of, write_json
from runner.deploy import onnx as exporter
from runner.deploy.session import OnnxSession
from runner.run.folder import Run
from runner.run.schema import Git, ModelInput
from runner.training import checkpoint
from tests.support.configs import CLASSES, CONFIG, config_of, trusted
from tests.support.graphs import graph_of
from tests.support.models.tiny import Tiny
from tests.support.processes import TINY

WEIGHTS = "0" * 64


def save(run: Run, step: int, change: Callable[[Tiny], object] = lambda model: None) -> Tiny:
    """Saves random weights, of which each step has its own, with a change."""
    torch.manual_seed(step)
    model = Tiny().requires_grad_(False).eval()
    change(model)
    checkpoint.save(run, model.state_dict(), step)
    return model


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with random weights and no file."""
    run = trusted(tmp_path / "tiny" / "seed-0")
    write_json(run.run_json, config_of(git=Git(commit="a" * 40)))
    save(run, 1)
    return run


def add(run: Run, precision: str = "fp32", raw: bool = False) -> exporter.OnnxFile:
    """Writes a file from the latest weights; its graph is the same in all precisions."""
    graph = graph_of(checkpoint.load_model(run))
    graph = exporter.with_raw_input(graph, run.config()) if raw else graph
    return exporter.write(run, graph, precision, raw, exporter.weights_sha256(run))


def small_graph(
    nodes: list[onnx.NodeProto],
    shape: tuple[int, ...],
    returned: tuple[int, ...] = (10,),
    raw: bool = False,
    **constants: np.ndarray,
) -> onnx.ModelProto:
    """A graph from `images` or `pixels` of a shape to `logits`; both shapes are without the batch."""
    name, kind = ("pixels", TensorProto.UINT8) if raw else ("images", TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes, "small",
        [helper.make_tensor_value_info(name, kind, ["batch", *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", *returned])],
        [numpy_helper.from_array(array, key) for key, array in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_an_export_computes_what_the_model_does_for_any_batch(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """And prints nothing, warns of nothing, and leaves the logger of torch's exporter as it was."""
    logger, images = logging.getLogger("torch.onnx"), torch.randn(7, 3, 32, 32)
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        file = exporter.export(run)
    assert capsys.readouterr().out == ""
    assert not [one for one in warned if "torch" in one.filename]
    assert logger.level == logging.WARNING
    assert b".py" not in file.path.read_bytes()  # nor does the file hold paths of this machine
    proto, metadata = exporter.read(file.path)
    (taken,), (returned,) = proto.graph.input, proto.graph.output
    assert (taken.name, returned.name) == ("images", "logits")
    assert [one.dim_param or one.dim_value for one in taken.type.tensor_type.shape.dim] == ["batch", 3, 32, 32]
    assert metadata.weights == exporter.weights_sha256(run)
    session, model = OnnxSession(file.path, threads=1), checkpoint.load_model(run)
    with torch.no_grad():
        for batch in (1, 2, 7):
            expected = model(images[:batch]).numpy()
            np.testing.assert_allclose(session(images[:batch].numpy()), expected, atol=1e-5)


class Attention(nn.Module):
    """Attention among the pixels of an image, which asks for the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 3, batch_first=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.flatten(2).transpose(1, 2)
        return self.attention(pixels, pixels, pixels, need_weights=False)[0].mean(1)


def test_a_graph_with_attention_computes_what_the_model_does_for_any_batch() -> None:
    """The exporter would take the batch of its example for the only one if that has a single image."""
    model = Attention().requires_grad_(False).eval()
    session = OnnxSession(exporter.to_proto(model, [3, 4, 4]).SerializeToString(), threads=1)
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 4, 4)
        np.testing.assert_allclose(session(images.numpy()), model(images), atol=1e-5)


@pytest.mark.parametrize(("scale", "kept"), [(1.0009, True), (1.0011, False), (0.9989, False), (float("nan"), False)])
def test_an_export_with_other_logits_is_not_kept(
    scale: float, kept: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By more than a thousandth of the largest logit."""
    earlier = add(run)
    monkeypatch.setattr(exporter, "to_proto", lambda model, shape: graph_of(model, scale))
    if kept:
        assert exporter.export(run).sha256 != earlier.sha256
    else:
        with pytest.raises(
            RuntimeError, match=r"fp32\.onnx.*: its logits would differ from the model's by .* on 64 images"
        ):
            exporter.export(run)
        assert exporter.exported(run) == earlier
    assert {path.name for path in run.deploy.iterdir()} == {"model.fp32.onnx", "exports.json"}


def test_a_model_whose_logits_are_all_zero_is_exported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last layer begins with zeros in some architectures; then no difference is the only one allowed."""
    save(run, 2, lambda model: [nn.init.zeros_(parameter) for parameter in model.parameters()])
    monkeypatch.setattr(exporter, "to_proto", lambda model, shape: graph_of(model))
    assert exporter.is_current(run, exporter.export(run).precision)


def test_weights_that_give_no_finite_logits_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 2, lambda model: nn.init.constant_(model.layers[-1].bias, float("inf")))
    monkeypatch.setattr(exporter, "to_proto", lambda model, shape: graph_of(model))
    with pytest.raises(UserError, match="its weights give logits that are not finite; train it again"):
        exporter.export(run)
    assert not list(run.deploy.iterdir())


@pytest.mark.parametrize("raw", [False, True])
def test_a_file_says_what_a_server_needs(raw: bool, run: Run) -> None:
    """Each value as JSON, without anything that the graph said before."""
    dataset = replace(CONFIG.dataset, image_shape=[24, 20, 3], source={"fit": "pad"})
    config = replace(run.config(), dataset=dataset, input=ModelInput(shape=[3, 32, 32], mean=[1, 2, 3], std=[4, 5, 6]))
    write_json(run.run_json, config)
    proto = graph_of(Tiny().requires_grad_(False))
    helper.set_model_props(proto, {"author": "somebody"})
    file = exporter.write(run, proto, "int8-cpu", raw, WEIGHTS)
    assert {entry.key: json.loads(entry.value) for entry in onnx.load(file.path).metadata_props} == {
        "classes": CLASSES,
        "precision": "int8-cpu",
        "front_end": "raw" if raw else "normalized",
        "shape": [3, 32, 32],
        "image_shape": [24, 20, 3],
        "fit": "pad",
        "mean": [1, 2, 3],
        "std": [4, 5, 6],
        "experiment": "tiny",
        "run": "seed-0",
        "dataset": {"name": "synthetic-10", "fingerprint": "0123456789abcdef"},
        "commit": "a" * 40,
        "weights": WEIGHTS,
        "largest_batch": 4096,
    }
    assert file.front_end == ("raw" if raw else "normalized")
    assert file.path.name == f"model.{file.name}.onnx" == ("model.int8-cpu.raw.onnx" if raw else "model.int8-cpu.onnx")


def test_a_file_is_whole_and_alone_or_is_not_written(run: Run) -> None:
    """A graph that onnx's strict checks refuse replaces nothing, nor does one that is refused after them."""
    file = add(run)
    assert not any(tensor.external_data for tensor in onnx.load(file.path).graph.initializer)
    contradiction = graph_of(checkpoint.load_model(run))
    contradiction.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 11  # of ten classes
    with pytest.raises(onnx.shape_inference.InferenceError):
        exporter.write(run, contradiction, "fp32", False, WEIGHTS)
    seen = []

    def refuse(path: Path) -> None:
        seen.append(path)
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        exporter.write(run, graph_of(checkpoint.load_model(run)), "fp32", False, WEIGHTS, refuse)
    assert seen != [file.path]  # a reader never sees a file that is not checked yet
    assert exporter.exported(run) == file
    assert {path.name for path in run.deploy.iterdir()} == {"model.fp32.onnx", "exports.json"}


def test_a_file_is_current_until_it_or_the_weights_change(run: Run) -> None:
    kinds = [(precision, raw) for raw in (False, True) for precision in ("int8-cpu", "fp16", "fp32", "int8")]
    for kind in kinds:
        add(run, *kind)
    names = ["fp32", "fp16", "int8", "int8-cpu", "fp32.raw", "fp16.raw", "int8.raw", "int8-cpu.raw"]
    assert [file.name for file in exporter.all_exported(run)] == names
    assert all(exporter.is_current(run, *kind) for kind in kinds)
    exporter.path_of(run, "int8").unlink()
    with exporter.path_of(run, "fp16").open("ab") as file:
        file.write(b"x")
    assert [file.name for file in exporter.all_exported(run)] == [n for n in names if n not in ("int8", "fp16")]
    write_json(run.exports, {})
    assert exporter.all_exported(run) == []
    add(run)
    save(run, 2)
    assert not exporter.is_current(run, "fp32")


@pytest.mark.parametrize(
    ("precision", "raw", "options"),
    [
        ("fp32", False, ""),
        ("fp16", False, " --precision fp16"),
        ("fp32", True, " --raw"),
        ("int8-cpu", True, " --precision int8-cpu --raw"),
    ],
)
def test_a_file_that_is_not_current_is_refused_with_the_command(
    precision: str, raw: bool, options: str, run: Run
) -> None:
    def message() -> str:
        with pytest.raises(UserError) as refused:
            exporter.exported(run, precision, raw)
        return str(refused.value)

    path = f"deploy/model.{precision}.raw.onnx" if raw else f"deploy/model.{precision}.onnx"
    expected, make = f"{run.folder}: expected {path}, found", f"make it: runner export {run.folder}{options}"
    assert message() == f"{expected} none; {make}"
    file = add(run, precision, raw)
    assert exporter.exported(run, precision, raw) == file
    content = file.path.read_bytes()
    file.path.write_bytes(content + b"x")
    assert message() == f"{expected} one that was changed after its export; {make}"
    file.path.write_bytes(content)
    save(run, 2)
    assert message() == f"{expected} one exported from other weights; {make}"
    write_json(run.exports, {})
    assert message() == f"{expected} one that exports.json does not list; {make}"


@pytest.mark.parametrize(
    ("image_shape", "shape"),
    [((8, 6), (8, 6)), ((8, 6), (16, 6)), ((8, 6), (8, 9)), ((5, 7), (10, 21)), ((41, 41), (64, 64))],
)
def test_the_raw_front_end_normalizes_and_then_resizes(
    image_shape: tuple[int, int], shape: tuple[int, int], tmp_path: Path
) -> None:
    """Like the model's own input, of which the graph here returns each number."""
    dataset = replace(CONFIG.dataset, image_shape=[*image_shape, 3])
    model_input = ModelInput(shape=[3, *shape], mean=[100, 120, 140], std=[50, 60, 70])
    plain = small_graph([helper.make_node("Identity", ["images"], ["logits"])], (3, *shape), (3, *shape))
    raw = exporter.with_raw_input(plain, config_of(dataset=dataset, input=model_input))
    assert plain.graph.input[0].name == "images"  # unchanged
    onnx.checker.check_model(raw, full_check=True)
    (taken,) = raw.graph.input
    assert taken.type.tensor_type.elem_type == TensorProto.UINT8
    assert [one.dim_param or one.dim_value for one in taken.type.tensor_type.shape.dim] == ["batch", *image_shape, 3]
    assert [node.op_type for node in raw.graph.node].count("Resize") == (image_shape != shape)
    pixels = np.random.default_rng(0).integers(0, 256, (4, *image_shape, 3), dtype=np.uint8)
    normalized = (torch.from_numpy(pixels) - torch.tensor([100, 120, 140])) / torch.tensor([50, 60, 70])
    expected = nn.functional.interpolate(normalized.permute(0, 3, 1, 2), shape, mode="bilinear")
    returned = OnnxSession(raw.SerializeToString(), threads=1)(pixels)
    # Coordinates are rounded in float32, here by up to 64 pixels' last digit.
    np.testing.assert_allclose(returned, expected, atol=1e-4 if shape == (64, 64) else 1e-5)


def test_every_size_can_be_resized_to_every_larger_one() -> None:
    for size in range(1, 257):
        for target in range(size, 257):
            factor = exporter.resize_factor(size, target)
            assert int(np.float32(size) * factor) == target
            assert factor == pytest.approx(target / size, rel=1e-6)
            if int(np.float32(size) * np.float32(target / size)) == target:
                assert factor == np.float32(target / size), "the nearest one where it suffices"


@pytest.mark.parametrize("shape", [(7, 6), (8, 5), (16, 5)])
def test_a_raw_front_end_that_would_reduce_images_is_refused(shape: tuple[int, int]) -> None:
    dataset = replace(CONFIG.dataset, image_shape=[8, 6, 3])
    config = config_of(dataset=dataset, input=ModelInput(shape=[3, *shape], mean=[0] * 3, std=[1] * 3))
    plain = small_graph([helper.make_node("Identity", ["images"], ["logits"])], (3, *shape), (3, *shape))
    expected = rf"--raw: expected images of at most {shape[0]} × {shape[1]}, found 8 × 6"
    with pytest.raises(UserError, match=expected):
        exporter.with_raw_input(plain, config)


def test_logits_are_finite_for_every_value_of_a_pixel(tmp_path: Path) -> None:
    """The check's random images contain the smallest and the largest."""
    shape, path = (8, 6, 3), tmp_path / "graph.onnx"

    def check(divisor: float) -> None:
        nodes = [
            helper.make_node("Cast", ["pixels"], ["a"], to=TensorProto.FLOAT),
            helper.make_node("Sub", ["a", "divisor"], ["b"]),
            helper.make_node("Reciprocal", ["b"], ["c"]),
            helper.make_node("Flatten", ["c"], ["d"]),
            helper.make_node("MatMul", ["d", "ones"], ["logits"]),
        ]
        constants = {"divisor": np.float32(divisor).reshape(1), "ones": np.ones((8 * 6 * 3, 10), np.float32)}
        onnx.save(small_graph(nodes, shape, raw=True, **constants), path)
        exporter.check_finite(path, shape, 10, raw=True, fp16=False)

    for value in (0, 255):
        with pytest.raises(UserError, match="expected finite logits, found infinity or NaN"):
            check(value)
    for value in (-1, 256):
        check(value)


def test_logits_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    nodes = [helper.make_node("MatMul", ["images", "weights"], ["logits"])]
    onnx.save(small_graph(nodes, (2,), weights=np.ones((2, 10), np.float32)), path)
    exporter.check_finite(path, (2,), 10, raw=False, fp16=False)
    with pytest.raises(RuntimeError, match=r"expected logits of shape \(64, 9\), found \(64, 10\)"):
        exporter.check_finite(path, (2,), 9, raw=False, fp16=False)


@pytest.mark.parametrize(
    ("fp16", "remedy"), [(True, "exceed those of fp16; export fp32 or int8"), (False, "train the")]
)
def test_logits_that_are_not_finite_have_a_remedy(fp16: bool, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    nodes = [helper.make_node("MatMul", ["images", "weights"], ["logits"])]
    onnx.save(small_graph(nodes, (2,), weights=np.full((2, 10), np.inf, np.float32)), path)
    with pytest.raises(UserError, match=f"expected finite logits, found infinity or NaN; .*{remedy}"):
        exporter.check_finite(path, (2,), 10, raw=False, fp16=fp16)


def test_a_listed_file_with_external_data_is_not_current(run: Run) -> None:
    """Whoever made a run folder also wrote the hashes in it."""
    file = add(run)
    for what in ("external data", "no graph"):
        model = onnx.load(file.path)
        tensor = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="w.bin")
        (run.deploy / "w.bin").write_bytes(b"\0" * 4)
        model.graph.initializer.append(tensor)
        file.path.write_bytes(model.SerializeToString() if what == "external data" else b"\xff")
        entry = msgspec.structs.replace(run.read_exports()[file.path.name], sha256=sha256_of(file.path))
        write_json(run.exports, {file.path.name: entry})
        with pytest.raises(UserError, match="found one with external data"):
            exporter.exported(run)
        file = add(run)


# Where a graph may hold a constant: name, and a function that puts it there.
def node_with(**attributes: object) -> onnx.NodeProto:
    """A node of any operator with attributes."""
    return helper.make_node("Any", [], [], **attributes)


def graph_with(tensor: onnx.TensorProto) -> onnx.GraphProto:
    return helper.make_graph([node_with(value=tensor)], "inner", [], [])


def sparse_with(values: onnx.TensorProto, indices: onnx.TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[4])


INDICES = helper.make_tensor("i", TensorProto.INT64, [1], [0])
VALUES = helper.make_tensor("v", TensorProto.FLOAT, [1], [1])


def function_with_default(value: object) -> onnx.FunctionProto:
    function = helper.make_function("domain", "F", [], [], [], [helper.make_opsetid("", 18)])
    function.attribute_proto.append(helper.make_attribute("value", value))
    return function


PLACES: dict[str, Callable[[onnx.ModelProto, onnx.TensorProto], object]] = {
    "initializer": lambda model, tensor: model.graph.initializer.append(tensor),
    "sparse values": lambda model, tensor: model.graph.sparse_initializer.append(sparse_with(tensor, INDICES)),
    "sparse indices": lambda model, tensor: model.graph.sparse_initializer.append(sparse_with(VALUES, tensor)),
    "attribute": lambda model, tensor: model.graph.node.append(node_with(value=tensor)),
    "list": lambda model, tensor: model.graph.node.append(node_with(value=[VALUES, tensor])),
    "sparse attribute": lambda model, tensor: model.graph.node.append(node_with(value=sparse_with(tensor, INDICES))),
    "sparse list": lambda model, tensor: model.graph.node.append(node_with(value=[sparse_with(VALUES, tensor)])),
    "inner graph": lambda model, tensor: model.graph.node.append(node_with(value=graph_with(tensor))),
    "list of graphs": lambda model, tensor: model.graph.node.append(node_with(value=[graph_with(tensor)])),
    "function": lambda model, tensor: model.functions.append(
        helper.make_function("domain", "F", [], [], [node_with(value=tensor)], [helper.make_opsetid("", 18)])
    ),
    **{
        f"default of a function: {name}": lambda model, tensor, make=make: model.functions.append(
            function_with_default(make(tensor))
        )
        for name, make in {
            "tensor": lambda tensor: tensor,
            "list": lambda tensor: [VALUES, tensor],
            "graph": lambda tensor: graph_with(tensor),
        }.items()
    },
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", ["location", "data"])
def test_external_data_is_refused_wherever_a_constant_is(place: str, how: str, run: Run, tmp_path: Path) -> None:
    """Also of a constant that only says where its data are, or only that they are elsewhere."""
    model, path = graph_of(checkpoint.load_model(run)), tmp_path / "graph.onnx"
    tensor = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    if how == "location":
        tensor.data_location = TensorProto.EXTERNAL
    else:
        tensor.external_data.add(key="location", value="data.bin")
    PLACES[place](model, tensor)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="expected one file that holds its weights, found external data"):
        exporter.read(path)


def test_a_file_that_runner_export_did_not_write_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    with pytest.raises(UserError, match=r"graph\.onnx: expected an ONNX file, found none"):
        exporter.read(path)
    path.write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"graph\.onnx: expected an ONNX file: "):
        exporter.read(path)
    model = graph_of(checkpoint.load_model(run))
    model.graph.node[0].op_type = "NoSuchOperator"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"graph\.onnx: expected a valid ONNX file: "):
        exporter.read(path)
    for metadata in ({}, {"classes": "["}, {"classes": "[" * 10_000}):
        helper.set_model_props(model := graph_of(checkpoint.load_model(run)), metadata)
        onnx.save(model, path)
        with pytest.raises(UserError, match=r"expected metadata of runner export: .*; export it again"):
            exporter.read(path)
    metadata = {entry.key: entry.value for entry in onnx.load(add(run).path).metadata_props}
    helper.set_model_props(model, metadata | {"experiment": json.dumps("a\x1bb")})
    onnx.save(model, path)
    assert exporter.read(path)[1].experiment == "a\ufffdb"  # a terminal would obey the control character


def test_a_raw_file_is_removed_when_the_file_changes_that_it_was_made_from(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for precision in ("fp32", "int8"):
        add(run, precision)
        add(run, precision, raw=True)
    add(run, "int8")  # the same file once more
    assert [file.name for file in exporter.all_exported(run)] == ["fp32", "int8", "fp32.raw", "int8.raw"]
    graph = graph_of(checkpoint.load_model(run))
    exporter.write(run, graph, "int8", False, exporter.weights_sha256(run), kept=["node_conv2d"])
    assert [file.name for file in exporter.all_exported(run)] == ["fp32", "int8", "fp32.raw"]
    exporter.path_of(run, "fp32", raw=True).unlink()  # listed, and gone
    exporter.write(run, graph, "fp32", False, exporter.weights_sha256(run), kept=["node_conv2d"])
    assert "model.fp32.raw.onnx" not in run.read_exports()
    assert not exporter.path_of(run, "int8", raw=True).exists()
    assert (
        "model.int8.raw.onnx: removed, because it was made from the earlier model.int8.onnx" in capsys.readouterr().err
    )


def test_a_file_with_external_data_is_not_used_even_with_a_hash_of_its_author(run: Run) -> None:
    file = add(run)
    proto = onnx.load(file.path)
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")
    file.path.write_bytes(proto.SerializeToString())
    exports = run.read_exports()
    exports[file.path.name] = replace(exports[file.path.name], sha256=sha256_of(file.path))
    write_json(run.exports, exports)
    with pytest.raises(UserError, match=r"expected deploy/model\.fp32\.onnx, found one with external data"):
        exporter.exported(run)
    assert exporter.all_exported(run) == []


def test_images_that_the_raw_front_end_cannot_resize_are_refused_before_anything_is_written(run: Run) -> None:
    config = run.config()
    smaller = replace(config.input, shape=[3, 16, 16])
    write_json(run.run_json, replace(config, input=smaller))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(run.folder), *TINY, "--raw"])
    assert stopped.value.code == 2
    assert not run.deploy.exists()
