"""File I/O: reads, hashes, JSON and atomic writes, retried after transient errors of a network file system."""

import contextlib
import errno
import functools
import hashlib
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec

from runner.common.errors import TRANSIENT_ERRNOS, UserError

T = TypeVar("T")
P = ParamSpec("P")
MAX_BYTES = 1 << 30  # limit for files that are read into memory at once
RETRY_PAUSES = (0.1, 1.0)  # seconds


def retried(function: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path, P], T]:
    """Retries a function of a path after transient errors. The function must be idempotent.

    It must not retry `fsync` without writing again: the second call can succeed although data is lost.
    """

    @functools.wraps(function)
    def call(path: Path, /, *args: P.args, **kwargs: P.kwargs) -> T:
        for pause in (*RETRY_PAUSES, None):
            try:
                return function(path, *args, **kwargs)
            except OSError as error:
                error.filename = error.filename or str(path)  # reads and writes do not name their file
                if error.errno not in TRANSIENT_ERRNOS or pause is None:
                    raise
                print(f"{error.filename}: {error.strerror}; trying again", file=sys.stderr)
                time.sleep(pause)
        raise AssertionError

    return call


@retried
def is_file(path: Path) -> bool:
    """Returns whether there is a file. Unlike `Path.is_file`, never takes another error for a missing file."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


@retried
def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Returns the content of a file. Raises UserError, without blocking, for more than `limit` bytes, and for pipes."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: expected a file, found a pipe or device; remove it")
        if status.st_size > limit:
            raise UserError(f"{path}: expected at most {limit:,} bytes, found {status.st_size:,}; restore or remove it")
        return file.read()


@retried
def remove(path: Path) -> None:
    """Removes a file, if it exists."""
    path.unlink(missing_ok=True)


@retried
def names_in(folder: Path) -> list[str]:
    """Returns the names of the entries of a folder; an empty list if it does not exist."""
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


@retried
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
        UserError: a folder cannot be read, or folders are nested too deep.
    """
    try:
        return sorted(_files_below(folder, frozenset()))
    except RecursionError:
        raise UserError(f"{folder}: folders nested too deep; remove them") from None


def _files_below(folder: Path, ancestors: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Yields the files below a folder. `ancestors` has the devices and inodes of the folders that contain it."""
    try:
        status = folder.stat()
        own = (status.st_dev, status.st_ino)
        if own in ancestors:
            return
        entries = list(os.scandir(folder))
    except OSError as error:
        remedy = "; grant permission" if error.errno == errno.EACCES else ""
        raise UserError(f"{folder}: cannot be read ({error.strerror}){remedy}") from None
    for entry in entries:
        # `entry.is_dir` and `Path.is_dir` raise OSError for a link to itself, or into a folder without permission.
        if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(folder / entry.name)):  # noqa: PTH112
            yield from _files_below(folder / entry.name, ancestors | {own})
        else:
            yield folder / entry.name


def read_json(path: Path, kind: type[T]) -> T:
    """Reads a JSON file into a struct or dataclass.

    Raises:
        UserError: the file is missing, damaged or does not match the type; the message names the key.
    """
    try:
        return msgspec.json.decode(read_bytes(path), type=kind, dec_hook=decode_text)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise unreadable(path, error) from None


class TransientReadError(UserError):
    """A file could not be read because of a transient error, and may be intact."""


def unreadable(path: Path, error: Exception) -> UserError:
    """Returns the error for a file that cannot be read or decoded."""
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
        return TransientReadError(f"{path}: cannot be read ({error.strerror}); repeat the command")
    if isinstance(error, PermissionError):
        return UserError(f"{path}: cannot be read ({error.strerror}); grant permission")
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: expected a file, found none; restore it")
    return UserError(f"{path}: damaged, or written by another version ({error}); restore or remove it")


def decode_text(kind: type, value: Any) -> Any:
    """Decodes a value that JSON stores as text, such as a path."""
    return kind(value)


def write_json(path: Path, value: Any) -> None:
    """Writes a struct or dict as JSON, atomically. NaN and infinity become null."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2) + b"\n")


@retried
def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to a temporary file, syncs it, and renames it to `path`; creates the folder if needed.

    Each path may have one writer at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
