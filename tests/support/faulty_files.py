"""Runs commands on files that fail as those of a file server do, with the library of `programs/faulty_files.c`."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import ROOT

SOURCE = ROOT / "tests" / "support" / "programs" / "faulty_files.c"


def build(folder: Path) -> Path:
    """Compiles the library; returns its path."""
    library = folder / "faulty_files.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
    return library


@dataclass(frozen=True)
class Event:
    """A fault, or with the kind `done` a change on disk; see the library."""

    kind: str
    call: str
    rank: str
    path: Path
    detail: str


@dataclass(frozen=True)
class FaultyFiles:
    """A folder below which calls fail.

    Attributes:
        library: the library to preload.
        below: the folder.
        log: the file of its events.
    """

    library: Path
    below: Path
    log: Path

    def environ(self, rules: str, seed: object = 0) -> dict[str, str]:
        """Returns the variables of a process whose calls fail."""
        return {
            "LD_PRELOAD": str(self.library),
            "FAULTS_BELOW": str(self.below),
            "FAULTS": rules,
            "FAULTS_SEED": str(seed),
            "FAULTS_LOG": str(self.log),
            "FAULTS_TRACE": "1",
        }

    def events(self) -> list[Event]:
        """Returns everything that was logged."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        fields = (line.split("\t") for line in lines)
        return [Event(kind, call, rank, Path(path), detail) for kind, call, rank, _, path, detail in fields]

    def faults(self) -> list[Event]:
        """Returns the faults that were injected."""
        return [event for event in self.events() if event.kind != "done"]

    def cut_power(self, zeros: bool = False) -> list[Path]:
        """Takes away what was written since the last sync of each file, as if the node had lost power.

        Args:
            zeros: the bytes are NUL, as on some file systems, instead of cut off.

        Returns:
            The files that lost something. The log begins anew, because what is left is on disk.
        """
        synced = synced_sizes(self.events())
        lost = [path for path, size in synced.items() if path.is_file() and path.stat().st_size > size]
        for path in lost:
            size = path.stat().st_size
            os.truncate(path, synced[path])
            if zeros:
                os.truncate(path, size)
        self.log.rename(self.log.with_suffix(f".{len(list(self.log.parent.glob('*.log*')))}"))
        return lost


def synced_sizes(events: list[Event]) -> dict[Path, int]:
    """Returns how much of each file that was written is on disk for certain, by its path after the events."""
    synced: dict[Path, int] = {}
    for event in events:
        if event.kind != "done":
            continue
        if event.call == "rename":
            before = Path(event.detail)
            moved = [path for path in synced if path == before or before in path.parents]
            synced |= {event.path / path.relative_to(before): synced.pop(path) for path in moved}
        elif event.call == "create":  # empty if it was truncated
            synced[event.path] = min(int(event.detail), synced.get(event.path, int(event.detail)))
        elif event.call == "sync" and event.path in synced:
            synced[event.path] = int(event.detail)
        elif event.call == "unlink":
            synced.pop(event.path, None)
    return synced
