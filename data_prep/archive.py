"""Reads tar and zip archives through one interface; nothing is extracted to disk."""

import functools
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.images import LARGEST_FILE
from runner.common.errors import UserError

# The name of a member, and a function that reads it; None for symbolic links and other members that are not files.
Member = tuple[str, Callable[[], bytes] | None]


class Archive:
    """A tar or zip archive, as a context manager."""

    def __init__(self, path: Path) -> None:
        self.zip: Any = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None
        self.tar: Any = None if self.zip else tarfile.open(path)  # noqa: SIM115 - closed in __exit__
        self.ended = False

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        (self.zip or self.tar).close()

    def names(self) -> list[str]:
        """Returns the names of all members."""
        return [_normalize(name) for name in (self.zip.namelist() if self.zip else self.tar.getnames())]

    def read(self, name: str) -> bytes:
        """Returns the content of a member. Raises UserError if it is missing or too large."""
        for member, read in self.members():
            if member == name and read:
                return read()
        raise UserError(f"{name}: expected in the archive, found none")

    def members(self) -> Iterator[Member]:
        """Yields all members except folders, in the archive's order, so that gzip data is not decompressed for each."""
        if self.zip:
            for info in self.zip.infolist():
                if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
                    yield _normalize(info.filename), partial(_read, info.filename, info.file_size, self.zip.read, info)
            return
        members = self.tar.getmembers()
        self._check_end()
        linked = {_normalize(member.linkname) for member in members if member.islnk()}
        files: dict[str, Callable[[], bytes]] = {}  # that hard links may point to: those before them
        for member in members:
            name = _normalize(member.name)
            if member.isfile():
                read = partial(_read, member.name, member.size, self._read_tar, member)
                files[name] = functools.cache(read) if name in linked else read
                yield name, files[name]
            elif member.islnk():
                target = _normalize(member.linkname)
                files[name] = files.get(target) or partial(_refuse_link, name, target)
                yield name, files[name]
            elif not member.isdir():
                yield name, None

    def _check_end(self) -> None:
        """Checks that a tar file ends correctly, because tarfile treats a damaged header or a missing end as the end.

        Raises:
            tarfile.ReadError: the file does not end with two blocks of zeros, of which tarfile has read the first.
        """
        if self.ended:
            return
        if self.tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it is truncated, or damaged in the middle")
        while self.tar.fileobj.read(1 << 20):  # read up to the checksum of a compressed file
            pass
        self.ended = True

    def _read_tar(self, member: tarfile.TarInfo) -> bytes:
        return self.tar.extractfile(member).read()


def _normalize(name: str) -> str:
    """Removes a leading `./` from the name of a member."""
    return name.removeprefix("./")


def _refuse_link(name: str, target: str) -> bytes:
    raise UserError(
        f"{name!r}: expected a hard link to a file before it in the archive, found {target!r}; pack it again"
    )


def _read(name: str, size: int, read: Callable[[Any], bytes], member: Any) -> bytes:
    """Reads a member. Raises UserError if it is too large."""
    if size > LARGEST_FILE:
        raise UserError(f"{name}: {size} bytes; expected an image or batch file of at most {LARGEST_FILE}")
    return read(member)
