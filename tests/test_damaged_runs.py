"""A run folder with a damaged file is reported in one line, and hides no other.

Hypothesis damages one file of a finished, deployed run; the same examples in every call.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from runner import cli
from runner.common import files
from runner.common.errors import UserError
from runner.common.files import read_json, write_json
from runner.report import collect, compare, markdown, page
from runner.run.folder import Run, find_runs
from runner.run.metrics import read_metrics
from runner.run.schema import CheckpointManifest, EngineSidecar
from tests.support.processes import TINY, runner

FILES = (
    "run.json", "summary.json", "metrics.jsonl", "ended.json", "figures/mistakes.json", "deploy/exports.json",
    "deploy/parity.json", "deploy/latency.json", "deploy/model.fp32.tensorrt-rtx.engine.json",
)  # fmt: skip
TEXTS = (
    "", "\ud800", "\udcff", "\u202e\u0000\u2028", "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "a|b`c\nd", "{{ 7 * 7 }}", "$x$", "é" * 300, "NaN",
)  # fmt: skip
WRONG = (None, True, -1, 2**70, 10**400, 1e308, float("nan"), float("inf"), [], {}, [[]], {"a": 1}, "text", *TEXTS)
GARBAGE = (b"\x00" * 40, b"\xff\xfe{}", b"[" * 10_000, b"\x89PNG", b"null", b"\n\n", b"1")
Draw = Callable[[Any], Any]


@pytest.fixture(scope="module")
def sound(deployed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The deployed run without what no report reads, and with the reason of an earlier failure."""
    folder = tmp_path_factory.mktemp("sound") / "runs" / "tiny" / "seed-0"
    shutil.copytree(deployed_run, folder, ignore=shutil.ignore_patterns("checkpoints", "*.onnx", "*.engine", "*.npz"))
    (folder / "ended.json").write_text('{"stopped": false, "told": "no space left"}')
    return folder


@pytest.mark.parametrize("name", ["figures/samples.png", "figures/mistakes.png", "summary.json", "checkpoints/x.bin"])
def test_files_outside_of_a_run_are_never_published(sound: Path, tmp_path: Path, name: str) -> None:
    """By a link, or as a picture that is none."""
    secret = tmp_path / "secret"
    secret.write_text("private")
    folder = Path(shutil.copytree(sound, tmp_path / "runs" / "tiny" / "seed-0"))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match=rf"{name}: a link that leads out of the run folder"):
        collect.read(Run(folder))
    synced = runner("sync", folder, WANDB_MODE="online", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert synced.returncode == 2
    assert f"{name}: a link that leads out" in synced.stderr
    (folder / name).unlink()
    if name.endswith(".png"):
        (folder / name).write_text("private")
        with pytest.raises(UserError, match=rf"{name}: expected a PNG file"):
            collect.read(Run(folder))
    (folder / "wandb").mkdir()
    (folder / "wandb" / "debug-core.log").symlink_to(secret)  # as W&B makes it of the second seed; nothing reads it
    if name != "summary.json" and not name.endswith(".png"):
        collect.read(Run(folder))


@pytest.mark.parametrize("name", ["wandb", "wandb/.cache"])
def test_w_and_b_writes_into_no_other_folder(sound: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "runs" / "tiny" / "seed-0"))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path)
    with pytest.raises(UserError, match=f"{name}: a link that leads out of the run folder"):
        Run(folder).check_links()


def test_what_cannot_be_read_as_a_file_is_refused(sound: Path, tmp_path: Path) -> None:
    """A pipe, a link to itself, a file larger than the memory, and folders deeper than Python's stack."""
    folder = Path(shutil.copytree(sound, tmp_path / "runs" / "tiny" / "seed-0"))
    picture = folder / "figures" / "own.png"
    os.mkfifo(picture)
    with pytest.raises(UserError, match="expected a PNG file"):
        collect.read(Run(folder))
    picture.unlink()
    picture.symlink_to(picture.name)
    with pytest.raises(UserError, match="cannot be read"):
        collect.read(Run(folder))
    picture.unlink()
    for name in ("metrics.jsonl", "run.json"):
        os.truncate(folder / name, 1 << 36)
        with pytest.raises(UserError, match="expected at most"):
            collect.read(Run(folder))
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(UserError, match="found a pipe"):
        files.read_bytes(folder / "metrics.jsonl")
    make = "for _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')"  # a path of this length cannot be given
    subprocess.run([sys.executable, "-c", f"import os\n{make}"], cwd=folder, check=True)
    for look in (Run(folder).check_links, lambda: find_runs([tmp_path])):
        with pytest.raises(UserError, match="nested too deep"):
            look()
    subprocess.run(["rm", "-r", folder / "d"], check=True)  # pytest's own removal is recursive


@pytest.fixture(scope="module")
def damaged(sound: Path) -> Path:
    """A copy of it beside it, to damage."""
    return Path(shutil.copytree(sound, sound.parent / "seed-1"))


def keys(value: Any) -> list[Any]:
    """The keys of a JSON object, or the indices of an array."""
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []


def changed(draw: Draw, text: str) -> str:
    """A JSON text with one of its values replaced or deleted, its version raised, or replaced as a whole."""
    value = json.loads(text)
    kind = draw(st.sampled_from(("replace", "delete", "root", "version")))
    if kind == "root" or not keys(value):
        return json.dumps(draw(st.sampled_from(WRONG)))
    if kind == "version" and isinstance(value, dict):
        return json.dumps(value | {"format": draw(st.sampled_from((0, 2, "2", None)))})
    parent, last = value, draw(st.sampled_from(keys(value)))
    while keys(parent[last]) and draw(st.booleans()):
        parent = parent[last]
        last = draw(st.sampled_from(keys(parent)))
    if kind == "delete":
        del parent[last]
    else:
        parent[last] = draw(st.sampled_from(WRONG))
    return json.dumps(value)


def damage(draw: Draw, content: bytes, rows: bool) -> bytes:
    """A damaged content of a JSON file; with `rows`, of a file of one JSON value a line."""
    kind = draw(st.sampled_from(("empty", "truncate", "garbage", "json", "json", "json", "json")))
    if kind == "empty":
        return b""
    if kind == "truncate":
        return content[: draw(st.integers(0, len(content)))]
    if kind == "garbage":
        return content[: draw(st.sampled_from((0, len(content) // 2)))] + draw(st.sampled_from(GARBAGE))
    if not rows:
        return changed(draw, content.decode()).encode()
    lines = content.decode().splitlines()
    index = draw(st.integers(0, len(lines) - 1))
    lines[index] = changed(draw, lines[index])
    return ("\n".join(lines) + "\n").encode()


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def check_damage(sound: Path, damaged: Path, draw: Draw) -> bool:
    """Damages a copy of a run and reads it, beside the run and without; returns whether it can still be read."""
    name = draw(st.sampled_from(FILES))
    for file in FILES:
        shutil.copy(sound / file, damaged / file)  # what an earlier example damaged
    (damaged / name).write_bytes(damage(draw, (sound / name).read_bytes(), rows=name.endswith("l")))
    if name == "ended.json":  # which is read of unfinished runs alone
        (damaged / "summary.json").unlink()
    expected = collect.read(Run(sound))
    records, unreadable = collect.read_all([Run(damaged), Run(sound)])
    assert len(records) + len(unreadable) == 2
    beside = records[-1]
    assert (beside.run, beside.config, beside.summary) == (expected.run, expected.config, expected.summary)
    assert (beside.metrics, beside.parity, beside.latency) == (expected.metrics, expected.parity, expected.latency)
    assert compare.run_row(beside).test_accuracy == expected.summary.test_accuracy
    for entry in unreadable:
        with pytest.raises(UserError):
            collect.read(Run(damaged))
        assert entry.folder == str(damaged)
        assert "\n" not in entry.reason
    html = page.render(records, unreadable)
    json.loads(re.search('type="application/json">(.*?)</script>', html)[1], parse_constant=refuse)
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    html.encode()
    markdown.render(records, unreadable).encode()
    return not unreadable


def damage_many(sound: Path, damaged: Path, examples: int) -> set[bool]:
    """Checks many damages; returns whether some were harmless, and some not."""
    outcomes = set()

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip
    @given(st.data())
    def check(data: st.DataObject) -> None:
        outcomes.add(check_damage(sound, damaged, data.draw))

    check()
    return outcomes


@pytest.mark.parametrize("examples", [30, pytest.param(1000, marks=pytest.mark.every)])
def test_a_damaged_file_hides_no_other_run(
    sound: Path, damaged: Path, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plotly.offline.get_plotlyjs", str)  # most of a page, and the same in all
    assert damage_many(sound, damaged, examples) == {True, False}


@pytest.fixture
def own(sound: Path, tmp_path: Path) -> Run:
    """A copy of the run for one test."""
    return Run(Path(shutil.copytree(sound, tmp_path / "runs" / "tiny" / "seed-0")))


def test_numbers_that_are_not_finite_are_missing(own: Run) -> None:
    own.summary.write_text(re.sub(r'"test_loss": [\d.]+', '"test_loss": NaN', own.summary.read_text()))
    lines = own.metrics.read_text().splitlines()
    lines[0] = re.sub(r'"train/loss":[\d.]+', '"train/loss":-Infinity', lines[0])
    own.metrics.write_text("\n".join(lines) + "\n")
    record = collect.read(own)
    assert record.summary.test_loss is None
    assert [row.train_loss is None for row in record.metrics] == [
        True,
        *[row.train_loss is None for row in record.metrics[1:]],
    ]
    assert len(record.metrics) == len(lines)
    own.summary.write_text(re.sub(r'"test_accuracy": [\d.]+', '"test_accuracy": NaN', own.summary.read_text()))
    with pytest.raises(UserError, match=r"summary\.json: damaged.*test_accuracy"):
        collect.read(own)


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("run.json", ["macs"], 10**400, "$.macs"),
        ("run.json", ["overrides"], {"recipe.epochs": ["ten", 2]}, "Expected `int`, got `str`"),
        ("summary.json", ["test_accuracy"], 1.5, "$.test_accuracy"),
        ("summary.json", ["confusion"], [[1]], "summary.json: confusion: expected 10 × 10 counts"),
        ("figures/mistakes.json", ["mistakes", 0, "label"], 10, "expected one of 10 classes, found 10"),
        ("deploy/latency.json", ["rows", 0, "p50_ms"], -1.0, "$.rows[0].p50_ms"),
        ("deploy/parity.json", ["rows", 0, "agreement"], "all", "$.rows[0].agreement"),
    ],
)
def test_a_value_that_no_page_can_show_is_refused(
    own: Run, name: str, path: list[Any], value: Any, message: str
) -> None:
    content = json.loads((own.folder / name).read_text())
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    (own.folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError) as refused:
        collect.read(own)
    assert message in str(refused.value)


@settings(max_examples=30)
@given(st.recursive(st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_no_file_of_ours_holds_a_number_that_json_lacks(value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "file.json", {"value": value})
        json.loads((Path(folder) / "file.json").read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize(
    "line", ['{"global_step": 9, "train/loss": 1.0}', '{"global_step": 9, "epoch": NaN}', "text", ""]
)
def test_a_damaged_row_of_metrics_is_no_end(own: Run, line: str) -> None:
    rows = own.metrics.read_text()
    own.metrics.write_text(rows + line)
    complete = len(read_metrics(own))
    assert complete == len(rows.splitlines())  # a last line without an end was cut short
    own.metrics.write_text(f"{line}\n{rows}")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1: damaged"):
        read_metrics(own)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("summary.json", "{}", "summary.json: damaged, or written by another version (Object missing required field"),
        ("summary.json", "text", "summary.json: damaged"),
        ("run.json", '{"format": 2, "renamed": 1}', "run.json: expected format 1, found 2; use the version that wrote"),
        ("run.json", '{"source": ' + "[" * 10_000, "run.json: damaged, or written by another version (nested too"),
    ],
)
def test_one_damaged_run_is_refused_in_one_line(
    own: Run, name: str, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (own.folder / name).write_text(text)
    page_file = own.folder / "report.html"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(own.folder), "--out", str(page_file)])
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert message in captured.err
    assert not page_file.exists()


@pytest.mark.parametrize("kind", [CheckpointManifest, EngineSidecar])
def test_json_that_is_nested_too_deep_is_damaged(kind: type, tmp_path: Path) -> None:
    """Also in a key that no command reads."""
    (tmp_path / "file.json").write_text('{"more": ' + "[" * 10_000)
    with pytest.raises(UserError, match=r"file\.json: damaged, or written by another version"):
        read_json(tmp_path / "file.json", kind)


def test_a_folder_need_not_have_a_unicode_name(own: Run, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"not-\xff-unicode")
    for name in ("one", "two"):
        shutil.copytree(own.folder, folder / name)
    (folder / "two" / "summary.json").write_text("{}")
    records, unreadable = collect.read_all(find_runs([tmp_path]))
    assert (len(records), len(unreadable)) == (2, 1)
    assert "not-\\udcff-unicode" in unreadable[0].folder
    page.write(records, tmp_path / "report.html", unreadable)
    assert "not-\\udcff-unicode" in markdown.render(records, unreadable)
    msgspec.json.encode(compare.outcomes(records))


COMMANDS = (
    "show RUN", "sync RUN", "eval RUN TINY --device cpu", "export RUN TINY", "parity RUN TINY --device cpu",
    "engine RUN", "bench RUN TINY --device cpu --seconds 0.01 --repeats 1", "predict RUN PICTURE",
    "train tiny TINY --data DATA --runs RUNS --device cpu --resume auto",
)  # fmt: skip
BEFORE_UPLOADS = ("run.json", "summary.json")  # what `runner sync` reads before it reaches for W&B
QUICK = ("show", "sync")
DAMAGED = [
    pytest.param(command, name, id=f"{command.split()[0]}-{name}", marks=[] if quick else pytest.mark.every)
    for command in COMMANDS
    for name in (*FILES, "checkpoints/step-16/manifest.json", "deploy/model.fp32.onnx")
    if not command.startswith("sync") or name in BEFORE_UPLOADS
    for quick in [command.startswith(QUICK) and name in ("run.json", "summary.json", "metrics.jsonl")]
]


def with_damage(content: bytes, seed: str) -> bytes:
    """A file damaged in one of six ways, chosen by a text: emptied, truncated, of another type, version or content."""
    not_finite = content.replace(b": 0", b": NaN", 3)
    changes = (b"", content[: len(content) // 2], b"[1]", b'{"format": 99}', not_finite, b"\xff\xfe{}")
    return changes[zlib.crc32(seed.encode()) % len(changes)]


@pytest.mark.parametrize(("command", "name"), DAMAGED)
def test_no_command_ends_in_a_traceback(
    deployed_run: Path, small_data: Path, tmp_path: Path, command: str, name: str
) -> None:
    """It succeeds where it does not need the file, or ends in one line that names it.

    `bench` ends with 1 after it has measured what does not need the file.
    """
    run = Path(shutil.copytree(deployed_run, tmp_path / "tiny" / "seed-0"))
    content = (run / name).read_bytes() if (run / name).exists() else b'{"stopped": true}'
    (run / name).write_bytes(with_damage(content, command + name))
    places = {"RUN": run, "RUNS": tmp_path, "DATA": small_data, "PICTURE": tmp_path / "x.png"}
    Image.new("RGB", (32, 32)).save(places["PICTURE"])
    words = command.replace("TINY", " ".join(TINY)).split()
    done = runner(*(places.get(word, word) for word in words), WANDB_API_KEY="0" * 40)
    assert done.returncode in ((0, 1, 2) if command.startswith("bench") else (0, 2)), done.stderr
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("runner: ")]
        resumed = command.startswith("train")  # also says of each damaged checkpoint that it is skipped
        assert len(lines) == 1 or (resumed and len(lines) == 2)
        assert any(Path(name).name in line or "first: runner export" in line for line in lines)
