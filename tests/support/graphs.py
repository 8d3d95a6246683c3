"""ONNX graphs that are written operator by operator, which takes no export."""

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.support.models.tiny import Tiny


def graph_of(model: Tiny, scale: float = 1.0) -> ModelProto:
    """The network of the tests' experiments, whose logits are multiplied by a constant of the graph."""
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    conv = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["images", "layers.0.weight", "layers.0.bias"], ["a"], name="first", **conv),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "layers.3.weight", "layers.3.bias"], ["c"], name="second", **conv),
        helper.make_node("Relu", ["c"], ["d"], name="relu2"),
        helper.make_node("AveragePool", ["d"], ["e"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["e"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "layers.8.weight", "layers.8.bias"], ["g"], name="last", transB=1),
        helper.make_node("Constant", [], ["h"], name="scale", value_float=scale),
        helper.make_node("Mul", ["g", "h"], ["logits"], name="times"),
    ]
    return model_of(nodes, weights)


def model_of(nodes: list[NodeProto], weights: dict[str, np.ndarray]) -> ModelProto:
    """A model of these operators, from `images` (batch, 3, 32, 32) to `logits` (batch, 10)."""
    float_tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "small",
        [float_tensor("images", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [float_tensor("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
