"""Reads the images and labels of a .beton file without ffcv's reader, and checks what ffcv does not check.

A file in version 2 of FFCV's format consists of a header, a descriptor for each field, a table with one row per sample
(mode, height, width and address of the pixels; the label), pages of pixels, and the allocation table, which has the
address and size of the pixels of each sample. The pixels are raw, or one JPEG picture for each sample. Within a page,
records are contiguous.

Without any check, FFCV copies the number of bytes in the allocation table from the address in the sample's row, so a
crafted file could read and overwrite memory. Every address and size is therefore checked here before FFCV opens a file,
and the header of every JPEG picture.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep import jpeg
from data_prep.images import require_memory
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
VERSION, TYPE_INT, TYPE_RGB_IMAGE = 2, 1, 2
MODES = {"jpeg": 0, "raw": 1}
BLOCK = 256  # JPEG records that one thread decodes, or whose headers are compared, at a time


class Table(NamedTuple):
    """The checked contents of a file.

    Attributes:
        content: (bytes,) uint8, the mapped file.
        addresses, sizes: (N,) int64, where in it the record of each image is.
        labels: (N,) int64.
    """

    content: np.ndarray
    addresses: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    def record(self, image: int) -> np.ndarray:
        """Returns the record of an image, (bytes,) uint8."""
        begin = self.addresses[image]
        return self.content[begin : begin + self.sizes[image]]


def read_split(path: Path, split: SplitFile, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Reads a whole split: images (N, H, W, 3) uint8 and labels (N,) int64. Raises UserError like `read_labels`."""
    table = _read_table(path, split, manifest)
    if manifest.records == "jpeg":
        return _decoded(path, table, range(split.images), manifest), table.labels
    content, addresses, size = table.content, table.addresses, math.prod(manifest.image_shape)
    images = np.empty((split.images, size), dtype=np.uint8)
    page_starts = np.flatnonzero(np.diff(addresses) != size) + 1  # the first image of each further page
    for start, stop in zip([0, *page_starts], [*page_starts, split.images], strict=True):
        begin = addresses[start]
        images[start:stop] = content[begin : begin + (stop - start) * size].reshape(-1, size)
    return images.reshape(-1, *manifest.image_shape), table.labels


def read_images(path: Path, split: SplitFile, manifest: Manifest, samples: np.ndarray) -> np.ndarray:
    """Reads the images with the indices `samples` (n,), as (n, H, W, 3) uint8. Raises UserError like `read_labels`."""
    table = _read_table(path, split, manifest)
    if manifest.records == "jpeg":
        return _decoded(path, table, samples.tolist(), manifest)
    images = [table.record(sample) for sample in samples]
    return np.array(images, np.uint8).reshape(len(samples), *manifest.image_shape)


def read_records(path: Path, split: SplitFile, manifest: Manifest) -> list[np.ndarray]:
    """Returns the record of each image, (bytes,) uint8, of the mapped file. Raises UserError like `read_labels`."""
    table = _read_table(path, split, manifest)
    return [table.record(image) for image in range(split.images)]


def _decoded(path: Path, table: Table, samples: Sequence[int], manifest: Manifest) -> np.ndarray:
    """Decodes the JPEG records of images `samples` to (n, H, W, 3) uint8; raises UserError if one is damaged."""
    shape = (len(samples), *manifest.image_shape)
    require_memory(math.prod(shape), f"{path}: {len(samples):,} decoded images", "use --loader streaming")
    images = np.empty(shape, np.uint8)

    def decode(start: int) -> None:
        for sample, image in zip(samples[start : start + BLOCK], images[start : start + BLOCK], strict=True):
            if not jpeg.decode(table.record(sample), image):
                raise _layout_error(path, "complete JPEG records", f"a damaged one at record {sample}")

    with ThreadPoolExecutor() as pool:
        list(pool.map(decode, range(0, len(samples), BLOCK)))
    return images


def read_labels(path: Path, split: SplitFile, manifest: Manifest) -> np.ndarray:
    """Checks the layout of a file and reads its labels, (N,) int64, but not its pixels; of JPEG records, the headers.

    Args:
        path: the file, whose hash the caller has checked.
        split: its entry in the manifest.
        manifest: the manifest, which has the image shape and the number of classes.

    Raises:
        UserError: layout, counts, sizes or labels differ from the manifest.
    """
    return _read_table(path, split, manifest).labels


def _read_table(path: Path, split: SplitFile, manifest: Manifest) -> Table:
    """Maps a file, and checks its tables and the headers of JPEG records."""
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
    wrong = (layout != (MODES[manifest.records], height, width)).any(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        expected = f"{manifest.records} images of {height}×{width}"
        raise _layout_error(path, expected, f"{layout[row].tolist()} at record {row}")
    labels = table["label"].copy()
    if labels.min() < 0 or labels.max() >= len(manifest.classes):
        worst = labels.min() if labels.min() < 0 else labels.max()
        raise _layout_error(path, f"labels 0 to {len(manifest.classes) - 1}", f"label {worst}")
    if tuple(np.bincount(labels, minlength=len(manifest.classes)).tolist()) != split.images_per_class:
        raise _layout_error(path, f"{split.images_per_class} images per class", "other counts")
    size, addresses = height * width * channels if manifest.records == "raw" else None, table["image"]["data_ptr"]
    least = size or 1
    if channels != 3 or least > len(content) or addresses.min() < table_end or addresses.max() > len(content) - least:
        raise _layout_error(path, "pixels within the file", "an address beyond it")
    sizes = _sizes(path, content, int(header["alloc_table_ptr"]), addresses, size)
    checked = Table(content, addresses.astype(np.int64), sizes.astype(np.int64), labels)
    if manifest.records == "jpeg":
        _check_headers(path, checked, height, width)
    return checked


def _sizes(path: Path, content: np.ndarray, start: int, addresses: np.ndarray, size: int | None) -> np.ndarray:
    """Returns the size of the record at each address, (N,) uint64, from the allocation table at the end of the file.

    Raises UserError unless the table lists exactly these records, within the file, with `size` bytes each if given.
    """
    rows, remainder = divmod(len(content) - start, ALLOCATION.itemsize)
    if rows != len(addresses) or remainder:
        raise _layout_error(path, f"an allocation table of {len(addresses)} rows at the end", f"{rows} rows")
    table = np.array(content[start:]).view(ALLOCATION)
    listed, rows_of = np.argsort(table["ptr"]), np.argsort(addresses)
    sizes = np.empty_like(addresses)
    sizes[rows_of] = table["size"][listed]
    fits = (sizes <= len(content) - addresses).all() if size is None else (sizes == size).all()
    if not (np.array_equal(table["ptr"][listed], addresses[rows_of]) and fits):
        what = f"an allocation of {size} bytes" if size else "an allocation within the file"
        raise _layout_error(path, f"{what} for each image", "others")
    if len(np.unique(addresses)) < len(addresses) or table["sample_id"].max() >= len(addresses):
        raise _layout_error(path, "separate pixels for each image", "pixels of two images at one address")
    return sizes


def _check_headers(path: Path, table: Table, height: int, width: int) -> None:
    """Raises UserError unless all records have the same header, of a JPEG picture of this size, and are complete."""
    header = jpeg.header_of(table.record(0), height, width) or b""
    expected = np.frombuffer(header + jpeg.END, np.uint8)
    sound = (table.sizes >= len(expected)) & bool(header)
    for start in range(0, len(sound) if sound.all() else 0, BLOCK):
        block = slice(start, start + BLOCK)
        first, end = table.addresses[block, None], (table.addresses + table.sizes)[block, None]
        places = np.hstack([first + np.arange(len(header)), end + np.arange(-len(jpeg.END), 0)])
        sound[block] = (table.content[places] == expected).all(axis=1)
    if not sound.all():
        form = f"complete baseline JPEG records of {height}×{width} with one header"
        raise _layout_error(path, form, f"another at record {int(np.argmin(sound))}")


def _layout_error(path: Path, expected: str, actual: str) -> UserError:
    return UserError(f"{path}: expected {expected}, found {actual}; prepare the dataset again")
