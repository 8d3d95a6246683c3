"""Reads image folders, and archives of them: train/<class>/ and test/<class>/, with images at any depth below."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_prep import images
from data_prep.archive import Member
from data_prep.dataset import Source, Split, unreserved
from data_prep.official import CIFAR10
from runner.common import memory
from runner.common.console import list_some, track
from runner.common.errors import UserError

EXPECTED = "train/<class>/ and test/<class>/ with images (" + ", ".join(s[1:] for s in images.SUFFIXES) + ")"
ARCHIVE_SUFFIX = re.compile(r"\.(zip|tgz|tbz2?|txz|tar(\.(gz|bz2|xz|zst))?)$", re.IGNORECASE)
SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("val", "valid", "validation"), "val")


@dataclass(frozen=True)
class ImageFile:
    """An image file, and the information in its path.

    Attributes:
        root: folder that contains the split's folder; "" if there is none.
        split: train, test or val.
        split_folder: name of the split's folder, such as `valid`.
        class_name: name of the folder below the split's folder.
        path: path of the file in the folder or archive.
        content: content of the file.
    """

    root: str
    split: str
    split_folder: str
    class_name: str
    path: str
    content: bytes


def load(
    path: Path, members: Iterable[Member], provenance: dict[str, Any], size: int | None, fit: images.Fit | None
) -> Source:
    """Decodes the images among the files of a folder or archive; labels follow the alphabetical order of the classes.

    If there is no `test`, `val` is the test split. The notes count all files that are not used.

    Args:
        path: path of the folder or archive.
        members: files of the folder or archive.
        provenance: where the images come from, for `dataset.json`.
        size: number of pixels per side to which all images are resized; None requires that all have the same size.
        fit: how images are fitted to `size`; by default "crop".

    Raises:
        UserError: there are no images, several datasets, images of several sizes, or a split that lacks a class.
    """
    files, unused = _collect_images(path, members)
    _check_root(path, files)
    found = {file.split for file in files}
    test_folder = "test" if "test" in found else "val"
    if files and test_folder not in found:
        raise UserError(f"--source {path}: expected {EXPECTED}, found neither test/ nor val/")
    unused += [file.path for file in files if file.split not in ("train", test_folder)]
    files = [file for file in files if file.split in ("train", test_folder)]
    if not files:
        raise UserError(f"--source {path}: contains no image; expected {EXPECTED}")
    classes = tuple(sorted({file.class_name for file in files}))
    files.sort(key=lambda file: (file.class_name, PurePosixPath(file.path).name, file.path))
    for split in ("train", test_folder):
        missing = sorted(set(classes) - {file.class_name for file in files if file.split == split})
        if missing:
            raise UserError(f"--source {path}: {split} contains no image of {missing[0]!r}; expected {EXPECTED}")
    pixels = _decode(path, files, size, fit or "crop")

    def split_of(name: str) -> Split:
        rows = [i for i, file in enumerate(files) if file.split == name]
        labels = np.array([classes.index(files[i].class_name) for i in rows], dtype=np.int64)
        return Split(np.stack([pixels[i] for i in rows]), labels)

    train, test = split_of("train"), split_of(test_folder)
    notes = ["val/ is used as the test split, since there is no test/"] if test_folder == "val" else []
    if unused:
        notes.append(f"not used: {list_some([name if name.isprintable() else repr(name) for name in unused])}")
    if size is not None:
        provenance = {**provenance, "size": size, "fit": fit or "crop"}
    suffixes = {PurePosixPath(file.path).suffix.lower() for file in files}
    return Source(_dataset_name(path, classes, train, test, suffixes), classes, train, test, provenance, tuple(notes))


def _collect_images(path: Path, members: Iterable[Member]) -> tuple[list[ImageFile], list[str]]:
    """Returns the images in the expected folders, and the paths of all other files."""
    files, unused, seen = list[ImageFile](), list[str](), set[str]()
    total, available = 0, memory.available()
    for name, read in members:
        parts = PurePosixPath(name).parts
        if not parts:  # the folder itself
            continue
        if name in seen:
            raise UserError(f"{name!r}: expected once in the archive, found twice; pack it again")
        seen.add(name)
        depth = 0 if parts[0].lower() in SPLITS else 1
        in_place = len(parts) >= depth + 3 and parts[depth].lower() in SPLITS
        hidden = any(part.startswith((".", "__MACOSX")) for part in parts)  # copies made by other programs
        if read is None or hidden or not in_place or PurePosixPath(name).suffix.lower() not in images.SUFFIXES:
            unused.append(name)
        else:
            split = SPLITS[parts[depth].lower()]
            if not parts[depth + 1].isprintable():
                raise UserError(f"{name!r}: expected printable characters in UTF-8 in the name of a class; rename it")
            content = read()
            total += len(content)
            if total > available:
                free = f"{available / 2**30:.1f} GiB of free memory"
                raise UserError(f"--source {path}: expected image files that fit into {free}, found more; use fewer")
            files.append(ImageFile("/".join(parts[:depth]), split, parts[depth], parts[depth + 1], name, content))
    return files, unused


def _check_root(path: Path, files: list[ImageFile]) -> None:
    """Raises UserError if there are several datasets, or several folders of one split, which would be merged."""
    roots = sorted({file.root for file in files})
    if len(roots) > 1:
        names = list_some([root or "train/ and test/ themselves" for root in roots])
        raise UserError(f"--source {path}: contains several datasets ({names}); give the folder of one")
    for split in ("train", "test", "val"):
        folders = sorted({file.split_folder for file in files if file.split == split})
        if len(folders) > 1:
            raise UserError(f"--source {path}: expected one folder for {split}, found {list_some(folders)}; remove one")


def _decode(path: Path, files: list[ImageFile], size: int | None, fit: images.Fit) -> list[np.ndarray]:
    """Decodes the pixels of each file, (H, W, 3) uint8, all of the same size, if there is memory for all of them."""

    def decoded(file: ImageFile) -> np.ndarray:
        image = images.decode(file.path, file.content)
        return np.asarray(image if size is None else images.fit(image, size, size, fit))

    height, width, _ = shape = decoded(files[0]).shape
    both = 2 * len(files) * height * width * 3  # the list, and the array of a split that is made from it
    what = f"--source {path}: {len(files):,} images of {height}×{width} pixels"
    images.require_memory(both, what, "use a smaller --size, or fewer images")

    def pixels_of(file: ImageFile) -> np.ndarray:
        image = decoded(file)
        if image.shape != shape:
            raise UserError(
                f"{file.path}: expected {height}×{width} pixels as in {files[0].path}, found "
                f"{image.shape[0]}×{image.shape[1]}; resize all images to one size with --size {min(height, width)}"
            )
        return image

    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
        return list(track(pool.map(pixels_of, files), "decode images", len(files)))


def _dataset_name(path: Path, classes: tuple[str, ...], train: Split, test: Split, suffixes: set[str]) -> str:
    """Returns the name of the folder or archive, or "CIFAR-10 (PNG copy)" for all of CIFAR-10, or
    "(JPEG copy)" or "(lossless copy)"."""
    complete = classes == CIFAR10.classes and (len(train.labels), len(test.labels)) == (50_000, 10_000)
    if not complete or train.images.shape[1:] != (32, 32, 3):
        whole = path.resolve()
        name = whole.name if whole.is_dir() else ARCHIVE_SUFFIX.sub("", whole.name)
        name = (whole.stem if name == whole.name and not whole.is_dir() else name).strip(". ") or "images"
        return unreserved(name)
    lossy = suffixes & {".jpg", ".jpeg", ".webp"}
    return f"CIFAR-10 ({'JPEG' if lossy else 'PNG' if suffixes == {'.png'} else 'lossless'} copy)"
