"""A run as ONNX: one file for each precision, and for each of two front ends.

model.fp32.onnx          images (batch, 3, H, W) float32, normalised, to logits (batch, classes) float32
model.<precision>.onnx   the same inputs and outputs; inside, the precision of its name (see precision.py)
model.<precision>.raw.onnx   pixels (batch, H, W, 3) uint8, as a decoder gives them; normalising is in the graph
"""

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from data_prep.console import UserError, sha256_of
from runner.runs import Run, read_json, write_json

if TYPE_CHECKING:
    from onnx import ModelProto

Precision = Literal["fp32", "fp16", "int8", "int8-cpu"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
INPUT, RAW_INPUT, OUTPUT = "images", "pixels", "logits"
RECORD = "exports.json"  # what was exported: of each file its hash, and that of the weights it was made of
LARGEST_BATCH = 4096
QUICK_IMAGES = 64
QUICK_LIMIT = 1e-3  # of the largest logit, by which fp32 may differ on the quick check's images


@dataclass(frozen=True)
class Exported:
    """An ONNX file of a run.

    Attributes:
        path: of the file.
        precision: of its arithmetic.
        raw: whether it takes pixels as they are.
        sha256: of the file, now.
    """

    path: Path
    precision: Precision
    raw: bool
    sha256: str

    @property
    def name(self) -> str:
        """`fp16`, or `fp16.raw`."""
        return name_of(self.precision, self.raw)


def name_of(precision: str, raw: bool) -> str:
    """How a file of this kind is called between `model.` and `.onnx`."""
    return f"{precision}.raw" if raw else precision


def path_of(run: Run, precision: Precision, raw: bool = False) -> Path:
    """Where the ONNX file of a run in a precision lies."""
    return run.deploy / f"model.{name_of(precision, raw)}.onnx"


def export(run: Run) -> Exported:
    """Writes `deploy/model.fp32.onnx`, when it gives the model's logits for a few images.

    The file holds its weights, and as metadata what a server needs: class names, mean and deviation, run,
    experiment, dataset, commit.

    Raises:
        RuntimeError: its logits are others. No file is left then.
    """
    import torch

    from runner import checkpoint, cpu

    cpu.prepare()
    config = run.config()
    weights = weights_of(run)  # before they are read: training may go on meanwhile
    # Traced in channels_last, flattening becomes an index computation in the graph.
    model = checkpoint.load_model(run).to(memory_format=torch.contiguous_format)
    proto = bare(model, config["input"]["shape"])

    def check(path: Path) -> None:
        from runner.deploy.session import Session

        images = torch.randn(QUICK_IMAGES, *config["input"]["shape"], generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = model(images)
        difference = (torch.from_numpy(Session(path)(images.numpy())) - expected).abs().max()
        if not difference <= QUICK_LIMIT * expected.abs().max():
            raise RuntimeError(
                f"{path}: logits differ from the model's by {difference:.3g} on {QUICK_IMAGES} images"
            )

    return write(run, proto, "fp32", raw=False, weights=weights, check=check)


def bare(model: Any, shape: list[int]) -> "ModelProto":
    """torch's exporter alone, with a dynamic batch of images (3, H, W)."""
    import torch

    with _quiet():
        program = torch.onnx.export(
            model,
            (torch.zeros(2, *shape),),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)},),
            dynamo=True,
            verbose=False,
        )
    return program.model_proto


def write(
    run: Run,
    proto: "ModelProto",
    precision: Precision,
    raw: bool,
    weights: str,
    check: Callable[[Path], None] | None = None,
) -> Exported:
    """Writes a graph as a run's file, with its metadata, after onnx's checker and `check` have passed it.

    Args:
        run: whose.
        proto: the graph.
        precision, raw: which of the run's files it is.
        weights: SHA-256 of those that the graph holds.
        check: raises where the file must not be.
    """
    import onnx

    config = run.config()
    metadata = {
        "classes": config["dataset"]["classes"],
        "precision": precision,
        "front_end": "raw" if raw else "normalised",
        "shape": config["input"]["shape"],
        "image_shape": config["dataset"]["image_shape"],
        "mean": config["input"]["mean"],
        "std": config["input"]["std"],
        "experiment": config["experiment"],
        "run": config["run"],
        "dataset": {key: config["dataset"][key] for key in ("name", "fingerprint")},
        "commit": config["git"].get("commit"),
        "weights": weights,
        "largest_batch": LARGEST_BATCH,
    }
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in metadata.items()})
    path = path_of(run, precision, raw)
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        onnx.save_model(proto, part, save_as_external_data=False)
        onnx.checker.check_model(part, full_check=True)
        if check is not None:
            check(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    made = Exported(path, precision, raw, sha256_of(path))
    write_json(path.with_name(RECORD), {**_record(run), path.name: {"sha256": made.sha256, "weights": weights}})
    return made


def check_finite(path: Path, shape: list[int], classes: int, raw: bool, fp16: bool) -> None:
    """The quick check of what is no fp32 file: it runs, and gives a finite logit for each class of each image.

    Args:
        path: of the file.
        shape: of an image as it is given: (3, H, W), or (H, W, 3) of a raw front end.
        classes: of the dataset.
        raw, fp16: which kind it is.

    Raises:
        RuntimeError: it does not.
    """
    import numpy as np

    from runner.deploy.session import Session

    generator = np.random.default_rng(0)
    if raw:
        images = generator.integers(0, 256, (QUICK_IMAGES, *shape), dtype=np.uint8)
    else:
        images = generator.standard_normal((QUICK_IMAGES, *shape), dtype=np.float32)
    logits = Session(path, fp16=fp16)(images)
    if logits.shape != (QUICK_IMAGES, classes) or not np.isfinite(logits).all():
        raise RuntimeError(f"{path}: expected finite logits of {classes} classes, found {logits.shape}, or others")


def with_raw_input(proto: "ModelProto", config: dict[str, Any]) -> "ModelProto":
    """The same graph, for pixels as a decoder gives them: (batch, H, W, 3) uint8 in front of what `images` was.

    Normalised and resized in float32, in that order, as training did it. Resizing is bilinear; where it makes
    images larger, as it does here, torchvision's antialiasing changes nothing.
    """
    import numpy as np
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    made = ModelProto()
    made.CopyFrom(proto)
    graph, shape = made.graph, config["input"]["shape"]
    height, width, _ = config["dataset"]["image_shape"]
    mean, std = (np.array(config["input"][key], dtype=np.float32) for key in ("mean", "std"))
    constants = {"raw_scale": 1 / std, "raw_shift": -mean / std}
    resized = [height, width] != shape[1:]
    planes = "raw_small" if resized else INPUT
    nodes = [  # the cast comes first: TensorRT takes uint8 nowhere else
        helper.make_node("Cast", [RAW_INPUT], ["raw_float"], name="raw_cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["raw_float", "raw_scale"], ["raw_scaled"], name="raw_scale"),
        helper.make_node("Add", ["raw_scaled", "raw_shift"], ["raw_normalised"], name="raw_shift"),
        helper.make_node("Transpose", ["raw_normalised"], [planes], name="raw_transpose", perm=[0, 3, 1, 2]),
    ]
    if resized:
        if height > shape[1] or width > shape[2]:
            raise UserError(
                f"--raw: images of {height} × {width} would have to be made smaller, which needs antialiasing; "
                "leave it out, and resize in front of the model"
            )
        constants["raw_factors"] = np.array([1, 1, shape[1] / height, shape[2] / width], dtype=np.float32)
        inputs = ["raw_small", "", "raw_factors"]
        nodes.append(helper.make_node("Resize", inputs, [INPUT], name="raw_resize", mode="linear"))
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *kept])
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(RAW_INPUT, TensorProto.UINT8, [batch, height, width, 3]))
    return made


def exported(run: Run, precision: Precision = "fp32", raw: bool = False) -> Exported:
    """A run's ONNX file.

    Raises:
        UserError: the run has not been exported so.
    """
    run.config()
    found = _found(run, precision, raw)
    if isinstance(found, str):
        words = f"{run.folder}" + ("" if precision == "fp32" else f" --precision {precision}") + " --raw" * raw
        told = f"expected {path_of(run, precision, raw).relative_to(run.folder)}, found {found}"
        raise UserError(f"{run.folder}: {told}; make it: runner export {words}")
    return found


def weights_of(run: Run) -> str:
    """SHA-256 of the weights that a run has now."""
    from runner import checkpoint

    return read_json(checkpoint.latest(run) / checkpoint.MANIFEST)["sha256"][checkpoint.WEIGHTS]


def is_current(run: Run, precision: Precision, raw: bool = False) -> bool:
    """Whether a run has this file, as it was exported, and of the weights that it has now."""
    return isinstance(_found(run, precision, raw), Exported)


def _found(run: Run, precision: Precision, raw: bool) -> Exported | str:
    """A run's file; or, where it is not what was exported of the run's weights, what is there instead."""
    path = path_of(run, precision, raw)
    if not path.is_file():
        return "none"
    made = Exported(path, precision, raw, sha256_of(path))
    told = _record(run).get(path.name, {})
    if told.get("sha256") != made.sha256:
        return "one that is not as it was exported"
    return made if told.get("weights") == weights_of(run) else "one of other weights"


def _record(run: Run) -> dict[str, Any]:
    path = run.deploy / RECORD
    return read_json(path) if path.is_file() else {}


def all_exported(run: Run) -> list[Exported]:
    """Every ONNX file that a run has of its weights, fp32 first."""
    kinds = [(precision, raw) for raw in (False, True) for precision in PRECISIONS]
    return [found for kind in kinds if isinstance(found := _found(run, *kind), Exported)]


def read(path: Path) -> tuple["ModelProto", dict[str, Any]]:
    """Reads an ONNX file that may come from anyone, and its metadata.

    Raises:
        UserError: it is no ONNX file, or keeps data outside of itself, wherever that is: such a file can name any
            other on this machine.
    """
    import onnx

    if not path.is_file():
        raise UserError(f"{path}: expected an ONNX file, there is none")
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own kinds
        raise UserError(f"{path}: expected an ONNX file: {_first_line(error)}") from None
    tensors = [tensor for graph in (proto.graph, *proto.functions) for tensor in _tensors(graph)]
    if any(tensor.external_data or tensor.data_location == tensor.EXTERNAL for tensor in tensors):
        raise UserError(f"{path}: expected one file that holds its weights, found external data; save it as one")
    try:
        onnx.checker.check_model(proto)
        metadata = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    except (onnx.checker.ValidationError, ValueError) as error:
        raise UserError(f"{path}: expected a sound ONNX file: {_first_line(error)}") from None
    return proto, metadata


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _tensors(graph: Any) -> Iterator[Any]:
    """Every constant of a graph, or of a function, and of the graphs inside it."""
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells its progress on standard output, where only our result belongs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)
