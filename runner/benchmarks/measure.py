"""Ratios that survive a busy machine: the subjects take turns, and what is compared is taken from one round."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from data_prep.console import UserError, progress
from runner import environment
from runner.runs import write_atomically

LEAST_ROUNDS = 7


@dataclass(frozen=True)
class Ratio:
    """Median, least and largest of a ratio over the rounds."""

    median: float
    min: float
    max: float
    rounds: int


def in_turn(subjects: dict[str, Callable[[], float]], rounds: int, description: str) -> dict[str, list[float]]:
    """Measures each subject once in every round, in an order that shifts by one from round to round.

    Args:
        subjects: functions that do the work once and return what was measured (a rate, or seconds).
        rounds: how many.
        description: for the progress bar.

    Returns:
        For each subject its figure in every round.
    """
    names = list(subjects)
    found: dict[str, list[float]] = {name: [] for name in names}
    with progress(description, rounds * len(names)) as advance:
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                found[name].append(subjects[name]())
                advance(1)
    return found


def ratio(over: list[float], under: list[float]) -> Ratio:
    """Round by round, `over` divided by `under`."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios), len(ratios))


def accelerate_launch(processes: int, precision: str) -> list[str]:
    """Python's arguments that start so many ranks on this node, of the module that follows."""
    words = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", str(processes)]
    words += ["--main_process_port", "0", "--mixed_precision", precision, "--dynamo_backend", "no"]
    return [*words, *(["--multi_gpu"] if processes > 1 else [])]


def conclude(
    title: str,
    ratios: dict[str, Ratio],
    goals: dict[str, str],
    more: dict[str, Any],
    out: Path | None,
    shown_only: dict[str, Ratio] | None = None,
) -> None:
    """Prints the ratios as a table with the goals, and writes them as JSON with hardware and versions.

    Args:
        title: of the table.
        ratios: by name, e.g. "ratio_resident_to_ffcv".
        goals: in words, for some of the names.
        more: what else belongs into the JSON, e.g. the settings.
        out: the JSON file; None for none.
        shown_only: figures for the table alone, such as seconds, which mean nothing on another machine.
    """
    from rich.console import Console
    from rich.table import Table

    hardware = environment.hardware()
    table = Table(
        "ratio", "median", "min", "max", "rounds", "goal", title=f"{title}, {environment.described(hardware)}"
    )
    for name, found in (ratios | (shown_only or {})).items():
        figures = [f"{figure:.3g}" for figure in (found.median, found.min, found.max)]
        table.add_row(name, *figures, str(found.rounds), goals.get(name, "–"))
    Console(width=120).print(table)
    if out is not None:
        result = {name: asdict(found) for name, found in ratios.items()}
        result |= {
            "goals": {name: goal for name, goal in goals.items() if name in ratios},
            **more,
            "hardware": hardware,
            "versions": environment.versions(),
        }
        write(result, out)


def write(result: dict[str, Any], out: Path | None) -> None:
    """Writes a result as JSON: into a file, or to standard output where there is none.

    Raises:
        UserError: the file cannot be written.
    """
    content = json.dumps(result, indent=2) + "\n"
    if out is None:
        sys.stdout.write(content)
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, content.encode())
    except OSError as error:
        raise UserError(f"--json {out}: expected a file that can be written ({error.strerror})") from None
