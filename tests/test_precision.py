"""Files in fp16 and int8 of graphs written operator by operator, which takes no export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runner.common.errors import UserError
from runner.common.files import write_json
from runner.deploy import onnx as exporter
from runner.deploy import precision
from runner.deploy.session import OnnxSession
from runner.run.folder import Run
from runner.run.schema import FrontEnd
from runner.training import checkpoint
from tests.support.configs import config_of, trusted
from tests.support.graphs import graph_of, model_of
from tests.support.models.tiny import Tiny


def run_of(folder: Path, graph: Callable[[Tiny], onnx.ModelProto]) -> Run:
    """A run whose fp32 file has a graph."""
    run = trusted(folder / "tiny" / "seed-0")
    write_json(run.run_json, config_of())
    model = Tiny().requires_grad_(False)
    checkpoint.save(run, model.state_dict(), 1)
    exporter.write(run, graph(model), "fp32", False, exporter.weights_sha256(run))
    return run


def images_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 32, 32), dtype=np.float32)


def with_large_values(_: Tiny) -> onnx.ModelProto:
    """A graph with values of which neither the squares nor the exponentials are numbers in fp16."""
    generator = np.random.default_rng(0)
    arrays = {
        "filters": generator.standard_normal((8, 3, 8, 8), dtype=np.float32),
        "large": np.float32(30),
        "gain": np.ones(128, np.float32),
        "matrix": generator.standard_normal((128, 10), dtype=np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["images", "filters"], ["a"], name="conv", kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["a"], ["b"], name="flatten"),
        helper.make_node("Mul", ["b", "large"], ["c"], name="mul"),
        helper.make_node("LayerNormalization", ["c", "gain"], ["d"], name="norm"),
        helper.make_node("Softmax", ["c"], ["e"], name="softmax"),
        helper.make_node("Add", ["d", "e"], ["f"], name="add"),
        helper.make_node("MatMul", ["f", "matrix"], ["logits"], name="matmul"),
    ]
    return model_of(nodes, arrays)


def test_operators_that_overflow_in_fp16_stay_in_fp32(tmp_path: Path) -> None:
    """Each value is cast once for all of them; inputs and outputs stay fp32, too."""
    run = run_of(tmp_path, with_large_values)
    file = precision.convert(run, "fp16", None)
    proto, metadata = exporter.read(file.path)
    assert metadata.precision == "fp16"
    typed = onnx.shape_inference.infer_shapes(proto).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*typed.input, *typed.value_info, *typed.output)}
    assert (types["images"], types["logits"]) == (TensorProto.FLOAT, TensorProto.FLOAT)
    read = {node.op_type: types[node.input[0]] for node in typed.node if node.op_type != "Cast"}
    assert read == dict.fromkeys(("Conv", "Flatten", "Mul", "Add", "MatMul"), TensorProto.FLOAT16) | dict.fromkeys(
        ("LayerNormalization", "Softmax"), TensorProto.FLOAT
    )
    casts = [node.input[0] for node in typed.node if node.op_type == "Cast"]
    assert len(casts) == len(set(casts)) == 5  # of the images and logits, c, d and e
    images = images_of(8)
    expected = OnnxSession(exporter.path_of(run, "fp32"))(images)
    np.testing.assert_allclose(OnnxSession(file.path, fp16=True)(images), expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_a_file_is_checked_as_what_it_is(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either front end, of which the raw one computes the same from pixels."""
    run, checks = run_of(tmp_path, with_large_values), []

    def check(path: Path, **settings: Any) -> None:
        checks.append(settings)

    monkeypatch.setattr(exporter, "check_finite", check)
    normalized = precision.convert(run, kind, images_of(8))
    raw = precision.add_raw_front_end(run, kind)
    both = {"classes": 10, "fp16": kind == "fp16"}
    assert checks == [
        {"shape": (3, 32, 32), "raw": False, **both},
        {"shape": (32, 32, 3), "raw": True, **both},
    ]
    assert [file.raw for file in (normalized, raw)] == [False, True]
    assert exporter.read(raw.path)[1].front_end == FrontEnd.RAW
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    images = ((pixels.astype(np.float32) - 120) / 60).transpose(0, 3, 1, 2)
    logits, expected = (OnnxSession(file.path)(values) for file, values in ((raw, pixels), (normalized, images)))
    np.testing.assert_allclose(logits, expected, atol=0.02 * np.abs(expected).max())


def test_int8_for_tensorrt_is_symmetric_and_keeps_biases(tmp_path: Path) -> None:
    run = run_of(tmp_path, graph_of)
    proto = onnx.load(precision.convert(run, "int8", images_of(8)).path)
    assert precision.quantized_operators(proto, "int8") == ["first", "second", "last"]
    weights = {entry.name: numpy_helper.to_array(entry) for entry in proto.graph.initializer}
    made_by = {node.output[0]: node for node in proto.graph.node}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            assert weights[node.input[2]].dtype == np.int8
            assert not weights[node.input[2]].any()
    for name, channels in (("first", 8), ("second", 16), ("last", 10)):
        (operator,) = [node for node in proto.graph.node if node.name == name]
        assert [made_by[source].op_type for source in operator.input[:2]] == ["DequantizeLinear"] * 2
        assert weights[made_by[operator.input[1]].input[1]].shape == (channels,)  # a scale for each
        assert weights[operator.input[2]].dtype == np.float32


def test_int8_for_the_cpu_quantizes_all_operators_to_unsigned_values(tmp_path: Path) -> None:
    proto = onnx.load(precision.convert(run_of(tmp_path, graph_of), "int8-cpu", images_of(8)).path)
    assert {"first", "second", "pool", "last", "times"} <= set(precision.quantized_operators(proto, "int8-cpu"))
    weights = {entry.name: numpy_helper.to_array(entry) for entry in proto.graph.initializer}
    quantizers = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert {str(weights[node.input[2]].dtype) for node in quantizers} == {"uint8"}
    unnamed = next(node for node in proto.graph.node if node.name == "second")
    unnamed.name = ""
    assert "" not in precision.quantized_operators(proto, "int8-cpu")


@pytest.mark.parametrize("count", [37, 64, 65])
def test_ranges_are_those_of_any_number_of_images(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of the last one, which percentiles leave out; nothing is printed, because `export --json` prints JSON."""
    run, images = run_of(tmp_path, graph_of), images_of(count)
    images[-1, 0, 0, 0] = 1000

    def largest(method: str) -> float:
        proto = onnx.load(precision.convert(run, "int8", images, method).path)
        scales = {entry.name: numpy_helper.to_array(entry) for entry in proto.graph.initializer}
        (first,) = [node for node in proto.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "images"]
        return float(scales[first.input[1]]) * 127

    assert largest("minmax") == pytest.approx(np.abs(images).max(), rel=0.01)
    assert largest("percentile") < 0.9 * np.abs(images).max()
    assert capsys.readouterr().out == ""


def test_a_name_to_keep_that_there_is_not_is_answered_with_others(tmp_path: Path) -> None:
    """With those that are spelled alike, or else with the first three."""
    run = run_of(tmp_path, graph_of)
    for name, others in (("frist", "first"), ("secon", "second"), ("0", "first, second, pool")):
        with pytest.raises(UserError) as raised:
            precision.convert(run, "int8-cpu", images_of(8), kept=["last", name])
        assert str(raised.value) == f"--keep {name}: expected an operator that int8-cpu quantizes: {others} …"
