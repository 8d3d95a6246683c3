import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from data_prep.console import UserError
from runner import checkpoint
from runner.runs import Run, write_json
from tests.conftest import ROOT, python
from tests.tiny import Tiny


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    architecture = {"factory": "tests.tiny:Tiny", "arguments": {"norm": True}}
    write_json(run.record, {"architecture": architecture, "dataset": {"name": "synthetic-10"}})
    return run


def test_weights_and_buffers_come_back_to_the_bit(run: Run) -> None:
    model = Tiny(norm=True).to(memory_format=torch.channels_last)
    model(torch.randn(8, 3, 32, 32))  # moves the statistics of batch norm
    checkpoint.save(run, model.state_dict(), 5)
    before = torch.get_rng_state()
    loaded = checkpoint.load_model(run)
    assert torch.equal(before, torch.get_rng_state())
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_what_they_were_trained_on_goes_with_them(run: Run) -> None:
    folder = checkpoint.save(run, Tiny(norm=True).state_dict(), 1)
    with safe_open(folder / checkpoint.WEIGHTS, "pt") as file:
        assert file.metadata() == {"dataset": "synthetic-10"}
    assert json.loads((folder / checkpoint.MANIFEST).read_text())["dataset"] == "synthetic-10"


def test_the_newest_is_the_one_of_the_highest_step(run: Run) -> None:
    for step in (9, 100):
        folder = run.checkpoints / f"step-{step}"
        folder.mkdir(parents=True)
    os.utime(run.checkpoints / "step-9", (2e9, 2e9))
    (run.checkpoints / ".step-999.writing").mkdir()
    assert checkpoint.latest(run).name == "step-100"


def test_older_ones_go_when_a_newer_is_whole(run: Run) -> None:
    """But for the one before it, which goes when the run has ended; and those of a future that is not lived."""

    def left() -> list[str]:
        return sorted(path.name for path in run.checkpoints.iterdir())

    for step in (1, 2, 3):
        checkpoint.save(run, Tiny(norm=True).state_dict(), step)
    assert left() == ["step-2", "step-3"]
    checkpoint.save(run, Tiny(norm=True).state_dict(), 2)  # step-3 was damaged, and training went on from before
    assert left() == ["step-2"]
    checkpoint.save(run, Tiny(norm=True).state_dict(), 4)
    checkpoint.keep_last(run)
    assert left() == ["step-4"]


def test_a_failed_save_keeps_the_old_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(run, Tiny(norm=True).state_dict(), 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(run, Tiny(norm=True).state_dict(), 2)
    assert checkpoint.latest(run).name == "step-1"
    checkpoint.load_model(run)


def test_a_damaged_one_is_named(run: Run) -> None:
    folder = checkpoint.save(run, Tiny(norm=True).state_dict(), 1)
    path = folder / checkpoint.WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        checkpoint.load_model(run)


def test_none(run: Run) -> None:
    with pytest.raises(UserError, match="expected a checkpoint"):
        checkpoint.load_model(run)


@pytest.mark.parametrize("kind", ["a new step", "replace"])
def test_killed_at_any_write_a_whole_one_is_found(kind: str, tmp_path: Path) -> None:
    """Every write, sync, rename and removal of a save is enumerated, and a process killed just before it."""
    library = tmp_path / "killer.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, ROOT / "tests/killer.c", "-ldl"], check=True)
    done = python(
        "-m", "tests.killed_saves", tmp_path / "work", *(["replace"] if kind == "replace" else []),
        LD_PRELOAD=str(library),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["changes"] > 12, done.stdout
    assert found["lost"] == []
    assert found["left"] == []
