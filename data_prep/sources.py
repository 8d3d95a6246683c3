"""Loads images from the official archives, a torchvision root, an image folder or archive, or the synthetic set.

Every source becomes a `Source`: uint8 images and labels of two splits, in memory. Archives with a known hash are
checked before they are parsed, and nothing is extracted to disk.
"""

import hashlib
import lzma
import os
import ssl
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

from data_prep import image_folder, images, synthetic
from data_prep.archive import Archive
from data_prep.dataset import Source, Split, limit_source, limit_split, unreserved
from data_prep.images import Fit
from data_prep.official import BY_SOURCE, CIFAR10, DATASETS, Official, load_splits
from runner.common.console import progress
from runner.common.errors import UserError
from runner.common.files import files_below, sha256_of
from runner.common.text import first_line

CONNECT_TIMEOUT = 20.0  # seconds
CIFAR10_CLASSES = CIFAR10.classes
__all__ = ["CIFAR10_CLASSES", "Source", "SourceUnreachableError", "Split", "download", "limit_split", "load"]


# Exceptions raised when a damaged or password-protected archive is read.
DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, KeyError, RuntimeError
)  # fmt: skip


class SourceUnreachableError(UserError):
    """The official archive cannot be downloaded."""


def load(
    source: str,
    *,
    sha256: str | None = None,
    limit_per_class: int | None = None,
    seed: int | None = None,
    downloads: Path = Path("downloads"),
    size: int | None = None,
    fit: Fit | None = None,
) -> Source:
    """Loads a dataset.

    Args:
        source: "official", "cifar100", "synthetic", or the path of an archive, torchvision root or image folder.
        sha256: expected SHA-256 of an archive. An archive in an official layout is parsed only if it has this hash
            or an official one.
        limit_per_class: use only the first images of each class in each split, up to this number.
        seed: seed of the synthetic dataset; by default 0.
        downloads: folder in which the downloaded official archive is kept.
        size: number of pixels per side to which the images of a folder, or of an archive of one, are resized.
        fit: how images are fitted to `size`; by default "crop".

    Raises:
        SourceUnreachableError: the download of an official archive failed.
        UserError: any other error in the source.
    """
    if limit_per_class is not None and limit_per_class < 1:
        raise UserError(f"--limit-per-class {limit_per_class}: expected 1 or more")
    if fit is not None and size is None:
        raise UserError(f"--fit {fit}: expected with --size, the number of pixels per side")
    if source == "synthetic":
        _refuse(source, sha256=sha256, size=size)
        return _synthetic(seed or 0, limit_per_class)
    if seed is not None:
        raise UserError(f"--seed {seed}: expected with --source synthetic, the only generated dataset; leave it out")
    path = Path(source)
    if source in BY_SOURCE:
        url = BY_SOURCE[source].url
        path = download(downloads / Path(url).name, url)
    if not path.exists():
        expected = f"{', '.join(BY_SOURCE)}, synthetic, or an existing archive or folder"
        raise UserError(f"--source {source}: no such file or folder; expected {expected}")
    try:
        loaded = _from_folder(path, sha256, size, fit) if path.is_dir() else _from_archive(path, sha256, size, fit)
    except PermissionError as error:
        raise UserError(f"--source {path}: no permission to read {error.filename}; grant it") from None
    return loaded if limit_per_class is None else limit_source(loaded, limit_per_class)


def _refuse(source: object, sha256: str | None = None, size: int | None = None) -> None:
    """Raises UserError for an option that the source does not use."""
    if sha256 is not None:
        raise UserError(f"--sha256: expected with an archive, but {source} is not one; leave it out")
    if size is not None:
        raise UserError(f"--size {size}: expected with an image folder, but {source} is not one; use --recipe.resize")


def download(path: Path, url: str) -> Path:
    """Downloads an official archive to `path` unless a file with its hash exists; returns the path.

    Raises:
        SourceUnreachableError: the connection failed; `path` is unchanged.
        UserError: the downloaded file does not have the official hash.
    """
    expected = _official_hashes()[path.name]
    if path.is_file() and sha256_of(path) == expected:
        return path
    remedy = f"download {path.name} elsewhere and pass its path as --source"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may download it too
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT) as reply, temporary.open("wb") as file:
            size = int(reply.headers.get("Content-Length", 0)) or None
            with progress(f"download {path.name}", size) as advance:
                while block := reply.read(1 << 20):
                    file.write(block)
                    digest.update(block)
                    advance(len(block))
            if size is not None and file.tell() < size:
                raise ConnectionError(f"ended after {file.tell():,} of {size:,} bytes")
        if digest.hexdigest() != expected:
            raise UserError(f"{url}: expected SHA-256 {expected}, received {digest.hexdigest()}; {remedy}")
        temporary.replace(path)
    except (urllib.error.URLError, TimeoutError, ConnectionError, ssl.SSLError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise SourceUnreachableError(f"--source: cannot reach {url} ({reason}); {remedy}") from None
    except OSError as error:
        raise UserError(f"{temporary}: cannot write the download ({error.strerror}); choose another folder") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _synthetic(seed: int, limit_per_class: int | None) -> Source:
    """Draws the synthetic dataset."""
    splits = []
    for split, per_class in enumerate((5_000, 1_000)):
        images = min(per_class, limit_per_class or per_class) * len(synthetic.CLASSES)
        splits.append(Split(*synthetic.draw(images, seed, split)))
    provenance: dict[str, Any] = {"kind": "synthetic", "seed": seed}
    if limit_per_class is not None:
        provenance["limit_per_class"] = limit_per_class
    train, test = splits
    return Source(synthetic.NAME, synthetic.CLASSES, train, test, provenance)


def _official_hashes() -> dict[str, str]:
    """Returns the SHA-256 of every official archive, by file name."""
    return {file: sha256 for dataset in DATASETS for file, sha256 in dataset.sha256.items()}


def _from_archive(path: Path, sha256: str | None, size: int | None, fit: Fit | None) -> Source:
    """Loads a tar or zip archive that has an official layout or contains images, after checking its hash."""
    actual = sha256_of(path)
    if sha256 is not None and actual != sha256.lower():
        raise UserError(f"--source {path}: expected SHA-256 {sha256}, found {actual}; fetch the file again")
    known = _official_hashes()
    trusted = sha256 is not None or actual in known.values()
    if path.name in known and not trusted:
        raise UserError(f"--source {path}: expected SHA-256 {known[path.name]}, found {actual}; fetch the file again")
    provenance = {"path": path.name, "sha256": actual}
    try:
        with Archive(path) as archive:
            names = set(archive.names())
            for dataset in DATASETS:
                for layout, folder, files, parse in (
                    ("official binary", dataset.binary_folder, dataset.binary_files, dataset.parse_binary),
                    ("official python", dataset.python_folder, dataset.python_files, dataset.parse_pickle),
                ):
                    if f"{folder}/{files['test'][0]}" not in names:
                        continue
                    if not trusted:
                        raise UserError(
                            f"--source {path}: an archive in the {layout} layout with the unknown SHA-256 {actual}; "
                            "expected the official hash; to trust this file, pass its hash with --sha256"
                        )
                    _refuse(dataset.name, size=size)
                    train, test = load_splits(files, parse, partial(_read_member, archive, folder))
                    name = dataset.name if actual in dataset.sha256.values() else unreserved(path.name)
                    return Source(name, dataset.classes, train, test, {"kind": layout, **provenance})
            return image_folder.load(path, archive.members(), {"kind": "image archive", **provenance}, size, fit)
    except DAMAGED as error:
        if isinstance(error, PermissionError):
            raise
        reason = first_line(error)
        raise UserError(
            f"--source {path}: not a complete tar or zip archive ({reason}); expected one of images or batches, "
            "without a password"
        ) from None


def _read_member(archive: Archive, folder: str, name: str) -> bytes:
    return archive.read(f"{folder}/{name}")


def _from_folder(path: Path, sha256: str | None, size: int | None, fit: Fit | None) -> Source:
    """Loads a torchvision root or an image folder."""
    _refuse("a folder", sha256=sha256)
    for dataset in DATASETS:
        root = path if path.name == dataset.python_folder else path / dataset.python_folder
        if root.is_dir():
            _refuse(dataset.name, size=size)
            return _from_torchvision_root(path, root, dataset)
    files = files_below(path)
    members = (
        (file.relative_to(path).as_posix(), partial(images.read, file) if file.is_file() else None) for file in files
    )
    return image_folder.load(path, members, {"kind": "image folder", "path": path.resolve().name}, size, fit)


def _from_torchvision_root(path: Path, root: Path, dataset: Official) -> Source:
    """Loads the pickles that torchvision extracts, after checking their MD5."""

    def read(name: str) -> bytes:
        file = root / name
        if not file.is_file():
            raise UserError(f"{file}: expected a file of a torchvision {dataset.name} root, found none")
        content = file.read_bytes()
        md5, expected = hashlib.md5(content, usedforsecurity=False).hexdigest(), dataset.python_md5[name]
        if md5 != expected:
            raise UserError(f"{file}: expected MD5 {expected}, found {md5}; fetch it again")
        return content

    train, test = load_splits(dataset.python_files, dataset.parse_pickle, read)
    return Source(dataset.name, dataset.classes, train, test, {"kind": "torchvision root", "path": path.name})
