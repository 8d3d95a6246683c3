import contextlib
import errno
import json
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open

from runner.common import files
from runner.common.errors import UserError
from runner.common.files import read_json, sha256_of, write_json
from runner.config.recipe import Architecture
from runner.run.folder import MANIFEST, WEIGHTS, Run
from runner.run.schema import CheckpointManifest
from runner.training import checkpoint
from tests.support.configs import config_of, trusted
from tests.support.models.tiny import Tiny
from tests.support.processes import ROOT, python


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = trusted(tmp_path / "run")
    architecture = Architecture("tests.support.models.tiny:Tiny", {"norm": True})
    write_json(run.run_json, config_of(architecture=architecture, dataset="synthetic-10"))
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


@pytest.mark.parametrize(
    ("error", "reason", "remedy"),
    [
        (OSError(errno.ENOSPC, "x"), "no space left on the disk", "make room, then resume"),
        (OSError(errno.EROFS, "read-only file system"), "read-only file system", "resume"),
        (RuntimeError("no tensor"), "no tensor", "resume"),
    ],
)
def test_a_failed_write_is_reported_by_the_next_wait(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str, remedy: str
) -> None:
    """Once, with what is left; and in place of no other error."""

    def fail(staging: Path, *_: object) -> None:
        staging.rmdir()  # cannot be removed any more
        raise error

    def divide(writer: checkpoint.CheckpointWriter) -> None:
        writer.save({}, 8)
        raise ZeroDivisionError

    for step in (5, 7):
        checkpoint.save(run, {}, step)
    monkeypatch.setattr(checkpoint, "_write_files", fail)
    for previous in ("step-7 stays", "step-7 stays", "there is no earlier one"):
        message = f"{run.checkpoints}: cannot write a checkpoint ({reason}); {previous}; {remedy} with --resume auto"
        writer = checkpoint.CheckpointWriter(run)
        with pytest.raises(checkpoint.CheckpointError, match=f"^{re.escape(message)}$"), writer:
            writer.save({}, 8)
        writer.wait()
        writer.save({}, 8)
        with pytest.raises(checkpoint.CheckpointError):
            writer.save({}, 9)
        with pytest.raises(ZeroDivisionError), checkpoint.CheckpointWriter(run) as writer:
            divide(writer)
        for folder in sorted(run.checkpoints.iterdir())[:1]:
            shutil.rmtree(folder)
    assert list(run.checkpoints.iterdir()) == []


def test_only_whole_checkpoints_of_a_step_count(run: Run) -> None:
    """A checkpoint of weights alone has no state to resume from; other files are left alone."""
    assert checkpoint.newest_intact(run) == (None, [])
    checkpoint.remove_others(run, 1)  # before there are any
    weights = Tiny(norm=True).state_dict()
    first, second = checkpoint.save(run, weights, 9, {"step": 9}), checkpoint.save(run, weights, 10)
    assert [path.name for path in sorted(first.iterdir())] == ["manifest.json", "model.safetensors", "state.pt"]
    assert [path.name for path in sorted(second.iterdir())] == ["manifest.json", "model.safetensors"]
    content = (second / MANIFEST).read_bytes()
    manifest = read_json(second / MANIFEST, CheckpointManifest)
    assert manifest.step == 10
    write_json(second / MANIFEST, manifest)
    assert (second / MANIFEST).read_bytes() == content  # formatted like other files
    assert checkpoint.read_state(first) == {"step": 9, "run_config": run.run_json.read_text()}
    assert checkpoint.newest_intact(run) == (first, [f"{second}: expected state.pt to resume from, found only weights"])
    with pytest.raises(UserError, match=r"expected a checkpoint with manifest\.json, found none"):
        checkpoint.read_state(run.folder)
    assert [checkpoint.is_newest(run, folder) for folder in (first, second, second / ".." / "step-10")] == [
        False,
        True,
        True,
    ]
    (run.checkpoints / "notes").mkdir()
    (run.checkpoints / ".step-9.replaced").mkdir()  # step-9 is there
    (run.checkpoints / ".step-x.replaced").mkdir()
    assert checkpoint.newest_intact(run)[0] == first
    (run.checkpoints / "step-9").rename(run.checkpoints / ".step-8.replaced")
    assert checkpoint.newest_intact(run)[0] == run.checkpoints / "step-8"
    checkpoint.remove_others(run)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["notes", "step-10"]
    assert checkpoint.is_newest(run, second)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_checkpoint_that_cannot_be_read_may_be_intact(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that without another one the run does not start over; errors of a file server name no file."""
    failing: list[Path] = []
    opened = Path.open

    def open_or_fail(path: Path, *arguments: Any, **options: Any) -> Any:
        if path in failing:
            raise OSError(errno.ESTALE, "Stale file handle")
        return opened(path, *arguments, **options)

    def message_about(folder: Path) -> str:
        return f"{folder / name}: cannot be read (Stale file handle); repeat the command"

    monkeypatch.setattr(files, "RETRY_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(Path, "open", open_or_fail)
    older, newer = (checkpoint.save(run, Tiny(norm=True).state_dict(), step, {"step": step}) for step in (1, 2))
    failing[:] = [newer / name]
    assert checkpoint.newest_intact(run) == (older, [message_about(newer)])
    failing[:] = [newer / name, older / name]
    with pytest.raises(UserError, match=re.escape(message_about(newer))):
        checkpoint.newest_intact(run)
    failing[:] = [older / name]
    (newer / checkpoint.STATE).write_bytes(b"")
    with pytest.raises(UserError, match=re.escape(message_about(older))):
        checkpoint.newest_intact(run)


def test_another_rank_waits_until_it_sees_the_checkpoint(run: Run) -> None:
    folder = checkpoint.save(run, Tiny(norm=True).state_dict(), 3, {"step": 3})
    chosen = checkpoint.verify_resumable(folder)
    hidden = folder.rename(run.checkpoints / ".hidden")
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(checkpoint.wait_for_state, folder, chosen, 100.0)
        time.sleep(0.1)
        checkpoint.save(run, Tiny(norm=True).state_dict(), 3, {"step": 2})  # not the one that the first rank sees
        time.sleep(0.4)
        assert not waiting.done()
        shutil.rmtree(folder)
        hidden.rename(folder)
        assert waiting.result()["step"] == 3
    with pytest.raises(UserError, match=f"after 0.1 s: .*expected SHA-256 other, as on rank 0, found {chosen}"):
        checkpoint.wait_for_state(folder, "other", 0.1)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"after 0 s: .*found none"):
        checkpoint.wait_for_state(folder, chosen, 0.0)


class Payload:
    """An object that would run code where it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("damage", [lambda path: torch.save(Payload(), path), lambda path: os.truncate(path, 300)])
def test_a_state_that_torch_cannot_read_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    """Although its hash is right: the files are written by others."""
    monkeypatch.chdir(run.folder)
    folder = checkpoint.save(run, {}, 1, {"step": 1})
    damage(folder / checkpoint.STATE)
    manifest = read_json(folder / MANIFEST, CheckpointManifest)
    hashes = manifest.sha256 | {checkpoint.STATE: sha256_of(folder / checkpoint.STATE)}
    write_json(folder / MANIFEST, msgspec.structs.replace(manifest, sha256=hashes))
    with pytest.raises(UserError, match=f"^{re.escape(str(folder / checkpoint.STATE))}: cannot be read: "):
        checkpoint.read_state(folder)
    assert not (run.folder / "unpickled").exists()


@pytest.mark.parametrize("listed", [[], ["state.pt"], ["model.safetensors", "other"]])
def test_a_manifest_lists_each_file(run: Run, listed: list[str]) -> None:
    folder = checkpoint.save(run, Tiny(norm=True).state_dict(), 1, {"step": 1})
    manifest = read_json(folder / MANIFEST, CheckpointManifest)
    hashes = {name: manifest.sha256.get(name, "0") for name in listed}
    write_json(folder / MANIFEST, msgspec.structs.replace(manifest, sha256=hashes))
    with pytest.raises(
        UserError, match=r"damaged: expected (a SHA-256 of each file|SHA-256 0, found no such file); train"
    ):
        (checkpoint.verify_resumable(folder), checkpoint.load_model(run))


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
    checkpoint.save(run, Tiny(norm=True).state_dict(), 4)  # still busy: its name stays
    names = [".step-1.removed", ".step-2.removed", "step-3", "step-4"]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == names
    monkeypatch.undo()
    checkpoint.save(run, Tiny(norm=True).state_dict(), 5)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-4", "step-5"]


def test_a_mistake_in_the_program_is_no_failed_write(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("of the program")

    monkeypatch.setattr(checkpoint, "_write_files", fail)
    with pytest.raises(TypeError, match="of the program"), checkpoint.CheckpointWriter(run) as writer:
        writer.save({}, 1)


def test_weights_and_manifest_name_the_dataset(run: Run) -> None:
    folder = checkpoint.save(run, Tiny(norm=True).state_dict(), 1)
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {"dataset": "synthetic-10"}
    assert json.loads((folder / MANIFEST).read_text())["dataset"] == "synthetic-10"


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
    checkpoint.remove_others(run)
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
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        checkpoint.load_model(run)


def test_a_damaged_state_matters_only_to_resuming(run: Run) -> None:
    folder = checkpoint.save(run, Tiny(norm=True).state_dict(), 1, {"step": 1})
    with (folder / checkpoint.STATE).open("ab") as file:
        file.write(b"x")
    found, damaged = checkpoint.newest_intact(run)
    assert found is None
    assert len(damaged) == 1
    assert damaged[0].startswith(f"{folder / checkpoint.STATE}: damaged: expected SHA-256 ")
    checkpoint.load_model(run)


def test_a_run_without_checkpoints_is_refused(run: Run) -> None:
    with pytest.raises(UserError, match="expected a checkpoint"):
        checkpoint.load_model(run)


@pytest.mark.parametrize("kind", ["replace", pytest.param("a new step", marks=pytest.mark.every)])
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
