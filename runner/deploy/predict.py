"""Classifies images with an exported model. An ONNX file suffices: its metadata describe its input and its classes.

A model with the raw front end takes uint8 pixels; for other models, images are normalized here.
"""

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from data_prep import images
from data_prep.images import SUFFIXES, decode, fit
from runner.common import files
from runner.common.console import list_some, track
from runner.common.errors import UserError
from runner.common.text import printable
from runner.deploy import onnx
from runner.deploy.session import PROVIDERS, OnnxSession
from runner.run.folder import Run
from runner.run.schema import EngineSidecar, FrontEnd, OnnxMetadata

JPEG = (".jpg", ".jpeg")
LARGEST_JPEG = 65_500  # maximum width and height of a JPEG file in pixels
COLUMNS, TILE, CAPTION = 8, 128, 49  # contact sheet: images per row; side of a tile and height of a caption, in pixels
Forward = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Prediction:
    """The predicted class of an image.

    Attributes:
        image: path of the image.
        label: name of the class.
        probability: probability of that class.
    """

    image: str
    label: str
    probability: float


def predict(
    model: Path, inputs: list[Path], batch: int, device: str, sheet: Path | None, server: str | None = None
) -> list[Prediction]:
    """Classifies images, and draws a contact sheet if requested.

    Args:
        model: an ONNX file; a run folder, to use its ONNX file that passed the gate; or, on a GPU, an engine with its
            sidecar next to it. With `server`, the name of a model on it.
        inputs: image files, or folders of them.
        batch: batch size; the last batch may be smaller.
        device: "cpu" or "cuda", for ONNX files.
        sheet: PNG or JPEG file to draw the contact sheet to; None draws none.
        server: address of an inference server; None to run the model here.

    Raises:
        UserError: an image or the model cannot be read, the model has no metadata, or the batch size is too large.
    """
    if sheet is not None:
        _check_sheet(sheet)
    paths, unused = _image_files(inputs)
    if sheet is not None:
        _check_sheet_images(sheet, paths)
        rows = -(-len(paths) // COLUMNS)
        needed = 2 * rows * COLUMNS * TILE * (TILE + CAPTION) * 3  # and its encoded copy
        images.require_memory(needed, f"--sheet {sheet}: {len(paths):,} images", "leave it out, or use fewer images")
    if server is not None:
        from runner.deploy import triton  # imports torch

        forward, metadata = triton.open_served(server, str(model))
    else:
        model = _passed_file(Run(model), device) if model.is_dir() else model
        forward, metadata = _load(model, device)
    if batch > metadata.largest_batch:
        raise UserError(f"--batch {batch}: expected at most {metadata.largest_batch}, the limit of {model}")
    height, width, _ = metadata.image_shape
    predictions = []
    batches = [paths[start : start + batch] for start in range(0, len(paths), batch)]
    for batch_paths in track(batches, "predict", len(batches)):
        # One after the other: only the fitted images of a batch are in memory together.
        fitted = [fit(decode(str(path), images.read(path)), width, height, metadata.fit) for path in batch_paths]
        pixels = np.stack([np.asarray(image) for image in fitted])
        logits = forward(pixels if metadata.front_end == FrontEnd.RAW else _normalize(pixels, metadata)).astype(
            np.float64
        )
        if logits.shape != (len(batch_paths), len(metadata.classes)):
            raise UserError(f"{model}: has {len(metadata.classes)} classes, but returns logits {logits.shape}")
        if not np.isfinite(logits).all():
            first = int(np.isfinite(logits).all(1).argmin())
            raise UserError(f"{model}: returned logits that are not finite for {batch_paths[first]}")
        probabilities = np.exp(logits - logits.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        for path, row in zip(batch_paths, probabilities, strict=True):
            predictions.append(Prediction(str(path), metadata.classes[int(row.argmax())], float(row.max())))
    if unused:
        print(f"runner: not used, because they are hidden or not images: {list_some(unused)}", file=sys.stderr)
    if sheet is not None:
        draw(predictions, sheet)
    return predictions


def _image_files(inputs: list[Path]) -> tuple[list[Path], list[str]]:
    """Returns the image files, those in folders and subfolders sorted by path, and the folders' other files."""
    paths, unused = [], []
    for path in inputs:
        if path.is_dir():
            for file in files.files_below(path):
                hidden = any(part.startswith(".") for part in file.relative_to(path).parts)  # such as ._1.png of macOS
                if file.suffix.lower() in SUFFIXES and not hidden and file.is_file():  # not a pipe
                    paths.append(file)
                else:
                    unused.append(printable(file))
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"{path}: expected an image or a folder of images, found no such file")
    if not paths:
        raise UserError(f"{', '.join(map(str, inputs)) or 'IMAGES'}: expected images, found none")
    return paths, unused


def _check_sheet(path: Path) -> None:
    """Raises UserError if a contact sheet cannot be written to this path."""
    known = path.suffix.lower() in (".png", *JPEG)
    if not known or path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--sheet {path}: expected a name that ends in .png or .jpg, in a writable folder")


def _check_sheet_images(sheet: Path, paths: list[Path]) -> None:
    """Raises UserError if a contact sheet would replace one of the images, or is too high for a JPEG."""
    if sheet.resolve() in {path.resolve() for path in paths}:
        raise UserError(f"--sheet {sheet}: expected a new file, found one of the images")
    height = -(-len(paths) // COLUMNS) * (TILE + CAPTION)
    if sheet.suffix.lower() in JPEG and height > LARGEST_JPEG:
        raise UserError(f"--sheet {sheet}: expected .png for {len(paths):,} images, too many for a JPEG")


def _passed_file(run: Run, device: str) -> Path:
    """Returns a run's most precise ONNX file with normalized input that passed the gate on this machine's device."""
    from runner.deploy import parity  # imports torch

    run.config()  # raises for a folder that is not a run
    run.read_parity()  # and for a damaged report
    failures = []
    for file in onnx.all_exported(run):
        if not file.raw:
            try:
                parity.require_passed(run, file, PROVIDERS[device])
            except UserError as error:
                failures.append(error)
            else:
                return file.path
    reason = f" ({failures[0]})" if failures else ""
    raise UserError(
        f"{run.folder}: expected an ONNX file that passed the gate on {device} on this machine, found none{reason}; "
        f"first: runner export {run.folder} && runner parity {run.folder} --device {device}"
    )


def _normalize(pixels: np.ndarray, metadata: OnnxMetadata) -> np.ndarray:
    """Normalizes and resizes as in training.

    Args:
        pixels: (n, H, W, 3) uint8, of the dataset's image size.
        metadata: metadata of the model.

    Returns:
        (n, 3, H, W) float32, of the model's input size.
    """
    from PIL import Image

    mean, std = (np.array(values, dtype=np.float32) for values in (metadata.mean, metadata.std))
    planes = ((pixels.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2)
    channels, height, width = metadata.shape
    if planes.shape[2:] != (height, width):
        resized = [
            np.asarray(Image.fromarray(plane, mode="F").resize((width, height), Image.Resampling.BILINEAR))
            for plane in planes.reshape(-1, *planes.shape[2:])
        ]
        planes = np.stack(resized).reshape(len(pixels), channels, height, width)
    return np.ascontiguousarray(planes)


def _load(model: Path, device: str) -> tuple[Forward, OnnxMetadata]:
    """Loads a model; returns a function that maps images to logits, and the metadata of the ONNX file."""
    if model.suffix == ".engine":
        return _load_engine(model)
    _, metadata = onnx.read(model)
    return OnnxSession(model, device, fp16=metadata.precision == "fp16"), metadata


def _load_engine(model: Path) -> tuple[Forward, OnnxMetadata]:
    """Like `_load`, for an engine, which must be in the deploy folder of its run."""
    import torch

    from runner.deploy import engine_run

    sidecar_path = engine_run.sidecar_of(model)
    if not sidecar_path.is_file():
        raise UserError(f"{model}: expected its sidecar {sidecar_path.name} next to it, found none")
    run, sidecar = Run(model.absolute().parent.parent), files.read_json(sidecar_path, EngineSidecar)
    engine_run.verify(run, sidecar)
    if (run.folder / sidecar.engine).resolve() != model.resolve():
        raise UserError(f"{model}: expected the sidecar of this engine, found that of {sidecar.engine}")
    if not torch.cuda.is_available():
        raise UserError(f"{model}: expected a GPU to run the engine, found none; pass the ONNX file instead")
    loaded = engine_run.LoadedEngine(run, sidecar)
    _, metadata = onnx.read(run.folder / sidecar.onnx)

    def forward(images: np.ndarray) -> np.ndarray:
        return loaded.run_in_batches(torch.from_numpy(images).cuda()).cpu().numpy()

    return forward, replace(metadata, largest_batch=sidecar.batch.max)


def draw(predictions: list[Prediction], target: Path) -> None:
    """Draws a contact sheet: every image with its class, probability and file name below."""
    from PIL import Image, ImageDraw, ImageFont

    rows = -(-len(predictions) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * (TILE + CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for index, prediction in enumerate(predictions):
        x, y = index % COLUMNS * TILE, index // COLUMNS * (TILE + CAPTION)
        path = Path(prediction.image)
        tile = decode(prediction.image, images.read(path)).resize((TILE - 8, TILE - 8), Image.Resampling.NEAREST)
        sheet.paste(tile, (x + 4, y + 4))
        label, name = (" ".join(text.split()) for text in (prediction.label, path.name))  # one line each
        lines = (label, "black"), (f"{prediction.probability:.1%}", "#666666"), (name, "#666666")
        for line, (text, color) in enumerate(lines):
            while pen.textlength(text, font) > TILE - 10:  # keep the end of a file name, which tells files apart
                text = text[:-1] if line == 0 else f"…{text[2:]}"
            pen.text((x + 6, y + TILE + 15 * line), text, fill=color, font=font)
    content = io.BytesIO()
    sheet.save(content, format=Image.registered_extensions()[target.suffix.lower()])
    files.write_atomically(target, content.getvalue())
