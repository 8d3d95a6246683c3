"""Converts the fp32 ONNX file to fp16 or int8.

The precision is part of the graph, because a strongly typed TensorRT network takes it from there: fp16 is a graph of
fp16 operators, int8 a graph with explicit Q/DQ pairs. Both are made with onnxruntime's own tools.

There are two int8 graphs, because neither is fast everywhere: TensorRT needs symmetric int8 activations (S8S8),
and the CPU's kernels are fast for unsigned ones (U8S8).
"""

import contextlib
import difflib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import replace

from runner.common.errors import UserError
from runner.deploy import onnx
from runner.deploy.onnx import OnnxFile
from runner.run.folder import Run
from runner.run.schema import Calibration, OnnxMetadata, Precision

if TYPE_CHECKING:
    from onnx import ModelProto

CALIBRATION_BATCH = 32  # most images at once
QUANTIZED_OPS = ["Conv", "Gemm", "MatMul"]
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
# These operators sum squares or exponentials, which overflow fp16 long before their inputs do.
FP32_OPS = ["LayerNormalization", "Softmax"]


def convert(
    run: Run,
    precision: Precision,
    calibration: np.ndarray | None,
    method: Calibration = "minmax",
    kept: Sequence[str] = (),
) -> OnnxFile:
    """Converts a run's fp32 ONNX file to a lower precision, and writes the result.

    Args:
        run: run that has been exported in fp32.
        precision: "fp16", "int8" (for TensorRT) or "int8-cpu".
        calibration: for int8, images for estimating the activation ranges, (N, 3, H, W) float32, normalized.
        method: how the activation ranges are estimated.
        kept: for int8, names of operators that stay in fp32.

    Raises:
        UserError: the run has no fp32 file, or `kept` names an operator that is not quantized.
    """
    proto, metadata = onnx.read(onnx.exported(run, "fp32").path)
    if precision == "fp16":
        converted = _to_fp16(proto)
    else:
        assert calibration is not None
        source = onnx.path_of(run, "fp32")
        quantizer = Quantizer(source, precision, calibration, method)
        for name in kept:
            if name not in quantizer.operators:
                near = difflib.get_close_matches(name, quantizer.operators) or quantizer.operators[:3]
                raise UserError(f"--keep {name}: expected an operator that {precision} quantizes: {', '.join(near)} …")
        converted = quantizer.quantize(kept)
        metadata = replace(metadata, kept=list(kept))
    return _write_checked(run, converted, precision, raw=False, metadata=metadata)


def add_raw_front_end(run: Run, precision: Precision) -> OnnxFile:
    """Writes a version of an exported ONNX file that takes decoded uint8 pixels (the raw front end)."""
    proto, metadata = onnx.read(onnx.exported(run, precision).path)
    return _write_checked(run, onnx.with_raw_input(proto, run.config()), precision, raw=True, metadata=metadata)


def _write_checked(run: Run, proto: "ModelProto", precision: Precision, raw: bool, metadata: OnnxMetadata) -> OnnxFile:
    """Writes a graph if it passes `onnx.check_finite`; `metadata` comes from the file that it was made from."""
    check = partial(
        onnx.check_finite,
        shape=metadata.image_shape if raw else metadata.shape,
        classes=len(metadata.classes),
        raw=raw,
        fp16=precision == "fp16",
    )
    return onnx.write(run, proto, precision, raw, metadata.weights, check, metadata.kept)


def _to_fp16(proto: "ModelProto") -> "ModelProto":
    """Converts all operators except FP32_OPS ones and those the converter skips; inputs and outputs stay fp32."""
    from onnxruntime.transformers import float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    fp32_operators = [*float16.DEFAULT_OP_BLOCK_LIST, *FP32_OPS]
    fp16 = float16.convert_float_to_float16(proto, keep_io_types=True, op_block_list=fp32_operators)
    _drop_repeated_casts(fp16.graph)
    OnnxModel(fp16).topological_sort()  # the converter appends casts after the operators that read them
    del fp16.graph.value_info[:]  # some of these types are outdated
    return fp16


def _drop_repeated_casts(graph: Any) -> None:
    """Keeps one of the casts of a value: the converter adds the same one for each operator that needs it."""
    casts: list[Any] = []
    for node in [node for node in graph.node if node.op_type == "Cast"]:
        if node in casts:
            graph.node.remove(node)
        casts.append(node)


class Quantizer:
    """Makes int8 graphs of an fp32 ONNX file, which differ in the operators that stay in fp32.

    Weights are quantized per output channel. For TensorRT, only the inputs of QUANTIZED_OPS are quantized, and biases
    stay fp32, because TensorRT fuses an activation into the preceding convolution only if there is no Q/DQ pair between
    them. The CPU's kernels pass int8 to each other, so all supported operators are quantized for the CPU.

    Args:
        source: the fp32 file.
        precision: "int8" (for TensorRT) or "int8-cpu".
        images: for estimating the activation ranges, (N, 3, H, W) float32, normalized.
        method: how these are estimated.
        ranges: file to keep the ranges in, so that they are estimated once for several graphs.
    """

    def __init__(
        self, source: Path, precision: Precision, images: np.ndarray, method: Calibration, ranges: Path | None = None
    ) -> None:
        self.source, self.precision, self.images, self.method, self.ranges = source, precision, images, method, ranges

    @cached_property
    def operators(self) -> list[str]:
        """The names of the operators that are quantized unless they are kept."""
        return quantized_operators(self.quantize(()), self.precision)

    def quantize(self, kept: Sequence[str]) -> "ModelProto":
        """Inserts Q/DQ pairs before all operators but those to keep in fp32."""
        import onnx as library
        from onnxruntime import quantization
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType

        methods = {"minmax": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}
        settings: dict[str, Any] = {"activation_type": QuantType.QUInt8}
        if self.precision == "int8":
            settings = {
                "activation_type": QuantType.QInt8,
                "op_types_to_quantize": QUANTIZED_OPS,
                "extra_options": {
                    "ActivationSymmetric": True,
                    "QuantizeBias": False,
                    "OpTypesToExcludeOutputQuantization": QUANTIZED_OPS,
                },
            }
        with tempfile.TemporaryDirectory() as folder, _quiet():
            path = Path(folder) / "int8.onnx"
            quantization.quantize_static(
                str(self.source),
                str(path),
                _CalibrationReader(self.images),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                weight_type=QuantType.QInt8,
                calibrate_method=methods[self.method],
                nodes_to_exclude=list(kept),
                calibration_cache_path=self.ranges,
                **settings,
            )
            proto = library.load(path)
        _read_before_quantization(proto, kept)
        return proto


def quantized_operators(proto: "ModelProto", precision: Precision) -> list[str]:
    """Returns the names of the operators that compute in int8, in the order of the graph.

    Others may read a quantized value as well, because it has several readers, but gain nothing by it.
    """
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    kinds = QUANTIZED_OPS if precision == "int8" else {*QDQRegistry, *QLinearOpsRegistry}
    dequantized = {node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    return [
        node.name
        for node in proto.graph.node
        if node.op_type in kinds and node.op_type not in QUANTIZERS and dequantized & set(node.input) and node.name
    ]


def _read_before_quantization(proto: "ModelProto", kept: Sequence[str]) -> None:
    """Connects operators to the values before Q/DQ pairs, which are there for other readers of the values."""
    producers = {name: node for node in proto.graph.node for name in node.output}
    for node in proto.graph.node:
        for index, name in enumerate(node.input) if node.name in kept else ():
            dequantize = producers.get(name)
            quantize = producers.get(dequantize.input[0]) if dequantize is not None else None
            if dequantize and quantize and [dequantize.op_type, quantize.op_type] == [*reversed(QUANTIZERS)]:
                node.input[index] = quantize.input[0]
    for _ in QUANTIZERS:  # first the dequantizers that have lost their last reader, then their quantizers
        used = {name for node in proto.graph.node for name in node.input} | {entry.name for entry in proto.graph.output}
        for node in [node for node in proto.graph.node if node.op_type in QUANTIZERS and not used & set(node.output)]:
            proto.graph.node.remove(node)


class _CalibrationReader:
    """Calibration images in batches, with the interface that onnxruntime's calibrators expect.

    All batches have the same size, because the calibrator for percentiles stacks what it collects.
    """

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.rewind()

    def rewind(self) -> None:
        count = len(self.images)
        size = max(size for size in range(1, CALIBRATION_BATCH + 1) if count % size == 0)
        self.batches = iter(np.split(self.images, count // size))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {onnx.INPUT: batch}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what onnxruntime's quantizer logs and prints: advice on preprocessing that is not needed, and progress."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # `export --json` prints JSON alone
            yield
    finally:
        logger.setLevel(level)


def calibration_images(run: Run, data: Path | None, count: int) -> np.ndarray:
    """Returns training images of the run's dataset, preprocessed as for evaluation; always the same images.

    Returns:
        (count, 3, H, W) float32, normalized.

    Raises:
        UserError: the dataset is missing, damaged or not the run's, or it has fewer than `count` training images.
    """
    import torch

    from runner.data import order
    from runner.data.open import open_split_of_run

    stream = open_split_of_run(run.config(), data, "train", torch.device("cpu"))
    if not 1 <= count <= stream.num_images:
        raise UserError(f"--calibration {count}: expected 1 to {stream.num_images:,}, the number of training images")
    samples = order.epoch_order(stream.num_images, 0, 0)[:count]  # shuffled, because a file may be sorted by class
    return stream.clean_images(samples).contiguous().numpy()
