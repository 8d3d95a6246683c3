"""Writes a source as FFCV files: `train.beton`, `test.beton` and `dataset.json`, all of them or none."""

import fcntl
import importlib.metadata
import multiprocessing
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data_prep import manifest as manifests
from data_prep.console import UserError, progress, sha256_of
from data_prep.manifest import Manifest, SplitFile
from data_prep.sources import Source, Split

STALL_SECONDS = 60.0  # a writer whose file has not grown for so long is hung
MARGIN = 1.1  # of disk space, over the size of the pixels


def write(source: Source, out: Path, overwrite: bool = False) -> Manifest:
    """Writes `source` into the folder `out`, which appears only when everything in it is whole.

    A folder that already holds the same source, undamaged, is left as it is. Two calls at once take turns.

    Args:
        source: the images.
        out: folder to make.
        overwrite: replace a dataset that stands there; without it another dataset there is refused.

    Returns:
        The manifest of the folder.

    Raises:
        UserError: the folder cannot be made, holds something else, or the disk is too small.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _lock(out):
            standing = _standing(out, source, overwrite)
            if standing is not None:
                return standing
            staging = out.with_name(f".{out.name}.writing")
            shutil.rmtree(staging, ignore_errors=True)  # left by a writer that was killed: we hold its lock
            staging.mkdir()
            try:
                manifest = _write_into(staging, source)
                _replace(out, staging)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            return manifest
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot write there ({error.strerror or error}); choose another folder"
        ) from None


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """A kernel lock beside `out`: it goes with its holder, however that ends."""
    with out.with_name(f".{out.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _standing(out: Path, source: Source, overwrite: bool) -> Manifest | None:
    """The dataset in `out` if it is whole and of this source."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / manifests.FILE_NAME).is_file():
        raise UserError(f"--out {out}: expected a new or empty folder, found other files; choose another")
    try:
        manifest = manifests.read(out)
        manifests.check_files(out, manifest)
    except UserError as error:
        if overwrite:
            return None
        raise UserError(f"{error} (or replace the dataset with --overwrite)") from None
    same = (manifest.name, manifest.classes, manifest.source, manifest.mean) == (
        source.name,
        source.classes,
        source.provenance,
        moments(source.train)[0],
    )
    if same:
        return manifest
    if overwrite:
        return None
    raise UserError(
        f"--out {out}: holds {manifest.name} from {manifest.source}; expected a new folder or the same source; "
        "choose another, or replace it with --overwrite"
    )


def _write_into(folder: Path, source: Source) -> Manifest:
    splits = {"train": source.train, "test": source.test}
    needed = int(MARGIN * sum(split.images.nbytes for split in splits.values()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"--out {folder.parent}: {needed >> 20} MiB needed, {free >> 20} MiB free; make room")
    paths = {name: folder / f"{name}.beton" for name in splits}
    _write_supervised(folder, [(paths[name], split) for name, split in splits.items()])
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
    mean, std = moments(source.train)
    manifest = Manifest(
        name=source.name,
        classes=source.classes,
        image_shape=source.train.images.shape[1:],
        mean=mean,
        std=std,
        splits=files,
        source=source.provenance,
        versions={
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in ("ffcv", "numpy", "pillow")},
        },
    )
    with (folder / manifests.FILE_NAME).open("w") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    return manifest


def moments(split: Split) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Per-channel mean and population standard deviation, exact: from counts of the 256 grey levels."""
    means, deviations = [], []
    levels = np.arange(256, dtype=np.float64)
    for channel in range(3):
        counts = np.bincount(split.images[..., channel].reshape(-1), minlength=256)
        mean = float(counts @ levels / counts.sum())
        means.append(mean)
        deviations.append(float(np.sqrt(counts @ (levels - mean) ** 2 / counts.sum())))
    return tuple(means), tuple(deviations)


def _write_supervised(folder: Path, work: list[tuple[Path, Split]]) -> None:
    """Runs FFCV's writer in a process of its own.

    If one of its workers raises (a full disk, say) the writer waits for ever, so we watch the files grow. The
    process also keeps ffcv's import, which sets torch to one thread, away from ours.
    """
    fork = multiprocessing.get_context("fork")  # the images are inherited, not copied
    writer = fork.Process(target=_write_betons, args=(work,), daemon=False)
    writer.start()
    written, changed = 0, time.monotonic()
    with progress("write FFCV files", sum(split.images.nbytes for _, split in work)) as advance:
        while writer.is_alive():
            writer.join(0.2)
            now = sum(path.stat().st_size for path, _ in work if path.exists())
            if now != written:
                advance(now - written)
                written, changed = now, time.monotonic()
            elif time.monotonic() - changed > STALL_SECONDS:
                os.killpg(writer.pid, signal.SIGKILL)
                writer.join()
                raise UserError(f"{folder}: FFCV's writer hung for {STALL_SECONDS:.0f} s; is the disk full?")
    if writer.exitcode != 0:
        raise UserError(f"{folder}: FFCV's writer failed with exit code {writer.exitcode}; see its message above")
    for path, _ in work:
        with path.open("rb") as file:
            os.fsync(file.fileno())


class _Samples:
    """The (image, label) pairs of a split, as FFCV's writer wants to index them."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.split.images[index], int(self.split.labels[index])


def _write_betons(work: list[tuple[Path, Split]]) -> None:
    os.setpgid(0, 0)  # so that the writer and its workers can be ended together
    import ffcv.writer
    from ffcv.fields import IntField, RGBImageField

    ffcv.writer.tqdm = lambda **_: _Silent()  # its bar would draw into logs; ours stands in for it
    for path, split in work:
        fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
        # One worker: with several, which page a record lands on would differ from run to run, and so the hash.
        writer = ffcv.writer.DatasetWriter(str(path), fields, num_workers=1)
        writer.from_indexed_dataset(_Samples(split), shuffle_indices=False)


class _Silent:
    def update(self, _: int) -> None: ...

    def close(self) -> None: ...


def _replace(out: Path, staging: Path) -> None:
    """Puts the finished folder in place of `out`, which is missing, empty, or a dataset to be replaced."""
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    folder = os.open(out.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
