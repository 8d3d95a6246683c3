"""Measures ratios that are robust on a busy machine: candidates take turns, and ratios are taken within a round."""

import contextlib
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, TypeVar
from unittest import mock

import msgspec
from msgspec import Meta

from runner.common.console import new_table, print_table, progress
from runner.common.errors import UserError
from runner.common.files import write_atomically
from runner.system import environment

K = TypeVar("K", bound=Hashable)
MIN_ROUNDS = 7  # enough for a spread
Rounds = Annotated[int, Meta(ge=MIN_ROUNDS, le=10**9)]
Steps = Annotated[int, Meta(ge=3, le=10**9)]  # time is measured from the second step to the last


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of a measurement or ratio over the rounds."""

    median: float
    min: float
    max: float
    rounds: int


def interleaved(
    candidates: Mapping[K, Callable[[], float]],
    rounds: int,
    description: str,
    after_round: Callable[[], None] = lambda: None,
) -> dict[K, list[float]]:
    """Measures the candidates in turn, each once in every round; the order rotates by one from round to round.

    Args:
        candidates: functions that do the work once and return the measurement (a rate, or seconds).
        rounds: number of rounds.
        description: title of the progress bar.
        after_round: called after each round, to write what was measured so far.

    Returns:
        The measurements of each candidate, one per round.
    """
    names = list(candidates)
    measured: dict[K, list[float]] = {name: [] for name in names}
    with progress(description, rounds * len(names)) as advance:
        for index in range(rounds):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                measured[name].append(candidates[name]())
                advance(1)
            after_round()
    return measured


def ratio(numerators: list[float], denominators: list[float]) -> Spread:
    """Returns the median, minimum and maximum of the ratios, which are taken round by round."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def spread(values: list[float]) -> Spread:
    """Returns the median, minimum and maximum of values, one per round."""
    return Spread(median(values), min(values), max(values), len(values))


def accelerate_launch_args(processes: int, precision: str) -> list[str]:
    """Returns the arguments with which Python starts `accelerate launch` on this node; append `-m MODULE ARGUMENTS`."""
    argv = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", str(processes)]
    argv += ["--main_process_port", "0", "--mixed_precision", precision, "--dynamo_backend", "no"]
    return [*argv, *(["--multi_gpu"] if processes > 1 else [])]


def synchronize(device: str) -> None:
    """Waits until a GPU has finished its work; does nothing on the CPU."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def make_step(model: Any, optimizer: Any, device: str, backward: Callable[[Any], None] | None = None) -> Callable:
    """Returns a minimal training step, in bf16 on a GPU and in float32 on the CPU.

    Args:
        model: the model in training mode.
        optimizer: its optimizer.
        device: "cuda" or "cpu".
        backward: runs the backward pass of a loss; by default `loss.backward()`.

    Returns:
        A function of images (n, 3, H, W) and labels (n,).
    """
    import torch
    import torch.nn.functional as F

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = F.cross_entropy(model(images), labels)
        (backward or torch.Tensor.backward)(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextlib.contextmanager
def before_every_step(callback: Callable[[], None]) -> Iterator[None]:
    """Calls `callback` before every optimizer step of `runner train` in this process.

    The callback runs where a step sets its learning rate, which happens once per step.
    """
    from runner.training import optim

    set_lr = optim.set_lr

    def observed(*arguments: Any) -> float:
        callback()
        return set_lr(*arguments)

    with mock.patch.object(optim, "set_lr", observed):
        yield


def report_ratios(
    title: str,
    ratios: dict[str, Spread],
    goals: dict[str, str],
    more: dict[str, Any],
    out: Path | None,
    table_only: dict[str, Spread] | None = None,
) -> None:
    """Prints the ratios as a table with the goals, and writes them as JSON with hardware and versions.

    Args:
        title: title of the table.
        ratios: ratios by name, e.g. "ratio_resident_to_ffcv".
        goals: goals for some of the ratios, as text.
        more: other content of the JSON file, e.g. the settings.
        out: the JSON file to write; None to write none.
        table_only: figures for the table only, such as seconds, which are not comparable across machines.
    """
    title = f"{title}, {environment.describe_hardware()}"
    table = new_table("ratio", "median", "min", "max", "rounds", "goal", title=title)
    for name, row in (ratios | (table_only or {})).items():
        cells = [f"{value:.3g}" for value in (row.median, row.min, row.max)]
        table.add_row(name, *cells, str(row.rounds), goals.get(name, "–"))
    print_table(table)
    write_ratios(ratios, goals, more, out)


def write_ratios(ratios: dict[str, Spread], goals: dict[str, str], more: dict[str, Any], out: Path | None) -> None:
    """Writes the JSON file of `report_ratios`, if there is to be one."""
    if out is not None:
        result = {
            **ratios,
            "goals": {name: goal for name, goal in goals.items() if name in ratios},
            **more,
            "hardware": environment.describe_hardware(),
            "versions": environment.package_versions(),
        }
        write(result, out)


def write(result: Any, out: Path | None) -> None:
    """Writes a result as JSON to a file, or to standard output if `out` is None.

    Raises:
        UserError: the file cannot be written.
    """
    content = msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n"
    if out is None:
        sys.stdout.write(content.decode())
        return
    try:
        write_atomically(out, content)
    except OSError as error:
        raise UserError(f"--json {out}: expected a file that can be written ({error.strerror})") from None
