import contextlib
import hashlib
import io
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import beton, jpeg, manifest
from data_prep import beton_reader as reader
from data_prep.sources import Source, Split
from data_prep.verify import verify
from runner.common.errors import UserError
from tests.support.processes import TINY, descendants_of, gone, python, wait_until


def decoded_by_ffcv(path: Path) -> Split:
    """Every record of a .beton file in file order."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    threads = torch.get_num_threads()
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(
        str(path), batch_size=100, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=pipelines
    )
    batches = [(np.array(images), np.array(labels).reshape(-1)) for images, labels in loader]
    torch.set_num_threads(threads)  # ffcv changes it
    return Split(*map(np.concatenate, zip(*batches, strict=True)))


def test_prepare_is_reproducible(small: Source, small_data: Path, tmp_path: Path) -> None:
    again = beton.write(small, tmp_path / "again")
    assert again == manifest.read(small_data)
    assert again.splits["train"].images == 500
    assert again.splits["test"].images_per_class == (20,) * 10


def test_mean_and_std_are_exact(small: Source, small_data: Path) -> None:
    pixels = small.train.images.reshape(-1, 3).astype(np.float64)
    prepared = manifest.read(small_data)
    np.testing.assert_allclose(prepared.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(prepared.std, pixels.std(axis=0), rtol=1e-12)


@pytest.mark.images
def test_verify_against_the_source(small: Source, small_data: Path) -> None:
    assert verify(small_data, small).name == small.name


def test_verify_names_a_record_that_differs(small: Source, small_data: Path) -> None:
    images = small.test.images.copy()
    images[17, 3, 4, 1] ^= 1
    other = replace(small, test=Split(images, small.test.labels))
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


def test_a_truncated_file_is_named(own_data: Path) -> None:
    path = own_data / "test.beton"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"test.beton: expected \d+ bytes"):
        verify(own_data)


RECORDS = ["small_data", "jpeg_data"]  # fixtures


@pytest.mark.parametrize("records", RECORDS)
def test_the_reader_matches_ffcvs_decoder(small: Source, records: str, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue(records)
    prepared = manifest.read(data)
    for split in ("train", "test"):
        path = data / f"{split}.beton"
        images, labels = reader.read_split(path, prepared.splits[split], prepared)
        decoded = decoded_by_ffcv(path)
        np.testing.assert_array_equal(images, decoded.images)
        np.testing.assert_array_equal(labels, decoded.labels)
        some = reader.read_images(path, prepared.splits[split], prepared, np.array([7, 3, 7]))
        np.testing.assert_array_equal(some, images[[7, 3, 7]])
        difference = np.abs(images.astype(int) - getattr(small, split).images).mean()
        assert 0 < difference < 25 if records == "jpeg_data" else difference == 0  # JPEG blurs colors of small images
        if split == "train":  # the statistics are those of the pixels that training sees
            np.testing.assert_allclose(prepared.mean, images.mean((0, 1, 2)), rtol=1e-12)
            np.testing.assert_allclose(prepared.std, images.std((0, 1, 2)), rtol=1e-9)


def crafted(path: Path, **changes: object) -> None:
    """Changes a field of the header, of the table (`row_`) or of the allocations (`allocation_`), of its first row."""
    content = np.fromfile(path, dtype=np.uint8)
    header = content[: reader.HEADER.itemsize].view(reader.HEADER)
    table = content[reader.HEADER.itemsize + 2 * reader.FIELD.itemsize :]
    row = table[: reader.SAMPLE.itemsize].view(reader.SAMPLE)["image"]
    allocation = content[int(header["alloc_table_ptr"][0]) :][: reader.ALLOCATION.itemsize].view(reader.ALLOCATION)
    for name, value in changes.items():
        target, _, field = name.rpartition("__")
        {"": header, "row": row, "allocation": allocation}[target][field] = value
    content.tofile(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"allocation__size": 2**20},
        {"allocation__size": 3},
        {"allocation__ptr": 0},
        {"row__data_ptr": 2**63 - 1},
        {"row__data_ptr": 2**64 - 1},
        {"row__data_ptr": 100},
        {"row__data_ptr": 2**40, "allocation__ptr": 2**40},
        {"row__height": 64},
        {"row__mode": 0},
        {"alloc_table_ptr": 2**63},
        {"alloc_table_ptr": 0},
        {"num_samples": 2**62},
        {"num_fields": 3},
        {"page_size": 0},
        {"page_size": 3},
        {"version": 3},
    ],
    ids=str,
)
def test_a_file_that_ffcv_must_not_open_is_refused(changes: dict[str, int], small_data: Path, tmp_path: Path) -> None:
    path, prepared = Path(shutil.copy(small_data / "test.beton", tmp_path)), manifest.read(small_data)
    crafted(path, **changes)
    with pytest.raises(UserError, match=r"test\.beton: expected .*; prepare the dataset again"):
        reader.read_labels(path, prepared.splits["test"], prepared)


def picture(mode: str = "RGB", side: int = 32, **options: object) -> bytes:
    """A JPEG picture of noise, by Pillow."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "jpeg", quality=1, **options)
    return buffer.getvalue()


FRAME = bytes([0xFF, 0xC0, 0, 17, 8, 0, 32, 0, 32, 3])  # of a baseline picture of 32×32 in three colors
JPEG_FAULTS = {
    "too high": lambda record: record.replace(FRAME, FRAME[:5] + bytes([0, 33]) + FRAME[7:]),
    "too wide": lambda record: record.replace(FRAME, FRAME[:7] + bytes([255, 255]) + FRAME[9:]),
    "of one color": lambda record: record.replace(FRAME, FRAME[:9] + bytes([1])),
    "called progressive": lambda record: record.replace(FRAME, FRAME[:1] + bytes([0xC2]) + FRAME[2:]),
    "of two frames": lambda record: record.replace(FRAME, bytes([0xFF, 0xC0, 0, 4, 0, 0]) + FRAME)[: len(record)],
    "of an endless segment": lambda record: record[:4] + bytes([255, 255]) + record[6:],
    "truncated": lambda record: record[:-2],
    "truncated in its header": lambda record: record[:300],
    "empty": lambda record: b"",
    "not a JPEG": lambda record: bytes(len(record)),
    "progressive": lambda record: picture(progressive=True),
    "CMYK": lambda record: picture("CMYK"),
    "gray": lambda record: picture("L"),
    "half as large": lambda record: picture(side=16),
    "of other tables": lambda record: picture(),
}


def with_records(path: Path, change: Callable[[bytes], bytes], rows: slice) -> None:
    """Replaces JPEG records by others of at most the same length."""
    content = np.fromfile(path, np.uint8)
    header = content[: reader.HEADER.itemsize].view(reader.HEADER)
    allocations = content[int(header["alloc_table_ptr"][0]) :].view(reader.ALLOCATION)
    for row in allocations[rows]:
        begin, size = int(row["ptr"]), int(row["size"])
        record = change(content[begin : begin + size].tobytes())
        assert len(record) <= size
        content[begin : begin + len(record)] = np.frombuffer(record, np.uint8)
        row["size"] = len(record)
    content.tofile(path)


@pytest.mark.parametrize("all_of_them", [True, False])
@pytest.mark.parametrize("fault", JPEG_FAULTS)
def test_a_jpeg_record_that_ffcv_must_not_decode_is_refused(
    fault: str, all_of_them: bool, jpeg_data: Path, tmp_path: Path
) -> None:
    """By its header and its end, without decoding it."""
    path, prepared = Path(shutil.copy(jpeg_data / "test.beton", tmp_path)), manifest.read(jpeg_data)
    with_records(path, JPEG_FAULTS[fault], slice(None) if all_of_them else slice(5, 6))
    if fault == "of other tables" and all_of_them:  # which is a sound dataset
        assert len(np.unique(reader.read_split(path, *of_test(jpeg_data))[0], axis=0)) == 1
        return
    with pytest.raises(UserError, match=r"test\.beton: expected .*; prepare the dataset again") as refused:
        reader.read_labels(path, prepared.splits["test"], prepared)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"allocation__size": 2**64 - 1},
        {"allocation__size": 2**40},
        {"allocation__ptr": 0},
        {"row__data_ptr": 2**64 - 1},
        {"row__data_ptr": 100},
        {"row__width": 31},
        {"row__mode": 1},
    ],
    ids=str,
)
def test_a_table_of_jpeg_records_that_ffcv_must_not_use_is_refused(
    changes: dict[str, int], jpeg_data: Path, tmp_path: Path
) -> None:
    path, prepared = Path(shutil.copy(jpeg_data / "test.beton", tmp_path)), manifest.read(jpeg_data)
    crafted(path, **changes)
    with pytest.raises(UserError, match=r"test\.beton: expected .*; prepare the dataset again"):
        reader.read_labels(path, prepared.splits["test"], prepared)


def test_a_manifest_of_other_records_than_the_files_is_refused(small_data: Path, jpeg_data: Path) -> None:
    for data, message in ((small_data, r"expected raw images of 32×32, found \[0, 32, 32\]"),
                          (jpeg_data, r"expected jpeg images of 32×32, found \[1, 32, 32\]")):  # fmt: skip
        (other,) = {small_data, jpeg_data} - {data}
        with pytest.raises(UserError, match=message):
            reader.read_labels(other / "test.beton", *of_test(data))


def test_a_record_that_cannot_be_decoded_is_named(jpeg_data: Path, tmp_path: Path) -> None:
    """Its header and its end are sound, and the pixels are missing: no other check can see that."""
    path = Path(shutil.copy(jpeg_data / "test.beton", tmp_path))

    def without_pixels(record: bytes) -> bytes:
        return jpeg.header_of(np.frombuffer(record, np.uint8), 32, 32) + jpeg.END

    with_records(path, without_pixels, slice(9, 10))
    assert len(reader.read_labels(path, *of_test(jpeg_data))) == 200
    with pytest.raises(UserError, match="expected complete JPEG records, found a damaged one at record 9"):
        reader.read_split(path, *of_test(jpeg_data))


@pytest.mark.images
def test_jpeg_records_are_verified_against_their_source(small: Source, jpeg_data: Path) -> None:
    """Byte by byte: one level of one pixel is another record, also where it can hardly be seen."""
    assert verify(jpeg_data, small).records == "jpeg"
    images = small.test.images.copy()
    images[17, :8, :8] ^= 8
    with pytest.raises(
        UserError, match=r"records differ, first record 17; they were compressed by opencv-python [\d.]+"
    ):
        verify(jpeg_data, replace(small, test=Split(images, small.test.labels)))


@pytest.mark.every
def test_jpeg_records_are_prepared_once_and_not_mixed_up(small: Source, jpeg_data: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(jpeg_data, tmp_path / "data"))
    assert beton.write(small, out, jpeg_quality=90) == manifest.read(jpeg_data)
    for quality in (None, 80):
        with pytest.raises(UserError, match=r"in JPEG records of quality 90; expected a new folder, or the same"):
            beton.write(small, out, jpeg_quality=quality)
    smaller = beton.write(small, out, overwrite=True, jpeg_quality=10)
    assert smaller.fingerprint != manifest.read(jpeg_data).fingerprint
    assert verify(out, small) == smaller
    assert smaller.versions.keys() - manifest.read(jpeg_data).versions.keys() == set()
    images = small.train.images.copy()
    images[0] ^= 128
    with pytest.raises(UserError, match="the images of the source have changed"):
        beton.write(replace(small, train=Split(images, small.train.labels)), out, jpeg_quality=10)


def test_the_size_of_jpeg_records_is_estimated_before_they_are_written(small: Source, jpeg_data: Path) -> None:
    prepared = manifest.read(jpeg_data)
    for name, split in prepared.splits.items():
        written = sum(record.nbytes for record in reader.read_records(jpeg_data / split.file, split, prepared))
        assert beton._record_bytes(getattr(small, name), 90) == pytest.approx(written, rel=0.05)
    assert beton._record_bytes(small.test, None) == 200 * 32 * 32 * 3
    with pytest.raises(
        UserError, match="--records jpeg: expected sides of at most 65500 pixels, found 65501; use --si"
    ):
        beton._record_bytes(Split(np.zeros((1, 65501, 1, 3), np.uint8), np.zeros(1, np.int64)), 90)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_changed_table_is_refused_or_changes_nothing(small_data: Path, jpeg_data: Path, data: st.DataObject) -> None:
    """Up to four bytes of the header, the fields and both tables, set at random."""
    sound_data = data.draw(st.sampled_from([small_data, jpeg_data]))
    prepared = manifest.read(sound_data)
    split, sound = prepared.splits["test"], (sound_data / "test.beton").read_bytes()
    header = np.frombuffer(sound[: reader.HEADER.itemsize], reader.HEADER)[0]
    end = reader.HEADER.itemsize + 2 * reader.FIELD.itemsize + split.images * reader.SAMPLE.itemsize
    content = bytearray(sound)
    places = st.integers(0, end - 1) | st.integers(int(header["alloc_table_ptr"]), len(sound) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "test.beton")
        path.write_bytes(content)
        try:
            images, labels = reader.read_split(path, split, prepared)
        except UserError:
            return
    expected = reader.read_split(sound_data / "test.beton", split, prepared)
    assert np.array_equal(images, expected[0])
    assert np.array_equal(labels, expected[1])


EDGES = (0, 1, 2, 3, 4, 31, 33, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def crafted_at_random(sound: bytes, seed: int, images: int) -> bytes:
    """Changes one to three numbers of the header, the fields, the samples and the allocations.

    Each becomes an edge of its type, a close number, the size of the file, or that of another row; or two rows are
    exchanged.
    """
    rng, content = np.random.default_rng(seed), np.frombuffer(sound, np.uint8).copy()
    header = content[: reader.HEADER.itemsize].view(reader.HEADER)
    fields = content[reader.HEADER.itemsize :][: 2 * reader.FIELD.itemsize].view(reader.FIELD)
    samples = content[reader.HEADER.itemsize + fields.nbytes :][: images * reader.SAMPLE.itemsize].view(reader.SAMPLE)
    allocations = content[int(header["alloc_table_ptr"][0]) :].view(reader.ALLOCATION)
    numbers = [header[name] for name in reader.HEADER.names] + [samples["image"][name] for name in reader.IMAGE.names]
    numbers += [samples["label"], fields["type_id"], fields["name"].reshape(-1), fields["arguments"].reshape(-1)]
    numbers += [allocations[name] for name in reader.ALLOCATION.names]
    for _ in range(rng.integers(1, 4)):
        column = numbers[rng.integers(len(numbers))]
        row, other = rng.integers(len(column), size=2)
        close = int(column[row]) + int(rng.choice([-3072, -1, 1, 3072]))
        value = [int(rng.choice(EDGES)), close, len(sound) - int(rng.choice([0, 1, 3072])), None][rng.integers(4)]
        if value is None:
            column[[row, other]] = column[[other, row]]
        else:
            column[row] = np.array(value % 2**64, np.uint64).astype(column.dtype)
    return content.tobytes()


@pytest.fixture(scope="session")
def betons(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """Of 120 crafted copies of test.beton, those that the reader accepts, with the SHA-256 of the pixels that it reads.

    All others are refused before FFCV would open them.
    """
    prepared, folder = manifest.read(small_data), tmp_path_factory.mktemp("crafted")
    split, sound = prepared.splits["test"], (small_data / "test.beton").read_bytes()
    accepted = {}
    for seed in range(120):
        path = folder / f"{seed}.beton"
        path.write_bytes(crafted_at_random(sound, seed, split.images))
        try:
            images, _ = reader.read_split(path, split, prepared)
            accepted[path] = hashlib.sha256(images).hexdigest()
        except UserError:
            path.unlink()
    return accepted


def test_of_crafted_files_only_harmless_ones_are_accepted(small_data: Path, betons: dict[Path, str]) -> None:
    """Whose changes FFCV does not read, or which show other pixels of the file."""
    sound = hashlib.sha256(reader.read_split(small_data / "test.beton", *of_test(small_data))[0]).hexdigest()
    assert 10 < len(betons) < 60, len(betons)
    assert list(betons.values()).count(sound) > 5
    for path in betons:  # FFCV copies, for each image, what its allocation says
        content = np.fromfile(path, np.uint8)
        header = content[: reader.HEADER.itemsize].view(reader.HEADER)
        allocations = content[int(header["alloc_table_ptr"][0]) :].view(reader.ALLOCATION)
        assert set(allocations["size"].tolist()) == {32 * 32 * 3}, path
        assert allocations["ptr"].max() <= len(content) - 32 * 32 * 3, path


def of_test(data: Path) -> tuple[manifest.SplitFile, manifest.Manifest]:
    prepared = manifest.read(data)
    return prepared.splits["test"], prepared


@pytest.fixture(scope="session")
def address_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which a process reports each `memcpy` of any library that leaves its memory, and ends."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed, which has AddressSanitizer")
    names = ("libasan.so", "libstdc++.so")  # the second, because exceptions of torch would not be found otherwise
    found = [subprocess.run(["gcc", f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names]
    libraries = [str(Path(path.strip()).resolve()) for path in found]
    if not all(Path(path).is_file() for path in libraries):
        pytest.skip("gcc has no AddressSanitizer here")
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}


@pytest.mark.every
def test_ffcv_stays_within_its_memory(
    small_data: Path, betons: dict[Path, str], address_sanitizer: dict[str, str], tmp_path: Path
) -> None:
    """With a third of the crafted files that are accepted. With a refused one it does not, so that this is seen."""
    program = ["-m", "tests.support.programs.decode_betons"]
    some = dict(list(betons.items())[::3])  # FFCV compiles for ten seconds for each file
    done = python(*program, *some, **address_sanitizer)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(some.values())
    content = np.fromfile(small_data / "test.beton", dtype=np.uint8)
    header = content[: reader.HEADER.itemsize].view(reader.HEADER)
    content[int(header["alloc_table_ptr"][0]) :].view(reader.ALLOCATION)["size"] = 2**23
    content.tofile(tmp_path / "test.beton")
    with pytest.raises(UserError, match="an allocation of 3072 bytes for each image"):
        reader.read_labels(tmp_path / "test.beton", *of_test(small_data))
    done = python(*program, tmp_path / "test.beton", **address_sanitizer)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


@pytest.mark.every
@pytest.mark.parametrize("records", RECORDS)
def test_verify_and_a_streaming_training_stay_within_their_memory(
    records: str, address_sanitizer: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data = request.getfixturevalue(records)
    train = ["train", "tiny", *TINY, "--data", data, "--runs", tmp_path, "--device", "cpu", "--max-steps", 2]
    for words in (["data_prep", "verify", data], ["runner", *train, "--loader", "streaming"]):
        done = python("-m", *words, **address_sanitizer)
        assert done.returncode == 0, done.stderr
        assert "AddressSanitizer" not in done.stderr


@pytest.mark.images
def test_the_reader_crosses_pages(source: Source, data: Path) -> None:
    """50,000 images fill 19 pages."""
    prepared = manifest.read(data)
    images, labels = reader.read_split(data / "train.beton", prepared.splits["train"], prepared)
    np.testing.assert_array_equal(images, source.train.images)
    np.testing.assert_array_equal(labels, source.train.labels)


@pytest.mark.every
def test_two_nodes_without_common_locks_write_one_folder(
    small: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins and ends after the first has written its files, but before it has renamed its folder."""
    monkeypatch.setattr(beton.fcntl, "lockf", lambda *_: None)
    out, digest, nodes = tmp_path / "data", beton.sha256_of, ["a", "b"]
    monkeypatch.setattr(beton.socket, "gethostname", lambda: nodes[0])

    def after_writing(path: Path) -> str:
        if nodes == ["a", "b"]:
            nodes.reverse()
            beton.write(small, out)
            nodes[:] = ["a"]
        return digest(path)

    monkeypatch.setattr(beton, "sha256_of", after_writing)
    beton.write(small, out)
    assert verify(out, small).name == small.name
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["data"]


def test_another_dataset_is_not_overwritten(small: Source, own_data: Path) -> None:
    other = Source("other", small.classes, small.test, small.test, {"kind": "other"})
    before = (own_data / "dataset.json").read_text()
    with pytest.raises(UserError, match="contains"):
        beton.write(other, own_data)
    assert (own_data / "dataset.json").read_text() == before
    prepared = beton.write(other, own_data, overwrite=True)
    assert prepared.name == "other"
    manifest.check_files(own_data, prepared)
    for split in ("train", "test"):
        images, _ = reader.read_split(own_data / f"{split}.beton", prepared.splits[split], prepared)
        np.testing.assert_array_equal(images, small.test.images)


@pytest.mark.parametrize(
    "change",
    ["an image more", *(pytest.param(change, marks=pytest.mark.every) for change in ("a test image", "two labels"))],
)
def test_a_source_that_has_changed_is_not_what_was_prepared(change: str, small: Source, own_data: Path) -> None:
    images, labels = small.test.images.copy(), small.test.labels.copy()
    if change == "a test image":
        images[3] ^= 1
    elif change == "two labels":
        labels[[0, -1]] = labels[[-1, 0]]
    else:
        images, labels = np.concatenate([images, images[:1]]), np.concatenate([labels, labels[:1]])
    changed = replace(small, test=Split(images, labels))
    with pytest.raises(UserError, match="the images of the source have changed; replace the dataset with --overwrite"):
        beton.write(changed, own_data)
    written = beton.write(changed, own_data, overwrite=True)
    assert verify(own_data, changed) == written


def test_overwrite_replaces_a_dataset_alone(small: Source, own_data: Path) -> None:
    (own_data / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"found other files \(thesis.txt\)"):
        beton.write(replace(small, name="other"), own_data, overwrite=True)
    assert (own_data / "train.beton").is_file()


@pytest.mark.every
def test_the_folder_may_be_the_current_one_or_a_link(small: Source, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    written = beton.write(small, Path())
    assert beton.write(small, tmp_path / "link") == written
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(UserError, match="--out /: expected a folder below it"):
        beton.write(small, Path("/"))


def test_foreign_files_are_left_alone(small: Source, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="expected a new or empty folder"):
            beton.write(small, tmp_path, overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


class EndsTheWriter(np.ndarray):
    """Labels whose length ends the process of the writer."""

    def __len__(self) -> int:
        raise SystemExit(3)


def test_a_failing_writer_leaves_nothing(small: Source, tmp_path: Path) -> None:
    """It fails at the second file, after the first is complete."""
    labels = small.test.labels.view(EndsTheWriter)
    with pytest.raises(UserError, match="failed with exit code 3"):
        beton.write(replace(small, test=Split(small.test.images, labels)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


class Blocking(np.ndarray):
    """Images that block the process that reads one, after it has written its pid to a file."""

    pid_file: Path

    def __getitem__(self, index: object) -> np.ndarray:
        self.pid_file.write_text(str(os.getpid()))
        time.sleep(600)
        raise AssertionError


@pytest.fixture
def stalls_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Shortens the time after which a writer has hung, but only once it has made a file, however slow the machine."""
    monkeypatch.setattr(beton, "STALL_SECONDS", 300.0)

    def shorten(file: Path) -> None:
        wait_until(file.exists)
        beton.STALL_SECONDS = 1.0

    return lambda file: threading.Thread(target=shorten, args=(file,), daemon=True).start()


def test_a_hung_writer_is_killed(small: Source, tmp_path: Path, stalls_after: Callable[[Path], None]) -> None:
    images = small.test.images.view(Blocking)
    images.pid_file = tmp_path / "pid"
    stalls_after(images.pid_file)
    with pytest.raises(UserError, match="hung"):
        beton.write(replace(small, test=Split(images, small.test.labels)), tmp_path / "out")
    assert gone([int(images.pid_file.read_text())], 20)
    assert multiprocessing.active_children() == []
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_the_writer(small: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a process group of its own, which a terminal's Ctrl-C does not reach."""
    images = small.test.images.view(Blocking)
    images.pid_file = tmp_path / "pid"
    join, waits = BaseProcess.join, []

    def interrupted(self: BaseProcess, timeout: float | None = None) -> None:
        waits.append(timeout)
        if len(waits) == 5:
            raise KeyboardInterrupt
        join(self, timeout)

    monkeypatch.setattr(BaseProcess, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        beton.write(replace(small, test=Split(images, small.test.labels)), tmp_path / "out")
    assert multiprocessing.active_children() == []
    assert {path.name for path in tmp_path.iterdir()} - {"pid"} == {".out.lock"}


def test_an_image_may_be_larger_than_a_page_of_ffcv(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 1700, 1700, 3), np.uint8)
    assert images[0].nbytes > beton.DEFAULT_PAGE
    train, test = (Split(images[k : k + 2], np.array([0, 1])) for k in (0, 2))
    source = Source("large", ("a", "b"), train, test, {"kind": "made"})
    written = beton.write(source, tmp_path / "out")
    read, labels = reader.read_split(tmp_path / "out" / "test.beton", written.splits["test"], written)
    assert (read == test.images).all()
    assert labels.tolist() == [0, 1]
    assert beton._record_bytes(train, None) <= written.splits["train"].bytes <= 1.1 * beton._record_bytes(train, None)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=False)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.root
def test_a_full_disk_is_reported_before_anything_is_written(small: Source, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
    with pytest.raises(UserError, match=r"2 MiB needed, \d MiB free; make room"):
        beton.write(small, disk / "out")
    assert [path.name for path in disk.iterdir()] == [".out.lock"]


class FillsTheDisk(np.ndarray):
    """Images of which the first that is read leaves no space on the disk."""

    disk: Path

    def __getitem__(self, index: object) -> np.ndarray:
        with contextlib.suppress(OSError), (self.disk / "filler").open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        return np.asarray(super().__getitem__(index))


@pytest.mark.root
def test_a_disk_that_fills_up_during_the_write_keeps_what_was_there(
    small: Source, small_data: Path, disk: Path, stalls_after: Callable[[Path], None]
) -> None:
    """Another program takes the space that the check has found: one error, and no file that is half written."""
    shutil.copytree(small_data, disk / "out")
    before = {path: path.read_bytes() for path in (disk / "out").iterdir()}
    images = small.test.images.view(FillsTheDisk)
    images.disk = disk
    other = replace(small, name="other", test=Split(images, small.test.labels))
    stalls_after(disk / "filler")
    with pytest.raises(UserError, match=r"FFCV's writer (hung|failed)|No space left"):
        beton.write(other, disk / "out", overwrite=True)
    assert multiprocessing.active_children() == []
    assert {path.name for path in disk.iterdir()} == {"out", ".out.lock", "filler"}
    assert {path: path.read_bytes() for path in (disk / "out").iterdir()} == before


def _write(source: Source, out: Path, queue: multiprocessing.Queue) -> None:
    queue.put(beton.write(source, out).fingerprint)


def waits_for_a_lock(process: int) -> bool:
    """Whether the kernel lists a process as one that waits for a file lock."""
    waiting = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    return str(process) in [fields[5] for fields in waiting]


def test_of_two_writers_one_waits_and_takes_over_if_the_other_is_killed(
    small: Source, small_data: Path, tmp_path: Path
) -> None:
    """Killed in the middle of the second file, with nobody left to clean up."""
    images = small.test.images.view(Blocking)
    images.pid_file = tmp_path / "pid"
    blocked = replace(small, test=Split(images, small.test.labels))
    fork, out = multiprocessing.get_context("fork"), tmp_path / "out"
    queue = fork.Queue()
    first, second, third = (fork.Process(target=_write, args=(s, out, queue)) for s in (blocked, small, small))
    first.start()
    wait_until(images.pid_file.exists)
    left = descendants_of(first.pid)
    for process in (second, third):
        process.start()
        wait_until(lambda process=process: waits_for_a_lock(process.pid))
    assert not out.exists()
    first.kill()
    assert gone(left, 20), "FFCV's writer or its worker still writes"
    assert queue.get(timeout=120) == queue.get(timeout=120)
    for process in (first, second, third):
        process.join()
    manifest.check_files(out, manifest.read(small_data))
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.lock", "pid"}
