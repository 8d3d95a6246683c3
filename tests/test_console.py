import errno
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runner.common.console import progress, run_command, track
from runner.common.errors import UserError
from runner.common.files import sha256_of
from runner.common.text import printable, without_controls
from tests.support.processes import ROOT, python

DIRECTION = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # Unicode's Bidi_Control


@example("cat\u202egnp.exe", True)
@example("\u2066\u061c\u200f", False)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.booleans())
def test_text_of_a_file_cannot_steer_the_terminal(text: str, ascii_only: bool) -> None:
    (read,) = json.loads(without_controls(json.dumps([text], ensure_ascii=ascii_only).encode()))
    assert read == re.sub(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f{DIRECTION}]", "\ufffd", text)


def test_an_error_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise UserError("a\x1b[2J\x9b: expected b")

    with pytest.raises(SystemExit):
        run_command(lambda: command, "prog")
    assert capsys.readouterr().err == "prog: a\\x1b[2J\\x9b: expected b\n"
    assert printable("not-\udcff") == "not-\\udcff"
    assert printable("cat\u202egnp.exe \u2067\u200f") == "cat\\u202egnp.exe \\u2067\\u200f"
    assert printable("שלום, 你好") == "שלום, 你好"


def test_user_error_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise UserError("x 3: expected\n  2; take 2")

    with pytest.raises(SystemExit) as stop:
        run_command(lambda: command, "prog")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "prog: x 3: expected 2; take 2\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "prog: runs/x: no space left; free some and"),
        (KeyboardInterrupt(), 130, "prog: interrupted\n"),
    ],
)
def test_a_full_disk_and_ctrl_c_are_one_line(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(lambda: command, "prog")
    assert stop.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == 1


def test_a_rank_that_waited_in_vain_prints_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise UserError("no")

    start = time.monotonic()
    with pytest.raises(SystemExit):
        run_command(lambda: command, "prog", report_after=0.2)
    assert time.monotonic() - start >= 0.2
    assert capsys.readouterr().err == "prog: no\n"


def test_a_file_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise PermissionError(errno.EROFS, "Read-only file system", "run/deploy")

    with pytest.raises(SystemExit) as stop:
        run_command(lambda: command, "prog")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("prog: run/deploy: cannot be used (read-only file system)")


QUICK = [("list", "-u"), ("list --json", "-E"), ("--help", "-E")]


@pytest.mark.parametrize(
    ("words", "python_option"),
    [
        pytest.param(words, option, marks=[] if (words, option) in QUICK else pytest.mark.every)
        for words in ("list", "list --json", "--help", "train soni-2 --help")
        for option in ("-u", "-E")
    ],
)
def test_a_reader_that_leaves_ends_the_command_quietly(words: str, python_option: str) -> None:
    """As in `runner list | head -1`; standard output may be unbuffered."""
    script = f"{sys.executable} {python_option} -m runner {words} | :; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stderr == ""
    assert done.returncode in (141, 1, 0)  # 1 from rich, 0 where the reader was too slow to leave


def test_output_to_a_full_disk_is_one_line() -> None:
    script = f"{sys.executable} -m runner list --json > /dev/full"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stderr == "runner: the disk: no space left; free some and repeat the command\n"
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("fails", "code", "message"),
    [
        ("raise UserError('names: expected two')", 2, "prog: names: expected two\n"),
        ("raise KeyboardInterrupt", 130, "prog: interrupted\n"),
        ("raise SystemExit(75)", 75, ""),  # stopped, and to be continued
        ("raise SystemExit(0)", 2, "prog: the disk: no space left; free some and repeat the command\n"),
    ],
)
def test_what_ends_a_command_is_reported_though_its_output_cannot_be_written(
    fails: str, code: int, message: str
) -> None:
    command = f"def command():\n    print('x')\n    {fails}\n"
    program = f"from runner.common.console import *\n{command}run_command(lambda: command, 'prog')"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -E -c "$0" > /dev/full', program],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (code, message)


@pytest.mark.parametrize(("code", "prefix"), [(0, ""), (2, "prog: ")])
def test_what_is_printed_while_options_are_parsed_is_shown(
    code: int, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def parse() -> Callable[[], None]:
        print("a module of the user warns", file=sys.stderr)
        raise SystemExit(code)

    with pytest.raises(SystemExit):
        run_command(parse, "prog")
    assert capsys.readouterr().err == f"{prefix}a module of the user warns\n"


def test_a_terminal_without_a_character_shows_its_number() -> None:
    done = python("-c", "from runner.common.console import run_command; run_command(lambda: lambda: print('–'), 'p')",
                  PYTHONIOENCODING="ascii")  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "\\u2013\n")


def test_a_bug_is_not_reported_as_a_user_error() -> None:
    def command() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_command(lambda: command, "prog")


def test_progress_is_quiet_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work", 10) as advance:
        advance(10)
    assert list(track(range(3), "items", 3)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_progress_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("[work]", 10) as advance:
        print("a result")
        advance(10)
    assert "[work]" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    assert "a result" not in terminal.getvalue()  # standard output is not a terminal
    assert capsys.readouterr().out == "a result\n"


def test_bars_nest_and_other_ranks_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("outer", 2) as advance:
        for _ in range(2):
            with progress("inner", 1) as inner:
                inner(1)
            advance(1)
    with progress("later", 1), progress("rank one", 1, shown=False):
        pass
    assert all(name in terminal.getvalue() for name in ("outer", "inner", "later"))
    assert "rank one" not in terminal.getvalue()


def test_sha256(tmp_path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x").startswith("ba7816bf8f01cfea")
