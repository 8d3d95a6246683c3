"""Simulates a run folder on a shared file system that shows new files late.

For STALE seconds after the start, listings on rank 1 lack the newest checkpoint.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.models import tiny

EXPERIMENTS = {"stale": tiny.EXPERIMENTS["tiny-everything"]}
START, GLOB = time.monotonic(), Path.glob


def late_glob(folder: Path, pattern: str, **options: Any) -> Iterator[Path]:
    """Replaces Path.glob; hides the newest checkpoint until STALE seconds after the start."""
    found = list(GLOB(folder, pattern, **options))
    if pattern == "step-*" and time.monotonic() - START < float(os.environ["STALE"]):
        found = sorted(found, key=lambda path: int(path.name.removeprefix("step-")))[:-1]
    return iter(found)


if os.environ.get("RANK") == "1":
    Path.glob = late_glob
