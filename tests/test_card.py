"""The model card of a run."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import onnxruntime
import pytest

from runner import cli
from runner.common.errors import UserError
from runner.common.files import write_json
from runner.run.folder import Run
from runner.run.schema import Export
from tests.support import many_runs


def card_of(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    cli.parse(["card", str(run), *options])({})
    return capsys.readouterr().out


def cells(card: str, first: str) -> list[str]:
    """The other cells of the row that begins with `first`."""
    (row,) = (line for line in card.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.split("|")[2:-1]]


def test_the_card_of_a_deployed_run(deployed_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = card_of(deployed_run, capsys, "--license", "Apache-2.0")
    summary, config = Run(deployed_run).read_summary(), Run(deployed_run).config()
    assert summary is not None
    assert cells(card, "license") == ["Apache-2.0"]
    assert cells(card, "fingerprint") == [f"`{config.dataset.fingerprint}`"]
    assert cells(card, f"test accuracy, {summary.test_images} images") == [f"{100 * summary.test_accuracy:.2f}%"]
    assert cells(card, "`deploy/model.fp32.onnx`")[-1] == "passed"
    assert "## Latency" in card
    for index, name in enumerate(config.dataset.classes):
        images, recall, *_ = cells(card, name.replace("_", "\\_"))
        row = summary.confusion[index]
        assert images == str(sum(row))
        assert recall == f"{row[index] / sum(row):.1%}"


def test_a_file_that_was_exported_again_has_not_passed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    report = run.read_parity()
    assert report is not None
    names = {Path(row.onnx).name for row in report.rows}
    write_json(run.exports, {name: Export(sha256="0" * 64, weights="0" * 64) for name in names})
    card = card_of(run.folder, capsys)
    assert "None has been compared with the model" in card
    assert "onnxruntime |" not in card.split("## Use")[0], "latencies of files that are gone"
    assert "Export a file first" in card


def test_a_failed_gate_is_not_an_export_that_is_missing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    report = run.read_parity()
    failed = [msgspec.structs.replace(row, passed=False) for row in report.rows]
    write_json(run.parity, msgspec.structs.replace(report, rows=failed))
    assert "## Use\n\nNo file for onnxruntime has passed the gate." in card_of(run.folder, capsys)


def test_the_code_of_the_card_runs(deployed_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", card_of(deployed_run, capsys), re.S)
    names: dict[str, Any] = {}
    exec(program, names)
    assert isinstance(names["session"], onnxruntime.InferenceSession)
    assert names["logits"].shape == (1, 10)


def test_the_epoch_of_the_accuracy_is_stated(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert "The accuracy is that after the last epoch, computed in " in card_of(run.folder, capsys)
    config = run.config()
    recipe = dataclasses.replace(config.recipe, validation=50, patience=2)
    write_json(run.run_json, msgspec.structs.replace(config, recipe=recipe))
    write_json(run.summary, msgspec.structs.replace(run.read_summary(), best_epoch=3.0))
    assert "after epoch 3, the best on validation images, computed in " in card_of(run.folder, capsys)


def test_the_code_is_for_an_onnx_file(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Not for a package of AOTInductor, which onnxruntime cannot load."""
    report = run.read_parity()
    package = msgspec.structs.replace(
        report.rows[0], backend="aotinductor", onnx="deploy/model.fp32.cpu.pt2", provider="torch cpu", passed=True
    )
    write_json(run.parity, msgspec.structs.replace(report, rows=[package]))
    assert "## Use\n\nExport a file first" in card_of(run.folder, capsys)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run of podeti-grid with every file, written without training."""
    many_runs.write(tmp_path, 1)
    (record,) = tmp_path.rglob("run.json")
    return Run(record.parent)


def test_limits_are_stated(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    summary, parity = run.read_summary(), run.read_parity()
    assert summary is not None
    assert parity is not None
    confusion = [list(row) for row in summary.confusion]
    confusion[3] = [0, 0, 0, 40, 0, 59, 0, 0, 0, 0]
    write_json(run.summary, msgspec.structs.replace(summary, epochs=1.0, confusion=confusion, validation_accuracy=None))
    failed = [msgspec.structs.replace(row, passed=False) for row in parity.rows]
    write_json(run.parity, msgspec.structs.replace(parity, rows=failed))
    card = card_of(run.folder, capsys)
    classes = run.config().dataset.classes
    for limit in (
        f"It was trained for 1 epoch; its registered recipe has {run.config().recipe.epochs}.",
        "No validation images were held out",
        f"The lowest recall is 40.4%, of {classes[3]}.",
        f"Fewer than 100 test images: {classes[3]}.",
        f"Not to be used, because the gate failed: {', '.join(dict.fromkeys(row.precision for row in failed))}.",
    ):
        assert f"- {limit}" in card
    assert cells(card, classes[3])[-1] == f"{classes[5]} (59.6%)"
    assert "```python" not in card  # nothing passed the gate
    assert cells(card, "license") == ["not stated"]


def test_text_of_a_run_is_escaped(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config = run.config()
    dataset = msgspec.structs.replace(
        config.dataset, name="a|b\n# Title", classes=["<script>", *config.dataset.classes[1:]], source={"k|": "`x`"}
    )
    write_json(run.run_json, msgspec.structs.replace(config, dataset=dataset))
    card = card_of(run.folder, capsys)
    assert "<script>" not in card
    assert "\n# Title" not in card
    assert "a\\|b # Title" in card
    for rows in re.findall(r"(?:^\|.*\n)+", card, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()}) == 1, rows


def test_it_is_written_to_a_file_or_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "CARD.md"
    printed = card_of(run.folder, capsys)
    assert card_of(run.folder, capsys, "--out", str(out)) == f"{out}\n"
    assert out.read_text() == printed
    with pytest.raises(UserError, match="expected a file, found a folder"):
        card_of(run.folder, capsys, "--out", str(tmp_path))
    unfinished = Run(Path(shutil.copytree(run.folder, tmp_path / "unfinished")))
    unfinished.summary.unlink()
    with pytest.raises(UserError, match="crashed; a card needs a finished run"):
        card_of(unfinished.folder, capsys)
