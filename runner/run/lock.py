"""The lock of the folder of a run or sweep: held by the process that writes it, also where nodes share no file locks.

`flock` is released when its process dies, but NFS and Lustre may be mounted so that it does not exist, or holds on one
node only. So the lock file also names its owner, and the owner touches it every few seconds.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec
from msgspec.structs import replace

from runner.common.errors import UserError

HEARTBEAT_SECONDS = 10.0  # seconds between two signs of life
STALE_SECONDS = 45.0  # seconds without one after which an owner on another node counts as dead
ABANDONED_SECONDS = 900.0  # the same, if the file lock is still held: longer, as its watchdog ends a process that hangs


class LockedError(UserError):
    """Another process still holds a lock."""


class Owner(msgspec.Struct, frozen=True, omit_defaults=True):
    """The process that trains a run: its host, the batch job that started it, if any, and if it has the file lock."""

    pid: int
    host: str
    job: str = ""
    start: int = 0  # how often the job had been requeued
    has_lock: bool = True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", job {self.job}," if self.job else "")


@contextlib.contextmanager
def locked(path: Path, timeout: float, job: str = "", start: int = 0) -> Iterator[None]:
    """Locks the folder of a run or sweep until the context exits.

    Args:
        path: the lock file, which is created if needed.
        timeout: seconds to wait for another owner.
        job: id of this process's batch job.
        start: how often the job has been requeued. An owner from an earlier start of the job is dead, because a job
            runs once at a time; but one start can train the same run on two of its nodes.

    Raises:
        LockedError: another process still holds the lock.
        OSError: the file cannot be written.
    """
    own = Owner(os.getpid(), socket.gethostname(), job, start)
    with _acquire(path, own, timeout) as file:
        ended = threading.Event()
        heartbeat = threading.Thread(target=_send_heartbeats, args=(path, own, ended), name="lock", daemon=True)
        heartbeat.start()
        try:
            yield
        finally:
            ended.set()
            heartbeat.join()
            with contextlib.suppress(OSError):
                if _is_owner(own, path):
                    file.truncate(0)  # no owner


def _acquire(path: Path, own: Owner, timeout: float) -> IO[str]:
    """Opens and locks the file. Waits while `flock` is held, or while the owner that the file names is alive."""
    deadline = time.monotonic() + timeout
    file = _open(path)
    while True:
        blocked, problem = False, ""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            blocked = True
        except OSError as error:
            problem = str(error.strerror)
        if not _is_at(file, path):  # another process has replaced it
            file.close()
            file = _open(path)
            continue
        owner = _read(path) if blocked else _live_owner(path, flock_works=not problem)
        if blocked and _is_abandoned(path):  # its server keeps the lock, which a new file does not have
            file.close()
            path.unlink(missing_ok=True)
            file = _open(path)
            continue
        if not blocked and (owner is None or _is_earlier_start(owner, own)):
            own = replace(own, has_lock=not problem)
            file.truncate(0)
            file.write(msgspec.json.encode(own).decode())
            file.flush()
            if problem:
                time.sleep(0.5)  # of several that begin at once, the last to write is the owner
                if _read(path) != own:
                    file.seek(0)
                    continue
                reason = "a process on another node that writes the same folder is noticed by its heartbeat alone"
                print(f"runner: {path}: no file locks here ({problem}); {reason}", file=sys.stderr)
            return file
        if time.monotonic() > deadline:
            file.close()
            who = owner or "another process"
            raise LockedError(f"{path.parent}: {who} uses it; wait for it, or choose another --name")
        time.sleep(0.5)


def _open(path: Path) -> IO[str]:
    """Opens a lock file, which is created if needed. A link, which could lead to any file, or a pipe is refused."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise UserError(f"{path}: expected a file, found a link or pipe; remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: expected a file, found a link or pipe; remove it")
    return os.fdopen(descriptor, "r+")


def _is_at(file: IO[str], path: Path) -> bool:
    """Returns whether an open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_regular(path: Path) -> bool:
    """Returns whether there is a file, and not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_locked(path: Path) -> bool:
    """Returns whether a process is currently training the run of a lock file."""
    flock_works = True
    if not _is_regular(path):
        return False
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return not _is_abandoned(path)
    except FileNotFoundError:
        return False
    except OSError:
        flock_works = False
    return _live_owner(path, flock_works) is not None


def _is_abandoned(path: Path) -> bool:
    """Returns whether the owner is on another node, and its heartbeat is older than `ABANDONED_SECONDS`."""
    owner = _read(path)
    try:
        return (
            owner is not None
            and owner.host != socket.gethostname()
            and time.time() - path.stat().st_mtime > ABANDONED_SECONDS
        )
    except OSError:
        return False


def _is_earlier_start(owner: Owner, own: Owner) -> bool:
    """Returns whether an owner on another node is from an earlier start of the same job."""
    return own.job != "" and owner.job == own.job and owner.start < own.start and owner.host != own.host


def _live_owner(path: Path, flock_works: bool) -> Owner | None:
    """Returns the owner that a lock file names, if it is alive although this process could lock the file.

    For an owner on this node, `flock` has the answer if both sides have it, or else the process ID; for one on another
    node, the age of its heartbeat.
    """
    owner = _read(path)
    try:
        if owner is None:
            return None
        if owner.host != socket.gethostname():
            return owner if abs(time.time() - path.stat().st_mtime) < STALE_SECONDS else None
        if (flock_works and owner.has_lock) or owner.pid == os.getpid():
            return None
        os.kill(owner.pid, 0)
    except PermissionError:  # of another user
        pass
    except OSError:
        return None
    return owner


def _read(path: Path) -> Owner | None:
    """Returns the owner that a lock file names; None if the file is missing or cannot be decoded."""
    if not _is_regular(path):
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Owner)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _is_owner(own: Owner, path: Path) -> bool:
    """Returns whether a lock file names this process, or no other one."""
    owner = _read(path)
    return owner is None or (owner.pid, owner.host) == (own.pid, own.host)


def _send_heartbeats(path: Path, own: Owner, ended: threading.Event) -> None:
    """Touches a lock file until `ended` is set, or until another process has taken it for one of a dead process."""
    while not ended.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            if not _is_owner(own, path):
                note = "this process gave no sign of life for long; stop one of them"
                print(f"runner: {path}: taken by {_read(path)}, because {note}", file=sys.stderr, flush=True)
                return
            os.utime(path)
