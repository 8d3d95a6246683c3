"""Lower precision, written into the graph, where every builder and runtime has to keep it.

A strongly typed TensorRT network has the precision of its graph and nothing else; so fp16 is a graph of fp16
operators, and int8 a graph with explicit Q/DQ pairs. Both are made from the fp32 file by onnxruntime's own tools.

Two int8 graphs, because no one graph is fast on both: TensorRT wants symmetric int8 activations (S8S8), the CPU's
kernels unsigned ones (U8S8).
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.console import UserError
from runner.deploy import onnx
from runner.deploy.onnx import Exported, Precision
from runner.runs import Run

CALIBRATION_BATCH = 32
Calibration = Literal["minmax", "percentile"]
WEIGHTED = ["Conv", "Gemm", "MatMul"]
# They add up squares or exponentials, which leave the range of fp16 long before what goes into them does.
SENSITIVE = ["LayerNormalization", "Softmax"]


def convert(
    run: Run, precision: Precision, calibration: np.ndarray | None, method: Calibration = "minmax"
) -> Exported:
    """Writes the file of a lower precision beside the fp32 one.

    Args:
        run: exported in fp32.
        precision: "fp16", "int8" (for TensorRT) or "int8-cpu".
        calibration: images that ranges of activations are found on, (N, 3, H, W) float32, normalised; for int8.
        method: how ranges are chosen from what was seen.

    Raises:
        UserError: the run has not been exported in fp32.
    """
    proto, metadata = onnx.read(onnx.exported(run, "fp32").path)
    if precision == "fp16":
        made = _fp16(proto)
    else:
        assert calibration is not None
        made = _int8(onnx.path_of(run, "fp32"), precision, calibration, method)
    return _written(run, made, precision, False, metadata)


def raw(run: Run, precision: Precision) -> Exported:
    """Writes the raw front end of a file that is there."""
    proto, metadata = onnx.read(onnx.exported(run, precision).path)
    return _written(run, onnx.with_raw_input(proto, run.config()), precision, True, metadata)


def _written(run: Run, made: Any, precision: Precision, is_raw: bool, metadata: dict[str, Any]) -> Exported:
    """The file, of the weights of the one that it was made of, after the quick check."""
    shape = metadata["image_shape" if is_raw else "shape"]
    classes, fp16 = len(metadata["classes"]), precision == "fp16"
    check = partial(onnx.check_finite, shape=shape, classes=classes, raw=is_raw, fp16=fp16)
    return onnx.write(run, made, precision, is_raw, metadata["weights"], check)


def _fp16(proto: Any) -> Any:
    """fp32 inputs and outputs, fp16 inside, but for SENSITIVE and what the converter leaves by itself."""
    from onnxruntime.transformers import float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    _unshare(proto.graph)
    kept = [*float16.DEFAULT_OP_BLOCK_LIST, *SENSITIVE]
    made = float16.convert_float_to_float16(proto, keep_io_types=True, op_block_list=kept)
    OnnxModel(made).topological_sort()  # the converter puts casts behind what reads them
    del made.graph.value_info[:]  # in part of the types before
    return made


def _unshare(graph: Any) -> None:
    """Gives each SENSITIVE operator constants of its own; of those of several, the converter names a cast twice."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for number, node in enumerate(graph.node):
        for place, name in enumerate(node.input):
            if node.op_type in SENSITIVE and name in constants:
                node.input[place] = f"{name}.{number}"
                graph.initializer.add().CopyFrom(constants[name])
                graph.initializer[-1].name = node.input[place]


def _int8(source: Path, precision: Precision, images: np.ndarray, method: Calibration) -> Any:
    """Q/DQ pairs; weights per output channel, biases in fp32.

    For TensorRT they stand in front of the operators with weights alone: it fuses an activation into the
    convolution before it only where no pair is between. The CPU's kernels hand int8 to one another, so there
    everything is quantised that can be.
    """
    import onnx as library
    from onnxruntime import quantization
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType

    methods = {"minmax": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}
    settings: dict[str, Any] = {"activation_type": QuantType.QUInt8}
    if precision == "int8":
        settings = {
            "activation_type": QuantType.QInt8,
            "op_types_to_quantize": WEIGHTED,
            "extra_options": {
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": WEIGHTED,
            },
        }
    with tempfile.TemporaryDirectory() as folder, _quiet():
        made = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            str(source),
            str(made),
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            calibrate_method=methods[method],
            **settings,
        )
        return library.load(made)


class _Reader:
    """Calibration images in small batches, as onnxruntime's calibrators ask for them."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.rewind()

    def rewind(self) -> None:
        self.batches = iter(np.split(self.images, range(CALIBRATION_BATCH, len(self.images), CALIBRATION_BATCH)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {onnx.INPUT: batch}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantiser advises what is done already."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def calibration_images(run: Run, data: Path | None, count: int) -> np.ndarray:
    """Training images of the run's dataset, as evaluation sees images; the same for every call.

    Raises:
        UserError: the dataset is gone, damaged or another one, or has fewer training images.
    """
    import torch

    from runner.batches import order
    from runner.batches.protocol import open_train_of_run

    stream = open_train_of_run(run.config(), data, torch.device("cpu"))
    if not 1 <= count <= stream.samples:
        raise UserError(f"--calibration {count}: expected 1 to {stream.samples:,}, the training images")
    chosen = order.epoch_order(stream.samples, 0, 0)[:count]  # not the first: a file may be sorted by class
    return stream.plain(chosen).contiguous().numpy()
