"""Hashes, JSON files, and atomic writes."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from runner.common.errors import UserError

T = TypeVar("T")


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file as a hexadecimal string."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(64 << 20):  # large, because other threads take the GIL between two chunks
            digest.update(chunk)
    return digest.hexdigest()


def files_below(folder: Path) -> list[Path]:
    """Returns all files below a folder, sorted. Follows links to folders, except links to a folder that contains them.

    Raises:
        UserError: a folder cannot be read.
    """
    return sorted(_files_below(folder, frozenset()))


def _files_below(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """Yields the files below a folder. `above` has the resolved paths of the folders that contain it."""
    real = folder.resolve()
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); grant permission") from None
    for entry in entries:
        if entry.is_dir():
            yield from _files_below(folder / entry.name, above | {real})
        else:
            yield folder / entry.name


def read(path: Path, kind: type[T]) -> T:
    """Reads a JSON file into a struct or dataclass.

    Raises:
        UserError: the file is damaged or does not match the type; the message names the key.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind, dec_hook=_from_text)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged, or written by another version ({error}); restore or remove it") from None


def _from_text(kind: type, value: Any) -> Any:
    """Decodes a value that JSON stores as text, such as a path."""
    return kind(value)


def write(path: Path, value: Any) -> None:
    """Writes a struct or dict as JSON, atomically. NaN and infinity become null."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2) + b"\n")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes and syncs a temporary file and renames it to `path`, whose folder is created if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
