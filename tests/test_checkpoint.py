import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from runner.common.errors import UserError
from runner.common.files import write
from runner.config.recipe import Architecture
from runner.run.folder import Run
from runner.training import checkpoint
from tests.support.configs import config_of, trusted
from tests.support.models.tiny import Tiny
from tests.support.processes import ROOT, python


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = trusted(tmp_path / "run")
    architecture = Architecture("tests.support.models.tiny:Tiny", {"norm": True})
    write(run.record, config_of(architecture=architecture, dataset="synthetic-10"))
    return run


def test_loaded_weights_and_buffers_are_bit_identical(run: Run) -> None:
    model = Tiny(norm=True).to(memory_format=torch.channels_last)
    model(torch.randn(8, 3, 32, 32))  # updates the statistics of batch norm
    checkpoint.save(run, model.state_dict(), 5)
    before = torch.get_rng_state()
    loaded = checkpoint.load_model(run)
    assert torch.equal(before, torch.get_rng_state())
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_a_failure_waits_for_the_pending_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def slow(handle: int) -> None:
        time.sleep(0.2)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", slow)
    with contextlib.suppress(ZeroDivisionError), checkpoint.CheckpointWriter(run) as writer:
        writer.save(Tiny(norm=True).state_dict(), 8)
        raise ZeroDivisionError
    assert checkpoint.latest(run).name == "step-8"


def test_a_checkpoint_that_cannot_be_removed_is_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where a file that another process has open stays; the new checkpoint is complete."""
    for step in (1, 2):
        checkpoint.save(run, Tiny(norm=True).state_dict(), step)

    def busy(path: Path, **_: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else busy(path))
    checkpoint.save(run, Tiny(norm=True).state_dict(), 3)
    assert checkpoint.latest(run).name == "step-3"
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [".step-1.removed", "step-2", "step-3"]
    monkeypatch.undo()
    checkpoint.save(run, Tiny(norm=True).state_dict(), 4)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-3", "step-4"]


def test_weights_and_manifest_name_the_dataset(run: Run) -> None:
    folder = checkpoint.save(run, Tiny(norm=True).state_dict(), 1)
    with safe_open(folder / checkpoint.WEIGHTS, "pt") as file:
        assert file.metadata() == {"dataset": "synthetic-10"}
    assert json.loads((folder / checkpoint.MANIFEST).read_text())["dataset"] == "synthetic-10"


def test_the_latest_checkpoint_has_the_highest_step(run: Run) -> None:
    for step in (9, 100):
        folder = run.checkpoints / f"step-{step}"
        folder.mkdir(parents=True)
    os.utime(run.checkpoints / "step-9", (2e9, 2e9))
    (run.checkpoints / ".step-999.writing").mkdir()
    assert checkpoint.latest(run).name == "step-100"


def test_older_checkpoints_are_removed(run: Run) -> None:
    """All but the previous one, which is removed at the end of the run; later steps of an abandoned future too."""

    def names() -> list[str]:
        return sorted(path.name for path in run.checkpoints.iterdir())

    for step in (1, 2, 3):
        checkpoint.save(run, Tiny(norm=True).state_dict(), step)
    assert names() == ["step-2", "step-3"]
    checkpoint.save(run, Tiny(norm=True).state_dict(), 2)  # step-3 was damaged, and training resumed earlier
    assert names() == ["step-2"]
    checkpoint.save(run, Tiny(norm=True).state_dict(), 4)
    checkpoint.keep_last(run)
    assert names() == ["step-4"]


def test_a_failed_save_keeps_the_previous_checkpoint(run: Run) -> None:
    """A resource limit prevents files of more than a few hundred bytes."""
    checkpoint.save(run, Tiny(norm=True).state_dict(), 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save(run, Tiny(norm=True).state_dict(), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.latest(run).name == "step-1"
    checkpoint.load_model(run)


def test_a_damaged_file_is_named(run: Run) -> None:
    folder = checkpoint.save(run, Tiny(norm=True).state_dict(), 1)
    path = folder / checkpoint.WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        checkpoint.load_model(run)


def test_a_run_without_checkpoints_is_refused(run: Run) -> None:
    with pytest.raises(UserError, match="expected a checkpoint"):
        checkpoint.load_model(run)


@pytest.mark.parametrize("kind", ["a new step", "replace"])
def test_an_intact_checkpoint_survives_a_kill_at_any_write(kind: str, tmp_path: Path) -> None:
    """Kills a process before every write, sync, rename and removal of a save, one at a time."""
    library = tmp_path / "killer.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", library, ROOT / "tests/support/programs/killer.c", "-ldl"], check=True
    )
    done = python(
        "-m", "tests.support.programs.killed_saves", tmp_path / "work", *(["replace"] if kind == "replace" else []),
        LD_PRELOAD=str(library),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["changes"] > 12, done.stdout
    assert result["lost"] == []
    assert result["left"] == []
