"""Reads the images and labels of a .beton file of raw records, without ffcv.

FFCV's format, version 2: a header, a descriptor of each field, a table with one row for each sample (mode, height,
width and address of the pixels; the label), then pages of pixels. Within a page, raw records are contiguous.
"""

import math
from pathlib import Path

import numpy as np

from data_prep.manifest import Manifest, SplitFile
from runner.common.errors import UserError

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
VERSION, TYPE_INT, TYPE_RGB_IMAGE, MODE_RAW = 2, 1, 2, 1


def read(path: Path, split: SplitFile, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Reads a whole split: images (N, H, W, 3) uint8 and labels (N,) int64. Raises as `read_labels`."""
    content, addresses, labels = _read_table(path, split, manifest)
    size = math.prod(manifest.image_shape)
    images = np.empty((split.images, size), dtype=np.uint8)
    page_starts = np.flatnonzero(np.diff(addresses) != size) + 1  # the first image of each further page
    for start, stop in zip([0, *page_starts], [*page_starts, split.images], strict=True):
        begin = addresses[start]
        images[start:stop] = content[begin : begin + (stop - start) * size].reshape(-1, size)
    return images.reshape(-1, *manifest.image_shape), labels


def read_some(path: Path, split: SplitFile, manifest: Manifest, samples: np.ndarray) -> np.ndarray:
    """Reads the images of `samples` (n,): (n, H, W, 3) uint8. Raises as `read_labels`."""
    content, addresses, _ = _read_table(path, split, manifest)
    size = math.prod(manifest.image_shape)
    images = [content[addresses[sample] : addresses[sample] + size] for sample in samples]
    return np.array(images, np.uint8).reshape(len(samples), *manifest.image_shape)


def read_labels(path: Path, split: SplitFile, manifest: Manifest) -> np.ndarray:
    """Checks the layout of a file and reads its labels, (N,) int64, but not its pixels.

    Args:
        path: the file, whose hash the caller has checked.
        split: its entry in the manifest.
        manifest: for the image shape and the number of classes.

    Raises:
        UserError: layout, counts, sizes or labels differ from the manifest.
    """
    return _read_table(path, split, manifest)[2]


def _read_table(path: Path, split: SplitFile, manifest: Manifest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checks and reads the table: the mapped file (bytes,) uint8, image addresses (N,) int64, labels (N,) int64."""
    if path.stat().st_size < HEADER.itemsize + 2 * FIELD.itemsize:
        raise _layout_error(path, "an FFCV file", f"{path.stat().st_size} bytes")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    header = content[: HEADER.itemsize].view(HEADER)[0]
    fields_end = HEADER.itemsize + 2 * FIELD.itemsize
    table_end = fields_end + split.images * SAMPLE.itemsize
    if header["version"] != VERSION or header["num_fields"] != 2 or table_end > len(content):
        actual = f"version {header['version']} with {header['num_fields']} fields"
        raise _layout_error(path, f"format version {VERSION} with an image and a label field", actual)
    types = content[HEADER.itemsize : fields_end].view(FIELD)["type_id"].tolist()
    if types != [TYPE_RGB_IMAGE, TYPE_INT]:
        raise _layout_error(path, f"field types {[TYPE_RGB_IMAGE, TYPE_INT]} (RGB image, integer)", str(types))
    if header["num_samples"] != split.images:
        raise _layout_error(path, f"{split.images} samples", str(header["num_samples"]))
    table = np.array(content[fields_end:table_end]).view(SAMPLE)
    height, width, channels = manifest.image_shape
    layout = np.stack([table["image"]["mode"], table["image"]["height"], table["image"]["width"]], axis=1)
    if (layout != (MODE_RAW, height, width)).any():
        row = int(np.argmax((layout != (MODE_RAW, height, width)).any(axis=1)))
        raise _layout_error(path, f"raw images of {height}×{width}", f"{layout[row].tolist()} at record {row}")
    labels = table["label"].copy()
    if labels.min() < 0 or labels.max() >= len(manifest.classes):
        worst = labels.min() if labels.min() < 0 else labels.max()
        raise _layout_error(path, f"labels 0 to {len(manifest.classes) - 1}", f"label {worst}")
    if tuple(np.bincount(labels, minlength=len(manifest.classes)).tolist()) != split.images_per_class:
        raise _layout_error(path, f"{split.images_per_class} images per class", "other counts")
    size = height * width * channels
    addresses = table["image"]["data_ptr"].astype(np.int64)
    if addresses.min() < table_end or addresses.max() + size > len(content):
        raise _layout_error(path, "pixels within the file", "an address beyond it")
    return content, addresses, labels


def _layout_error(path: Path, expected: str, actual: str) -> UserError:
    return UserError(f"{path}: expected {expected}, found {actual}; prepare the dataset again")
