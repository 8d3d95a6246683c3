"""Decodes every record of a prepared dataset with FFCV and compares it with the manifest and the source."""

from pathlib import Path

import numpy as np

from data_prep import manifest as manifests
from data_prep.beton import mean_and_std
from data_prep.manifest import Manifest
from data_prep.sources import Source, Split
from runner.common.console import progress
from runner.common.errors import UserError

BATCH = 1_000


def verify(folder: Path, source: Source | None = None) -> Manifest:
    """Verifies a prepared folder.

    Checks, in this order: the format of the manifest; size and SHA-256 of each file; every decoded record, with its
    label in range; images per class, mean and standard deviation against the manifest; and with a source, that every
    image and label is bit-identical.

    Raises:
        UserError: the first difference.
    """
    manifest = manifests.read(folder)
    manifests.check_files(folder, manifest)
    for name in manifests.SPLITS:
        decoded = decode(folder / manifest.splits[name].file, manifest)
        counts = tuple(np.bincount(decoded.labels, minlength=len(manifest.classes)).tolist())
        if counts != manifest.splits[name].images_per_class:
            expected = manifest.splits[name].images_per_class
            raise UserError(f"{folder}/{name}.beton: expected {expected} images per class, found {counts}")
        if name == "train" and not np.allclose(mean_and_std(decoded), (manifest.mean, manifest.std), rtol=1e-9):
            raise UserError(f"{folder}: mean and standard deviation differ from the manifest; prepare it again")
        if source is not None:
            _compare(folder, name, decoded, getattr(source, name))
    if source is not None and source.classes != manifest.classes:
        raise UserError(f"{folder}: expected the source's classes {source.classes}, found {manifest.classes}")
    return manifest


def decode(path: Path, manifest: Manifest) -> Split:
    """Decodes every record of a .beton file with FFCV's Loader, in file order.

    The caller has checked the hash of the file: in a damaged file FFCV reads out of bounds.
    """
    import torch

    threads = torch.get_num_threads()
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    loader = Loader(
        str(path),
        batch_size=BATCH,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
    )
    images, labels = [], []
    with progress(f"decode {path.name}", loader.reader.num_samples) as advance:
        for image, label in loader:
            images.append(np.array(image))
            labels.append(np.array(label).reshape(-1))
            advance(len(label))
    torch.set_num_threads(threads)  # ffcv changes it on import and at the start of each epoch
    split = Split(np.concatenate(images), np.concatenate(labels))
    if split.images.shape[1:] != manifest.image_shape:
        raise UserError(f"{path}: expected images of {manifest.image_shape}, found {split.images.shape[1:]}")
    if split.labels.min() < 0 or split.labels.max() >= len(manifest.classes):
        found = f"{split.labels.min()} to {split.labels.max()}"
        raise UserError(f"{path}: expected labels 0 to {len(manifest.classes) - 1}, found {found}")
    return split


def _compare(folder: Path, name: str, decoded: Split, source: Split) -> None:
    """Raises UserError if a decoded split differs from the source."""
    if decoded.images.shape != source.images.shape:
        raise UserError(f"{folder}/{name}.beton: expected {len(source.labels)} images, found {len(decoded.labels)}")
    same = (decoded.images == source.images).all(axis=(1, 2, 3)) & (decoded.labels == source.labels)
    if not same.all():
        first = int(np.argmin(same))
        raise UserError(f"{folder}/{name}.beton: {int((~same).sum())} records differ, first record {first}")
