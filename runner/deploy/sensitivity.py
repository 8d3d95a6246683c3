"""Measures which operators of an ONNX file change its values, compared with the fp32 file."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from runner.deploy.session import OnnxSession

if TYPE_CHECKING:
    from onnx import ModelProto


class AddedError(NamedTuple):
    """The relative error of an operator's output, and the largest one of its inputs."""

    operator: str
    kind: str
    error: float
    before: float

    @property
    def added(self) -> float:
        """What the operator itself adds."""
        return self.error - self.before

    def __str__(self) -> str:
        return f"{self.kind} {self.operator} (relative error {self.error:.2g}, {self.before:.2g} before it)"


def added_errors(
    reference: "ModelProto", suspect: "ModelProto", images: np.ndarray, device: str = "cpu"
) -> list[AddedError]:
    """Returns the operators of the fp32 graph by the error that they add in another one, in descending order.

    onnxruntime runs both graphs and returns every tensor that both have.

    Args:
        reference: the fp32 graph, which runs on the CPU. Both graphs are changed: more tensors become outputs.
        suspect: the other graph.
        images: (n, 3, H, W) float32, normalized.
        device: device that runs the other graph.
    """
    clipped = _clipped_by_quantization(reference, suspect)
    errors = _relative_errors(reference, suspect, clipped, images, device)
    makers = {name: node for node in reference.graph.node for name in node.output}
    found = []
    for node in reference.graph.node:
        for name in node.output:
            operator = makers[node.input[0]] if name in clipped else node
            before = max((errors.get(source, 0.0) for source in operator.input), default=0.0)
            if name in errors and np.isfinite(before):
                found.append(AddedError(operator.name or name, operator.op_type, errors[name], before))
    return sorted(found, key=lambda error: error.added, reverse=True)


def _clipped_by_quantization(reference: "ModelProto", suspect: "ModelProto") -> dict[str, str]:
    """Returns the outputs of activations that are left to the limits of uint8, and the tensors with their values.

    The operator before such an activation computes a tensor of the activation's name.
    """
    kinds = {name: node.op_type for node in reference.graph.node for name in node.output}
    quantized = {node.input[0]: node.output[0] for node in suspect.graph.node if node.op_type == "QuantizeLinear"}
    values = {node.input[0]: node.output[0] for node in suspect.graph.node if node.op_type == "DequantizeLinear"}
    return {
        name: values[quantized[name]]
        for node in suspect.graph.node
        for name in node.output
        if name in quantized and kinds.get(name) in ("Relu", "Clip") and node.op_type != kinds[name]
    }


def _relative_errors(
    reference: "ModelProto", suspect: "ModelProto", clipped: dict[str, str], images: np.ndarray, device: str
) -> dict[str, float]:
    """Returns the relative errors of the tensors that two graphs share, by name."""
    from onnx import helper

    suspect_names = {name for node in suspect.graph.node for name in node.output}
    shared = [name for node in reference.graph.node for name in node.output if name in suspect_names]
    values = []
    for proto, where, names in ((reference, "cpu", {}), (suspect, device, clipped)):
        outputs = {output.name for output in proto.graph.output}
        read = [names.get(name, name) for name in shared]
        proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in read if name not in outputs)
        arrays = OnnxSession(proto.SerializeToString(), where, optimize=False).run_all_outputs(images)
        values.append({name: arrays[names.get(name, name)] for name in shared})
    errors = {}
    for name in shared:
        expected, actual = (np.asarray(arrays[name], dtype=np.float64) for arrays in values)
        error = float(np.linalg.norm(actual - expected) / (np.linalg.norm(expected) + 1e-12))
        errors[name] = error if np.isfinite(error) else np.inf
    return errors
