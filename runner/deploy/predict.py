"""A small server's work: a model file, some images, and for each its class and probability. Needs no run folder.

The file's metadata says what it wants and what its classes are; a file with a raw front end is given pixels as they
are, the other is given normalised ones.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.console import UserError, track
from runner.deploy import onnx
from runner.deploy.session import Session
from runner.runs import Run, write_atomically

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
COLUMNS, TILE = 8, 128  # of the contact sheet, in pictures and in pixels


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image.

    Attributes:
        image: its file.
        label: the class.
        probability: of that class.
    """

    image: str
    label: str
    probability: float


def predict(model: Path, images: list[Path], batch: int, device: str, sheet: Path | None) -> list[Prediction]:
    """Classifies images, and draws a contact sheet where one is wanted.

    Args:
        model: an ONNX file, or an engine with its sidecar beside it (on a GPU).
        images: files, or folders of them.
        batch: how many at a time; the last may be smaller.
        device: "cpu" or "cuda", for ONNX files.
        sheet: PNG file for the pictures with what was said of them.

    Raises:
        UserError: a file that is none, a model without metadata, a batch that the model does not take.
    """
    if batch < 1:
        raise UserError(f"--batch {batch}: expected 1 or more")
    files = _found(images)
    forward, metadata = _loaded(model, device)
    if batch > metadata["largest_batch"]:
        raise UserError(f"--batch {batch}: expected at most {metadata['largest_batch']}, the limit of {model}")
    raw = metadata["front_end"] == "raw"
    predictions = []
    cuts = [files[start : start + batch] for start in range(0, len(files), batch)]
    for cut in track(cuts, "predict", len(cuts)):
        side = (metadata["image_shape"][1], metadata["image_shape"][0])
        pixels = np.stack([_pixels(file, side) for file in cut])
        logits = forward(pixels if raw else _normalised(pixels, metadata)).astype(np.float64)
        if logits.shape != (len(cut), len(metadata["classes"])):
            raise UserError(f"{model}: names {len(metadata['classes'])} classes, gives logits {logits.shape}")
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        for file, row in zip(cut, shares, strict=True):
            predictions.append(Prediction(str(file), metadata["classes"][int(row.argmax())], float(row.max())))
    if sheet is not None:
        draw(predictions, sheet)
    return predictions


def _found(images: list[Path]) -> list[Path]:
    files = []
    for path in images:
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: expected an image or a folder of images, there is none")
    if not files:
        raise UserError(f"{', '.join(map(str, images)) or 'IMAGES'}: expected images, found none")
    return files


def _pixels(file: Path, size: tuple[int, int]) -> np.ndarray:
    """An image as (H, W, 3) uint8, brought to (width, height)."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            whole = image.convert("RGB")
            return np.asarray(whole if whole.size == size else whole.resize(size, Image.Resampling.BILINEAR))
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{file}: expected an image: {error}") from None


def _normalised(pixels: np.ndarray, metadata: dict[str, Any]) -> np.ndarray:
    """(n, H, W, 3) uint8 of the dataset's size to (n, 3, H, W) float32 of the model's, as training made them."""
    from PIL import Image

    mean, std = (np.array(metadata[key], dtype=np.float32) for key in ("mean", "std"))
    planes = ((pixels.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2)
    channels, height, width = metadata["shape"]
    if planes.shape[2:] != (height, width):
        resized = [
            np.asarray(Image.fromarray(plane, mode="F").resize((width, height), Image.Resampling.BILINEAR))
            for plane in planes.reshape(-1, *planes.shape[2:])
        ]
        planes = np.stack(resized).reshape(len(pixels), channels, height, width)
    return np.ascontiguousarray(planes)


def _loaded(model: Path, device: str) -> tuple[Any, dict[str, Any]]:
    """A function from an array of images to one of logits, and the metadata of its ONNX file."""
    if model.suffix == ".engine":
        return _engine(model)
    _, metadata = onnx.read(model)
    _check(model, metadata)
    return Session(model, device, fp16=metadata.get("precision") == "fp16"), metadata


def _check(model: Path, metadata: dict[str, Any]) -> None:
    """Raises UserError where metadata are not those of runner export: a file may come from anyone."""

    def numbers(key: str, *lengths: int) -> bool:
        value = metadata[key]
        return isinstance(value, list) and len(value) in lengths and all(isinstance(n, int | float) for n in value)

    classes = metadata.get("classes")
    right = {
        "classes": isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes),
        "front_end": metadata.get("front_end") in ("raw", "normalised"),
        "largest_batch": isinstance(metadata.get("largest_batch"), int) and metadata["largest_batch"] > 0,
        **{key: key in metadata and numbers(key, 3) for key in ("shape", "image_shape", "mean", "std")},
    }
    if wrong := sorted(key for key, fits in right.items() if not fits):
        raise UserError(f"{model}: expected metadata of runner export, found none or others of {', '.join(wrong)}")


def _engine(model: Path) -> tuple[Any, dict[str, Any]]:
    import torch

    from runner.deploy import engine

    sidecar_path = engine.sidecar_of(model)
    if not sidecar_path.is_file():
        raise UserError(f"{model}: expected its sidecar {sidecar_path.name} beside it; engines run only with it")
    run = Run(model.parent.parent)
    sidecar = engine.check_sidecar(run, sidecar_path)
    if (run.folder / sidecar["engine"]).resolve() != model.resolve():
        raise UserError(f"{model}: its sidecar speaks of {sidecar['engine']}; give that, in its run folder")
    if not torch.cuda.is_available():
        raise UserError(f"{model}: an engine runs on a GPU, found none; give the ONNX file it was built of")
    running = engine.RunningEngine(run, sidecar)
    _, metadata = onnx.read(run.folder / sidecar["onnx"])
    _check(model, metadata)
    metadata["largest_batch"] = sidecar["batch"]["max"]
    return lambda images: running.in_pieces(torch.from_numpy(images).cuda()).cpu().numpy(), metadata


def draw(predictions: list[Prediction], path: Path) -> None:
    """A contact sheet: every image with its class and probability below."""
    from PIL import Image, ImageDraw, ImageFont

    rows = -(-len(predictions) // COLUMNS)
    text = 34
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * (TILE + text)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for index, said in enumerate(predictions):
        x, y = index % COLUMNS * TILE, index // COLUMNS * (TILE + text)
        with Image.open(said.image) as image:
            tile = image.convert("RGB").resize((TILE - 8, TILE - 8), Image.Resampling.NEAREST)
        sheet.paste(tile, (x + 4, y + 4))
        pen.text((x + 6, y + TILE), said.label[:16], fill="black", font=font)
        pen.text((x + 6, y + TILE + 15), f"{said.probability:.1%}", fill="#666666", font=font)
    content = io.BytesIO()
    try:
        sheet.save(content, format=Image.registered_extensions().get(path.suffix.lower(), ""))
        write_atomically(path, content.getvalue())
    except (OSError, ValueError, KeyError) as error:
        known = "a name that ends in .png or .jpg, in a folder that can be written"
        raise UserError(f"--sheet {path}: expected {known} ({error})") from None
