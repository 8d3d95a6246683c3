"""Reads the images and labels of a .beton file of raw records without ffcv, and checks what ffcv does not check.

A file in version 2 of FFCV's format consists of a header, a descriptor for each field, a table with one row per sample
(mode, height, width and address of the pixels; the label), pages of pixels, and the allocation table, which has the
address and size of the pixels of each sample. Within a page, raw records are contiguous.

Without any check, FFCV copies the number of bytes in the allocation table from the address in the sample's row, so a
crafted file could read and overwrite memory. Every address and size is therefore checked here before FFCV opens a file.
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
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELD_NAMES = ["image", "label"]
VERSION, TYPE_INT, TYPE_RGB_IMAGE, MODE_RAW = 2, 1, 2, 1


def read_split(path: Path, split: SplitFile, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Reads a whole split: images (N, H, W, 3) uint8 and labels (N,) int64. Raises UserError like `read_labels`."""
    content, addresses, labels = _read_table(path, split, manifest)
    size = math.prod(manifest.image_shape)
    images = np.empty((split.images, size), dtype=np.uint8)
    page_starts = np.flatnonzero(np.diff(addresses) != size) + 1  # the first image of each further page
    for start, stop in zip([0, *page_starts], [*page_starts, split.images], strict=True):
        begin = addresses[start]
        images[start:stop] = content[begin : begin + (stop - start) * size].reshape(-1, size)
    return images.reshape(-1, *manifest.image_shape), labels


def read_images(path: Path, split: SplitFile, manifest: Manifest, samples: np.ndarray) -> np.ndarray:
    """Reads the images with the indices `samples` (n,), as (n, H, W, 3) uint8. Raises UserError like `read_labels`."""
    content, addresses, _ = _read_table(path, split, manifest)
    size = math.prod(manifest.image_shape)
    images = [content[addresses[sample] : addresses[sample] + size] for sample in samples]
    return np.array(images, np.uint8).reshape(len(samples), *manifest.image_shape)


def read_labels(path: Path, split: SplitFile, manifest: Manifest) -> np.ndarray:
    """Checks the layout of a file and reads its labels, (N,) int64, but not its pixels.

    Args:
        path: the file, whose hash the caller has checked.
        split: its entry in the manifest.
        manifest: the manifest, which has the image shape and the number of classes.

    Raises:
        UserError: layout, counts, sizes or labels differ from the manifest.
    """
    return _read_table(path, split, manifest)[2]


def _read_table(path: Path, split: SplitFile, manifest: Manifest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checks the table; returns the mapped file (bytes,) uint8, image addresses (N,) int64 and labels (N,) int64."""
    if path.stat().st_size < HEADER.itemsize + 2 * FIELD.itemsize:
        raise _layout_error(path, "an FFCV file", f"{path.stat().st_size} bytes")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    header = content[: HEADER.itemsize].view(HEADER)[0]
    fields_end = HEADER.itemsize + 2 * FIELD.itemsize
    table_end = fields_end + split.images * SAMPLE.itemsize
    if header["version"] != VERSION or header["num_fields"] != 2 or table_end > len(content):
        actual = f"version {header['version']} with {header['num_fields']} fields"
        raise _layout_error(path, f"format version {VERSION} with an image and a label field", actual)
    fields = content[HEADER.itemsize : fields_end].view(FIELD)
    types = fields["type_id"].tolist()
    names = [name.tobytes().rstrip(b"\0").decode(errors="backslashreplace") for name in fields["name"]]
    if types != [TYPE_RGB_IMAGE, TYPE_INT] or names != FIELD_NAMES:
        actual = f"{' and '.join(names)} of types {types}"
        raise _layout_error(path, "the fields image (RGB image) and label (integer)", actual)
    if header["page_size"].bit_count() != 1:
        raise _layout_error(path, "a page size that is a power of two", str(header["page_size"]))
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
    size, addresses = height * width * channels, table["image"]["data_ptr"]
    if channels != 3 or size > len(content) or addresses.min() < table_end or addresses.max() > len(content) - size:
        raise _layout_error(path, "pixels within the file", "an address beyond it")
    _check_allocations(path, content, int(header["alloc_table_ptr"]), addresses, size)
    return content, addresses.astype(np.int64), labels


def _check_allocations(path: Path, content: np.ndarray, start: int, addresses: np.ndarray, size: int) -> None:
    """Checks that the allocation table at the end of the file lists exactly the samples' pixels, `size` bytes each."""
    rows, remainder = divmod(len(content) - start, ALLOCATION.itemsize)
    if rows != len(addresses) or remainder:
        raise _layout_error(path, f"an allocation table of {len(addresses)} rows at the end", f"{rows} rows")
    table = np.array(content[start:]).view(ALLOCATION)
    if not (np.array_equal(np.sort(table["ptr"]), np.sort(addresses)) and (table["size"] == size).all()):
        raise _layout_error(path, f"an allocation of {size} bytes for each image", "others")
    if len(np.unique(addresses)) < len(addresses) or table["sample_id"].max() >= len(addresses):
        raise _layout_error(path, "separate pixels for each image", "pixels of two images at one address")


def _layout_error(path: Path, expected: str, actual: str) -> UserError:
    return UserError(f"{path}: expected {expected}, found {actual}; prepare the dataset again")
