"""Reads the pixels and labels of a .beton of raw records, without ffcv.

FFCV's file (format version 2): a header, one descriptor for each field, a table with one row for each sample
(mode, height, width and address of the pixels; the label), then pages of pixels. Raw records of one size lie
one behind the other within a page.
"""

import math
from pathlib import Path

import numpy as np

from data_prep.console import UserError
from data_prep.manifest import Manifest, SplitFile

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
    """Reads a whole split: images (N, H, W, 3) uint8 and labels (N,) int64. Refuses as `read_labels` does."""
    content, pointers, labels = _table(path, split, manifest)
    size = math.prod(manifest.image_shape)
    images = np.empty((split.images, size), dtype=np.uint8)
    breaks = np.flatnonzero(np.diff(pointers) != size) + 1  # where a page ends
    for start, stop in zip([0, *breaks], [*breaks, split.images], strict=True):
        begin = pointers[start]
        images[start:stop] = content[begin : begin + (stop - start) * size].reshape(-1, size)
    return images.reshape(-1, *manifest.image_shape), labels


def read_some(path: Path, split: SplitFile, manifest: Manifest, samples: np.ndarray) -> np.ndarray:
    """Reads the images of `samples` (n,) alone: (n, H, W, 3) uint8. Refuses as `read_labels` does."""
    content, pointers, _ = _table(path, split, manifest)
    size = math.prod(manifest.image_shape)
    images = [content[pointers[sample] : pointers[sample] + size] for sample in samples]
    return np.array(images, np.uint8).reshape(len(samples), *manifest.image_shape)


def read_labels(path: Path, split: SplitFile, manifest: Manifest) -> np.ndarray:
    """Checks a whole file's layout and reads its labels, (N,) int64; the pixels stay on disk.

    Args:
        path: the file; its hash is the caller's to check.
        split: what the manifest says of it.
        manifest: for the image shape and the number of classes.

    Raises:
        UserError: a layout, count, size or label other than the manifest's.
    """
    return _table(path, split, manifest)[2]


def _table(path: Path, split: SplitFile, manifest: Manifest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mapped file (bytes,) uint8, the address of each image (N,) int64, and the labels (N,) int64."""
    if path.stat().st_size < HEADER.itemsize + 2 * FIELD.itemsize:
        raise _refused(path, "an FFCV file", f"{path.stat().st_size} bytes")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    header = content[: HEADER.itemsize].view(HEADER)[0]
    fields_end = HEADER.itemsize + 2 * FIELD.itemsize
    table_end = fields_end + split.images * SAMPLE.itemsize
    if header["version"] != VERSION or header["num_fields"] != 2 or table_end > len(content):
        found = f"version {header['version']} with {header['num_fields']} fields"
        raise _refused(path, f"format version {VERSION} with an image and a label field", found)
    types = content[HEADER.itemsize : fields_end].view(FIELD)["type_id"].tolist()
    if types != [TYPE_RGB_IMAGE, TYPE_INT]:
        raise _refused(path, f"field types {[TYPE_RGB_IMAGE, TYPE_INT]} (RGB image, integer)", str(types))
    if header["num_samples"] != split.images:
        raise _refused(path, f"{split.images} samples", str(header["num_samples"]))
    table = np.array(content[fields_end:table_end]).view(SAMPLE)
    height, width, channels = manifest.image_shape
    layout = np.stack([table["image"]["mode"], table["image"]["height"], table["image"]["width"]], axis=1)
    if (layout != (MODE_RAW, height, width)).any():
        row = int(np.argmax((layout != (MODE_RAW, height, width)).any(axis=1)))
        raise _refused(path, f"raw images of {height}×{width}", f"{layout[row].tolist()} at record {row}")
    labels = table["label"].copy()
    if labels.min() < 0 or labels.max() >= len(manifest.classes):
        worst = labels.min() if labels.min() < 0 else labels.max()
        raise _refused(path, f"labels 0 to {len(manifest.classes) - 1}", f"label {worst}")
    if tuple(np.bincount(labels, minlength=len(manifest.classes)).tolist()) != split.images_per_class:
        raise _refused(path, f"{split.images_per_class} images per class", "other counts")
    size = height * width * channels
    pointers = table["image"]["data_ptr"].astype(np.int64)
    if pointers.min() < table_end or pointers.max() + size > len(content):
        raise _refused(path, "pixels within the file", "an address beyond it")
    return content, pointers, labels


def _refused(path: Path, expected: str, found: str) -> UserError:
    return UserError(f"{path}: expected {expected}, found {found}; prepare the dataset again")
