"""Writes a source as `train.beton`, `test.beton` and `dataset.json`, atomically."""

import contextlib
import ctypes
import fcntl
import functools
import importlib.metadata
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep import beton_reader, jpeg
from data_prep import manifest as manifests
from data_prep.manifest import Manifest, SplitFile
from data_prep.sources import Source, Split
from runner.common.console import list_some, progress
from runner.common.errors import UserError
from runner.common.files import sha256_of

PR_SET_PDEATHSIG = 1  # prctl.h
STALL_SECONDS = 60.0  # a writer whose file has not grown for this long has hung
MARGIN = 1.1  # required disk space, relative to the size of the pixels or JPEG records
COUNTED = 1024  # images whose pixels are counted at a time, because counting takes eight bytes for each
DEFAULT_PAGE = 8 << 20  # bytes; FFCV's default
SAMPLED = 256  # images of a split whose size as JPEG records is measured first


def write(source: Source, out: Path, overwrite: bool = False, jpeg_quality: int | None = None) -> Manifest:
    """Writes `source` into the folder `out`, which appears only when it is complete.

    A folder that already contains an undamaged dataset from the same source is not changed. Concurrent calls for one
    folder run one after the other.

    Args:
        source: the images.
        out: folder to create.
        overwrite: replace a different or damaged dataset in `out`, which is otherwise an error.
        jpeg_quality: quality of JPEG records, 1 to 100; None for raw ones.

    Returns:
        The manifest of the folder.

    Raises:
        UserError: the folder cannot be created, contains other files, or the disk is too small.
    """
    out = out.resolve()  # the lock and the new folder are created next to it
    if not out.name:
        raise UserError(f"--out {out}: expected a folder below it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _lock(out):
            existing = _existing(out, source, overwrite, jpeg_quality)
            if existing is not None:
                return existing
            # The lock may hold on one node only, so each node has a folder of its own.
            staging = out.with_name(f".{out.name}.writing-{socket.gethostname()}")
            shutil.rmtree(staging, ignore_errors=True)  # left by a killed process that no longer holds the lock
            staging.mkdir()
            try:
                manifest = _write_into(staging, out, source, jpeg_quality)
                _replace(out, staging)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            return manifest
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror or error}); choose another folder") from None


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Locks a file next to `out`. The kernel releases the lock when this process exits; child processes lack it."""
    with out.with_name(f".{out.name}.lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _existing(out: Path, source: Source, overwrite: bool, jpeg_quality: int | None) -> Manifest | None:
    """Returns the manifest of `out` if it is an undamaged dataset from this source; None if `out` must be written.

    Raises:
        UserError: `out` contains anything else, unless it is a dataset that may be overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    known = {manifests.FILE_NAME, *(f"{split}.beton" for split in manifests.SPLITS)}
    others = sorted(path.name for path in out.iterdir() if path.name not in known) if out.is_dir() else [out.name]
    if others or not (out / manifests.FILE_NAME).is_file():
        found = list_some(others or ["no dataset.json"])
        raise UserError(f"--out {out}: expected a new or empty folder, found other files ({found}); choose another")
    try:
        manifest = manifests.read(out)
        manifests.check_files(out, manifest)
        stored = (manifest.name, manifest.classes, manifest.source, manifest.jpeg_quality)
        same = stored == (source.name, source.classes, source.provenance, jpeg_quality)
        if same and _has_content(out, manifest, source):
            return manifest
    except UserError as error:
        if overwrite:
            return None
        raise UserError(f"{error} (or replace the dataset with --overwrite)") from None
    if overwrite:
        return None
    if same:
        encoder = manifest.versions.get("opencv-python")
        changed = "the images of the source have changed"
        changed += f", or not: they were compressed by opencv-python {encoder}" if encoder else ""
        raise UserError(f"--out {out}: {changed}; replace the dataset with --overwrite")
    raise UserError(
        f"--out {out}: contains {manifest.name} from {manifest.source} in {manifest.record_kind}; expected a new "
        "folder, or the same source and records; choose another, or replace it with --overwrite"
    )


def _has_content(folder: Path, manifest: Manifest, source: Source) -> bool:
    """Returns whether a prepared folder has exactly the images and labels of a source."""
    for name in manifests.SPLITS:
        split, expected = manifest.splits[name], getattr(source, name)
        if split.images != len(expected.labels):
            return False
        decoded = Split(*beton_reader.read_split(folder / split.file, split, manifest))
        same_shape = decoded.images.shape == expected.images.shape
        if not (same_shape and same_records(folder / split.file, manifest, split, decoded, expected).all()):
            return False
    return True


def same_records(path: Path, manifest: Manifest, split: SplitFile, decoded: Split, source: Split) -> np.ndarray:
    """Returns for each image whether its label and its record are those of the source, (N,) bool.

    A raw record is compared by its pixels. For a JPEG record, the source's image is compressed again, and the bytes are
    compared.

    Args:
        path, manifest, split: the file, its manifest and its entry there.
        decoded: what `read_split` returns for the file.
        source: images of the same number and shape.
    """
    quality = manifest.jpeg_quality
    if quality is None:
        same = (decoded.images == source.images).all(axis=(1, 2, 3))
    else:
        records = beton_reader.read_records(path, split, manifest)
        with ThreadPoolExecutor() as pool:
            again = pool.map(lambda image: jpeg.encode(image, quality), source.images)
            same = np.array([np.array_equal(*pair) for pair in zip(records, again, strict=True)])
    return same & (decoded.labels == source.labels)


def _write_into(folder: Path, out: Path, source: Source, jpeg_quality: int | None) -> Manifest:
    """Writes both .beton files and the manifest into an existing folder, which becomes `out`."""
    splits = {"train": source.train, "test": source.test}
    expected_bytes = sum(_record_bytes(split, jpeg_quality) for split in splits.values())
    needed = int(MARGIN * expected_bytes)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"--out {out}: {needed >> 20} MiB needed, {free >> 20} MiB free; make room")
    paths = {name: folder / f"{name}.beton" for name in splits}
    _write_supervised(out, [(paths[name], split) for name, split in splits.items()], expected_bytes, jpeg_quality)
    files = {}
    for name, split in splits.items():
        path = paths[name]
        files[name] = SplitFile(
            file=path.name,
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
            images=len(split.labels),
            images_per_class=tuple(np.bincount(split.labels, minlength=len(source.classes)).tolist()),
        )
    tools = ("ffcv", "numpy", "pillow") if jpeg_quality is None else ("ffcv", "numpy", "opencv-python", "pillow")
    manifest = Manifest(
        name=source.name,
        classes=source.classes,
        image_shape=source.train.images.shape[1:],
        mean=(0.0, 0.0, 0.0),  # computed below
        std=(0.0, 0.0, 0.0),
        splits=files,
        source=source.provenance,
        versions={
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in tools},
        },
        records="raw" if jpeg_quality is None else "jpeg",
        jpeg_quality=jpeg_quality,
    )
    seen = source.train
    if jpeg_quality is not None:  # training sees the decoded pixels
        seen = Split(*beton_reader.read_split(paths["train"], files["train"], manifest))
    mean, std = mean_and_std(seen)
    manifest = replace(manifest, mean=mean, std=std)
    with (folder / manifests.FILE_NAME).open("w") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    return manifest


def page_size_for(split: Split) -> int:
    """Returns the size of FFCV's pages in bytes, a power of two; FFCV cannot write an image larger than a page."""
    return max(DEFAULT_PAGE, 1 << (int(np.prod(split.images.shape[1:])) - 1).bit_length())


def _record_bytes(split: Split, jpeg_quality: int | None) -> int:
    """Returns the size of all records of a split; for JPEG an estimate from images at equal distances."""
    if jpeg_quality is None:
        record, page = int(np.prod(split.images.shape[1:])), page_size_for(split)
        # A page holds whole images, so one of large images is not full; and the first begins at a multiple of its size.
        pages = 1 + -(-len(split.images) // (page // record))
        return split.images.nbytes if 16 * record < page else pages * page
    rows = np.linspace(0, len(split.images) - 1, min(len(split.images), SAMPLED)).astype(int)
    return int(np.mean([jpeg.encode(split.images[row], jpeg_quality).nbytes for row in rows]) * len(split.images))


def mean_and_std(split: Split) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Returns the exact mean and population standard deviation per channel, from the counts of the pixel values."""
    levels = np.arange(256, dtype=np.float64)

    def of_channel(channel: int) -> tuple[float, float]:
        counts = np.zeros(256, np.int64)
        for start in range(0, len(split.images), COUNTED):
            values = split.images[start : start + COUNTED, ..., channel]
            counts += np.bincount(values.reshape(-1), minlength=256)
        mean = float(counts @ levels / counts.sum())
        return mean, float(np.sqrt(counts @ (levels - mean) ** 2 / counts.sum()))

    red, green, blue = map(of_channel, range(3))
    return (red[0], green[0], blue[0]), (red[1], green[1], blue[1])


def _write_supervised(
    out: Path, files: list[tuple[Path, Split]], expected_bytes: int, jpeg_quality: int | None
) -> None:
    """Runs FFCV's writer in a child process, and kills it if the files stop growing, or on Ctrl-C.

    The writer waits forever if one of its workers fails, for example on a full disk. The child process also isolates
    the import of ffcv, which sets torch to one thread.
    """
    fork = multiprocessing.get_context("fork")  # the images are inherited, not copied
    writer = fork.Process(target=_write_betons, args=(files, jpeg_quality, os.getpid()), daemon=False)
    writer.start()
    written, last_growth = 0, time.monotonic()
    try:
        with progress("write FFCV files", expected_bytes) as advance:
            while writer.is_alive():
                writer.join(0.2)
                size = sum(path.stat().st_size for path, _ in files if path.exists())
                if size != written:
                    advance(size - written)
                    written, last_growth = size, time.monotonic()
                elif time.monotonic() - last_growth > STALL_SECONDS:
                    raise UserError(f"--out {out}: FFCV's writer hung for {STALL_SECONDS:.0f} s; is the disk full?")
    finally:
        if writer.is_alive():
            assert writer.pid is not None
            with contextlib.suppress(ProcessLookupError):  # the writer does not have its own process group yet
                os.killpg(writer.pid, signal.SIGKILL)
            writer.kill()
            writer.join()
    if writer.exitcode != 0:
        raise UserError(f"--out {out}: FFCV's writer failed with exit code {writer.exitcode}; see its message above")
    for path, _ in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())


class _Samples:
    """The (image, label) pairs of a split, with the interface that FFCV's writer expects."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.split.images[index], int(self.split.labels[index])


def _end_with(parent: int) -> None:
    """Makes the kernel kill this process when its parent is killed, since the next call uses the same folder."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _write_betons(files: list[tuple[Path, Split]], jpeg_quality: int | None, parent: int) -> None:
    os.setpgid(0, 0)  # so that the writer and its workers can be killed together
    _end_with(parent)
    os.register_at_fork(after_in_child=functools.partial(_end_with, os.getpid()))
    import ffcv.writer
    from ffcv.fields import IntField, RGBImageField

    ffcv.writer.tqdm = lambda **_: _NoProgressBar()  # its output would fill logs, and a progress bar is already shown
    image = RGBImageField("raw") if jpeg_quality is None else RGBImageField("jpg", jpeg_quality=jpeg_quality)
    for path, split in files:
        fields = {"image": image, "label": IntField()}
        # With several workers the order of pages, and thus the hash, would differ from run to run.
        writer = ffcv.writer.DatasetWriter(str(path), fields, page_size_for(split), num_workers=1)
        writer.from_indexed_dataset(_Samples(split), shuffle_indices=False)


class _NoProgressBar:
    """Replaces tqdm and displays nothing."""

    def update(self, _: int) -> None: ...

    def close(self) -> None: ...


def _replace(out: Path, staging: Path) -> None:
    """Renames the finished folder to `out`, which is missing, empty, or a dataset to replace."""
    old = out.with_name(f".{out.name}.replaced-{socket.gethostname()}")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    folder = os.open(out.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
