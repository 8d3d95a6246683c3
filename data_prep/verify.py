"""Reads every record of a prepared dataset and compares it with the manifest and the source."""

from pathlib import Path

import numpy as np

from data_prep import beton_reader
from data_prep import manifest as manifests
from data_prep.beton import mean_and_std, same_records
from data_prep.dataset import Source, Split
from data_prep.manifest import Manifest
from runner.common.errors import UserError


def verify(folder: Path, source: Source | None = None) -> Manifest:
    """Verifies a prepared folder.

    Checks, in this order: the format of the manifest; the size and SHA-256 of each file; its layout, including that
    every address and label is in range, and the number of images per class; that every record can be decoded; the mean
    and standard deviation against the manifest; and, if a source is given, that every image and label is bit-identical
    to it, or for JPEG records, to the source's image compressed again.

    Raises:
        UserError: a check failed; the message describes the first difference.
    """
    manifest = manifests.read(folder)
    manifests.check_files(folder, manifest)
    for name in manifests.SPLITS:
        split = manifest.splits[name]
        decoded = Split(*beton_reader.read_split(folder / split.file, split, manifest))
        if name == "train" and not np.allclose(mean_and_std(decoded), (manifest.mean, manifest.std), rtol=1e-9):
            raise UserError(f"{folder}: mean and standard deviation differ from the manifest; prepare it again")
        if source is not None:
            _compare(folder, name, manifest, decoded, getattr(source, name))
    if source is not None and source.classes != manifest.classes:
        raise UserError(f"{folder}: expected the source's classes {source.classes}, found {manifest.classes}")
    return manifest


def _compare(folder: Path, name: str, manifest: Manifest, decoded: Split, source: Split) -> None:
    """Raises UserError if a split differs from the source."""
    if decoded.images.shape != source.images.shape:
        expected, found = ("×".join(map(str, part.images.shape)) for part in (source, decoded))
        raise UserError(f"{folder}/{name}.beton: expected images of shape {expected}, found {found}")
    split = manifest.splits[name]
    same = same_records(folder / split.file, manifest, split, decoded, source)
    if not same.all():
        first = int(np.argmin(same))
        encoder = manifest.versions.get("opencv-python")
        hint = f"; they were compressed by opencv-python {encoder}, expected here too" if encoder else ""
        raise UserError(f"{folder}/{name}.beton: {int((~same).sum())} records differ, first record {first}{hint}")
