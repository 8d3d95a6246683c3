"""The command lines of the benchmarks and of the preview follow the rules of `runner`'s."""

import itertools
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.benchmarks import (
    allreduce,
    deploy,
    loader,
    operators,
    overhead,
    papers,
    parity,
    quantizers,
    scaling,
    search,
    tables,
)
from runner.benchmarks.gpu.__main__ import GpuBenchmark
from runner.common.command_line import options_of, read_command
from runner.data.preview import Preview
from tests import test_command_lines as rules
from tests.support.processes import ROOT, python

PROGRAMS: dict[str, Any] = {
    "runner.benchmarks.allreduce": allreduce.Prediction,
    "runner.benchmarks.deploy": deploy.DeployBenchmark,
    "runner.benchmarks.gpu": GpuBenchmark,
    "runner.benchmarks.loader": loader.LoaderBenchmark,
    "runner.benchmarks.operators": operators.Operators,
    "runner.benchmarks.overhead": overhead.OverheadBenchmark,
    "runner.benchmarks.papers": papers.Papers,
    "runner.benchmarks.parity": parity.CollectParity,
    "runner.benchmarks.quantizers": quantizers.Quantizers,
    "runner.benchmarks.scaling": scaling.ScalingBenchmark,
    "runner.benchmarks.search": search.Replay,
    "runner.benchmarks.tables": tables.Tables,
    "runner.data.preview": Preview,
}


def test_every_benchmark_is_checked() -> None:
    folder = Path(tables.__file__).parent
    files = {path for path in folder.rglob("*.py") if '__name__ == "__main__"' in path.read_text()}
    names = {path.parent.name if path.stem == "__main__" else path.stem for path in files}
    assert {f"runner.benchmarks.{name}" for name in names} | {"runner.data.preview"} == PROGRAMS.keys()


def test_command_lines_are_parsed_in_one_place() -> None:
    files = [path for folder in ("data_prep", "launch", "runner") for path in (ROOT / folder).rglob("*.py")]
    parsers = [path.relative_to(ROOT) for path in files if "tyro.cli(" in path.read_text()]
    assert parsers == [Path("runner/common/command_line.py")]


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, Any, list[str]]:
    """The name of a program, and a command with words that are parsed to it."""
    name = draw(st.sampled_from(list(PROGRAMS)))
    command, positional, required = rules.draw_required(draw, PROGRAMS[name])
    options, declared = rules.leaves(command), options_of(PROGRAMS[name])
    selected = draw(st.lists(st.sampled_from(list(options)), unique=True, max_size=7))
    groups = [positional]
    for path in dict.fromkeys([*selected, *required]):
        option = rules.Drawn(path, draw(options[path]))
        if option.value is False and not declared[option.name].has_negative:
            continue
        command = rules.changed(command, path, option.value)
        groups.append(list(itertools.chain.from_iterable(draw(rules.written(option, None)))))
    return name, command, list(itertools.chain.from_iterable(draw(st.permutations(groups))))


@settings(max_examples=200, **rules.SETTINGS)
@given(command_lines())
def test_a_command_is_parsed_in_any_order_and_form(line: tuple[str, Any, list[str]]) -> None:
    name, command, words = line
    assert read_command(PROGRAMS[name], words, name) == command, words


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_number_has_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.COMMANDS, name, PROGRAMS[name])
    rules.test_every_number_has_limits(name)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("benchmarks.allreduce --cluster.link 1e9 --cluster.link 4e11", "expected once, found twice: 1e9 and 4e11"),
        ("benchmarks.allreduce --no-write --write --no-write", "--write: expected once, found twice"),
        ("benchmarks.allreduce --cluster.link nan", "--cluster.link nan: expected a finite number"),
        ("benchmarks.allreduce --cluster.link 0", "--cluster.link 0.0: expected a number >= 1"),
        ("benchmarks.allreduce --cluster.flops -1", "--cluster.flops -1.0: expected a number >= 1"),
        ("benchmarks.allreduce --cluster.gpus-per-node 0", "--cluster.gpus-per-node 0: expected an integer >= 1"),
        ("benchmarks.allreduce --write --cluster.network 11e9", "--write: expected without --cluster"),
        ("benchmarks.deploy --rounds 7", "RUNS: expected at least one, found none"),
        ("benchmarks.deploy RUN --batch 8", "--batch 8: expected 1 among them, and each once"),
        ("benchmarks.deploy RUN --batch 1 1", "--batch 1 1: expected 1 among them, and each once"),
        ("benchmarks.deploy RUN --backend compiled", "--backend compiled: expected eager and onnxruntime among them"),
        ("benchmarks.deploy RUN --rounds 6", "--rounds 6: expected an integer >= 7"),
        ("benchmarks.gpu --data d --out o --minutes nan --rehearse", "--minutes nan: expected a finite number"),
        ("benchmarks.gpu --data d --out o --minutes 0 --rehearse", "--minutes 0.0: expected a number > 0"),
        ("benchmarks.gpu --data d --out o --only --rehearse", "--only: expected one or more values"),
        ("benchmarks.gpu --data d --out o --only everything", "--only: expected one or more values"),
        ("benchmarks.gpu --data d --out o --rehearse --no-rehearse", "--no-rehearse: no such option"),
        ("benchmarks.loader --data d --rounds 8 --rounds 9", "expected once, found twice: 8 and 9"),
        ("benchmarks.loader --data d --json None", "--json None: expected a value"),
        ("benchmarks.loader --data d --batch-size 0", "--batch-size 0: expected an integer >= 1"),
        ("benchmarks.loader --data d --workers 99999999", "--workers 99999999: expected an integer <= 1024"),
        ("benchmarks.operators row", "row: expected no further word"),
        ("benchmarks.overhead --data d --steps 2", "--steps 2: expected an integer >= 3"),
        ("benchmarks.overhead --data d --part loop --json f", "--json f: expected without --part"),
        ("benchmarks.papers --json f", "RUNS: expected at least one, found none"),
        ("benchmarks.parity --json f", "RUNS: expected at least one, found none"),
        ("benchmarks.quantizers --modelopt python", "RUNS: expected at least one, found none"),
        ("benchmarks.scaling --data d --batch 0", "--batch 0: expected an integer >= 1"),
        ("benchmarks.scaling --data d --batch 8 --json f", "--json f: expected without --batch"),
        ("benchmarks.scaling --data nowhere", "nowhere"),
        ("benchmarks.tables --write --write", "--write: expected once, found twice"),
        ("data.preview --data d --images 99999999", "--images 99999999: expected an integer <= 900"),
        ("data.preview --data d --seed -1", "--seed -1: expected an integer >= 0"),
        ("data.preview --data d --out picture.pdf", "--out picture.pdf: expected a name that ends with .png"),
    ],
)
def test_an_invalid_command_line_is_reported(
    line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each program, as it is started by `python -m`, prints one line and nothing else."""
    monkeypatch.chdir(tmp_path)
    name, *words = line.split()
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"runner.{name}", run_name="__main__")
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"{name.rpartition('.')[2]}: ")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_bad_value_exits_2_with_one_line() -> None:
    done = python("-m", "runner.benchmarks.allreduce", "--cluster.link", "nan")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "allreduce: --cluster.link nan: expected a finite number\n"
