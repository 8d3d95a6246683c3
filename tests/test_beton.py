import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import beton, manifest
from data_prep.console import UserError
from data_prep.sources import Source
from data_prep.verify import decode, verify
from runner.batches import beton as reader


def test_prepare_writes_the_same_bytes_again(small: Source, small_data: Path, tmp_path: Path) -> None:
    again = beton.write(small, tmp_path / "again")
    assert again == manifest.read(small_data)
    assert again.splits["train"].images == 500
    assert again.splits["test"].images_per_class == (20,) * 10


def test_moments_are_exact(small: Source, small_data: Path) -> None:
    pixels = small.train.images.reshape(-1, 3).astype(np.float64)
    prepared = manifest.read(small_data)
    np.testing.assert_allclose(prepared.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(prepared.std, pixels.std(axis=0), rtol=1e-12)


def test_verify_against_the_source(small: Source, small_data: Path) -> None:
    assert verify(small_data, small).name == small.name


def test_verify_names_a_record_that_differs(small: Source, small_data: Path) -> None:
    images = small.test.images.copy()
    images[17, 3, 4, 1] ^= 1
    other = Source(small.name, small.classes, small.train, type(small.test)(images, small.test.labels), {})
    with pytest.raises(UserError, match=r"test.beton: 1 records differ, first record 17"):
        verify(small_data, other)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("where", [0, 3, 5_000, -1])
def test_a_flipped_byte_is_named(own_data: Path, split: str, where: int) -> None:
    path = own_data / f"{split}.beton"
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{split}.beton: damaged: expected SHA-256"):
        manifest.check_files(own_data, manifest.read(own_data))


def test_a_cut_file_is_named(own_data: Path) -> None:
    path = own_data / "test.beton"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"test.beton: expected \d+ bytes"):
        verify(own_data)


def test_our_reader_sees_what_ffcv_decodes(small: Source, small_data: Path) -> None:
    prepared = manifest.read(small_data)
    for split in ("train", "test"):
        path = small_data / f"{split}.beton"
        images, labels = reader.read(path, prepared.splits[split], prepared)
        decoded = decode(path, prepared)
        np.testing.assert_array_equal(images, decoded.images)
        np.testing.assert_array_equal(labels, decoded.labels)
        np.testing.assert_array_equal(images, getattr(small, split).images)


def test_the_reader_crosses_pages(source: Source, data: Path) -> None:
    """50,000 images lie on 19 pages."""
    prepared = manifest.read(data)
    images, labels = reader.read(data / "train.beton", prepared.splits["train"], prepared)
    np.testing.assert_array_equal(images, source.train.images)
    np.testing.assert_array_equal(labels, source.train.labels)


def test_another_dataset_is_not_overwritten(small: Source, own_data: Path) -> None:
    other = Source("other", small.classes, small.test, small.test, {"kind": "other"})
    before = (own_data / "dataset.json").read_text()
    with pytest.raises(UserError, match="holds"):
        beton.write(other, own_data)
    assert (own_data / "dataset.json").read_text() == before
    assert beton.write(other, own_data, overwrite=True).name == "other"
    verify(own_data, other)


def test_foreign_files_are_left_alone(small: Source, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="expected a new or empty folder"):
            beton.write(small, tmp_path, overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failing_writer_leaves_nothing(small: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(work: list) -> None:
        work[0][0].write_bytes(b"half a file")
        raise SystemExit(3)

    monkeypatch.setattr(beton, "_write_betons", fail)
    with pytest.raises(UserError, match="failed with exit code 3"):
        beton.write(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


def test_a_hung_writer_is_ended(small: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(work: list) -> None:
        import os

        os.setpgid(0, 0)
        time.sleep(600)

    monkeypatch.setattr(beton, "_write_betons", hang)
    monkeypatch.setattr(beton, "STALL_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(UserError, match="hung"):
        beton.write(small, tmp_path / "out")
    assert time.monotonic() - began < 20
    assert multiprocessing.active_children() == []


def test_a_full_disk_is_said_before_anything_is_written(small: Source, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(beton.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="make room"):
        beton.write(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _write(source: Source, out: Path, queue: multiprocessing.Queue) -> None:
    queue.put(beton.write(source, out).fingerprint)


def test_two_at_once_take_turns(small: Source, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    both = [fork.Process(target=_write, args=(small, tmp_path / "out", queue)) for _ in range(2)]
    for process in both:
        process.start()
    assert queue.get(timeout=120) == queue.get(timeout=120)
    for process in both:
        process.join()
    verify(tmp_path / "out", small)
