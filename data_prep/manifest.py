"""`dataset.json`, the manifest of a prepared dataset, and the check of the files that it lists.

Does not import NumPy or FFCV, because every later stage reads the manifest.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from runner.common.errors import UserError
from runner.common.files import read_bytes, sha256_of
from runner.common.text import without_controls

FILE_NAME = "dataset.json"
SPLITS = ("train", "test")
FORMAT = 1
Count = Annotated[int, Meta(ge=1, lt=2**48)]
Side = Annotated[int, Meta(ge=1, lt=2**16)]
Level = Annotated[float, Meta(ge=0, le=255)]
Records = Literal["raw", "jpeg"]
Quality = Annotated[int, Meta(ge=1, le=100)]


class _Format(msgspec.Struct):
    """The version of a manifest, which is read first."""

    format: Literal[1]


class PreparedWith(msgspec.Struct):
    """The options of `prepare` in `Manifest.source`."""

    limit_per_class: Annotated[int, Meta(ge=1)] | None = None
    seed: Annotated[int, Meta(ge=0, lt=2**32)] | None = None
    size: Annotated[int, Meta(ge=1, le=4096)] | None = None
    fit: Literal["crop", "pad", "stretch"] | None = None


@dataclass(frozen=True)
class SplitFile:
    """One .beton file: its name, size in bytes, SHA-256, and images per class."""

    file: str
    bytes: Count
    sha256: str
    images: Count
    images_per_class: tuple[Annotated[int, Meta(ge=0)], ...]


@dataclass(frozen=True)
class Manifest:
    """The contents of `dataset.json`.

    Attributes:
        name: label of all results on this dataset, e.g. "CIFAR-10".
        classes: class names; the index of a class is its label.
        image_shape: (height, width, channels) of every image, uint8 RGB.
        mean: per-channel mean over the training images, in 0..255.
        std: per-channel population standard deviation over the training images, in 0..255.
        splits: files of the splits "train" and "test".
        source: origin of the images: kind, path or URL, SHA-256.
        versions: versions of the tools that wrote the files.
        records: how the .beton files store images: as pixels, or as JPEG pictures.
        jpeg_quality: quality of JPEG records; None for raw ones.
    """

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[Side, Side, Literal[3]]
    mean: tuple[Level, Level, Level]
    std: tuple[Level, Level, Level]
    splits: dict[str, SplitFile]
    source: dict[str, Any]
    versions: dict[str, str]
    records: Records = "raw"
    jpeg_quality: Quality | None = None

    def __post_init__(self) -> None:
        if (self.records == "jpeg") != (self.jpeg_quality is not None):
            raise ValueError(f"{self.records} records of jpeg_quality {self.jpeg_quality}")

    @property
    def fingerprint(self) -> str:
        """A hash of 16 hexadecimal digits, which changes with any image, label or class name."""
        content = [self.classes, [self.splits[name].sha256 for name in SPLITS]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @property
    def record_kind(self) -> str:
        """How the .beton files store images, in words."""
        return "raw records" if self.records == "raw" else f"JPEG records of quality {self.jpeg_quality}"

    def image_bytes(self, split: SplitFile) -> int:
        """Returns the bytes that a split takes in memory, decoded."""
        return split.bytes if self.records == "raw" else split.images * math.prod(self.image_shape)

    def to_json(self) -> str:
        """Returns the manifest as indented JSON with keys in a fixed order."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"


def read(folder: Path) -> Manifest:
    """Reads and validates `dataset.json` in `folder`, without opening the data files.

    Raises:
        UserError: the folder or manifest is missing or has another format.
    """
    remedy = f"prepare one with: python -m data_prep prepare --source official --out {folder}"
    if not folder.is_dir():
        raise UserError(f"--data {folder}: expected a folder made by data_prep, found none; {remedy}")
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(f"--data {folder}: expected {FILE_NAME} in it, found none; {remedy}")
    try:
        content = without_controls(read_bytes(path))
        msgspec.json.decode(content, type=_Format)
        manifest = msgspec.json.decode(content, type=Manifest)
        if manifest.splits.keys() != set(SPLITS):
            raise ValueError(f"splits {', '.join(manifest.splits)}")
        return manifest
    except (ValueError, RecursionError) as error:  # of msgspec, or of text that is not UTF-8
        raise UserError(f"{path}: expected a manifest of format {FORMAT}, found {error}; {remedy}") from None


def prepared_with(folder: Path, manifest: Manifest) -> PreparedWith:
    """Returns the options of `prepare` that a dataset was made with. Raises UserError if one is damaged."""
    try:
        return msgspec.convert(manifest.source, PreparedWith)
    except msgspec.ValidationError as error:
        raise UserError(f"{folder / FILE_NAME}: source: {error}; prepare the dataset again") from None


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compares the size and SHA-256 of every .beton file with the manifest.

    FFCV returns wrong images from a damaged file without an error, so call this before opening a file.

    Raises:
        UserError: a file is missing or differs.
    """
    remedy = "prepare the dataset again, or restore the file"
    for split in manifest.splits.values():
        path = folder / split.file
        if Path(split.file).name != split.file or not path.is_file():
            raise UserError(f"{path}: expected the file that {FILE_NAME} names, found none; {remedy}")
        if path.stat().st_size != split.bytes:
            size = path.stat().st_size
            raise UserError(f"{path}: expected {split.bytes} bytes, found {size}; {remedy}")
        sha256 = sha256_of(path)
        if sha256 != split.sha256:
            raise UserError(f"{path}: damaged: expected SHA-256 {split.sha256}, found {sha256}; {remedy}")
