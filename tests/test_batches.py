"""The sample stream: pure in seed, epoch and sample; the same for any number of ranks."""

import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import manifest
from data_prep.console import UserError
from runner.batches import augment, beton, order, pixels, streaming
from runner.batches.protocol import Place, open_manifest, open_split, open_test_of_run
from runner.batches.stream import BatchStream
from runner.recipe import SGD, Architecture, Augment, Recipe, to_json

CPU = torch.device("cpu")
RECIPE = Recipe(2, 60, SGD(0.1), augment=Augment(crop_padding=4, flip=True))


LOADERS = ["resident", "streaming"]


def opened(
    data: Path,
    rank: int = 0,
    world: int = 1,
    split: str = "train",
    recipe: Recipe = RECIPE,
    seed: int = 0,
    loader: str = "resident",
    workers: int = 1,
) -> BatchStream:
    return open_split(data, open_manifest(data), split, recipe, Place(CPU, rank, world, loader, workers), seed)


def assert_same(one: Iterable, other: Iterable) -> None:
    for (images, labels), (more, more_labels) in zip(one, other, strict=True):
        assert torch.equal(images, more)
        assert torch.equal(labels, more_labels)


PLAIN = Recipe(2, 60, SGD(0.1), drop_last=False)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("recipe", [RECIPE, PLAIN], ids=["augmented", "plain"])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_union_over_ranks_is_the_global_batch(
    small_data, world: int, split: str, recipe: Recipe, loader: str
) -> None:
    whole = list(opened(small_data, split=split, recipe=recipe).epoch(1))
    ranks = [list(opened(small_data, rank, world, split, recipe, loader=loader).epoch(1)) for rank in range(world)]
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([rank[step][0] for rank in ranks]), images)
        assert torch.equal(torch.cat([rank[step][1] for rank in ranks]), labels)


@pytest.mark.parametrize("loader", LOADERS)
def test_starting_at_a_step_is_skipping_the_ones_before(small_data: Path, loader: str) -> None:
    batches = opened(small_data, loader=loader)
    assert_same(list(batches.epoch(3))[4:], batches.epoch(3, start_step=4))
    assert list(batches.epoch(3, start_step=len(batches))) == []


def test_streaming_is_resident_whatever_the_workers(data: Path) -> None:
    """A whole epoch of real images, 512 a batch, the order and augmentation of training."""
    recipe = Recipe(1, 512, SGD(0.1), augment=Augment(crop_padding=4, flip=True))
    resident = list(opened(data, recipe=recipe).epoch(0))
    for workers in (1, 2):
        assert_same(resident, opened(data, recipe=recipe, loader="streaming", workers=workers).epoch(0))


def test_more_workers_than_cores_are_refused(small_data: Path) -> None:
    with pytest.raises(UserError, match="--workers 1000: expected 1 to"):
        opened(small_data, loader="streaming", workers=1000)


def test_one_loader_serves_epoch_after_epoch(small_data: Path) -> None:
    stream, resident = opened(small_data, loader="streaming"), opened(small_data)
    for epoch in (0, 1, 0):
        assert_same(resident.epoch(epoch), stream.epoch(epoch))


def test_importing_ffcv_leaves_torchs_threads(small_data: Path) -> None:
    torch.set_num_threads(2)
    next(opened(small_data, loader="streaming").epoch(0))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_reader_that_dies_or_hangs_is_an_error_in_time(small_data: Path, monkeypatch, fault: str) -> None:
    from ffcv.loader.epoch_iterator import EpochIterator

    def run_pipeline(self, *_: object) -> None:
        if fault == "dies":
            raise RuntimeError("a decoder failed")
        self.terminate_event.wait(30)

    monkeypatch.setattr(EpochIterator, "run_pipeline", run_pipeline)
    monkeypatch.setattr(streaming, "BATCH_SECONDS", 2.0)
    began = time.monotonic()
    with pytest.raises(streaming.ReaderError, match="reader died" if fault == "dies" else "no batch within"):
        next(opened(small_data, loader="streaming").epoch(0))
    assert time.monotonic() - began < 25  # compiling included


def test_auto_takes_resident_where_there_is_room_and_says_so(small_data: Path) -> None:
    split = manifest.read(small_data).splits["train"]
    assert Place(CPU).loader_for(split)[0] == "resident"
    assert "resident below 25%" in Place(CPU).loader_for(split)[1]
    huge = dataclasses.replace(split, bytes=10**14)
    assert Place(CPU).loader_for(huge)[0] == "streaming"
    assert Place(CPU, loader="streaming").loader_for(split)[0] == "streaming"


def test_seed_and_epoch_each_change_order_and_augmentation() -> None:
    samples = np.arange(1000)
    orders = {order.epoch_order(1000, seed, epoch).tobytes() for seed in (0, 1) for epoch in (0, 1)}
    bits = {order.random_bits(samples, s, e, stream).tobytes() for s in (0, 1) for e in (0, 1) for stream in (0, 1)}
    assert len(orders) == 4
    assert len(bits) == 8
    assert sorted(order.epoch_order(1000, 0, 0)) == list(range(1000))


def test_the_stream_is_the_one_of_earlier_versions() -> None:
    """A change here breaks the resumption of every run that is under way."""
    assert order.epoch_order(10, 0, 0).tolist() == GOLDEN_ORDER
    assert order.random_bits(np.arange(3), 0, 0, order.CROP_ROW).tolist() == GOLDEN_BITS


GOLDEN_ORDER = [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
GOLDEN_BITS = [17964823697111478408, 18027570692173722940, 11203626095865337575]


def test_offsets_and_flips_are_uniform_and_independent() -> None:
    samples = np.arange(50_000)
    drawn = [augment.placement(Augment(4, True), samples, 0, epoch) for epoch in (0, 1)]
    for values, kinds in ((drawn[0].row + 4, 9), (drawn[0].column + 4, 9), (drawn[0].flip.astype(int), 2)):
        counts = np.bincount(values, minlength=kinds)
        expected = len(samples) / kinds
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < 30  # 8 degrees of freedom: p = 0.0002
    pairs = [
        (drawn[0].row, drawn[0].column),
        (drawn[0].row, drawn[0].flip),
        (drawn[0].row, drawn[1].row),
        (drawn[0].flip, drawn[1].flip),
        (drawn[0].row[1:], drawn[0].row[:-1]),
    ]
    for a, b in pairs:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.02


def reference(image: np.ndarray, row: int, column: int, flip: bool) -> np.ndarray:
    """The crop of a zero-padded image, mirrored, written as one would say it."""
    pad = 8
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    height, width, _ = image.shape
    crop = padded[pad + row : pad + row + height, pad + column : pad + column + width]
    return crop[:, ::-1] if flip else crop


@pytest.mark.parametrize("make", [pixels.in_numba, pixels.in_torch])
def test_the_pass_is_crop_flip_and_normalise(make) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    chosen, row, column = rng.integers(0, 20, 50), rng.integers(-4, 5, 50), rng.integers(-4, 5, 50)
    flip = rng.random(50) < 0.5
    identity = torch.ones(3), torch.zeros(3)
    made = make(*(torch.from_numpy(part) for part in (images, chosen, row, column, flip)), *identity)
    for i in range(50):
        expected = reference(images[chosen[i]], row[i], column[i], flip[i])
        np.testing.assert_array_equal(made[i].numpy(), expected.astype(np.float32))


def test_normalised_in_channels_last(small_data: Path) -> None:
    batches = opened(small_data, split="test")
    images = torch.cat([images for images, _ in batches.epoch(0)])
    assert images.is_contiguous(memory_format=torch.channels_last)
    prepared = manifest.read(small_data)
    raw, _ = beton.read(small_data / "test.beton", prepared.splits["test"], prepared)
    expected = (raw - np.array(prepared.mean)) / np.array(prepared.std)
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_half_normalisation_maps_to_minus_one_to_one(small_data: Path) -> None:
    recipe = Recipe(1, 50, SGD(0.1), normalize="half")
    images = next(iter(opened(small_data, split="test", recipe=recipe).epoch(0)))[0]
    assert images.min() >= -1
    assert images.max() <= 1
    assert images.min() < -0.9


@pytest.mark.parametrize("world", [1, 3, 7])
def test_evaluation_sees_every_image_once(data: Path, world: int) -> None:
    seen = []
    for rank in range(world):
        batches = opened(data, rank, world, "test")
        seen += [i for step in range(len(batches)) for i in range(*batches.slice_of(step).indices(batches.samples))]
    assert sorted(seen) == list(range(10_000))


def test_the_last_partial_batch_is_dropped_or_kept_by_the_recipe(small_data: Path) -> None:
    dropped = opened(small_data)
    assert [len(labels) for _, labels in dropped.epoch(0)] == [60] * 8
    kept = opened(small_data, recipe=PLAIN)
    assert [len(labels) for _, labels in kept.epoch(0)] == [60] * 8 + [20]
    assert [kept.size_of(step) for step in range(9)] == [60] * 8 + [20]
    with pytest.raises(UserError, match="the last batch has 2 images for 3 ranks"):
        opened(small_data, world=3, recipe=Recipe(1, 498, SGD(0.1), drop_last=False))


def test_batches_that_cannot_be_are_refused(small_data: Path) -> None:
    with pytest.raises(UserError, match="expected a multiple of the 7 ranks"):
        opened(small_data, 0, 7)
    with pytest.raises(UserError, match="at most the 500 training images"):
        opened(small_data, recipe=Recipe(1, 501, SGD(0.1)))


def test_another_dataset_than_the_runs_is_refused(small_data: Path, data: Path) -> None:
    prepared = manifest.read(data)
    config = {
        "recipe": to_json(RECIPE),
        "architecture": to_json(Architecture("x:y")),
        "dataset": {"folder": str(data), "fingerprint": prepared.fingerprint, "name": prepared.name},
    }
    assert open_test_of_run(config, None, CPU).samples == 10_000
    with pytest.raises(UserError, match="expected the dataset of the run"):
        open_test_of_run(config, small_data, CPU)


def spoiled(data: Path, change) -> Path:
    """Changes a .beton and makes the manifest agree about its hash, as a careless tool would."""
    from data_prep.console import sha256_of

    path = data / "train.beton"
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    record = json.loads((data / "dataset.json").read_text())
    record["splits"]["train"] |= {"sha256": sha256_of(path), "bytes": len(content)}
    (data / "dataset.json").write_text(json.dumps(record))
    return data


TABLE = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.__setitem__(0, 3), "expected format version 2"),
        (lambda c: c.__setitem__(2, 3), "expected format version 2"),
        (lambda c: c.__setitem__(8, 99), "expected 500 samples, found"),
        (lambda c: c.__setitem__(beton.HEADER.itemsize, 0), "expected field types"),
        (lambda c: c.__setitem__(TABLE, 0), "expected raw images of 32×32"),
        (
            lambda c: c.__setitem__(TABLE + beton.SAMPLE.fields["label"][1], 10),
            "expected labels 0 to 9, found label 10",
        ),
        (lambda c: c.__setitem__(TABLE + beton.SAMPLE.fields["label"][1], 5), "images per class"),
        (lambda c: c.__setitem__(TABLE + 11, 255), "expected pixels within the file"),
        (lambda c: c.__delitem__(slice(0, None)), "expected an FFCV file, found 0 bytes"),
    ],
)
def test_a_wrong_layout_is_refused(own_data: Path, change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(spoiled(own_data, change))
