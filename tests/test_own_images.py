"""Image folders of any classes and sizes, from `prepare` to `predict`."""

import contextlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import image_folder, images, sources
from runner import experiments
from runner.common import memory
from runner.common.errors import UserError
from runner.common.files import files_below
from runner.config.recipe import Architecture
from runner.run.folder import Run
from runner.training.model import build_for
from tests.support import archives
from tests.support.configs import CONFIG
from tests.support.processes import module, runner

CLASSES = ("ant", "bee", "cat", "dog", "elk")
ALL = experiments.load()
BY_FACTORY = {experiment.architecture.factory: experiment for experiment in ALL.values()}


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def drawn(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def folder_of(path: Path, per_class: int = 4, size: tuple[int, int] | None = (32, 32)) -> Path:
    """An image folder of five classes; images of many sizes and formats where `size` is None."""
    files = {}
    for split in ("train", "test"):
        for label, name in enumerate(CLASSES):
            for k in range(per_class):
                image = drawn(k, *(size or (20 + 7 * k, 50 - 3 * label)))
                form = "PNG" if size else ("PNG", "JPEG", "WEBP", "BMP")[k % 4]
                files[f"{split}/{name}/{'' if size else 'below/'}{k}.{form.lower()}"] = encoded(image, form)
    return archives.folder(path, files)


# --- decoding -------------------------------------------------------------------------------------------


def test_sixteen_bits_of_gray_are_scaled() -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    decoded = np.asarray(images.decode("x", encoded(Image.fromarray(values))))
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(decoded, np.stack([expected] * 3, axis=2))


def test_a_photograph_with_a_preview_is_the_photograph() -> None:
    """Cameras append previews to a JPEG file (MPO)."""
    content = encoded(drawn(1, 16, 16), "MPO", save_all=True, append_images=[drawn(0, 16, 16)])
    decoded, alone = images.decode("x", content), images.decode("x", encoded(drawn(1, 16, 16), "JPEG"))
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(alone))


def test_images_are_upright() -> None:
    image = drawn(0, 8, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    decoded = images.decode("x", encoded(image, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(decoded), np.rot90(np.asarray(image), 3))


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes], rows: int = 1) -> bytes:
    """A PNG file of black RGB pixels, with more chunks, and with the data of few rows."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(rows * (1 + 3 * width)), 9)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return content


BOMB = zlib.compress(bytes(100 << 20), 9)  # 100 kB of 100 MiB


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_color_modes_are_converted(mode: str) -> None:
    """To what Pillow's conversion of the file gives; alpha is dropped."""
    image = drawn(1).convert(mode)
    content = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(images.decode("x", content)), np.asarray(expected))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x: not a readable image (the file is empty)"),
        (b"garbage", "x: not a readable image (expected PNG, JPEG"),
        (encoded(drawn(0))[:200], "x: not a readable image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x: not a readable image (expected PNG"),
        (png_of(4, 4, (b"zTXt", b"a\0\0" + BOMB), rows=4), "x: not a readable image (Decompressed data too large"),
        (
            png_of(4, 4, (b"iTXt", b"a\0\1\0\0\0" + BOMB), rows=4),
            "x: not a readable image (Decompressed data too large",
        ),
        (png_of(4, 4, (b"iCCP", b"a\0\0" + BOMB), rows=4), "x: not a readable image (Decompressed data too large"),
        (png_of(13_000, 13_000), "x: 13000×13000 pixels; expected at most 64,000,000"),  # 483 MiB
        (encoded(Image.new("1", (20_000, 20_000))), "x: 20000×20000 pixels; expected at most 64,000,000"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point pixels"),
        (encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "found 32; convert it"),
        (encoded(drawn(0), "GIF", save_all=True, append_images=[drawn(1)]), "found an animation"),
    ],
)
def test_what_is_no_image_is_reported(content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=r"^x: ") as error:
        images.decode("x", content)
    assert message in str(error.value)
    assert "BytesIO" not in str(error.value)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_images_are_reported(data: st.DataObject) -> None:
    """A decoded image, or a UserError; nothing else."""
    content = bytearray(encoded(drawn(2, 16, 16), data.draw(st.sampled_from(images.FORMATS))))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UserError):
        assert images.decode("x", bytes(content[: data.draw(st.integers(0, len(content)))])).mode == "RGB"


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_images_are_fit_to_a_size(fit: images.Fit) -> None:
    """A wide image: its ends are cut, or black bars are added above and below, or it is squeezed."""
    wide = Image.new("RGB", (64, 32), "white")
    wide.paste("red", (0, 0, 16, 32))
    pixels = np.asarray(images.fit(wide, 32, 32, fit))
    assert pixels.shape == (32, 32, 3)
    red, black = (pixels[16, :, 1] < 128).sum(), (pixels == 0).all(2).sum()
    assert (int(red), int(black)) == {"crop": (0, 0), "pad": (8, 512), "stretch": (8, 0)}[fit]


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.sampled_from(["crop", "pad", "stretch"]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_size_is_fit_to_any_other(width: int, height: int, side: int, fit: images.Fit) -> None:
    assert images.fit(Image.new("RGB", (width, height), "white"), side, side, fit).getextrema() != ((0, 0),) * 3


# --- folders --------------------------------------------------------------------------------------------


def load(path: Path, **options: object) -> sources.Source:
    return sources.load(str(path), **options)


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    path = folder_of(tmp_path, size=None)
    with pytest.raises(UserError, match=r"expected \d+×\d+ pixels as in .*; resize all images to one size with --size"):
        load(path)
    source = load(path, size=24)
    assert source.classes == CLASSES
    assert source.train.images.shape == source.test.images.shape == (20, 24, 24, 3)
    assert (source.provenance["size"], source.provenance["fit"]) == (24, "crop")
    assert source.notes == ()


@pytest.mark.parametrize(
    ("free", "options", "message"),
    [
        (100_000, {}, "expected image files that fit into 0.0 GiB of free memory, found more; use fewer"),
        (200_000, {}, "40 images of 32×32 pixels need 0.0 GiB of memory, 0.0 GiB free; use a smaller --size, or fewer"),
        (2**30, {"size": 4096}, "40 images of 4096×4096 pixels need 3.8 GiB of memory, 1.0 GiB free; use a smaller"),
    ],
    ids=["files", "pixels", "resized"],
)
def test_a_folder_that_does_not_fit_into_memory_is_refused(
    free: int, options: dict[str, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is decoded: each image is small enough, but not all of them together."""
    path = folder_of(tmp_path)
    monkeypatch.setattr(memory, "available", lambda: free)
    monkeypatch.setattr(image_folder, "track", lambda *_: pytest.fail("images were decoded"))
    with pytest.raises(UserError) as refused:
        load(path, **options)
    assert message in str(refused.value)


def test_the_memory_that_is_free_is_that_of_the_cgroup_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**20 < memory.available() < 2**50
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n", "/proc/self/cgroup": "0::/job\n"}
    files |= {"/sys/fs/cgroup/job/memory.max": "max\n", "/sys/fs/cgroup/job/memory.current": "1000\n"}

    def read_text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    files["/sys/fs/cgroup/job/memory.stat"] = "anon 1\ninactive_file 100\nactive_file 50\n"
    assert memory.available() == 8192
    files["/sys/fs/cgroup/job/memory.max"] = "5000\n"
    assert memory.available() == 4150  # the cache of files is freed when it is needed
    files["/proc/self/cgroup"] = "0::/job/step/task\n"  # whose own limit is that of the job
    files["/sys/fs/cgroup/job/step/memory.max"] = "max\n"
    assert memory.available() == 4150


def test_a_file_that_is_too_large_for_an_image_is_not_read(tmp_path: Path) -> None:
    path = folder_of(tmp_path)
    with (path / "train" / "ant" / "0.png").open("wb") as file:
        file.truncate(2**40)  # of a size that no memory has
    with pytest.raises(
        UserError, match=r"0\.png: expected an image file of at most 67108864 bytes, found a larger one"
    ):
        load(path)


def test_every_file_is_used_or_counted(tmp_path: Path) -> None:
    path = folder_of(tmp_path)
    extra = {"README.txt": b"", "train/x.png": encoded(drawn(0)), "train/ant/notes.csv": b"", "val/ant/0.png": b"",
             "other/place/0.png": b""}  # fmt: skip
    archives.folder(path, extra)
    source = load(path)
    assert len(source.train.labels) == len(source.test.labels) == 20
    (note,) = source.notes
    assert note.startswith("not used: README.txt, ")
    assert note.endswith(" and 2 more")


PNG = encoded(drawn(0, 4, 4))
PART = st.sampled_from(["train", "Test", "val", "valid", "ant", "bee", ".cache", "__MACOSX", "deep", "é"])
FILE_NAME = st.sampled_from(["0.png", "1.PNG", "2.jpeg", "notes.txt", ".png", "._0.png", "no-suffix"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sets(st.builds(lambda parts, name: "/".join([*parts, name]), st.lists(PART, max_size=4), FILE_NAME)))
def test_of_any_layout_every_file_is_used_or_counted(extra: set[str]) -> None:
    """Or the layout is refused in one line."""
    names = {f"{split}/{name}/sound.png" for split in ("train", "test") for name in ("ant", "bee")} | extra
    members = [(name, lambda: PNG) for name in sorted(names)]
    try:
        source = image_folder.load(Path("folder"), members, {}, None, None)
    except UserError:
        return
    used = len(source.train.labels) + len(source.test.labels)
    unused = 0
    for note in source.notes:
        listed, _, more = note.removeprefix("not used: ").partition(" and ")
        unused += len(listed.split(", ")) + (int(more.removesuffix(" more")) if more else 0)
    assert used + unused == len(names)


def test_links_to_folders_are_read_and_a_circle_ends(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "mine")
    (path / "train" / "ant").rename(tmp_path / "elsewhere")
    (path / "train" / "ant").symlink_to(tmp_path / "elsewhere")
    (path / "train" / "bee" / "up").symlink_to(path)
    (path / "train" / "gone.png").symlink_to(tmp_path / "nowhere")
    source = load(path)
    assert len(source.train.labels) == len(source.test.labels) == 20
    assert source.notes == ("not used: train/gone.png",)


def test_links_between_folders_end(tmp_path: Path) -> None:
    path = folder_of(tmp_path, per_class=1)
    for name, other in (("ant", "bee"), ("bee", "cat"), ("cat", "ant")):
        for k in range(2):
            (path / "train" / name / f"link{k}").symlink_to(path / "train" / other)
    assert len(load(path).train.labels) < 100


def test_a_link_to_itself_is_a_file_and_deep_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    assert files_below(tmp_path) == [tmp_path / "link"]
    make = "for _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')"  # a path of this length cannot be given
    subprocess.run([sys.executable, "-c", f"import os\n{make}"], cwd=tmp_path, check=True)
    with pytest.raises(UserError, match="nested too deep"):
        files_below(tmp_path)
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # pytest's own removal is recursive


def test_a_folder_that_cannot_be_read_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, scandir = folder_of(tmp_path), os.scandir

    def locked(folder: Path):
        if Path(folder).name == "bee":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(UserError, match=r"bee: cannot be read \(Permission denied\)"):
        load(path)


def test_figures_of_odd_and_of_many_classes(tmp_path: Path) -> None:
    """A formula that is none, numbers, two lines, and more classes than a matrix can have numbers for."""
    from runner.tracking import figures

    for classes in ([r"US$ \\frac{$", "10", "two\nlines, \udcff"], [str(k) for k in range(200)]):
        run, count = Run(tmp_path / str(len(classes))), len(classes)
        run.run_json.parent.mkdir(parents=True)
        dataset = msgspec.structs.replace(CONFIG.dataset, classes=classes, name="two\nlines")
        config = msgspec.structs.replace(CONFIG, dataset=dataset)
        confusion, images = np.eye(count, dtype=int), np.zeros((count, 40, 30, 3), np.uint8)
        for path in figures.draw(run, config, confusion.tolist(), np.eye(count), np.arange(count), images[:32]):
            with Image.open(path) as picture:
                assert min(picture.size) > 200
                assert len(picture.getcolors(2**20)) > 2


def test_several_folders_of_a_split_are_refused(tmp_path: Path) -> None:
    path = folder_of(tmp_path)
    (path / "test").rename(path / "val")
    shutil.copytree(path / "val", path / "valid")
    with pytest.raises(UserError, match=r"expected one folder for val, found val, valid; remove one"):
        load(path)


def test_val_is_the_test_split_where_there_is_none(tmp_path: Path) -> None:
    path = folder_of(tmp_path)
    (path / "test").rename(path / "val")
    source = load(path)
    assert len(source.test.labels) == 20
    assert "val/ is used as the test split" in source.notes[0]


def test_datasets_side_by_side_are_not_merged(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder_of(tmp_path / name)
    with pytest.raises(UserError, match=r"contains several datasets \(one, two\); give the folder of one"):
        load(tmp_path)
    assert len(load(tmp_path / "one").train.labels) == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "synthetic", "--sha256", "0"], "--sha256: expected with an archive"),
        (["--source", "FOLDER", "--sha256", "0"], "--sha256: expected with an archive"),
        (["--source", "synthetic", "--size", "32"], "--size 32: expected with an image folder"),
        (["--source", "FOLDER", "--fit", "pad"], "--fit pad: expected with --size"),
        (["--source", "FOLDER", "--name", ""], "--name '': expected a value"),
        (["--source", "FOLDER", "--size", "0"], "--size 0: expected"),
        (["--source", "FOLDER", "--seed", "0"], "--seed 0: expected with --source synthetic"),
        (["--source", "FOLDER", "--name", "CIFAR-10 of mine"], "expected another name for folder"),
        (["--source", "synthetic", "--limit-per-class", "1", "--name", "Cifar-100"], "expected another name for syn"),
    ],
)
def test_options_that_a_source_does_not_use_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path / "folder")
    words = [str(path) if word == "FOLDER" else word for word in words]
    done = module("data_prep", "prepare", *words, "--out", tmp_path / "data")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "data").exists()


# --- architectures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factory", [pytest.param(name, marks=pytest.mark.every if "vit" in name else []) for name in BY_FACTORY]
)
def test_every_architecture_is_built_for_classes_and_sizes(factory: str) -> None:
    """Or refuses the size in one line, with one that it takes."""
    architecture = BY_FACTORY[factory].architecture
    for shape in ((3, 32, 32), (3, 48, 40), (3, 33, 35), (3, 9, 9)):
        try:
            model, side = build_for(architecture, 5, shape), None
        except UserError as error:
            side = int(re.search(r"cannot take images of .* use --recipe.resize (\d+)$", str(error))[1])
        if side is not None:
            shape = (3, side, side)
            model = build_for(architecture, 5, shape)
        with torch.no_grad():
            assert model.eval()(torch.zeros(2, *shape)).shape == (2, 5)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("runner.models.none:Net", "--architecture.factory runner.models.none:Net: expected module:callable"),
        ("runner.models.alexnet:None", "expected module:callable"),
        ("nonsense", "expected module:callable"),
        ("torch:pi", "expected module:callable"),
        ("tests.support.models.picky:Picky", "cannot take images of 32×32 (too small); expected 64 or 224 pixels"),
        ("tests.support.models.broken:Net", "expected module:callable (division by zero)"),
        ("tests.support.models.tiny:Tiny", "expected logits (1, 5) for an image, found (1, 10)"),
    ],
)
def test_a_factory_that_cannot_be_used_is_reported(factory: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        build_for(Architecture(factory), 5, (3, 32, 32))
    assert message in str(error.value)


def test_a_size_that_cannot_be_trained_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "folder", size=(48, 40))
    done = module("data_prep", "prepare", "--source", path, "--out", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    words = ["vit-tiny-4", "--data", tmp_path / "data", "--runs", tmp_path / "runs", "--batch-size", 10]
    done = runner("train", *words, "--device", "cpu")
    assert done.returncode == 2
    assert "cannot take images of 40×48" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


ONE_OF_EACH = ["podeti-alexnet", "podeti-mobilenetv2", "soni-2", "merabishvili", "ghasemi-net", "vit-tiny-4"]


@pytest.mark.every
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_own_images_from_prepare_to_predict(name: str, tmp_path: Path) -> None:
    """A folder of five classes, sizes and formats: trained, exported, gated, reported, and predicted by the RUN."""
    path, data, run = folder_of(tmp_path / "mine", size=None), tmp_path / "data", tmp_path / "runs" / name / "seed-0"
    done = module("data_prep", "prepare", "--source", path, "--out", data, "--size", 32, "--fit", "pad")
    assert done.returncode == 0, done.stderr
    page = tmp_path / "page.html"
    for words in (
        ["train", name, "--data", data, "--runs", tmp_path / "runs", "--batch-size", 10, "--recipe.validation", 0,
         "--max-steps", 1, "--device", "cpu"],
        ["export", run], ["parity", run, "--device", "cpu"], ["report", tmp_path / "runs", "--out", page],
    ):  # fmt: skip
        done = runner(*words)
        assert done.returncode == 0, done.stderr
    assert [*Run(run).config().dataset.classes] == [*CLASSES]
    assert "elk" in page.read_text()
    done = runner("predict", run, path / "test", "--json", "--sheet", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    predicted = json.loads(done.stdout)
    assert len(predicted) == 20
    assert {one["label"] for one in predicted} <= set(CLASSES)
    # The images that predict fits are those that prepare wrote.
    stored = np.load(Run(run).predictions)["logits"].argmax(1)
    order = sorted(range(20), key=lambda k: (CLASSES[k // 4], f"{k % 4}"))
    assert [one["label"] for one in predicted] == [CLASSES[stored[k]] for k in order]
