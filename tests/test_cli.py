"""The command line: JSON output, one line and exit code 2 for bad input, and fast help."""

import contextlib
import functools
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runner import experiments
from runner.common import console
from runner.deploy import latency
from runner.run.folder import Run
from tests.support import archives
from tests.support.processes import ROOT, TINY, clean_environment, module, python, runner

GOLDEN_RUN = ROOT / "tests/golden/runs/soni-2/seed-0"
COMMANDS = [
    *(f"runner {name}" for name in ("list", "show", "train", "eval", "export", "parity", "engine", "bench", "predict")),
    *("runner report", "runner sync", "runner doctor", "runner watch", "runner compare", "runner card"),
    "runner serve-repo",
    *("launch submit", "launch sweep", "launch search", "launch agent", "launch.quickstart"),
    *("data_prep prepare", "data_prep verify"),
]


def test_list_json() -> None:
    rows = {row["name"]: row for row in json.loads(runner("list", "--json").stdout)}
    assert list(rows) == list(experiments.load())
    assert rows["merabishvili"]["parameters"] == 4_916_284
    assert rows["merabishvili"]["paper"] == "merabishvili"
    assert rows["merabishvili"]["reported"]["accuracy"] == 0.9416
    assert all(row["macs"] > 0 for row in rows.values())


def test_list_as_text() -> None:
    shown = runner("list").stdout
    for name in experiments.load():
        assert name in shown
    assert "4.92 M" in shown
    assert "94.16% test" in shown


def test_a_table_fits_a_terminal_of_80_columns_and_cuts_nothing() -> None:
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-m", "runner", "list"], stdout=theirs, check=True, env=clean_environment(COLUMNS="80")
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:]] == list(experiments.load())
    assert "…" not in "".join(lines)


def test_a_table_through_a_pipe_has_80_columns_and_cuts_nothing(
    deployed_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = runner("list").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert set(experiments.load()) <= {line.split()[0] for line in lines if line.split()}
    report = Run(deployed_run).read_latency()
    latency.show([report])
    lines = [line for line in capsys.readouterr().out.splitlines() if re.search(r"\S  +\S", line)]  # of the table
    assert max(map(len, lines)) <= 80
    for row in report.rows:
        assert not row.measured or any(row.backend in line and row.precision in line for line in lines)


def test_show_says_what_a_run_is_and_how_far(deployed_run: Path) -> None:
    shown = runner("show", deployed_run)
    assert shown.returncode == 0, shown.stderr
    for line in ("tiny (tests), seed 0", "complete", "epoch 2 of 2, step 16", "CPUExecutionProvider: passed", "p50"):
        assert line in shown.stdout
    assert str(deployed_run / "deploy" / "model.fp32.onnx") in shown.stdout
    facts = json.loads(runner("show", deployed_run, "--json").stdout)
    assert facts["test accuracy"] == f"{Run(deployed_run).read_summary().test_accuracy:.2%} of 200 images"


def test_a_long_name_is_not_wrapped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    table = console.new_table("name", "text")
    table.add_row("n" * console.LONGEST_NAME, "word " * 20)
    console.print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("n" * console.LONGEST_NAME + " word") for line in lines)
    assert sum(line.count("word") for line in lines) == 20


def test_a_table_shows_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    table = console.new_table("name", "text")
    table.add_row("a", "[rank0]: failed [/tmp] :smile:")
    console.print_table(table)
    assert "[rank0]: failed [/tmp] :smile:" in capsys.readouterr().out


def test_list_includes_external_modules() -> None:
    names = [row["name"] for row in json.loads(runner("list", "--json", *TINY).stdout)]
    assert "tiny" in names


def test_list_shows_grids_and_their_trials() -> None:
    grids = json.loads(runner("list", "--grids", "--json").stdout)
    assert grids.keys() == experiments.load_grids().keys()
    shown = runner("list", "--grids").stdout.splitlines()
    for name, trials in grids.items():
        assert f"{name}: {len(trials)} trials" in shown
        assert {f"    {trial}" for trial in trials} <= set(shown)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: str) -> None:
    done = module(*command.split(), "--help", COLUMNS="100")  # with more columns tyro draws panels side by side
    assert done.returncode == 0
    options = re.findall(r"^│ (?:--)[^│]*│\n(?:│ {6,}[^│]*│\n)*", done.stdout, re.M)
    assert options
    for option in options:
        text = re.sub(r"│|\(default.*?\)|\(required\)", " ", option, flags=re.S)
        words = [word for word in text.split()[1:] if any(letter.islower() for letter in word)]
        assert len(words) >= 3, f"{command}: {option}"


def test_the_list_above_has_every_command_of_the_runner() -> None:
    shown = runner("--help").stdout
    names = re.findall(r"• ([\w-]+) ", shown)
    assert {f"runner {name}" for name in names} == {name for name in COMMANDS if name.startswith("runner ")}


def test_help_and_lists_import_no_slow_packages(tmp_path: Path) -> None:
    """All in one new process; unlike a time limit, this does not depend on the machine."""
    other = shutil.copytree(GOLDEN_RUN, tmp_path / "run")
    code = """
import contextlib, io, sys
from runner.cli import main
heavy = {"torch", "torchvision", "accelerate", "wandb", "numpy", "numba", "onnx", "onnxruntime", "matplotlib"}
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            main(command.split())
        except SystemExit as end:
            assert not end.code, command
    assert len(output.getvalue().splitlines()) > 5, command
    assert not heavy & set(sys.modules), (command, heavy & set(sys.modules))
"""
    done = python(
        "-c", code, "--help", "train --help", "report --help", "sync --help", "doctor --help", "list",
        f"watch {GOLDEN_RUN}", f"compare {GOLDEN_RUN} {other}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_discarded(closed: str, tmp_path: Path) -> None:
    """And no file that is opened later gets what is printed."""
    for words, code in (("list", 0), ("trian", 2)):
        shell = f"exec {sys.executable} -m runner {words} {closed}"
        done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, env=clean_environment(), cwd=ROOT)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert bool(done.stderr) == (code == 2 and "2>" not in closed)


@pytest.fixture
def bad(small_data: Path, own_data: Path, tiny_run: Path, tmp_path: Path) -> dict[str, Path]:
    """Paths of valid and invalid inputs."""
    paths = {"data": small_data, "run": tiny_run, "new": tmp_path / "new", "empty": tmp_path / "empty"}
    paths["empty"].mkdir()
    paths["text"] = tmp_path / "notes.tar.gz"
    paths["text"].write_text("not an archive")
    paths["official"] = archives.binary_archive(tmp_path / "cifar-10-binary.tar.gz", archives.batches())
    paths["damaged"] = own_data
    content = bytearray((own_data / "test.beton").read_bytes())
    content[-100] ^= 1
    (own_data / "test.beton").write_bytes(content)
    paths["locked"] = tmp_path / "locked"
    paths["locked"].mkdir(mode=0o555)
    paths["runs"] = tiny_run.parent.parent
    return paths


BAD = {
    "an exported precision twice": (
        "runner export {run} --precision int8 int8",
        "--precision int8 int8: expected each once",
    ),
    "precision of eager": (
        "runner bench {run} --backend eager --precision fp16",
        "--precision fp16: expected with a backend that runs exported files",
    ),
    "engine of int8-cpu": (
        "runner serve-repo {run} --out {new} --backend tensorrt --precision int8-cpu",
        "--precision int8-cpu: expected --backend onnxruntime",
    ),
    "wrong name": ("runner train podeti-alexnt --data {data} --runs {new}", "podeti-alexnet"),
    "missing folder": ("runner train tiny --data {new} --runs {new}", "found none; prepare one"),
    "empty folder": ("runner train tiny --data {empty} --runs {new}", "dataset.json"),
    "overwrite and resume": (
        "runner train tiny --data {data} --runs {new} --overwrite --resume auto",
        "expected no --resume",
    ),
    "damaged file": ("runner train tiny --data {damaged} --runs {new}", "test.beton: damaged"),
    "unknown option": ("runner train tiny --data {data} --bach 3", "--bach"),
    "unknown value": ("runner train tiny --data {data} --device gpu", "--device"),
    "no number": ("runner train tiny --data {data} --seed one", "one"),
    "no steps": ("runner train tiny --data {data} --runs {new} --max-steps 0", "--max-steps 0"),
    "odd run name": ("runner train tiny --data {data} --runs {new} --name $(x)", "$(x)"),
    "run exists": ("runner train tiny --data {data} --runs {runs}", "finished run"),
    "unknown module": ("runner list --experiments-from no.such.module", "no.such.module"),
    "missing argument": ("runner train tiny", "--data"),
    "no command": ("runner", "list"),
    "no such command": ("runner trian", "trian"),
    "no run": ("runner export {empty}", "run.json"),
    "no runs": ("runner report {empty} --out {new}", "found none"),
    "no gpu": ("runner eval {run} --device cuda", "found 0"),
    "fp16 on the CPU": (
        "runner train tiny --data {data} --runs {new} --precision fp16 --device cpu",
        "--precision fp16: expected a GPU, found --device cpu",
    ),
    "fp16 without a GPU": ("runner train tiny --data {data} --runs {new} --precision fp16", "expected a GPU"),
    "no checkpoint": (
        "runner train tiny --data {data} --runs {new} --resume {empty}",
        "expected auto, never, or the folder of a checkpoint",
    ),
    "nothing to resume anyway": ("runner train tiny --data {data} --runs {new} --resume-anyway", "expected with --res"),
    "workers of no loader": (
        "runner train tiny --data {data} --runs {new} --loader resident --workers 2",
        "--workers 2: expected with --loader streaming",
    ),
    "weight of no teacher": (
        "runner train tiny --data {data} --runs {new} --recipe.teacher-weight 0.7",
        "--recipe.teacher-weight 0.7: expected with --teacher",
    ),
    "more parts than images": (
        "runner train tiny --data {data} --runs {new} --recipe.accumulate 61",
        "--recipe.accumulate 61: expected at most 60",
    ),
    "nothing left of an image": (
        "runner train tiny --data {data} --runs {new} --recipe.augment.cutout 33",
        "--recipe.augment.cutout 33: expected at most the images' side of 32",
    ),
    "magnitude of no policy": (
        "runner train tiny --data {data} --runs {new} --recipe.augment.policy trivial "
        "--recipe.augment.rand-magnitude 5",
        "--recipe.augment.rand-magnitude 5: expected with --recipe.augment.policy rand, found trivial",
    ),
    "operations of no policy": (
        "runner train tiny --data {data} --runs {new} --recipe.augment.rand-ops 3",
        "--recipe.augment.rand-ops 3: expected with --recipe.augment.policy rand, found none",
    ),
    "magnitude beyond the last": (
        "runner train tiny --data {data} --runs {new} --recipe.augment.policy rand --recipe.augment.rand-magnitude 31",
        "--recipe.augment.rand-magnitude 31: expected an integer <= 30",
    ),
    "more repeats than a batch": (
        "runner train tiny --data {data} --runs {new} --recipe.augment.repeats 61",
        "--recipe.augment.repeats 61: expected at most the batch size of 60",
    ),
    "a file with data to stop": (
        "runner train tiny --data {data} --runs {new} --stop-file {text}",
        "holds data, and would be removed",
    ),
    "a folder to stop": (
        "runner train tiny --data {data} --runs {new} --stop-file {empty}",
        "expected a file, found a",
    ),
    "nothing to calibrate": ("runner export {run} --calibration 3", "--calibration 3: expected with --precision int8"),
    "a folder for a sheet": ("runner predict {run} {text} --sheet {empty}", "--sheet"),
    "not exported": ("runner bench {run}", "runner export"),
    "too many threads": ("runner bench {run} --threads 100000", "usable cores"),
    "too long a wait": ("runner train tiny --data {data} --runs {new} --hang-timeout 1e300", "--hang-timeout"),
    "nothing to trust": ("runner train tiny --data {data} --runs {new} --trust", "--trust: expected with --resume"),
    "no number to wait": (
        "runner train tiny --data {data} --runs {new} --hang-timeout nan",
        "--hang-timeout nan",
    ),
    "no end of the wait": ("runner train tiny --data {data} --runs {new} --hang-timeout inf", "--hang-timeout inf"),
    "a path for a module": (
        "runner train tiny --data {data} --runs {new} --experiments-from ./mine",
        "--experiments-from ./mine: expected an importable module",
    ),
    "no dataset": ("runner train soni-2 --data {new} --runs {new}", "prepare --source official --out"),
    "no factory": (
        "runner train tiny --data {data} --runs {new} --architecture.factory no.such:Net",
        "--architecture.factory no.such:Net: expected module:callable",
    ),
    "an empty name of a run": ("runner eval ", "'': expected a name or a path, found an empty one"),
    "an empty name of a dataset": ("data_prep verify ", "'': expected a name or a path, found an empty one"),
    "weight decay of normalized weights": (
        "runner train speedrun --data {data} --runs {new} --weight-decay 0.1",
        "--recipe.optimizer.weight-decay 0.1: expected 0 with --recipe.optimizer.unit-rows",
    ),
    "kept operators without int8": ("runner export {run} --keep a b", "--keep a b: expected with --precision int8"),
    "a search without int8": (
        "runner export {run} --precision fp16 --search-precision",
        "--search-precision: expected with --precision int8",
    ),
    "a limit without a search": ("runner export {run} --precision int8 --drop 1", "--drop 1: expected with --search-"),
    "a search of what is given": (
        "runner export {run} --precision int8 --search-precision --keep a",
        "--keep and --search-precision: expected one",
    ),
    "early stopping by test images": (
        "runner train tiny --data {data} --runs {new} --recipe.patience 2",
        "--recipe.patience 2: expected --recipe.validation above 0, found 0",
    ),
    "early stopping between evaluations": (
        "runner train tiny --data {data} --runs {new} --recipe.patience 3 --recipe.validation 50 --evaluate-every 2",
        "--recipe.patience 3: expected a multiple of --evaluate-every 2",
    ),
    "early stopping of a pruned model": (
        "runner train tiny --data {data} --runs {new} --recipe.patience 3 --recipe.validation 50 --recipe.prune 0.5",
        "--recipe.patience and --recipe.prune: expected one of them",
    ),
    "layers with one step size": (
        "runner train speedrun --data {data} --runs {new} --recipe.layer-decay 0.5",
        "--recipe.layer-decay 0.5: expected 1 with Muon",
    ),
    "steps in reverse": (
        "runner train tiny --data {data} --runs {new} --profile-steps 3:2",
        "--profile-steps 3:2: expected the first and the last step, counted from 1, such as 10:12",
    ),
    "step 0": ("runner train tiny --data {data} --runs {new} --profile-steps 0:2", "--profile-steps 0:2: expected"),
    "a step": ("runner train tiny --data {data} --runs {new} --profile-steps 5", "--profile-steps 5: expected"),
    "steps after the last": (
        "runner train tiny --data {data} --runs {new} --max-steps 9 --profile-steps 8:10",
        "--profile-steps 8:10: expected steps up to 9",
    ),
    "steps of two epochs": (
        "runner train tiny --data {data} --runs {new} --profile-steps 8:9",
        "--profile-steps 8:9: expected steps within one epoch of",
    ),
    "a precision twice": ("runner bench {new} --precision fp16 fp16", "--precision fp16 fp16: expected each once"),
    "no package of int8": (
        "runner bench {new} --precision int8 --backend aotinductor",
        "--precision int8: expected fp32 with --backend aotinductor",
    ),
    "no peak": ("runner train tiny --data {data} --runs {new} --peak-tflops 0", "--peak-tflops 0"),
    "nothing to watch": ("runner watch {empty}", "run.json"),
    "nothing to compare with": ("runner compare {run}", "expected at least two runs, found 1"),
    "no run to compare": ("runner compare {run} {empty}", "found none"),
    "nothing shown": ("runner show {empty}", "run.json"),
    "no archive": ("data_prep prepare --source {text} --out {new}", "not a complete tar or zip"),
    "wrong hash": ("data_prep prepare --source {official} --out {new}", "expected SHA-256"),
    "no source": ("data_prep prepare --source {new} --out {new}", "no such file"),
    "quality of raw records": (
        "data_prep prepare --source synthetic --jpeg-quality 80 --out {new}",
        "--jpeg-quality 80: expected with --records jpeg, found raw records",
    ),
    "no such records": ("data_prep prepare --source synthetic --records png --out {new}", "--records png: expected"),
    "too high a quality": (
        "data_prep prepare --source synthetic --records jpeg --jpeg-quality 101 --out {new}",
        "--jpeg-quality 101: expected an integer <= 100",
    ),
    "two crops": (
        "runner train tiny --data {data} --runs {new} --recipe.augment.random-resized-crop 0.3",
        "--recipe.augment.random-resized-crop 0.3: expected with --recipe.augment.crop-padding 0, found 4",
    ),
    "more than an image": (
        "runner train tiny --data {data} --runs {new} --recipe.augment.random-resized-crop 1.5",
        "--recipe.augment.random-resized-crop 1.5: expected a number <= 1",
    ),
    "no images": ("data_prep prepare --source {empty} --out {new}", "contains no image"),
    "verify damaged": ("data_prep verify {damaged}", "test.beton: damaged"),
    "verify nothing": ("data_prep verify {empty}", "dataset.json"),
}
FRESH = ("damaged file", "no archive")  # in new processes, as users start them


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_exit_2(kind: str, bad: dict[str, Path]) -> None:
    command, message = BAD[kind]
    name, *arguments = (word.format(**bad) for word in command.split(" "))
    more = TINY if arguments[:2] == ["train", "tiny"] else ()
    start = functools.partial(python, "-m") if kind in FRESH else module
    done = start(name, *arguments, *more, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout == ""
    assert not bad["new"].exists()


@pytest.mark.parametrize("command", ["runner train tiny", "data_prep prepare"])
def test_no_permission_to_write(command: str, bad: dict[str, Path], small_data: Path) -> None:
    module, *arguments = command.split()
    if module == "runner":
        arguments += ["--data", str(small_data), "--runs", str(bad["locked"] / "runs"), "--device", "cpu", *TINY]
    else:
        arguments += ["--source", "synthetic", "--limit-per-class", "1", "--out", str(bad["locked"] / "data")]
    shell = [sys.executable, "-m", module, *arguments]
    if os.geteuid() == 0:  # drop root's capability to override permissions
        setpriv = shutil.which("setpriv")
        assert setpriv, "setpriv of util-linux is required"
        shell = [setpriv, "--bounding-set=-all", "--inh-caps=-all", *shell]
    done = subprocess.run(shell, capture_output=True, text=True, cwd=ROOT, env=clean_environment())
    assert done.returncode == 2, done.stderr
    assert "cannot write there" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert list(bad["locked"].iterdir()) == []
