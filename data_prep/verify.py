"""Decodes every record of a prepared dataset by FFCV itself and compares it with manifest and source."""

from pathlib import Path

import numpy as np

from data_prep import manifest as manifests
from data_prep.beton import moments
from data_prep.console import UserError, progress
from data_prep.manifest import Manifest
from data_prep.sources import Source, Split

BATCH = 1_000


def verify(folder: Path, source: Source | None = None) -> Manifest:
    """Verifies a prepared folder.

    Checks, in this order: the manifest's form; size and SHA-256 of each file; every record decoded, with its
    label in range; images per class, mean and standard deviation against the manifest; and, where a source
    is given, every image and label against it, bit by bit.

    Raises:
        UserError: names the first thing that differs.
    """
    manifest = manifests.read(folder)
    manifests.check_files(folder, manifest)
    for name in manifests.SPLITS:
        decoded = decode(folder / manifest.splits[name].file, manifest)
        counts = tuple(np.bincount(decoded.labels, minlength=len(manifest.classes)).tolist())
        if counts != manifest.splits[name].images_per_class:
            stated = manifest.splits[name].images_per_class
            raise UserError(f"{folder}/{name}.beton: {stated} images per class in the manifest, {counts} found")
        if name == "train" and not np.allclose(moments(decoded), (manifest.mean, manifest.std), rtol=1e-9):
            raise UserError(f"{folder}: mean and standard deviation differ from the manifest; prepare it again")
        if source is not None:
            _compare(folder, name, decoded, getattr(source, name))
    if source is not None and source.classes != manifest.classes:
        raise UserError(f"{folder}: classes {manifest.classes}, in the source {source.classes}")
    return manifest


def decode(path: Path, manifest: Manifest) -> Split:
    """Every record of a .beton, decoded by FFCV's Loader in file order.

    The caller has checked the file's hash: FFCV reads beyond its memory in a damaged file.
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
    torch.set_num_threads(threads)  # ffcv sets it, when it is imported and again when an epoch starts
    split = Split(np.concatenate(images), np.concatenate(labels))
    if split.images.shape[1:] != manifest.image_shape:
        raise UserError(f"{path}: images of {split.images.shape[1:]}, in the manifest {manifest.image_shape}")
    if split.labels.min() < 0 or split.labels.max() >= len(manifest.classes):
        raise UserError(f"{path}: expected labels below {len(manifest.classes)}, found {split.labels.max()}")
    return split


def _compare(folder: Path, name: str, decoded: Split, source: Split) -> None:
    if decoded.images.shape != source.images.shape:
        raise UserError(f"{folder}/{name}.beton: {len(decoded.labels)} images, in the source {len(source.labels)}")
    same = (decoded.images == source.images).all(axis=(1, 2, 3)) & (decoded.labels == source.labels)
    if not same.all():
        first = int(np.argmin(same))
        raise UserError(f"{folder}/{name}.beton: {int((~same).sum())} records differ, first record {first}")
