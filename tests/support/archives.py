"""Small datasets in every layout that data_prep reads, made from arrays."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.official import CIFAR10, CIFAR100

BINARY_FILES, PICKLE_FILES = CIFAR10.binary_files, CIFAR10.python_files
TORCHVISION_FOLDER, CIFAR10_CLASSES = CIFAR10.python_folder, CIFAR10.classes


def pixels(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images (N, 32, 32, 3) and labels that cover every class."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10


def batches(per_file: int = 20) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the images and labels of each of the six official files."""
    names = [name for split in PICKLE_FILES.values() for name in split]
    return {name: pixels(per_file, seed) for seed, name in enumerate(names)}


def planes(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def binary_archive(path: Path, contents: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    files = {}
    for name, (images, labels) in contents.items():
        records = np.concatenate([labels[:, None].astype(np.uint8), planes(images)], axis=1)
        files[f"cifar-10-batches-bin/{name}.bin"] = records.tobytes()
    assert set(BINARY_FILES["train"]) < {Path(name).name for name in files}
    return tar(path, files)


def pickled(images: np.ndarray, labels: np.ndarray) -> bytes:
    return pickle.dumps({b"data": planes(images), b"labels": labels.tolist()}, protocol=2)


def python_archive(path: Path, contents: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    return tar(path, {f"{TORCHVISION_FOLDER}/{name}": pickled(*batch) for name, batch in contents.items()})


def cifar100(layout: str) -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Returns the files of a small archive in a layout of CIFAR-100, and its images and labels by split."""
    contents = {split: (pixels(100, seed)[0], np.arange(100)) for seed, split in enumerate(("train", "test"))}
    files = {}
    for split, (images, labels) in contents.items():
        if layout == "binary":
            coarse_and_fine = np.stack([labels // 5, labels], axis=1).astype(np.uint8)
            files[f"{CIFAR100.binary_folder}/{split}.bin"] = np.hstack([coarse_and_fine, planes(images)]).tobytes()
        else:
            batch = {b"data": planes(images), b"coarse_labels": [], b"fine_labels": labels.tolist()}
            files[f"{CIFAR100.python_folder}/{split}"] = pickle.dumps(batch, protocol=2)
    return files, contents


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def image_files(per_class: int = 3, classes: tuple[str, ...] = CIFAR10_CLASSES, prefix: str = "") -> dict[str, bytes]:
    files = {}
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            images, _ = pixels(per_class, 100 * label + (split == "test"))
            for i, image in enumerate(images):
                files[f"{prefix}{split}/{name}/{i:04}.png"] = png(image)
    return files


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path
