"""Exports a run to ONNX, with one file per precision and front end.

model.<precision>.onnx       normalized images (batch, 3, H, W) float32 to logits (batch, classes) float32
model.<precision>.raw.onnx   decoded pixels (batch, H, W, 3) uint8 to the same logits; the graph normalizes and resizes

The precision is the one that the graph computes in; see precision.py.
"""

import contextlib
import functools
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from runner.common import files
from runner.common.errors import UserError
from runner.common.files import sha256_of
from runner.common.text import first_line, without_controls
from runner.run.folder import MANIFEST, WEIGHTS, Run
from runner.run.schema import CheckpointManifest, Export, FrontEnd, OnnxMetadata, Precision, RunConfig

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
INPUT, RAW_INPUT, OUTPUT = "images", "pixels", "logits"
LARGEST_BATCH = 4096
CHECK_IMAGES = 64
MAX_LOGIT_ERROR = 1e-3  # maximum difference between fp32 logits in the quick check, relative to the largest logit


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file of a run.

    Attributes:
        path: path of the file.
        precision: precision that the graph computes in.
        raw: whether the graph takes uint8 pixels.
        sha256: SHA-256 of the file's current contents.
    """

    path: Path
    precision: Precision
    raw: bool
    sha256: str

    @property
    def name(self) -> str:
        """Precision and front end, as in the file name: `fp16` or `fp16.raw`."""
        return name_of(self.precision, self.raw)

    @property
    def front_end(self) -> FrontEnd:
        """The kind of input that the graph takes, as written in JSON files."""
        return FrontEnd.RAW if self.raw else FrontEnd.NORMALIZED


def name_of(precision: Precision, raw: bool) -> str:
    """Returns the part of a file name between `model.` and `.onnx`."""
    return f"{precision}.raw" if raw else precision


def path_of(run: Run, precision: Precision, raw: bool = False) -> Path:
    """The path of a run's ONNX file, whether or not it exists."""
    return run.deploy / f"model.{name_of(precision, raw)}.onnx"


def export(run: Run) -> OnnxFile:
    """Writes `deploy/model.fp32.onnx` and checks its logits against the model's on random images.

    The file contains the weights, and metadata that a server needs (see `OnnxMetadata`).

    Raises:
        RuntimeError: the logits differ; the file is not kept.
    """
    import torch

    from runner.system import cpu
    from runner.training import checkpoint

    cpu.prepare()
    shape = run.config().input.shape
    weights = weights_sha256(run)  # before loading them: a run that is still training may write newer ones
    # When traced in channels_last, flattening becomes an index computation in the graph.
    model = checkpoint.load_model(run).to(memory_format=torch.contiguous_format)

    def check(path: Path) -> None:
        from runner.deploy.session import OnnxSession

        images = torch.randn(CHECK_IMAGES, *shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = model(images)
        if not expected.isfinite().all():
            raise UserError(f"{run.folder}: its weights give logits that are not finite; train it again")
        difference = (torch.from_numpy(OnnxSession(path)(images.numpy())) - expected).abs().max()
        if not difference <= MAX_LOGIT_ERROR * expected.abs().max():
            raise RuntimeError(
                f"{path_of(run, 'fp32')}: its logits would differ from the model's by {difference:.3g} on "
                f"{CHECK_IMAGES} images"
            )

    return write(run, to_proto(model, shape), "fp32", raw=False, weights=weights, check=check)


def to_proto(model: Any, shape: list[int]) -> "ModelProto":
    """Traces a model with torch's exporter, for images of one shape (3, H, W) and any batch size."""
    import torch

    with silenced_exporter():
        program = torch.onnx.export(
            model,
            (torch.zeros(2, *shape),),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)},),
            dynamo=True,
        )
    assert program is not None
    proto = program.model_proto
    # The exporter's notes, such as a stack trace of each operator, with the paths of this machine.
    for graph in (proto.graph, *proto.functions):
        for part in (graph, *graph.node):
            del part.metadata_props[:]
    return proto


def write(
    run: Run,
    proto: "ModelProto",
    precision: Precision,
    raw: bool,
    weights: str,
    check: Callable[[Path], None] | None = None,
    kept: Sequence[str] = (),
) -> OnnxFile:
    """Writes a graph with its metadata as a run's ONNX file, if it passes onnx's checker and `check`.

    Args:
        run: the run.
        proto: the graph.
        precision, raw: precision and front end, which select the file to write.
        weights: SHA-256 of the weights in the graph.
        check: raises if the file must not be kept.
        kept: operators of an int8 graph that stay in fp32.
    """
    import onnx

    path = path_of(run, precision, raw)
    path.parent.mkdir(exist_ok=True)
    staging = path.with_name(f".{path.name}.part")
    try:
        del proto.metadata_props[:]
        onnx.helper.set_model_props(proto, _metadata_of(run, precision, raw, weights, kept))
        onnx.save_model(proto, staging, save_as_external_data=False)
        onnx.checker.check_model(staging, full_check=True)
        if check is not None:
            check(staging)
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    written = OnnxFile(path, precision, raw, sha256_of(path))
    exports = run.read_exports()
    before = exports.get(path.name)
    exports[path.name] = Export(sha256=written.sha256, weights=weights)
    outdated = path_of(run, precision, raw=True)
    changed = before is None or before.sha256 != written.sha256
    removed = exports.pop(outdated.name, None) if not raw and changed else None
    files.write_json(run.exports, exports)
    if removed is not None:
        outdated.unlink(missing_ok=True)
        print(f"runner: {outdated}: removed, because it was made from the earlier {path.name}", file=sys.stderr)
    return written


def _metadata_of(run: Run, precision: Precision, raw: bool, weights: str, kept: Sequence[str]) -> dict[str, str]:
    """The metadata of an ONNX file, each value as JSON."""
    config = run.config()
    values = {
        "classes": config.dataset.classes,
        "precision": precision,
        "front_end": FrontEnd.RAW if raw else FrontEnd.NORMALIZED,
        "shape": config.input.shape,
        "image_shape": config.dataset.image_shape,
        "fit": config.dataset.source.get("fit", "stretch"),
        "mean": config.input.mean,
        "std": config.input.std,
        "experiment": config.experiment,
        "run": config.run,
        "dataset": {"name": config.dataset.name, "fingerprint": config.dataset.fingerprint},
        "commit": config.git.commit,
        "weights": weights,
        "kept": list(kept),
        "largest_batch": LARGEST_BATCH,
    }
    metadata = msgspec.convert(values, OnnxMetadata)  # checks that `read` will accept it
    return {key: json.dumps(value) for key, value in msgspec.to_builtins(metadata).items()}


def check_finite(path: Path, shape: tuple[int, ...], classes: int, raw: bool, fp16: bool) -> None:
    """Runs an ONNX file on random images and checks that it returns a finite logit for each class.

    Args:
        path: the file.
        shape: shape of one input image: (3, H, W), or (H, W, 3) for the raw front end.
        classes: number of classes.
        raw, fp16: whether the file has the raw front end, and whether it is an fp16 file.

    Raises:
        RuntimeError: the logits have another shape.
        UserError: they are not finite.
    """
    import numpy as np

    from runner.deploy.session import OnnxSession

    generator = np.random.default_rng(0)
    images: np.ndarray
    if raw:
        images = generator.integers(0, 256, (CHECK_IMAGES, *shape), dtype=np.uint8)
    else:
        images = generator.standard_normal((CHECK_IMAGES, *shape), dtype=np.float32)
    logits = OnnxSession(path, fp16=fp16)(images)
    if logits.shape != (CHECK_IMAGES, classes):
        raise RuntimeError(f"{path}: expected logits of shape {(CHECK_IMAGES, classes)}, found {logits.shape}")
    if not np.isfinite(logits).all():
        name = path.name.removeprefix(".").removesuffix(".part")
        remedy = "its values exceed those of fp16; export fp32 or int8" if fp16 else "train the run again"
        raise UserError(f"{path.with_name(name)}: expected finite logits, found infinity or NaN; {remedy}")


def check_raw_input(config: RunConfig) -> None:
    """Raises UserError if the raw front end would have to downscale images."""
    height, width, _ = config.dataset.image_shape
    if height > config.input.shape[1] or width > config.input.shape[2]:
        raise UserError(
            f"--raw: expected images of at most {config.input.shape[1]} × {config.input.shape[2]}, found {height} × "
            f"{width}; downscaling needs antialiasing: omit --raw, and resize images before the model"
        )


def with_raw_input(proto: "ModelProto", config: RunConfig) -> "ModelProto":
    """Returns a copy of a graph that takes decoded pixels, (batch, H, W, 3) uint8, in place of `images`.

    The copy normalizes and resizes in float32, in that order, as in training. Resizing is bilinear; torchvision's
    antialiasing makes no difference when images are upscaled.

    Raises:
        UserError: images would have to be downscaled.
    """
    import numpy as np
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    raw = ModelProto()
    raw.CopyFrom(proto)
    graph, shape = raw.graph, config.input.shape
    height, width, _ = config.dataset.image_shape
    mean, std = (np.array(values, dtype=np.float32) for values in (config.input.mean, config.input.std))
    constants = {"raw_scale": 1 / std, "raw_shift": -mean / std}
    resized = [height, width] != shape[1:]
    transposed = "raw_small" if resized else INPUT
    front_end = [  # the cast comes first, because TensorRT accepts uint8 nowhere else
        helper.make_node("Cast", [RAW_INPUT], ["raw_float"], name="raw_cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["raw_float", "raw_scale"], ["raw_scaled"], name="raw_scale"),
        helper.make_node("Add", ["raw_scaled", "raw_shift"], ["raw_normalized"], name="raw_shift"),
        helper.make_node("Transpose", ["raw_normalized"], [transposed], name="raw_transpose", perm=[0, 3, 1, 2]),
    ]
    if resized:
        check_raw_input(config)
        factors = (resize_factor(height, shape[1]), resize_factor(width, shape[2]))
        constants["raw_factors"] = np.array([1, 1, *factors], dtype=np.float32)
        inputs = ["raw_small", "", "raw_factors"]
        front_end.append(helper.make_node("Resize", inputs, [INPUT], name="raw_resize", mode="linear"))
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    model_nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*front_end, *model_nodes])
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(RAW_INPUT, TensorProto.UINT8, [batch, height, width, 3]))
    return raw


def resize_factor(size: int, target: int) -> "np.float32":
    """Returns the float32 factor by which ONNX resizes from `size` to `target` pixels, of which it takes the floor."""
    import numpy as np

    factor = np.float32(target / size)
    return factor if np.float32(size) * factor >= target else np.nextafter(factor, np.float32(np.inf))


def exported(run: Run, precision: Precision = "fp32", raw: bool = False) -> OnnxFile:
    """Returns a run's ONNX file for a precision and front end.

    Raises:
        UserError: it is missing, was changed after export, has external data, or was exported from other weights.
    """
    run.config()
    file = _find(run, precision, raw)
    if isinstance(file, str):
        command = f"runner export {run.folder}" + f" --precision {precision}" * (precision != "fp32") + " --raw" * raw
        expected = path_of(run, precision, raw).relative_to(run.folder)
        raise UserError(f"{run.folder}: expected {expected}, found {file}; make it: {command}")
    return file


def weights_sha256(run: Run) -> str:
    """SHA-256 of a run's latest weights, from their manifest."""
    from runner.training import checkpoint

    return files.read_json(checkpoint.latest(run) / MANIFEST, CheckpointManifest).sha256[WEIGHTS]


def is_current(run: Run, precision: Precision, raw: bool = False) -> bool:
    """Whether a run has this file, unchanged since export, and exported from its latest weights."""
    return isinstance(_find(run, precision, raw), OnnxFile)


def all_exported(run: Run) -> list[OnnxFile]:
    """Every current ONNX file of a run, fp32 first, raw front ends last."""
    kinds = [(precision, raw) for raw in (False, True) for precision in PRECISIONS]
    return [file for kind in kinds if isinstance(file := _find(run, *kind), OnnxFile)]


def _find(run: Run, precision: Precision, raw: bool) -> OnnxFile | str:
    """Returns a run's file if it is current, or else a phrase for error messages that says what is there instead."""
    path = path_of(run, precision, raw)
    if not path.is_file():
        return "none"
    file = OnnxFile(path, precision, raw, sha256_of(path))
    entry = run.read_exports().get(path.name)
    if entry is None:
        return f"one that {run.exports.name} does not list"
    if entry.sha256 != file.sha256:
        return "one that was changed after its export"
    if has_external_data(path, file.sha256):
        return "one with external data"
    return file if entry.weights == weights_sha256(run) else "one exported from other weights"


def read(path: Path) -> tuple["ModelProto", OnnxMetadata]:
    """Reads an ONNX file that may come from an untrusted source, and its metadata.

    Raises:
        UserError: the file was not written by `runner export`, or it refers to external data, which could be any file
            on this machine.
    """
    import onnx

    if not path.is_file():
        raise UserError(f"{path}: expected an ONNX file, found none")
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises exceptions from several modules
        raise UserError(f"{path}: expected an ONNX file: {first_line(error)}") from None
    if _refers_to_files(proto):
        raise UserError(f"{path}: expected one file that holds its weights, found external data; save it as one")
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise UserError(f"{path}: expected a valid ONNX file: {first_line(error)}") from None
    try:
        values = {entry.key: without_controls(entry.value.encode()) for entry in proto.metadata_props}
        metadata = {key: msgspec.json.decode(value) for key, value in values.items()}
        return proto, msgspec.convert(metadata, OnnxMetadata)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UserError(f"{path}: expected metadata of runner export: {error}; export it again") from None


@functools.lru_cache(64)
def has_external_data(path: Path, sha256: str) -> bool:
    """Returns whether an ONNX file with this hash refers to external data, or is not an ONNX file.

    Whoever made a run folder also wrote the hashes in it, so that these do not rule it out.
    """
    import onnx

    try:
        return _refers_to_files(onnx.load(path, load_external_data=False))
    except Exception:  # protobuf raises exceptions from several modules
        return True


def _refers_to_files(proto: "ModelProto") -> bool:
    tensors = [tensor for graph in (proto.graph, *proto.functions) for tensor in _tensors(graph)]
    tensors += [tensor for function in proto.functions for tensor in _attribute_tensors(function.attribute_proto)]
    return any(tensor.external_data or tensor.data_location == tensor.EXTERNAL for tensor in tensors)


def _tensors(graph: Any) -> Iterator[Any]:
    """Yields every constant of a graph or function, including those of nested graphs."""
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _attribute_tensors(node.attribute)


def _attribute_tensors(attributes: Any) -> Iterator[Any]:
    """Yields every constant in attributes of a node or function."""
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


@contextlib.contextmanager
def silenced_exporter() -> Iterator[None]:
    """Hides what torch's exporter logs and prints to standard output."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
