"""The manners of every command here: one clear line for bad input, and progress only where someone looks.

This lives in the first room of the road because later stages may import earlier ones, and not the other way
round.
"""

import contextlib
import errno
import hashlib
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """A mistake in what the user gave. The message names the value, what was expected, and the remedy."""


def run_command(parse: Callable[[], Callable[[], Any]], prog: str, speaks: bool = True) -> Any:
    """Parses a command line, runs the command it names, and returns what that returns.

    What the option parser refuses, every `UserError` of the command, and a full disk become one line on standard
    error and exit code 2; Ctrl-C one line and exit code 130.

    Args:
        parse: reads the command line and returns the command as a function of no arguments.
        prog: the program's name, put before the message.
        speaks: False on ranks other than the node's first, so that one mistake is told once and not once a rank.
    """
    try:
        command = in_one_line(parse)
    except UserError as error:
        _refuse(prog, error, speaks)
    try:
        return command()
    except UserError as error:
        _refuse(prog, error, speaks)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = error.filename or "the disk"
        _refuse(prog, UserError(f"{place}: no space left; free some, and repeat the command"), speaks)
    except KeyboardInterrupt:
        _refuse(prog, UserError("interrupted"), speaks, EXIT_INTERRUPTED)


def in_one_line(parse: Callable[[], Any]) -> Any:
    """What `parse` returns of a command line.

    Raises:
        UserError: the option parser refuses it; tyro would draw a panel of several lines.
    """
    panel = io.StringIO()
    try:
        with contextlib.redirect_stderr(panel):
            return parse()
    except SystemExit as stop:
        if stop.code != EXIT_BAD_INPUT:
            raise  # --help, which has been printed
        raise UserError(re.sub(r"[─━╭╮╰╯│┃]+", " ", panel.getvalue())) from None


def _refuse(prog: str, error: UserError, speaks: bool, code: int = EXIT_BAD_INPUT) -> NoReturn:
    if speaks:
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(code) from None


_display: Any = None  # the one display of bars that a terminal can hold


@contextlib.contextmanager
def progress(description: str, total: float | None, shown: bool = True) -> Iterator[Callable[[float], None]]:
    """A progress bar on standard error, drawn only where that is a terminal. Inside of another it is drawn below.

    Args:
        description: what is going on.
        total: what `advance` adds up to; None where that is not known.
        shown: False on ranks other than the first, which share the terminal.

    Yields:
        A function that advances the bar by the amount given.
    """
    global _display
    if not shown or not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich import progress as bars
    from rich.console import Console

    with contextlib.ExitStack() as stack:
        if _display is None:
            columns = (
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.TaskProgressColumn(),
                bars.TimeRemainingColumn(),
            )
            _display = stack.enter_context(bars.Progress(*columns, console=Console(stderr=True)))
            stack.callback(_forget_display)
            task = _display.add_task(description, total=total)
        else:
            task = _display.add_task(description, total=total)
            stack.callback(_display.remove_task, task)
        display = _display
        yield lambda amount: display.update(task, advance=amount)


def _forget_display() -> None:
    global _display
    _display = None


def track(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
    """Yields `items` unchanged, advancing a progress bar by one for each."""
    with progress(description, total) as advance:
        for item in items:
            yield item
            advance(1)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(64 << 20):  # large, for between two of them other threads take Python's lock
            digest.update(piece)
    return digest.hexdigest()
