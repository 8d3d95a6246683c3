"""The official archives of CIFAR-10 and CIFAR-100 (A. Krizhevsky, 2009): hashes, files and parsers.

Pickles are loaded by an unpickler that allows only NumPy arrays.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.dataset import Split
from runner.common.errors import UserError

SIDE, PIXELS = 32, 3 * 32 * 32


@dataclass(frozen=True)
class Official:
    """A dataset with official archives.

    Attributes:
        name: name of the dataset.
        url: URL of the archive that is downloaded.
        sha256: SHA-256 of each archive, by file name.
        classes: class names; the index of a class is its label.
        binary_folder, binary_files: folder and files in the binary archive.
        python_folder, python_files: folder and files in the archive of pickles.
        python_md5: MD5 of the files in `python_folder`, as in torchvision.
        label_bytes: number of bytes before the pixels of a binary record; the last is the label.
        label_key: key of the labels in a pickle.
    """

    name: str
    url: str
    sha256: dict[str, str]
    classes: tuple[str, ...]
    binary_folder: str
    binary_files: dict[str, list[str]]
    python_folder: str
    python_files: dict[str, list[str]]
    python_md5: dict[str, str]
    label_bytes: int
    label_key: bytes

    def parse_binary(self, name: str, content: bytes) -> Split:
        """Parses binary records, each of which consists of label bytes and channel planes."""
        record = self.label_bytes + PIXELS
        if len(content) == 0 or len(content) % record:
            raise UserError(f"{name}: expected records of {record} bytes, found {len(content)} bytes in total")
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
        labels = records[:, self.label_bytes - 1]
        return Split(_planes_to_pixels(records[:, self.label_bytes :]), self._checked(name, labels))

    def parse_pickle(self, name: str, content: bytes) -> Split:
        """Parses a pickled dict that has `data` (N, 3072) uint8 and labels, without executing code in the pickle."""
        try:
            batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
            planes, labels = batch[b"data"], batch[self.label_key]
            if planes.dtype != np.uint8 or planes.shape != (len(labels), PIXELS):
                raise ValueError(f"data of shape {planes.shape} and type {planes.dtype}")
        except (pickle.UnpicklingError, KeyError, TypeError, ValueError, AttributeError, EOFError) as error:
            raise UserError(f"{name}: not a {self.name} batch ({error})") from None
        return Split(_planes_to_pixels(planes), self._checked(name, np.asarray(labels)))

    def _checked(self, name: str, labels: np.ndarray) -> np.ndarray:
        """Converts labels to int64. Raises UserError if one is out of range."""
        last = len(self.classes) - 1
        if labels.min() < 0 or labels.max() > last:
            raise UserError(f"{name}: expected labels 0 to {last}, found {labels.min()} to {labels.max()}")
        return labels.astype(np.int64)


def load_splits(
    files: dict[str, list[str]], parse: Callable[[str, bytes], Split], read: Callable[[str], bytes]
) -> tuple[Split, Split]:
    """Reads and parses the files of the training and the test split."""

    def load(split: str) -> Split:
        parts = [parse(name, read(name)) for name in files[split]]
        return Split(np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts]))

    return load("train"), load("test")


def _planes_to_pixels(planes: np.ndarray) -> np.ndarray:
    """Converts channel planes (N, 3072) to pixels (N, 32, 32, 3)."""
    return np.ascontiguousarray(planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


class _ArrayUnpickler(pickle.Unpickler):
    """Loads NumPy arrays; any other global is rejected before it is imported."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            reconstruct = np.zeros(0).__reduce__()[0]  # NumPy's own; its module is private
            return {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": reconstruct}[name]
        if (module, name) == ("_codecs", "encode"):  # newer pickles encode bytes this way
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


CIFAR10 = Official(
    name="CIFAR-10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    sha256={
        "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    },
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    binary_folder="cifar-10-batches-bin",
    binary_files={"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
    python_folder="cifar-10-batches-py",
    python_files={"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
    python_md5={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
    label_bytes=1,
    label_key=b"labels",
)
CIFAR100 = Official(
    name="CIFAR-100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    sha256={
        "cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        "cifar-100-python.tar.gz": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    },
    classes=(
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
        "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee",
        "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant",
        "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower",
        "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom",
        "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate",
        "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark",
        "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower",
        "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor", "train", "trout", "tulip",
        "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    ),
    binary_folder="cifar-100-binary",
    binary_files={"train": ["train.bin"], "test": ["test.bin"]},
    python_folder="cifar-100-python",
    python_files={"train": ["train"], "test": ["test"]},
    python_md5={"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    label_bytes=2,  # the first is the coarse label
    label_key=b"fine_labels",
)  # fmt: skip
DATASETS = (CIFAR10, CIFAR100)
BY_SOURCE = {"official": CIFAR10, "cifar100": CIFAR100}  # values of --source
