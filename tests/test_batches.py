"""The sample stream: a function of seed, epoch and sample; identical for any number of ranks."""

import dataclasses
import functools
import importlib
import itertools
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from msgspec.structs import replace

from data_prep import beton_reader, manifest
from data_prep.sources import Source
from runner.common import memory
from runner.common.errors import UserError
from runner.config.recipe import SGD, Augment, Recipe
from runner.data import augment, color, mixing, order, streaming
from runner.data.kernels import crop
from runner.data.kernels.crop import Crops, Output
from runner.data.open import RankInfo, normalization, open_manifest, open_split, open_split_of_run, split_indices
from runner.data.stream import BatchStream
from tests.support.configs import CONFIG, EVERY_AUGMENTATION, EVERY_WITH_RESIZED_CROP, config_of
from tests.support.processes import python, start

CPU = torch.device("cpu")
RECIPE = Recipe(2, 60, SGD(0.1), augment=Augment(crop_padding=4, flip="random"))
LOADERS = ["resident", "streaming"]


@functools.cache  # FFCV compiles each of its loaders
def opened(
    data: Path,
    rank: int = 0,
    world: int = 1,
    split: str = "train",
    recipe: Recipe = RECIPE,
    loader: str = "resident",
    workers: int = 1,
) -> BatchStream:
    return open_split(data, open_manifest(data), split, recipe, RankInfo(CPU, rank, world, loader, workers), seed=0)


def assert_same(batches: Iterable, others: Iterable) -> None:
    for (images, labels), (other_images, other_labels) in zip(batches, others, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


PLAIN = Recipe(2, 60, SGD(0.1), drop_last=False)


EVERYTHING = Recipe(2, 60, SGD(0.1), drop_last=False, resize=40, augment=EVERY_AUGMENTATION)
RESIZED = dataclasses.replace(EVERYTHING, resize=24, augment=EVERY_WITH_RESIZED_CROP)
RECIPES = {"augmented": RECIPE, "plain": PLAIN, "everything": EVERYTHING, "resized crop": RESIZED}
STREAMED = [("train", 3, "everything"), ("test", 2, "plain")]  # the default tier: each rank compiles a loader


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_of_lower_precision_are_those_of_float32_rounded(
    small_data: Path, recipe: str, dtype: torch.dtype
) -> None:
    stream = opened(small_data, recipe=RECIPES[recipe])
    lower = open_split(small_data, open_manifest(small_data), "train", RECIPES[recipe], RankInfo(CPU, dtype=dtype))
    rounded = ((images.to(dtype), targets) for images, targets in stream.epoch(1))
    assert_same(lower.epoch(1), rounded)
    assert lower.first_images(3).dtype == torch.float32


@pytest.mark.parametrize(
    ("loader", "split", "world", "recipe"),
    [
        pytest.param(loader, *case, marks=[] if loader == "resident" or case in STREAMED else pytest.mark.every)
        for loader in LOADERS
        for case in itertools.product(("train", "test"), (2, 3, 4), RECIPES)
    ],
)
def test_the_union_over_ranks_is_the_global_batch(
    small_data: Path, loader: str, split: str, world: int, recipe: str
) -> None:
    recipe = RECIPES[recipe]
    whole = list(opened(small_data, split=split, recipe=recipe).epoch(1))
    ranks = [list(opened(small_data, rank, world, split, recipe, loader=loader).epoch(1)) for rank in range(world)]
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([rank[step][0] for rank in ranks]), images)
        assert torch.equal(torch.cat([rank[step][1] for rank in ranks]), labels)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("recipe", ["augmented", "everything", "resized crop"])
def test_starting_at_a_step_skips_the_earlier_ones(small_data: Path, loader: str, recipe: str) -> None:
    batches = opened(small_data, loader=loader, recipe=RECIPES[recipe])
    assert_same(list(batches.epoch(3))[3:], batches.epoch(3, start_step=3))  # odd, as two copies alternate
    assert list(batches.epoch(3, start_step=len(batches))) == []


def test_mixing_streams_every_batch(small_data: Path) -> None:
    """It reads one image more per batch than FFCV's loader has: with batches that divide the images, all of them."""
    recipe = Recipe(1, 20, SGD(0.1), augment=Augment(mixup=0.2))
    streamed = opened(small_data, recipe=recipe, loader="streaming")
    assert streamed.num_images % 20 == 0
    assert_same(list(opened(small_data, recipe=recipe).epoch(0)), streamed.epoch(0))


@pytest.mark.every
@pytest.mark.images
def test_streaming_matches_resident_for_any_number_of_workers(data: Path) -> None:
    """A full epoch with batches of 512 images, in the order and augmentation of training."""
    recipe = Recipe(1, 512, SGD(0.1), augment=Augment(crop_padding=4, flip="random"))
    resident = list(opened(data, recipe=recipe).epoch(0))
    for workers in (1, 2):
        assert_same(resident, opened(data, recipe=recipe, loader="streaming", workers=workers).epoch(0))


@pytest.mark.parametrize("split", ["train", pytest.param("test", marks=pytest.mark.every)])
def test_jpeg_records_are_the_same_from_both_loaders_on_any_number_of_ranks(
    jpeg_data: Path, small_data: Path, split: str
) -> None:
    resident = list(opened(jpeg_data, split=split, recipe=RESIZED).epoch(1))
    assert_same(resident, opened(jpeg_data, split=split, recipe=RESIZED, loader="streaming").epoch(1))
    ranks = [list(opened(jpeg_data, rank, 2, split, RESIZED).epoch(1)) for rank in range(2)]
    for step, (images, labels) in enumerate(resident):
        assert images.shape[1:] == (3, 24, 24)
        assert torch.equal(torch.cat([rank[step][0] for rank in ranks]), images)
        assert torch.equal(torch.cat([rank[step][1] for rank in ranks]), labels)
    raw = next(opened(small_data, split=split, recipe=RESIZED).epoch(1))[0]  # the same images, not compressed
    assert 0 < (raw - resident[0][0]).abs().mean() < 0.5


def test_more_workers_than_cores_are_refused(small_data: Path) -> None:
    with pytest.raises(UserError, match="--workers 1000: expected 1 to"):
        opened(small_data, loader="streaming", workers=1000)


def test_one_loader_serves_epoch_after_epoch(small_data: Path) -> None:
    stream, resident = opened(small_data, loader="streaming"), opened(small_data)
    for epoch in (0, 1, 0):
        assert_same(resident.epoch(epoch), stream.epoch(epoch))


@pytest.mark.parametrize(("suffix", "content"), [("nbi", b""), ("nbi", None), ("nbc", b"no pickle"), ("nbc", None)])
def test_a_damaged_cache_of_numba_is_written_again(
    suffix: str, content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is empty, truncated (None) or of something else."""
    (tmp_path / "loops.py").write_text("import numba\n@numba.njit(cache=True)\ndef double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)

    def doubled() -> int:
        sys.modules.pop("loops", None)
        loop = importlib.import_module("loops").double
        crop.compile_loop(loop, (numba.int64,))
        return loop(21)

    assert doubled() == 42
    (file,) = (tmp_path / "__pycache__").glob(f"*.{suffix}")
    sound = file.read_bytes()
    file.write_bytes(sound[:-20] if content is None else content)
    assert doubled() == 42
    (file,) = (tmp_path / "__pycache__").glob(f"*.{suffix}")
    assert len(file.read_bytes()) >= len(sound) - 20


def test_of_several_processes_one_compiles(tmp_path: Path) -> None:
    """Compiling takes a second and logs the process."""
    (tmp_path / "loops.py").write_text(
        "import os, time, numba\nfrom pathlib import Path\nfrom numba.extending import overload\n"
        "def slow(x):\n    pass\n"
        "@overload(slow)\ndef _slow(x):\n"
        "    (Path(__file__).parent / f'{os.getpid()}.log').touch()\n    time.sleep(1)\n    return lambda x: 2 * x\n"
        "@numba.njit(cache=True)\ndef double(x):\n    return slow(x)\n"
    )
    program = (
        f"import sys; sys.path.append({str(tmp_path)!r}); import loops, numba; from runner.data.kernels import crop; "
        "crop.compile_loop(loops.double, (numba.int64,)); assert loops.double(21) == 42"
    )
    processes = [start("timeit", "-n", 1, "-r", 1, program) for _ in range(3)]
    for process in processes:
        with process:
            assert process.wait(900) == 0
    assert len(list(tmp_path.glob("*.log"))) == 1


def test_importing_ffcv_leaves_torchs_threads(small_data: Path) -> None:
    torch.set_num_threads(2)
    next(opened(small_data, loader="streaming").epoch(0))
    assert torch.get_num_threads() == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_reader_that_dies_or_hangs_is_an_error_in_time(small_data: Path, monkeypatch, fault: str) -> None:
    from ffcv.loader.epoch_iterator import EpochIterator

    def run_pipeline(self, *_: object) -> None:
        if fault == "dies":
            raise RuntimeError("a decoder failed")
        self.terminate_event.wait(30)

    monkeypatch.setattr(EpochIterator, "run_pipeline", run_pipeline)
    monkeypatch.setattr(streaming, "BATCH_TIMEOUT", 2.0)
    with pytest.raises(streaming.ReaderError, match="reader died" if fault == "dies" else "no batch within"):
        next(opened(small_data, loader="streaming").epoch(0))


def test_auto_selects_resident_for_small_splits_and_reports_it(small_data: Path) -> None:
    prepared = manifest.read(small_data)
    split = prepared.splits["train"]
    assert RankInfo(CPU).loader_for(prepared, split)[0] == "resident"
    assert "resident below 25%" in RankInfo(CPU).loader_for(prepared, split)[1]
    huge = dataclasses.replace(split, bytes=10**14)
    assert RankInfo(CPU).loader_for(prepared, huge)[0] == "streaming"
    assert RankInfo(CPU, loader="streaming").loader_for(prepared, split)[0] == "streaming"
    jpeg = dataclasses.replace(prepared, records="jpeg", jpeg_quality=90)  # which takes memory only once decoded
    many = dataclasses.replace(split, images=10**11)
    assert RankInfo(CPU).loader_for(jpeg, many)[0] == "streaming"
    assert "train.beton, decoded, is " in RankInfo(CPU).loader_for(jpeg, many)[1]
    tenth = dataclasses.replace(split, bytes=memory.limit() // 10)
    choices = [RankInfo(CPU, workers=2, local_world_size=ranks).loader_for(prepared, tenth) for ranks in (1, 8)]
    assert [loader for loader, _ in choices] == ["resident", "streaming"]  # each rank has a copy
    assert ["--workers is not used" in message for _, message in choices] == [True, False]


def test_a_constant_channel_is_refused_where_it_would_be_divided_by(small_data: Path) -> None:
    prepared = manifest.read(small_data)
    constant = dataclasses.replace(prepared, std=(*prepared.std[:2], 0.0))
    with pytest.raises(UserError, match="found one value for blue in all training images; use --recipe"):
        normalization(constant, RECIPE)
    assert normalization(constant, dataclasses.replace(RECIPE, normalize="half"))[1] == (127.5,) * 3


def test_seed_and_epoch_each_change_order_and_augmentation() -> None:
    samples = np.arange(1000)
    orders = {order.epoch_order(1000, seed, epoch).tobytes() for seed in (0, 1) for epoch in (0, 1)}
    bits = {order.random_bits(samples, s, e, stream).tobytes() for s in (0, 1) for e in (0, 1) for stream in (0, 1)}
    assert len(orders) == 4
    assert len(bits) == 8
    assert sorted(order.epoch_order(1000, 0, 0)) == list(range(1000))


@pytest.mark.parametrize("loader", LOADERS)
def test_validation_images_are_held_out_of_training(small_data: Path, loader: str) -> None:
    recipe = dataclasses.replace(PLAIN, validation=100)
    held_out = split_indices("validation", 500, 100)
    remaining = split_indices("train", 500, 100)
    assert sorted([*held_out, *remaining]) == list(range(500))
    everything = torch.from_numpy(opened(small_data).images.numpy())
    validation = opened(small_data, split="validation", recipe=recipe, loader=loader)
    training = opened(small_data, recipe=recipe, loader=loader)
    assert (validation.num_images, training.num_images) == (100, 400)
    seen = torch.cat([images for images, _ in validation.epoch(0)])
    mean, std = (torch.tensor(values) for values in normalization(open_manifest(small_data), recipe))
    expected = (everything[held_out].float() - mean) / std
    torch.testing.assert_close(seen.permute(0, 2, 3, 1), expected, atol=1e-5, rtol=1e-5)
    trained = torch.cat([labels for _, labels in training.epoch(0)])
    labels = opened(small_data).labels
    assert torch.equal(trained.bincount(), labels[remaining].bincount())
    first = training.first_images(10).permute(0, 2, 3, 1)
    torch.testing.assert_close(first, (everything[remaining[:10]].float() - mean) / std, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="expected fewer than the 500 training images"):
        opened(small_data, recipe=dataclasses.replace(PLAIN, validation=500))


def test_the_stream_matches_earlier_versions() -> None:
    """A change here breaks the resumption of every unfinished run."""
    assert order.epoch_order(10, 0, 0).tolist() == GOLDEN_ORDER
    assert order.random_bits(np.arange(3), 0, 0, augment.CROP_ROW).tolist() == GOLDEN_BITS


GOLDEN_ORDER = [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
GOLDEN_BITS = [17964823697111478408, 18027570692173722940, 11203626095865337575]


def test_augmentation_matches_earlier_versions() -> None:
    """Of images that are not square, in two epochs."""
    everything = Augment(crop_padding=4, brightness=0.5, contrast=0.3, saturation=1.5, hue=0.2, cutout=8)
    for flip, epoch, expected in (
        ("random", 2, [True, True, False]), ("none", 2, [False] * 3),
        ("alternating", 2, [True, False, True]), ("alternating", 3, [False, True, False]),
    ):  # fmt: skip
        params = augment.sample_params(
            dataclasses.replace(everything, flip=flip), np.array([0, 5, 9]), (24, 40), 3, epoch
        )
        assert params.flip.tolist() == expected, flip
    assert params.changes_pixels
    assert (params.row.tolist(), params.column.tolist()) == ([2, 4, 3], [-2, -1, -3])
    assert params.cutout_center.tolist() == [[15, 37], [19, 12], [5, 5]]
    assert params.jitter_order.tolist() == [[2, 3, 1, 0], [3, 2, 1, 0], [3, 0, 2, 1]]
    factors = [
        [0.7274263501, 0.8820937872, 2.3767967224, 0.1198977754],
        [0.6096324921, 0.7952500582, 0.8437219262, -0.1667605937],
        [1.2839127779, 1.0199627876, 0.4481503069, -0.0290910192],
    ]
    np.testing.assert_allclose(params.jitter_factors.numpy(), factors, rtol=1e-6)
    assert params[1:].row.tolist() == [4, 3]
    plain = augment.sample_params(Augment(crop_padding=4), np.array([0, 5, 9]), (24, 40), 3, 3)
    assert plain.row.tolist() == [2, 4, 3]
    assert not plain.changes_pixels
    crops = Augment(random_resized_crop=0.1, cutout=8, erase=1.0)
    resized = augment.sample_params(crops, np.array([0, 5, 9]), (24, 40), 3, 3, (100, 200))
    assert not resized.changes_pixels
    assert resized.resized_box.tolist() == [[1, 16, 23, 39], [10, 21, 22, 34], [3, 14, 16, 26]]
    assert (resized.cutout_center[0].tolist(), resized.erase_box[0].tolist()) == ([62, 186], [31, 65, 62, 111])
    nothing = augment.sample_params(None, np.array([0, 5]), (24, 40), 3, 3)
    assert [nothing.row.tolist(), nothing.column.tolist(), nothing.flip.tolist()] == [[0, 0], [0, 0], [False, False]]


def test_mixing_matches_earlier_versions() -> None:
    """A batch of images that are not square is mixed by one of both."""
    both = [mixing.sample_params(Augment(mixup=0.3, cutmix=1.0), (24, 40), 3, 2, step) for step in range(6)]
    weights = [0.1169808600, 0.5333333333, 0.9375, 0.6940383038, 0.5416666667, 0.1136943567]
    assert [params.weight for params in both] == pytest.approx(weights, rel=1e-8)
    boxes = [None, (2, 4, 18, 32), (17, 20, 23, 30), None, (4, 0, 24, 22), None]
    assert [params.box for params in both] == boxes
    for setting, expected in (("cutmix", [0.4333333333, 0.75]), ("mixup", [0.2292056578, 0.7145288032])):
        params = [mixing.sample_params(Augment(**{setting: 0.5}), (24, 40), 3, 2, step) for step in range(2)]
        assert [one.weight for one in params] == pytest.approx(expected, rel=1e-8)


CHANGES = {
    "crop_padding": 4, "crop_fill": "reflect", "flip": "random", "brightness": 0.5, "contrast": 0.5, "saturation": 0.5,
    "hue": 0.2, "cutout": 8, "mixup": 1.0, "cutmix": 1.0, "policy": "trivial", "rand_ops": 3, "rand_magnitude": 10,
    "erase": 0.5, "repeats": 2, "random_resized_crop": 0.5,
}  # fmt: skip
ONLY_WITH = {"crop_fill": {"crop_padding": 4}, "rand_ops": {"policy": "rand"}, "rand_magnitude": {"policy": "rand"}}


def test_seeds_and_batch_generators_match_earlier_versions() -> None:
    """For dropout on several ranks, and for mixing."""
    seeds = [order.rank_seed(seed, rank) for seed, rank in ((0, 0), (3, 1), (2**32 - 1, 7))]
    assert seeds == [6140391860161666508, 8458709945103788358, 5855480981957312120]
    drawn = order.batch_generator(3, 2, 5).integers(0, 2**63, 3).tolist()
    assert drawn == [523534655586764384, 618834857667409141, 1145851005861656778]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Augment)])
def test_every_augmentation_changes_the_images_of_training(small_data: Path, name: str) -> None:
    """And not those of evaluation. A new one needs a value in CHANGES."""
    without = ONLY_WITH.get(name, {})
    settings = (without, {**without, name: CHANGES[name]})
    before, after = (dataclasses.replace(PLAIN, augment=Augment(**setting)) for setting in settings)
    for split, differ in (("train", True), ("test", False)):
        images = [
            torch.cat([images for images, _ in opened(small_data, split=split, recipe=recipe).epoch(0)])
            for recipe in (before, after)
        ]
        assert torch.equal(*images) != differ


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Augment)])
def test_every_augmentation_is_among_those_that_are_tested_together(name: str) -> None:
    """On one and two ranks, in lower precision, interrupted, without waits; a new one needs a value in these."""
    together = (EVERY_AUGMENTATION, EVERY_WITH_RESIZED_CROP)
    assert any(getattr(augment, name) != getattr(Augment(), name) for augment in together)


@pytest.mark.parametrize("policy", ["rand", "trivial"])
def test_each_random_number_of_an_image_has_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """Two uses of one stream would depend on each other."""
    streams: list[int] = []
    random_bits = order.random_bits

    def recorded(samples: np.ndarray, seed: int, epoch: int, stream: int) -> np.ndarray:
        streams.append(stream)
        return random_bits(samples, seed, epoch, stream)

    monkeypatch.setattr(order, "random_bits", recorded)
    augment.sample_params(Augment(**CHANGES | {"policy": policy}), np.arange(50), (32, 32), 0, 0)
    order.rank_seed(0, 1)
    assert order.RANK in streams
    assert len(streams) > 30
    assert sorted(set(streams)) == sorted(streams)


class Arrays:
    """AugmentParams as numpy arrays."""

    def __init__(self, params: augment.AugmentParams) -> None:
        for name, tensor in vars(params).items():
            setattr(self, name, None if tensor is None else tensor.numpy())


def test_offsets_and_flips_are_uniform_and_independent() -> None:
    samples = np.arange(50_000)
    everything = Augment(crop_padding=4, flip="random", cutout=8, hue=0.1)
    first, second = (Arrays(augment.sample_params(everything, samples, (32, 32), 0, epoch)) for epoch in (0, 1))
    uniform = [
        (first.row + 4, 9),
        (first.column + 4, 9),
        (first.flip.astype(int), 2),
        (first.cutout_center[:, 0] // 4, 8),
        (first.cutout_center[:, 1] // 4, 8),
        (((first.jitter_factors[:, 3] + 0.1) * 40).astype(int), 8),
        (first.jitter_order[:, 0], 4),
        (first.jitter_order[:, 3], 4),
    ]
    for values, kinds in uniform:
        counts = np.bincount(values, minlength=kinds)
        expected = len(samples) / kinds
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < 30  # 8 degrees of freedom: p = 0.0002
    pairs = [
        (first.row, first.column),
        (first.row, first.flip),
        (first.row, second.row),
        (first.flip, second.flip),
        (first.row[1:], first.row[:-1]),
        (first.cutout_center[:, 0], first.cutout_center[:, 1]),
        (first.cutout_center[:, 0], first.row),
        (first.jitter_factors[:, 3], second.jitter_factors[:, 3]),
        (first.jitter_order[:, 0], first.jitter_factors[:, 3]),
    ]
    for a, b in pairs:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.02


def reference(image: np.ndarray, row: int, column: int, flip: bool, reflect: bool) -> np.ndarray:
    """The mirrored crop of a padded image, in plain numpy."""
    pad = 8
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect" if reflect else "constant")
    height, width, _ = image.shape
    crop = padded[pad + row : pad + row + height, pad + column : pad + column + width]
    return crop[:, ::-1] if flip else crop


def random_crops(device: str = "cpu", side: tuple[int, int] = (32, 32)) -> tuple[torch.Tensor, Crops]:
    """Random images, and crops of 50 of them."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, *side, 3), dtype=np.uint8)
    index, row, column = rng.integers(0, 20, 50), rng.integers(-4, 5, 50), rng.integers(-4, 5, 50)
    crops = [torch.from_numpy(array).to(device) for array in (index, row, column, rng.random(50) < 0.5)]
    return torch.from_numpy(images).to(device), Crops(*crops)


IDENTITY = torch.ones(3), torch.zeros(3)


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("side", [(32, 32), (20, 28)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("make", [crop.make_batch_numba, crop.make_batch_torch])
def test_make_crops_flips_and_normalizes(make, dtype, side, reflect: bool) -> None:
    images, crops = random_crops(side=side)
    index, row, column, flip = crops
    batch = make(images, crops, Output(reflect, *IDENTITY, dtype))
    assert batch.dtype == dtype
    for i in range(50):
        expected = reference(images[index[i]].numpy(), row[i], column[i], flip[i], reflect)
        np.testing.assert_array_equal(batch[i].numpy(), expected.astype(batch.numpy().dtype))


def test_an_alternating_flip_shows_every_image_both_ways_in_two_epochs() -> None:
    samples = np.arange(50_000)
    flips = [augment.sample_params(Augment(flip="alternating"), samples, (32, 32), 0, e).flip for e in range(4)]
    assert torch.equal(flips[0], ~flips[1])
    assert torch.equal(flips[0], flips[2])
    assert torch.equal(flips[1], flips[3])
    assert abs(flips[0].float().mean() - 0.5) < 0.01


def test_color_jitter_matches_torchvision_image_by_image(small: Source) -> None:
    """Within one level of 255: torchvision's CPU code fuses a product and a sum before it truncates."""
    from torchvision.transforms.v2 import functional

    images = torch.from_numpy(np.concatenate([small.test.images, small.train.images]))
    params = augment.sample_params(
        Augment(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5), np.arange(len(images)), (32, 32), 0, 0
    )
    jittered = color.jitter(images, params.jitter_factors, params.jitter_order)
    assert jittered.dtype == torch.uint8
    names = ("brightness", "contrast", "saturation", "hue")
    references = [getattr(functional, f"adjust_{name}") for name in names]
    operations = [getattr(color, name) for name in names]
    for k, (operation, reference) in enumerate(zip(operations, references, strict=True)):
        results = operation(images, params.jitter_factors[:, k, None, None, None]).permute(0, 3, 1, 2)
        for result, image, factor in zip(results, images, params.jitter_factors[:, k].tolist(), strict=True):
            expected = reference(image.permute(2, 0, 1), factor)
            difference = (result.int() - expected.int()).abs()
            if k == 3:  # a level at the edge of a sixth of the circle may fall into the next
                assert difference.float().mean() < 0.01
            else:
                assert difference.max() <= 1
    for i, image in enumerate(images[:50].permute(0, 3, 1, 2)):
        for k in params.jitter_order[i].tolist():
            image = references[k](image, params.jitter_factors[i, k].item())
        difference = (jittered[i].permute(2, 0, 1).int() - image.int()).abs().float()
        assert difference.mean() < 0.05
        assert difference.quantile(0.99) <= 2
    assert {tuple(permutation) for permutation in params.jitter_order.tolist()} == set(itertools.permutations(range(4)))


def random_jitter(side: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images with grays and extremes, and factors with those that change nothing, for `color.jitter`."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, *side, 3), dtype=torch.uint8, generator=generator)
    images[:4] = images[:4, :, :, :1] // 64 * 64
    images[4], images[5] = 0, 255
    factors = torch.rand(24, 4, generator=generator) * 2
    factors[:, 3] = factors[:, 3] / 2 - 0.5
    factors[::7, :3], factors[::5, 3], factors[3::11, 3], factors[4::11, 3] = 1, 0, -1e-9, 0.5
    return images, factors, torch.stack([torch.randperm(4, generator=generator) for _ in range(24)])


@pytest.mark.parametrize("side", [(32, 32), (20, 28), (40, 50)])
def test_the_compiled_jitter_matches_the_reference(side: tuple[int, int]) -> None:
    images, factors, order = random_jitter(side)
    before = images.clone()
    assert torch.equal(color.jitter(images, factors, order), color.jitter_torch(images, factors, order))
    assert torch.equal(images, before)


def test_jitter_does_not_depend_on_the_batch(small: Source) -> None:
    images = torch.from_numpy(small.train.images)
    params = augment.sample_params(Augment(contrast=0.8, hue=0.5), np.arange(len(images)), (32, 32), 0, 0)
    whole = color.jitter(images, params.jitter_factors, params.jitter_order)
    for part in (slice(0, 1), slice(3, 10), slice(77, 400)):
        jittered = color.jitter(images[part], params.jitter_factors[part], params.jitter_order[part])
        assert torch.equal(jittered, whole[part])


def test_cutout_blanks_one_square_around_its_center() -> None:
    images = torch.ones(3, 32, 32, 3)
    blanked = augment.cut_out(images.clone(), torch.tensor([[16, 16], [0, 31], [31, 2]]), 8)
    blank = blanked[..., 0] == 0
    assert blank.sum((1, 2)).tolist() == [64, 4 * 5, 5 * 6]
    assert blank[0, 12:20, 12:20].all()
    assert blank[1, 0:4, 27:].all()
    odd = augment.cut_out(images[:1].clone(), torch.tensor([[16, 16]]), 5)[0, ..., 0] == 0
    assert odd.sum() == odd[14:19, 14:19].sum() == 25


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_each_image_and_its_target_are_mixed_with_the_predecessor(small_data: Path, kind: str) -> None:
    plain = opened(small_data, recipe=PLAIN)
    mixed = opened(small_data, recipe=dataclasses.replace(PLAIN, augment=Augment(**{kind: 1.0})))
    batches = zip(plain.epoch(0), mixed.epoch(0), strict=True)
    for step, ((images, labels), (mixed_images, targets)) in enumerate(batches):
        params = mixing.sample_params(Augment(**{kind: 1.0}), (32, 32), 0, 0, step)
        one_hot, previous = torch.eye(10)[labels], images.roll(1, 0)
        expected = params.weight * one_hot + (1 - params.weight) * one_hot.roll(1, 0)
        torch.testing.assert_close(targets, expected)
        if kind == "mixup":
            torch.testing.assert_close(mixed_images, params.weight * images + (1 - params.weight) * previous)
        else:
            top, left, bottom, right = params.box
            box = torch.zeros(32, 32, dtype=torch.bool)
            box[top:bottom, left:right] = True
            assert torch.equal(mixed_images, torch.where(box, previous, images))
            assert params.weight == pytest.approx(1 - box.float().mean().item())


def test_the_weight_of_mixup_follows_its_beta_distribution() -> None:
    for alpha in (0.2, 1.0):
        weights = np.array(
            [mixing.sample_params(Augment(mixup=alpha), (32, 32), 0, 0, step).weight for step in range(4000)]
        )
        assert abs(weights.mean() - 0.5) < 0.03
        assert abs(weights.var() - 1 / (4 * (2 * alpha + 1))) < 0.01
    both = Augment(mixup=1, cutmix=1)
    is_mixup = [mixing.sample_params(both, (32, 32), 0, 0, step).box is None for step in range(1000)]
    assert 430 < sum(is_mixup) < 570


def test_resizing_is_torchvisions(small_data: Path) -> None:
    from torchvision.transforms.v2 import functional

    recipe = dataclasses.replace(PLAIN, resize=56)
    small_images = next(iter(opened(small_data, split="test").epoch(0)))[0]
    images = next(iter(opened(small_data, split="test", recipe=recipe).epoch(0)))[0]
    assert images.shape[1:] == (3, 56, 56)
    assert images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(images, functional.resize(small_images, [56, 56]))


@pytest.mark.parametrize("size", [(32, 32), (20, 28), (48, 40)])
def test_a_resized_crop_is_torchvisions(size: tuple[int, int]) -> None:
    """Of images that are not square, enlarged and reduced, and mirrored."""
    from torchvision.transforms import functional

    images, crops = random_crops(side=(40, 24))
    samples = np.arange(50)
    boxes = augment.sample_params(Augment(random_resized_crop=0.08), samples, (40, 24), 0, 0).resized_box
    boxes[:2] = torch.tensor([[0, 0, 40, 24], [39, 23, 40, 24]])  # the whole image, and one pixel
    before = images.clone()
    batch = crop.make_resized_batch(images, crops, boxes, size, torch.float32)
    rounded = crop.make_resized_batch(images, crops, boxes, size, torch.uint8)
    assert torch.equal(images, before)
    assert batch.shape == (50, *size, 3)
    assert batch.is_contiguous()
    assert torch.equal(rounded, batch.round().to(torch.uint8))
    for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
        image = images[crops.samples[i]].permute(2, 0, 1)
        expected, levels = (
            functional.resized_crop(pixels, top, left, bottom - top, right - left, list(size), antialias=False)
            for pixels in (image.float(), image)
        )
        if crops.flip[i]:
            expected, levels = expected.flip(2), levels.flip(2)
        torch.testing.assert_close(batch[i].permute(2, 0, 1), expected, atol=2e-3, rtol=0)
        assert (rounded[i].permute(2, 0, 1).int() - levels.int()).abs().max() <= 1
    for part in (slice(0, 1), slice(3, 10), slice(7, 50)):
        some = crop.make_resized_batch(images, Crops(*(c[part] for c in crops)), boxes[part], size, torch.float32)
        assert torch.equal(some, batch[part])


@pytest.mark.parametrize("side", [(32, 32), (20, 48), (60, 20)])
def test_random_resized_crops_have_torchvisions_distribution(side: tuple[int, int]) -> None:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.zeros(3, *side)
    for smallest in (0.08, 0.5, 1.0):
        params = augment.sample_params(Augment(random_resized_crop=smallest), np.arange(20_000), side, 0, 0)
        top, left, bottom, right = params.resized_box.numpy().T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top < bottom).all()
        assert (left < right).all()
        assert (bottom.max(), right.max()) <= side
        found = np.stack([top, left, bottom - top, right - left])
        drawn = [RandomResizedCrop.get_params(image, [smallest, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
        for values, expected in zip(found, np.array(drawn).T, strict=True):
            assert abs(values.mean() - expected.mean()) < 0.05 * expected.std() + 0.05
            assert abs(values.std() - expected.std()) < 0.05 * expected.std() + 0.05


def test_a_random_resized_crop_comes_first_and_training_alone_has_it(small_data: Path) -> None:
    """Cutout blanks pixels of the model's size; a policy sees rounded pixels; images of a test are resized as ever."""
    recipe = dataclasses.replace(PLAIN, resize=80, augment=Augment(random_resized_crop=0.5))
    plain, cut, rounded, test = (
        next(opened(small_data, split=split, recipe=dataclasses.replace(recipe, augment=changed)).epoch(0))[0]
        for split, changed in (
            ("train", recipe.augment),
            ("train", Augment(random_resized_crop=0.5, cutout=80)),  # larger than the images of the dataset
            ("train", Augment(random_resized_crop=0.5, brightness=1e-9)),  # which changes nothing
            ("test", recipe.augment),
        )
    )
    assert plain.shape == (60, 3, 80, 80)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in (plain, cut, rounded, test))
    blank = cut == 0
    assert 0.3 < blank.float().mean() < 0.8
    assert torch.equal(cut, torch.where(blank, 0.0, plain))
    std = torch.tensor(normalization(open_manifest(small_data), recipe)[1])[:, None, None]
    assert 0 < ((plain - rounded) * std).abs().max() < 0.51
    assert torch.equal(
        test, next(opened(small_data, split="test", recipe=dataclasses.replace(PLAIN, resize=80)).epoch(0))[0]
    )
    first = opened(small_data, recipe=recipe).first_images(10)
    assert torch.equal(first, opened(small_data, recipe=dataclasses.replace(PLAIN, resize=80)).first_images(10))
    with pytest.raises(UserError, match="cutout 81: expected at most the images' side of 80"):
        opened(small_data, recipe=dataclasses.replace(recipe, augment=Augment(random_resized_crop=0.5, cutout=81)))


@pytest.mark.gpu
@pytest.mark.parametrize("reflect", [False, True])
def test_make_on_a_gpu_matches_the_cpu(reflect: bool) -> None:
    batch = crop.make_batch_triton(*random_crops("cuda"), Output(reflect, *(tensor.cuda() for tensor in IDENTITY)))
    assert torch.equal(batch.cpu(), crop.make_batch_numba(*random_crops(), Output(reflect, *IDENTITY)))


@pytest.mark.every
def test_the_gpu_kernels_in_tritons_interpreter_match_the_cpus() -> None:
    """In a new process, because triton selects the interpreter when it is imported."""
    program = """
import torch
from runner.data.kernels import crop
from runner.data import color
from runner.data.kernels.crop import Crops, Output
from tests.test_batches import IDENTITY, random_crops, random_jitter

scale = torch.tensor([0.5, 0.25, 2.0]), torch.tensor([1.0, -1.0, 0.5])
for reflect in (False, True):
    for dtype in (torch.float32, torch.bfloat16):
        for side in ((32, 32), (20, 28)):
            output = crop.Output(reflect, *scale, dtype)
            batch = crop.make_batch_triton(*random_crops(side=side), output)
            assert torch.equal(batch, crop.make_batch_torch(*random_crops(side=side), output)), (reflect, dtype)
for side in ((32, 32), (20, 28), (40, 50)):
    assert torch.equal(color.jitter_triton(*random_jitter(side)), color.jitter_torch(*random_jitter(side))), side
"""
    done = python("-c", program, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_images_are_normalized_in_channels_last(small_data: Path) -> None:
    batches = opened(small_data, split="test")
    images = torch.cat([images for images, _ in batches.epoch(0)])
    assert images.is_contiguous(memory_format=torch.channels_last)
    prepared = manifest.read(small_data)
    raw, _ = beton_reader.read_split(small_data / "test.beton", prepared.splits["test"], prepared)
    expected = (raw - np.array(prepared.mean)) / np.array(prepared.std)
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_half_normalization_maps_to_minus_one_to_one(small_data: Path) -> None:
    recipe = Recipe(1, 50, SGD(0.1), normalize="half")
    images = next(iter(opened(small_data, split="test", recipe=recipe).epoch(0)))[0]
    assert images.min() >= -1
    assert images.max() <= 1
    assert images.min() < -0.9


@pytest.mark.parametrize("world", [1, 3, 7])
def test_evaluation_sees_every_image_once(small_data: Path, world: int) -> None:
    seen = []
    for rank in range(world):
        batches = opened(small_data, rank, world, "test")
        seen += [i for step in range(len(batches)) for i in range(*batches.slice_of(step).indices(batches.num_images))]
    assert sorted(seen) == list(range(200))


def test_the_recipe_drops_or_keeps_the_last_partial_batch(small_data: Path) -> None:
    dropped = opened(small_data)
    assert [len(labels) for _, labels in dropped.epoch(0)] == [60] * 8
    kept = opened(small_data, recipe=PLAIN)
    assert [len(labels) for _, labels in kept.epoch(0)] == [60] * 8 + [20]
    assert [kept.size_of(step) for step in range(9)] == [60] * 8 + [20]
    with pytest.raises(UserError, match="the last batch has 2 images for 3 ranks"):
        opened(small_data, world=3, recipe=Recipe(1, 498, SGD(0.1), drop_last=False))


def test_impossible_batch_sizes_are_refused(small_data: Path) -> None:
    with pytest.raises(UserError, match="expected a multiple of the 7 ranks"):
        opened(small_data, 0, 7)
    with pytest.raises(UserError, match="at most the 500 training images"):
        opened(small_data, recipe=Recipe(1, 501, SGD(0.1)))


def test_a_dataset_other_than_the_runs_is_refused(small_data: Path, data: Path) -> None:
    prepared = manifest.read(small_data)
    dataset = replace(CONFIG.dataset, name=prepared.name, fingerprint=prepared.fingerprint, folder=str(small_data))
    config = config_of(recipe=RECIPE, dataset=dataset)
    assert open_split_of_run(config, None, "test", CPU).num_images == 200
    with pytest.raises(UserError, match="expected the dataset of the run"):
        open_split_of_run(config, data, "test", CPU)


def corrupted(data: Path, change) -> Path:
    """Changes a .beton and updates its hash in the manifest, as a careless tool would."""
    from runner.common.files import sha256_of

    path = data / "train.beton"
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    record = json.loads((data / "dataset.json").read_text())
    record["splits"]["train"] |= {"sha256": sha256_of(path), "bytes": len(content)}
    (data / "dataset.json").write_text(json.dumps(record))
    return data


def test_a_jpeg_record_of_another_size_never_reaches_ffcv(jpeg_data: Path, tmp_path: Path) -> None:
    """Where the manifest has the hash of the crafted file."""
    frame = bytes([0xFF, 0xC0, 0, 17, 8, 0, 32, 0, 32, 3])

    def enlarge(content: bytearray) -> None:
        content[:] = content.replace(frame, frame[:5] + bytes([4, 0]) + frame[7:])

    data = corrupted(Path(shutil.copytree(jpeg_data, tmp_path / "own")), enlarge)
    for loader in LOADERS:
        with pytest.raises(UserError, match="expected complete baseline JPEG records of 32×32"):
            opened(data, loader=loader)


TABLE = beton_reader.HEADER.itemsize + 2 * beton_reader.FIELD.itemsize


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.__setitem__(0, 3), "expected format version 2"),
        (lambda c: c.__setitem__(2, 3), "expected format version 2"),
        (lambda c: c.__setitem__(8, 99), "expected 500 samples, found"),
        (lambda c: c.__setitem__(beton_reader.HEADER.itemsize, 0), "expected the fields image"),
        (lambda c: c.__setitem__(TABLE, 0), "expected raw images of 32×32"),
        (
            lambda c: c.__setitem__(TABLE + beton_reader.SAMPLE.fields["label"][1], 10),
            "expected labels 0 to 9, found label 10",
        ),
        (lambda c: c.__setitem__(TABLE + beton_reader.SAMPLE.fields["label"][1], 5), "images per class"),
        (lambda c: c.__setitem__(TABLE + 11, 255), "expected pixels within the file"),
        (lambda c: c.__delitem__(slice(9, None)), "expected an FFCV file, found 9 bytes"),
    ],
)
def test_a_wrong_layout_is_refused(own_data: Path, change, message: str) -> None:
    """Also by the streaming loader, before FFCV opens the file."""
    data = corrupted(own_data, change)
    for loader in LOADERS:
        with pytest.raises(UserError, match=message):
            opened(data, loader=loader)
