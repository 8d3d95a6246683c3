"""One-line error messages for bad input, and progress bars on terminals."""

import contextlib
import errno
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from runner.common.errors import DISK_FULL, TRANSIENT_ERRNOS, UserError
from runner.common.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # the exit code of a program that SIGPIPE terminates
CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
OTHER_RANKS_ERROR_DELAY = 30.0
"""Seconds that every rank except the first of its node waits before it prints an error."""


def run_command(parse: Callable[[], Callable[[], Any]], prog: str, report_after: float = 0) -> Any:
    """Parses a command line, runs the command, and returns its result.

    Errors from the option parser, every `UserError`, a full disk, a path that cannot be used, and errors of a file
    server become one line on standard error and exit code 2. Ctrl-C becomes exit code 130, with one line only if
    `report_after` is 0.

    Args:
        parse: parses the command line and returns the command as a function without arguments.
        prog: name of the program, printed before the message.
        report_after: seconds to wait before an error is printed. If all ranks have the same error, the first rank of
            the node prints it immediately, and the launcher terminates the other ranks while they wait. If another
            rank exited first, the launcher would terminate the first rank before it printed anything.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # raised by a stream that claims to be seekable but is not
                stream.reconfigure(errors="backslashreplace")  # for terminals that cannot display a character
    try:
        try:
            result = call_parser(parse)()
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            # The command's own error says more, and its exit code has a meaning; --help exits with 0.
            failed = not isinstance(error, SystemExit) or error.code not in (None, 0)
            with contextlib.suppress(OSError) if failed else contextlib.nullcontext():
                _flush()
            raise
        _flush()
        return result
    except UserError as error:
        _exit(prog, error, report_after)
    except BrokenPipeError:  # for example from `runner list | head -1`
        with contextlib.suppress(OSError):
            _flush()
        raise SystemExit(EXIT_BROKEN_PIPE) from None
    except OSError as error:
        path = error.filename or "the disk"
        if error.errno in DISK_FULL:
            _exit(prog, UserError(f"{path}: no space left; free some and repeat the command"), report_after)
        reason = (error.strerror or "").lower()
        if error.errno in TRANSIENT_ERRNOS:
            _exit(prog, UserError(f"{path}: cannot be read or written ({reason}); repeat the command"), report_after)
        if error.errno in CANNOT_WRITE and error.filename:
            _exit(prog, UserError(f"{path}: cannot be used ({reason}); change it, or choose another"), report_after)
        raise
    except KeyboardInterrupt:
        _exit(prog, UserError("interrupted"), 0 if report_after == 0 else None, EXIT_INTERRUPTED)


def _open_closed_streams() -> None:
    """Discards the output of streams that are closed, as with `runner list >&-`.

    Otherwise, the next file that is opened would take the stream's number, and get what libraries print.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.dup(number), "r" if number == 0 else "w"))


def _flush() -> None:
    """Flushes standard output. Raises OSError, for example if its reader or the disk's space has gone."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise Python fails again at its end
        raise


def call_parser(parse: Callable[[], Any]) -> Any:
    """Calls an argument parser, and converts tyro's error panel into a UserError without the frame of the panel.

    Raises:
        UserError: the parser rejects the command line.
    """
    captured, panel = io.StringIO(), ""
    try:
        with contextlib.redirect_stderr(captured):
            return parse()
    except SystemExit as stop:
        if stop.code != EXIT_BAD_INPUT:
            raise  # --help
        panel = captured.getvalue()
        raise UserError(re.sub(r"[─━╭╮╰╯│┃]+|-{5,}", " ", panel)) from None
    finally:
        if not panel:
            sys.stderr.write(captured.getvalue())  # what modules of the user print


def _exit(prog: str, error: UserError, report_after: float | None, code: int = EXIT_BAD_INPUT) -> NoReturn:
    if report_after is not None:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(report_after)
        print(f"{prog}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    raise SystemExit(code) from None


LONGEST_NAME = 60  # maximum length, in characters, of a name that a table does not wrap

_display: Any = None  # the active progress display; a terminal can show only one


@contextlib.contextmanager
def progress(description: str, total: float | None, shown: bool = True) -> Iterator[Callable[[float], None]]:
    """Shows a progress bar on standard error if it is a terminal. A nested bar is drawn below the outer one.

    Args:
        description: text before the bar.
        total: sum of all `advance` calls; None if unknown.
        shown: False on all ranks but the first, because they share the terminal.

    Yields:
        A function that advances the bar by an amount.
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
                bars.TextColumn("{task.description}", markup=False),
                bars.BarColumn(),
                bars.TaskProgressColumn(),
                bars.TimeRemainingColumn(),
            )
            bar = bars.Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty())
            _display = stack.enter_context(bar)
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


def new_table(*titles: str, title: str | None = None) -> "Table":
    """Creates a table whose cells are wrapped if they do not fit; for `print_table`.

    Args:
        titles: titles of the columns.
        title: title of the table, printed above it.
    """
    from rich.table import Column, Table

    columns = [Column(name, overflow="fold") for name in titles]
    return Table(*columns, title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))


def output_console() -> "Console":
    """Returns a console for standard output at the width of the terminal, or in 80 columns through a pipe.

    It shows text as it is, because names and messages from elsewhere may contain [...], which markup would remove.
    """
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 80, markup=False, emoji=False)


def print_table(table: "Table") -> None:
    """Prints a table; see `output_console` for its width.

    The first column, which names the row, is not wrapped, so that it can be copied, unless a name is longer than
    LONGEST_NAME or leaves too little room for the other columns.
    """
    console = output_console()
    name = table.columns[0]
    name.no_wrap = all(len(str(cell)) <= min(LONGEST_NAME, console.width - 20) for cell in name.cells)
    console.print(table)


def list_some(names: Sequence[str], most: int = 3) -> str:
    """Returns the first names and the number of remaining ones, such as `a, b, c and 4 more`."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def track(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
    """Yields `items`, advancing a progress bar by one for each."""
    with progress(description, total) as advance:
        for item in items:
            yield item
            advance(1)
