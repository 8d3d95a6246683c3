"""A dataset in memory."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runner.common.errors import UserError

RESERVED_PREFIXES = ("CIFAR-10", "SYNTHETIC-10")  # compared in upper case; the first also covers CIFAR-100


@dataclass(frozen=True)
class Split:
    """The images (N, H, W, 3) uint8 RGB and labels (N,) int64 of a split."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Source:
    """A dataset in memory.

    Attributes:
        name: name that labels all results.
        classes: class names; the index of a class is its label.
        train, test: the splits.
        provenance: where the images come from, for `dataset.json`.
        notes: messages for the user, for example about unused files.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    provenance: dict[str, Any]
    notes: tuple[str, ...] = ()


def check_name(name: str) -> None:
    """Raises UserError if a name is empty, not printable, or surrounded by spaces."""
    if not name or not name.isprintable() or name != name.strip():
        raise UserError(f"--name {name!r}: expected printable characters, without spaces around them")


def renamed(source: Source, name: str) -> Source:
    """Returns the dataset with another name.

    Raises:
        UserError: the name is reserved for another dataset, empty, not printable, or surrounded by spaces.
    """
    check_name(name)
    is_own = name == source.name or name.startswith(f"{source.name} ")  # such as "CIFAR-10 (resized)"
    if name.upper().startswith(RESERVED_PREFIXES) and not is_own:
        raise UserError(f"--name {name}: expected another name for {source.name}; this name is reserved")
    return replace(source, name=name)


def unreserved(name: str) -> str:
    """Returns the name of a file or folder as that of a dataset, not to be mistaken for one with a reserved name."""
    name = "".join(letter if letter.isprintable() else "_" for letter in name)
    return f"images of {name}" if name.upper().startswith(RESERVED_PREFIXES) else name


def named_as_jpeg_records(source: Source) -> Source:
    """Returns the dataset under a name for JPEG records: reserved names are those of the unchanged pixels."""
    reserved = source.name.upper().startswith(RESERVED_PREFIXES)
    return replace(source, name=f"JPEG records of {source.name}") if reserved else source


def limit_split(split: Split, per_class: int) -> Split:
    """Returns the first `per_class` images of each class, in their original order."""
    selected = [np.flatnonzero(split.labels == label)[:per_class] for label in np.unique(split.labels)]
    rows = np.sort(np.concatenate(selected))
    return Split(split.images[rows], split.labels[rows])


def limit_source(source: Source, per_class: int) -> Source:
    """Returns a dataset with the first `per_class` images of each class in both splits, and records the limit.

    A part of CIFAR-10 or CIFAR-100 is named so, because only the complete dataset may have its name.
    """
    train, test = limit_split(source.train, per_class), limit_split(source.test, per_class)
    is_part = len(train.labels) + len(test.labels) < len(source.train.labels) + len(source.test.labels)
    name = f"{source.name} ({per_class} per class)" if is_part and source.name.startswith("CIFAR-10") else source.name
    provenance = {**source.provenance, "limit_per_class": per_class}
    return replace(source, name=name, train=train, test=test, provenance=provenance)
