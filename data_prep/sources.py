"""Where images come from: the official archives, a torchvision root, an image folder or archive, or synthetic.

Each source becomes the same value: uint8 images and labels of two splits, held in memory.
Nothing is parsed before its hash is known where a hash exists, nothing is extracted to disk, and pickles are
read by an unpickler that knows NumPy arrays and nothing else.
"""

import hashlib
import io
import pickle
import re
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_prep import synthetic
from data_prep.console import UserError, progress, sha256_of, track

OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
OFFICIAL_SHA256 = {
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
}
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
BINARY_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
PICKLE_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
# The MD5 sums by which torchvision.datasets.CIFAR10 knows its extracted files.
TORCHVISION_FOLDER = "cifar-10-batches-py"
TORCHVISION_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
IMAGE_NAME = re.compile(r"^(?:[^/]+/)?(train|test)/([^/]+)/([^/]+\.(?:png|jpe?g))$", re.IGNORECASE)
LARGEST_MEMBER = 64 * 2**20  # bytes; an image or batch file beyond this is not one
CONNECT_TIMEOUT = 20.0  # seconds


class SourceUnreachableError(UserError):
    """The official archive cannot be downloaded from here."""


@dataclass(frozen=True)
class Split:
    """images (N, H, W, 3) uint8 RGB; labels (N,) int64 in 0..C-1."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Source:
    """A whole dataset in memory, the label for figures made from it, and where it came from."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    provenance: dict[str, Any]


def load(
    source: str,
    *,
    sha256: str | None = None,
    limit_per_class: int | None = None,
    seed: int = 0,
    downloads: Path = Path("downloads"),
) -> Source:
    """Reads a dataset.

    Args:
        source: "official", "synthetic", or the path of an archive, torchvision root or image folder.
        sha256: the SHA-256 that an archive must have. An archive of the official layout needs either this or
            the official hash; without one it is refused before it is parsed.
        limit_per_class: keep only the first so many images of each class in each split.
        seed: of the synthetic set.
        downloads: folder that keeps the downloaded official archive.

    Raises:
        SourceUnreachableError: "official", and the download failed.
        UserError: anything else that is wrong with the source; names it.
    """
    if limit_per_class is not None and limit_per_class < 1:
        raise UserError(f"--limit-per-class {limit_per_class}: expected 1 or more")
    if source == "synthetic":
        return _synthetic(seed, limit_per_class)
    name = Path(OFFICIAL_URL).name
    path = download(downloads / name, OFFICIAL_URL) if source == "official" else Path(source)
    if not path.exists():
        expected = "official, synthetic, or an existing archive or folder"
        raise UserError(f"--source {source}: no such file or folder; expected {expected}")
    try:
        loaded = _from_folder(path) if path.is_dir() else _from_archive(path, sha256)
    except PermissionError as error:
        raise UserError(f"--source {path}: no permission to read {error.filename}; grant it") from None
    if limit_per_class is None:
        return loaded
    return Source(
        loaded.name,
        loaded.classes,
        limited(loaded.train, limit_per_class),
        limited(loaded.test, limit_per_class),
        {**loaded.provenance, "limit_per_class": limit_per_class},
    )


def download(path: Path, url: str) -> Path:
    """Downloads the official archive to `path` unless it is there already, whole.

    Raises:
        SourceUnreachableError: no connection, or it broke off; nothing stays but what stood there before.
        UserError: what arrived has another hash than the official one.
    """
    expected = OFFICIAL_SHA256[path.name]
    if path.is_file() and sha256_of(path) == expected:
        return path
    remedy = f"download {path.name} elsewhere and give its path as --source"
    part = path.with_name(path.name + ".part")
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT) as reply, part.open("wb") as file:
            size = int(reply.headers.get("Content-Length", 0)) or None
            with progress(f"download {path.name}", size) as advance:
                while block := reply.read(1 << 20):
                    file.write(block)
                    digest.update(block)
                    advance(len(block))
        if digest.hexdigest() != expected:
            raise UserError(f"{url}: expected SHA-256 {expected}, received {digest.hexdigest()}; {remedy}")
        part.replace(path)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise SourceUnreachableError(f"--source official: cannot reach {url} ({reason}); {remedy}") from None
    except OSError as error:
        raise UserError(f"{part}: cannot write the download ({error.strerror}); choose another folder") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def _synthetic(seed: int, limit_per_class: int | None) -> Source:
    splits = []
    for split, per_class in enumerate((5_000, 1_000)):
        images = min(per_class, limit_per_class or per_class) * len(synthetic.CLASSES)
        splits.append(Split(*synthetic.draw(images, seed, split)))
    provenance: dict[str, Any] = {"kind": "synthetic", "seed": seed}
    if limit_per_class is not None:
        provenance["limit_per_class"] = limit_per_class
    return Source(synthetic.NAME, synthetic.CLASSES, *splits, provenance)


def _from_archive(path: Path, sha256: str | None) -> Source:
    found = sha256_of(path)
    if sha256 is not None and found != sha256.lower():
        raise UserError(f"--source {path}: expected SHA-256 {sha256}, found {found}; fetch the file again")
    official = OFFICIAL_SHA256.get(path.name)
    trusted = sha256 is not None or found in OFFICIAL_SHA256.values()
    if official is not None and not trusted:
        raise UserError(f"--source {path}: expected SHA-256 {official}, found {found}; fetch the file again")
    provenance = {"path": path.name, "sha256": found}
    try:
        with _open_archive(path) as archive:
            names = set(archive.names())
            for layout, files, parse in (
                ("official binary", BINARY_FILES, _parse_binary),
                ("official python", PICKLE_FILES, _parse_pickle),
            ):
                folder = _folder_with(names, files["test"][0], layout)
                if folder is None:
                    continue
                if not trusted:
                    raise UserError(
                        f"--source {path}: an archive of the {layout} layout with the unknown SHA-256 {found}; "
                        "expected the official one, or name the one you trust with --sha256"
                    )
                splits = _batches(files, parse, lambda name, folder=folder: archive.read(folder + name))
                name = "CIFAR-10" if found in OFFICIAL_SHA256.values() else path.name
                return Source(name, CIFAR10_CLASSES, *splits, {"kind": layout, **provenance})
            return _images(path, archive.images(), {"kind": "image archive", **provenance})
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, KeyError) as error:
        if isinstance(error, PermissionError):
            raise
        raise UserError(
            f"--source {path}: not a whole tar or zip archive ({error}); expected one of the images or batches"
        ) from None


def _folder_with(names: set[str], file: str, layout: str) -> str | None:
    """The folder, with its slash, that holds `file` in an archive of the official layout."""
    folder = {"official binary": "cifar-10-batches-bin/", "official python": f"{TORCHVISION_FOLDER}/"}[layout]
    return folder if folder + file in names else None


def _from_folder(path: Path) -> Source:
    root = path if path.name == TORCHVISION_FOLDER else path / TORCHVISION_FOLDER
    if root.is_dir():

        def read(name: str) -> bytes:
            file = root / name
            if not file.is_file():
                raise UserError(f"{file}: expected a file of a torchvision CIFAR-10 root, found none")
            content = file.read_bytes()
            found = hashlib.md5(content, usedforsecurity=False).hexdigest()
            if found != TORCHVISION_MD5[name]:
                raise UserError(f"{file}: expected MD5 {TORCHVISION_MD5[name]}, found {found}; fetch it again")
            return content

        splits = _batches(PICKLE_FILES, _parse_pickle, read)
        return Source("CIFAR-10", CIFAR10_CLASSES, *splits, {"kind": "torchvision root", "path": path.name})
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    members = ((file.relative_to(path).as_posix(), file.read_bytes) for file in files)
    return _images(path, members, {"kind": "image folder", "path": path.name})


# --- the official layouts -------------------------------------------------------------------------------


def _batches(files: dict[str, list[str]], parse: Any, read: Any) -> list[Split]:
    splits = []
    for names in files.values():
        parts = [parse(name, read(name)) for name in names]
        images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        splits.append(Split(images, labels))
    return splits


def _planes_to_pixels(planes: np.ndarray) -> np.ndarray:
    """(N, 3072) channel planes to (N, 32, 32, 3)."""
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _parse_binary(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte and 3,072 bytes of channel planes."""
    if len(content) == 0 or len(content) % 3073:
        raise UserError(f"{name}: expected records of 3073 bytes, found {len(content)} bytes in all")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 3073)
    return _planes_to_pixels(records[:, 1:]), _checked_labels(name, records[:, 0])


def _parse_pickle(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A pickled dict with `data` (N, 3072) uint8 and `labels`, read without running anything from it."""
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        planes, labels = batch[b"data"], batch[b"labels"]
        if planes.dtype != np.uint8 or planes.shape != (len(labels), 3072):
            raise ValueError(f"data of shape {planes.shape} and type {planes.dtype}")
    except (pickle.UnpicklingError, KeyError, TypeError, ValueError, AttributeError, EOFError) as error:
        raise UserError(f"{name}: not a CIFAR-10 batch ({error})") from None
    return _planes_to_pixels(planes), _checked_labels(name, np.asarray(labels))


class _ArraysOnly(pickle.Unpickler):
    """Knows what a pickled NumPy array is made of; any other global is refused before it is looked up."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return {"ndarray": np.ndarray, "dtype": np.dtype}.get(name) or np._core.multiarray._reconstruct
        if (module, name) == ("_codecs", "encode"):  # how newer pickles spell bytes
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


def _checked_labels(name: str, labels: np.ndarray) -> np.ndarray:
    if labels.min() < 0 or labels.max() >= len(CIFAR10_CLASSES):
        raise UserError(f"{name}: expected labels 0 to 9, found {labels.min()} to {labels.max()}")
    return labels.astype(np.int64)


# --- image folders and archives of them -----------------------------------------------------------------


class _open_archive:  # noqa: N801 - reads as the function it is used as
    """One face for tar and zip: member names, and the content of a member by name. Nothing is extracted."""

    def __init__(self, path: Path) -> None:
        self.zip = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None
        self.tar = None if self.zip else tarfile.open(path)  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> "_open_archive":
        return self

    def __exit__(self, *_: object) -> None:
        (self.zip or self.tar).close()

    def names(self) -> list[str]:
        return [_clean(name) for name in (self.zip.namelist() if self.zip else self.tar.getnames())]

    def read(self, name: str) -> bytes:
        if self.zip:
            return _bounded(name, self.zip.getinfo(name).file_size, lambda: self.zip.read(name))
        for member in self.tar.getmembers():
            if _clean(member.name) == name and member.isfile():
                return _bounded(name, member.size, lambda m=member: self.tar.extractfile(m).read())
        raise UserError(f"{name}: expected in the archive, found none")

    def images(self) -> Iterator[tuple[str, Any]]:
        if self.zip:
            for info in self.zip.infolist():
                yield (
                    _clean(info.filename),
                    lambda i=info: _bounded(i.filename, i.file_size, lambda: self.zip.read(i)),
                )
            return
        for member in self.tar.getmembers():  # in the archive's order, so that gzip is read once, forwards
            if member.isfile():
                yield (
                    _clean(member.name),
                    lambda m=member: _bounded(m.name, m.size, self.tar.extractfile(m).read),
                )


def _clean(name: str) -> str:
    return name.removeprefix("./")


def _bounded(name: str, size: int, read: Any) -> bytes:
    if size > LARGEST_MEMBER:
        raise UserError(f"{name}: {size} bytes; expected an image or batch file of at most {LARGEST_MEMBER}")
    return read()


def _images(path: Path, members: Iterator[tuple[str, Any]], provenance: dict[str, Any]) -> Source:
    expected = "train/<class>/*.png|jpg and test/<class>/*.png|jpg"
    found = []
    for name, read in members:
        match = IMAGE_NAME.match(name)
        if match and ".." not in PurePosixPath(name).parts:
            found.append((match[1].lower(), match[2], match[3], name, read()))
    if not found:
        raise UserError(f"--source {path}: holds no image; expected {expected}")
    classes = sorted({class_name for _, class_name, *_ in found})
    for split in ("train", "test"):
        missing = sorted(set(classes) - {c for s, c, *_ in found if s == split})
        if missing:
            raise UserError(f"--source {path}: {split} holds no image of {missing[0]!r}; expected {expected}")
    found.sort(key=lambda entry: (entry[1], entry[2], entry[3]))  # by class, then by file name
    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter lock while it decodes
        decoded = pool.map(lambda entry: _decode(entry[3], entry[4]), found, chunksize=64)
        pixels = list(track(decoded, "decode images", len(found)))
    shapes = {image.shape for image in pixels}
    if len(shapes) > 1:
        odd = next(e[3] for e, image in zip(found, pixels, strict=True) if image.shape != pixels[0].shape)
        raise UserError(f"{odd}: expected {pixels[0].shape[:2]} pixels as in {found[0][3]}; resize the images")
    splits = []
    for split in ("train", "test"):
        rows = [i for i, entry in enumerate(found) if entry[0] == split]
        labels = np.array([classes.index(found[i][1]) for i in rows], dtype=np.int64)
        splits.append(Split(np.stack([pixels[i] for i in rows]), labels))
    suffixes = {PurePosixPath(entry[2]).suffix.lower() for entry in found}
    name = _name_of(path, tuple(classes), splits, suffixes)
    return Source(name, tuple(classes), *splits, provenance)


def _decode(name: str, content: bytes) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable image ({error}); replace or remove it") from None


def _name_of(path: Path, classes: tuple[str, ...], splits: list[Split], suffixes: set[str]) -> str:
    """All of CIFAR-10 as image files is called a copy of it, and a lossy one by its format."""
    whole = classes == CIFAR10_CLASSES and [len(split.labels) for split in splits] == [50_000, 10_000]
    if not whole or splits[0].images.shape[1:] != (32, 32, 3):
        return path.name.split(".")[0]
    return f"CIFAR-10 ({'PNG' if suffixes == {'.png'} else 'JPEG'} copy)"


def limited(split: Split, per_class: int) -> Split:
    kept = [np.flatnonzero(split.labels == label)[:per_class] for label in np.unique(split.labels)]
    rows = np.sort(np.concatenate(kept))
    return Split(split.images[rows], split.labels[rows])
