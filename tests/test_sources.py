import gzip
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import beton, cli, manifest, sources
from data_prep.dataset import named_as_jpeg_records, renamed
from data_prep.official import BY_SOURCE, CIFAR10, CIFAR100
from data_prep.sources import CIFAR10_CLASSES, Source, SourceUnreachableError
from runner.common.errors import UserError
from runner.common.files import sha256_of
from tests.support import archives


def assert_official(source: Source, contents: dict) -> None:
    for split, names in archives.PICKLE_FILES.items():
        loaded = getattr(source, split)
        np.testing.assert_array_equal(loaded.images, np.concatenate([contents[name][0] for name in names]))
        np.testing.assert_array_equal(loaded.labels, np.concatenate([contents[name][1] for name in names]))
    assert source.classes == CIFAR10_CLASSES


@pytest.mark.parametrize("make", [archives.binary_archive, archives.python_archive])
def test_official_layouts_with_a_trusted_hash(make, tmp_path: Path) -> None:
    contents = archives.batches()
    path = make(tmp_path / "mine.tar.gz", contents)
    source = sources.load(str(path), sha256=sha256_of(path))
    assert_official(source, contents)
    assert source.provenance["sha256"] == sha256_of(path)


@pytest.mark.parametrize("make", [archives.binary_archive, archives.python_archive])
@pytest.mark.parametrize("name", ["cifar-10-binary.tar.gz", "cifar-10-python.tar.gz", "renamed.tar.gz"])
def test_official_layouts_with_another_hash_are_refused(make, name: str, tmp_path: Path) -> None:
    path = make(tmp_path / name, archives.batches())
    with pytest.raises(UserError, match=sha256_of(path)):
        sources.load(str(path))


def test_a_wrong_hash_is_refused(tmp_path: Path) -> None:
    path = archives.tar(tmp_path / "images.tar", archives.image_files())
    with pytest.raises(UserError, match="expected SHA-256 0000"):
        sources.load(str(path), sha256="0" * 64)


@pytest.mark.parametrize("damage", ["one byte", "no archive"])
def test_a_wrong_hash_is_refused_before_parsing_and_what_stood_there_stays(
    damage: str, own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither archive can be parsed, and --overwrite would replace the dataset."""
    path = archives.python_archive(tmp_path / "cifar.tar.gz", archives.batches())
    expected, content = sha256_of(path), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "one byte" else b"no archive at all")
    before = {file.name: file.read_bytes() for file in own_data.iterdir()}
    words = ["prepare", "--source", str(path), "--sha256", expected, "--out", str(own_data), "--overwrite"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert (stopped.value.code, capsys.readouterr().err) == (
        2, f"data_prep: --source {path}: expected SHA-256 {expected}, found {sha256_of(path)}; fetch the file again\n",
    )  # fmt: skip
    assert {file.name: file.read_bytes() for file in own_data.iterdir()} == before


@pytest.mark.parametrize("name", sources.BY_SOURCE)
def test_a_named_source_is_refused_by_its_hash_before_it_is_parsed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = sources.BY_SOURCE[name]
    served = tmp_path / Path(dataset.url).name
    served.write_bytes(b"no archive at all")
    monkeypatch.setitem(sources.BY_SOURCE, name, replace(dataset, url=served.as_uri()))
    expected = dataset.sha256[served.name]
    with pytest.raises(UserError, match=f"expected SHA-256 {expected}, received {sha256_of(served)}"):
        sources.load(name, downloads=tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


def test_the_hashes_of_cifar100() -> None:
    assert sorted(sources.BY_SOURCE["cifar100"].sha256.values()) == [
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    ]


def trust_md5(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in files.items():
        monkeypatch.setitem(CIFAR10.python_md5, Path(name).name, hashlib.md5(content).hexdigest())


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("where", ["archive", "torchvision root"])
def test_a_malicious_pickle_is_refused_and_never_runs(where: str, tmp_path, monkeypatch) -> None:
    marker = tmp_path / "it-ran"
    malicious = pickle.dumps({b"data": Malicious(marker), b"labels": []}, protocol=2)
    files = {f"{archives.TORCHVISION_FOLDER}/{n}": archives.pickled(*b) for n, b in archives.batches().items()}
    files[f"{archives.TORCHVISION_FOLDER}/data_batch_3"] = malicious
    if where == "archive":
        path = archives.tar(tmp_path / "x.tar.gz", files)
        sha256 = sha256_of(path)
    else:
        path, sha256 = archives.folder(tmp_path / "root", files), None
        trust_md5(files, monkeypatch)
    with pytest.raises(UserError, match="data_batch_3: not a CIFAR-10 batch"):
        sources.load(str(path), sha256=sha256)
    assert not marker.exists()


def test_torchvision_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = archives.batches()
    files = {f"{archives.TORCHVISION_FOLDER}/{n}": archives.pickled(*b) for n, b in contents.items()}
    root = archives.folder(tmp_path, files)
    with pytest.raises(UserError, match="expected MD5"):
        sources.load(str(root))
    trust_md5(files, monkeypatch)
    assert_official(sources.load(str(root)), contents)
    (root / archives.TORCHVISION_FOLDER / "test_batch").unlink()
    with pytest.raises(UserError, match="test_batch"):
        sources.load(str(root))


def test_the_md5_sums_match_torchvision() -> None:
    from torchvision import datasets

    for dataset, theirs in ((CIFAR10, datasets.CIFAR10), (CIFAR100, datasets.CIFAR100)):
        assert dict([*theirs.train_list, *theirs.test_list]) == dataset.python_md5
        assert theirs.base_folder == dataset.python_folder
        assert len(set(dataset.classes)) == len(dataset.classes) == int(dataset.name.removeprefix("CIFAR-"))


@pytest.mark.parametrize("layout", ["binary", "python"])
def test_cifar100(layout: str, tmp_path: Path) -> None:
    files, contents = archives.cifar100(layout)
    path = archives.tar(tmp_path / f"cifar-100-{layout}.tar.gz", files)
    with pytest.raises(UserError, match=r"expected SHA-256 (58a81|85cd4)"):
        sources.load(str(path))
    loaded = sources.load(str(path), sha256=sha256_of(path))
    assert loaded.classes == CIFAR100.classes
    for split, (images, labels) in contents.items():
        np.testing.assert_array_equal(getattr(loaded, split).images, images)
        np.testing.assert_array_equal(getattr(loaded, split).labels, labels)


@pytest.mark.parametrize("prefix", ["", "cifar/"])
@pytest.mark.parametrize("make", [archives.tar, archives.zipped, archives.folder])
def test_image_folders_and_archives(make, prefix: str, tmp_path: Path) -> None:
    files = archives.image_files(prefix=prefix)
    files[f"{prefix}README.txt"] = b"not an image"
    source = sources.load(str(make(tmp_path / "images.x", files)))
    assert source.classes == CIFAR10_CLASSES
    assert source.train.images.shape == (30, 32, 32, 3)
    expected, _ = archives.pixels(3, 100 * 4 + 1)
    np.testing.assert_array_equal(source.test.images[source.test.labels == 4], expected)
    assert source.name == ("images.x" if make is archives.folder else "images")


def test_limit_per_class(tmp_path: Path) -> None:
    path = archives.folder(tmp_path, archives.image_files())
    source = sources.load(str(path), limit_per_class=2)
    assert np.bincount(source.train.labels).tolist() == [2] * 10
    assert source.provenance["limit_per_class"] == 2
    with pytest.raises(UserError, match="--limit-per-class 0"):
        sources.load(str(path), limit_per_class=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train/cat/9.png", b"garbage", "train/cat/9.png: not a readable image"),
        ("train/cat/9.png", archives.png(np.zeros((40, 30, 3), np.uint8)), "train/cat/9.png: expected"),
        ("train/zebra/1.png", archives.png(np.zeros((32, 32, 3), np.uint8)), "no image of 'zebra'"),
    ],
)
def test_invalid_images_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = archives.folder(tmp_path, archives.image_files() | {name: content})
    with pytest.raises(UserError, match=message):
        sources.load(str(path))


def test_members_outside_the_archive_and_links_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in archives.image_files().items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("train/cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("../train/cat/up.png"))
    source = sources.load(str(path))
    assert len(source.train.labels) == 30
    assert source.notes == ("not used: train/cat/link.png, ../train/cat/up.png",)


def hard_linked(path: Path, links: dict[str, str]) -> Path:
    """A tar archive of one image per class, and of hard links to some of them."""
    files = archives.image_files(1, classes=("cat", "dog"))
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in links.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, target
            archive.addfile(link)
    return path


def test_a_hard_link_is_the_file_that_it_points_to(tmp_path: Path) -> None:
    """As tar stores equal files of one folder; the second link points to the first."""
    links = {"train/dog/1.png": "./train/cat/0000.png", "train/dog/2.png": "train/dog/1.png"}
    source = sources.load(str(hard_linked(tmp_path / "x.tar.gz", links)))
    assert source.train.labels.tolist() == [0, 1, 1, 1]
    assert source.notes == ()
    for row in (2, 3):
        np.testing.assert_array_equal(source.train.images[row], source.train.images[0])


@pytest.mark.parametrize("target", ["/etc/passwd", "../x.png", "train/cat/none.png", "train/cat/9.png", "train"])
def test_a_hard_link_out_of_the_archive_is_refused(target: str, tmp_path: Path) -> None:
    path = hard_linked(tmp_path / "x.tar.gz", {"train/cat/9.png": target})
    with pytest.raises(UserError, match=r"'train/cat/9\.png': expected a hard link to a file before it in the archive"):
        sources.load(str(path))


@pytest.mark.parametrize("content", [b"", b"not an archive", b"\x1f\x8b broken gzip"])
def test_a_file_that_is_not_an_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.tar.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a complete tar or zip archive"):
        sources.load(str(path))


def packed(tmp_path: Path, compression: str) -> bytes:
    content = archives.tar(tmp_path / "images.tar.gz", archives.image_files()).read_bytes()
    return content if compression else gzip.decompress(content)


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_of_a_damaged_tar_no_image_is_lost_in_silence(compression: str, tmp_path: Path) -> None:
    """tarfile takes a damaged header for the end, and does not read the checksum of a compressed file."""
    sound, path = packed(tmp_path, compression), tmp_path / f"damaged.tar{compression}"
    rng = np.random.default_rng(0)
    cuts = [sound[:end] for end in (len(sound) // 2, len(sound) // 512 // 3 * 512, len(sound) - 1100)]
    flips = []
    for place in rng.integers(0, len(sound), 20):
        content = bytearray(sound)
        content[place] ^= 0x41
        flips.append(bytes(content))
    for content in [*cuts, *flips]:
        path.write_bytes(content)
        try:
            source = sources.load(str(path))
        except UserError:
            continue
        assert (len(source.train.labels), len(source.test.labels)) == (30, 30)
        assert not compression, "the checksum was not read"


def test_what_a_zip_may_hold_beside_images(tmp_path: Path) -> None:
    """A member twice, a name that is no text, and a compression that Python lacks."""
    files = archives.image_files()
    path = archives.zipped(tmp_path / "x.zip", files)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(next(iter(files)), b"again")
    with pytest.raises(UserError, match="expected once in the archive, found twice"):
        sources.load(str(path))
    path = archives.zipped(tmp_path / "y.zip", {**files, "train/a\nb/0.png": files[next(iter(files))]})
    with pytest.raises(UserError, match="expected printable characters in UTF-8 in the name of a class"):
        sources.load(str(path))
    content = bytearray(archives.zipped(tmp_path / "z.zip", files).read_bytes())
    for start in (content.index(b"PK\x03\x04") + 6, content.index(b"PK\x01\x02") + 8):
        content[start] |= 1  # the flag of a password
    (tmp_path / "z.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"encrypted.*without a password"):
        sources.load(str(tmp_path / "z.zip"))


@pytest.mark.parametrize(
    ("folder", "name"),
    [("flowers.v2", "flowers.v2"), (".hidden", "hidden"), ("synthetic-10", "images of synthetic-10"),
     ("Cifar-10", "images of Cifar-10"), ("...", "images")],
)  # fmt: skip
def test_a_folder_names_its_dataset(folder: str, name: str, tmp_path: Path) -> None:
    source = sources.load(str(archives.folder(tmp_path / folder, archives.image_files(per_class=1))))
    assert source.name == name
    for other in ("CIFAR-10 mine", " x", "x\ny", "", " ", "CIFAR-100"):
        with pytest.raises(UserError, match=r"--name"):
            renamed(source, other)
    assert renamed(source, "mine").name == "mine"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("CIFAR-10", True), ("CIFAR-10 (resized)", True), ("mine", True), ("CIFAR-100", False), ("CIFAR-10x", False),
     ("cifar-10", False), ("synthetic-10", False)],
)  # fmt: skip
def test_cifar10_is_never_called_another_dataset(name: str, allowed: bool) -> None:
    images = np.zeros((1, 32, 32, 3), np.uint8)
    split = sources.Split(images, np.zeros(1, np.int64))
    source = sources.Source("CIFAR-10", sources.CIFAR10_CLASSES, split, split, {})
    if allowed:
        assert renamed(source, name).name == name
    else:
        with pytest.raises(UserError, match=f"--name {name}: expected another name for CIFAR-10"):
            renamed(source, name)


def test_only_complete_official_data_has_an_official_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the manifest, and then in reports: not a part of it, nor an archive or a folder that is called so."""
    path = archives.binary_archive(tmp_path / "CIFAR-10", archives.batches())
    assert sources.load(str(path), sha256=sha256_of(path)).name == "images of CIFAR-10"
    monkeypatch.setitem(CIFAR10.sha256, path.name, sha256_of(path))
    complete, part = sources.load(str(path)), sources.load(str(path), limit_per_class=1)
    assert sources.load(str(path), limit_per_class=1000).name == complete.name == "CIFAR-10"
    with pytest.raises(UserError, match=r"--name CIFAR-10: expected another name for CIFAR-10 \(1 per class\)"):
        renamed(part, "CIFAR-10")
    compressed = named_as_jpeg_records(complete)
    assert compressed.name == "JPEG records of CIFAR-10"
    with pytest.raises(UserError, match=r"--name CIFAR-10: expected another name for JPEG records of CIFAR-10"):
        renamed(compressed, "CIFAR-10")
    assert named_as_jpeg_records(renamed(complete, "mine")).name == "mine"
    beton.write(part, tmp_path / "data")
    assert manifest.read(tmp_path / "data").name == "CIFAR-10 (1 per class)"
    others = archives.folder(tmp_path / "other" / "CIFAR-10", archives.image_files(1, classes=("cat", "dog")))
    assert sources.load(str(others)).name == "images of CIFAR-10"


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = archives.tar(tmp_path / "x.tar.gz", archives.image_files())
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match="not a complete tar or zip archive"):
        sources.load(str(path))


def test_a_failed_download_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(SourceUnreachableError, match="cannot reach"):
        sources.download(tmp_path / "d" / "cifar-10-binary.tar.gz", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    assert list((tmp_path / "d").iterdir()) == []


@pytest.fixture
def served(tmp_path: Path):
    """The URL of a small archive in the official layout, served on the loopback interface, and its path."""
    folder = tmp_path / "served"
    folder.mkdir()
    path = archives.binary_archive(folder / "cifar-10-binary.tar.gz", archives.batches())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{path.name}", path
    server.shutdown()


def test_download_checks_the_hash_and_keeps_the_file(served, tmp_path: Path, monkeypatch) -> None:
    url, original = served
    target = tmp_path / "downloads" / original.name
    with pytest.raises(UserError, match="received"):
        sources.download(target, url)
    assert list(target.parent.iterdir()) == []
    monkeypatch.setitem(CIFAR10.sha256, original.name, sha256_of(original))
    monkeypatch.setitem(BY_SOURCE, "official", replace(CIFAR10, url=url))
    source = sources.load("official", downloads=target.parent)
    assert_official(source, archives.batches())
    assert source.name == "CIFAR-10"
    original.unlink()  # the second call downloads nothing
    assert_official(sources.load("official", downloads=target.parent), archives.batches())


@pytest.mark.images
def test_the_jpeg_copy_is_named_so(source: Source) -> None:
    assert source.name == ("CIFAR-10 (JPEG copy)" if os.environ.get("CIFAR10_IMAGES") else "synthetic-10")
    assert source.train.images.shape == (50_000, 32, 32, 3)
    assert np.bincount(source.test.labels).tolist() == [1_000] * 10
