"""RandAugment, TrivialAugmentWide, random erasing: torchvision's operations and distributions; parameters of copies."""

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import RandAugment, TrivialAugmentWide

from runner.config.recipe import Augment
from runner.data import augment, color, order, policy

TORCHVISION: dict[str, Any] = {"rand": RandAugment(), "trivial": TrivialAugmentWide()}
SIGNED = policy.OPERATIONS[policy.SHEAR_X : policy.POSTERIZE]
GEOMETRIC = policy.OPERATIONS[policy.SHEAR_X : policy.COLOR]
# torchvision's CPU code fuses a product and a sum before it truncates; on a GPU it does not. All others are exact.
WITHIN_ONE = ("Color", "Contrast", "Sharpness")


def pictures(count: int, side: tuple[int, int]) -> torch.Tensor:
    """Noise, smooth images, and images with few colors or one, (count, H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, *side), dtype=torch.uint8, generator=generator)
    coarse = torch.randint(30, 200, (count // 2, 3, 4, 4), generator=generator).float()
    images[count // 2 :] = torch.nn.functional.interpolate(coarse, side, mode="bilinear").to(torch.uint8)
    images[0], images[1] = 7, images[1] // 128 * 255
    return images.permute(0, 2, 3, 1).contiguous()


def distance_to_tie(matrices: torch.Tensor, side: tuple[int, int]) -> torch.Tensor:
    """How far the source of each pixel is from the middle between two pixels, in pixels, (n, H, W)."""
    height, width = side
    x, y = torch.arange(width).double() - (width - 1) / 2, torch.arange(height).double()[:, None] - (height - 1) / 2
    distances = []
    for k, size in enumerate((width, height)):
        a, b, c = matrices[:, k].double()[..., None, None].unbind(1)
        source = (x * a + y * b + c + 1) * size / 2 - 0.5
        distances.append((source - source.floor() - 0.5).abs())
    return torch.minimum(*distances)


@pytest.mark.parametrize("side", [(32, 32), (20, 28)])
@pytest.mark.parametrize("kind", TORCHVISION)
def test_every_operation_is_torchvisions_at_all_magnitudes(kind: str, side: tuple[int, int]) -> None:
    """A shear or rotation may differ only where the source of a pixel is in the middle between two pixels."""
    matrices, factors = (torch.from_numpy(table) for table in policy.parameter_tables(kind, side))
    images, reference = pictures(6, side), TORCHVISION[kind]
    for k, name in enumerate(policy.OPERATIONS):
        make, signed = reference._AUGMENTATION_SPACE[name]
        assert signed == (name in SIGNED)
        values = make(policy.BINS, *side)
        cases = list(itertools.product(range(policy.BINS if values is not None else 1), range(1 + signed)))
        operations, count = torch.full((len(cases) * len(images), 1), k), len(images)
        chosen = [table[k][tuple(zip(*cases, strict=True))] for table in (matrices, factors)]
        params = [values.repeat_interleave(count, 0)[:, None] for values in chosen]
        results = policy.apply_torch(images.repeat(len(cases), 1, 1, 1), operations, *params)
        near = distance_to_tie(params[0][:, 0], side) < 1e-4
        for case, (magnitude, negative) in enumerate(cases):
            magnitude = 0.0 if values is None else float(values[magnitude]) * (-1 if negative else 1)
            planes = images.permute(0, 3, 1, 2)
            expected = reference._apply_image_or_video_transform(planes, name, magnitude, "nearest", reference._fill)
            part = slice(case * count, (case + 1) * count)
            difference = (results[part].int() - expected.permute(0, 2, 3, 1).int()).abs().amax(-1)
            if name in GEOMETRIC:
                difference[near[part]] = 0
            assert difference.max() <= (name in WITHIN_ONE), (name, magnitude)


def random_policy(side: tuple[int, int], count: int = 120) -> tuple[torch.Tensor, ...]:
    """Images and three layers of random operations of any magnitude, for `policy.apply`."""
    rng = np.random.default_rng(0)
    tables = policy.parameter_tables("trivial", side)
    shape = (count, 3)
    chosen = rng.integers(len(policy.OPERATIONS), size=shape), rng.integers(31, size=shape), rng.integers(2, size=shape)
    chosen[0][: len(policy.OPERATIONS), 0] = range(len(policy.OPERATIONS))
    return pictures(count, side), *(torch.from_numpy(a) for a in (chosen[0], *(table[chosen] for table in tables)))


@pytest.mark.parametrize("side", [(32, 32), (20, 28), (3, 50), (2, 2), (1, 1)])
def test_the_compiled_policy_matches_the_reference(side: tuple[int, int]) -> None:
    images, *params = random_policy(side)
    before = images.clone()
    results = policy.apply(images, *params)
    assert torch.equal(results, policy.apply_torch(images, *params))
    assert torch.equal(images, before)
    for part in (slice(0, 1), slice(3, 10), slice(50, 50)):
        assert torch.equal(policy.apply(images[part], *(values[part] for values in params)), results[part])


@pytest.mark.gpu
@pytest.mark.parametrize("side", [(32, 32), (20, 28)])
def test_a_policy_on_a_gpu_matches_the_cpu(side: tuple[int, int]) -> None:
    params = random_policy(side)
    assert torch.equal(policy.apply(*(tensor.cuda() for tensor in params)).cpu(), policy.apply(*params))


def test_operations_magnitudes_and_signs_are_uniform_and_independent() -> None:
    samples = np.arange(50_000)

    def drawn(epoch: int, **settings: Any) -> tuple[np.ndarray, ...]:
        params = augment.sample_params(Augment(**settings), samples, (32, 32), 0, epoch)
        return tuple(t.numpy() for t in (params.policy_operations, params.policy_matrices, params.policy_factors))

    operations, matrices, factors = drawn(0, policy="trivial")
    assert operations.shape == factors.shape == (50_000, 1)
    for values, expected in (
        (operations, np.full(14, 50_000 / 14)),
        (factors[operations == policy.BRIGHTNESS], None),
        (factors[operations == policy.SOLARIZE], None),
        (matrices[operations == policy.SHEAR_X][:, 0, 1], None),
    ):
        _, counts = np.unique(values, return_counts=True)
        if expected is None:  # each sign and magnitude; 0 has no sign
            assert len(counts) in (31, 61)
            expected = np.full(31, len(values) / 31) if len(counts) == 31 else np.full(61, len(values) / 62)
            expected[30] *= 1 if len(counts) == 31 else 2
        assert len(counts) == len(expected)
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < len(expected) + 4 * np.sqrt(2 * len(expected))  # four standard deviations
    two, _, two_factors = drawn(0, policy="rand", rand_magnitude=20)
    three, *_ = drawn(0, policy="rand", rand_ops=3)
    assert two.shape == (50_000, 2)
    assert np.array_equal(three[:, :2], two)
    assert np.unique(two_factors[two == policy.COLOR]) == pytest.approx([0.4, 1.6])
    assert (operations[:, 0] == two[:, 0]).all()
    pairs = [
        (two[:, 0], two[:, 1]),
        (operations, drawn(1, policy="trivial")[0]),
        (operations[1:], operations[:-1]),
        (two[:, 0], two_factors[:, 1]),
    ]
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


def test_random_erasing_has_torchvisions_distribution() -> None:
    from torchvision.transforms.v2 import RandomErasing

    side, samples = (20, 28), np.arange(50_000)
    params = augment.sample_params(Augment(erase=0.25), samples, side, 0, 0)
    assert params.erase_box is not None
    boxes = params.erase_box.numpy()
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    erased = height > 0
    assert abs(erased.mean() - 0.25) < 0.01
    assert not boxes[~erased].any()
    boxes, height, width = boxes[erased], height[erased], width[erased]
    assert (boxes >= 0).all()
    assert boxes[:, 2].max() == 20
    assert boxes[:, 3].max() == 28
    torch.manual_seed(0)
    transform, image = RandomErasing(1.0), [torch.zeros(3, *side)]
    drawn = [transform.make_params(image) for _ in range(4000)]
    for name, values in (("h", height), ("w", width), ("i", boxes[:, 0]), ("j", boxes[:, 1])):
        expected = np.array([one[name] for one in drawn])
        assert abs(values.mean() - expected.mean()) < 0.05 * expected.std() + 0.05
        assert abs(values.std() - expected.std()) < 0.05 * expected.std()
    always = augment.sample_params(Augment(erase=1.0), samples, side, 0, 0).erase_box
    assert always is not None
    assert (always[:, 2] > always[:, 0]).float().mean() > 0.999  # ten attempts failed for the others


@pytest.mark.parametrize(
    ("changes", "side", "digest"),
    [
        ({"erase": 0.5}, (32, 32), "244238e43b7d545e"),
        ({"erase": 1.0}, (7, 9), "09c0c2a739d0428a"),
        ({"erase": 1.0}, (2, 3), "61164bfde9cc6929"),
        ({"random_resized_crop": 0.08}, (32, 20), "db8d82b1f09640a5"),
        ({"random_resized_crop": 0.02}, (3, 2), "0515862a65b33635"),
        ({"random_resized_crop": 0.9}, (40, 8), "9f5a55b631054e54"),
        (
            {"random_resized_crop": 0.9},
            (32, 28),
            "70fc84f4c2f25013",
        ),  # where one of fifty images needs the last attempt
        ({"policy": "rand"}, (32, 32), "85677d3c416008ca"),
    ],
)
def test_the_parameters_are_those_of_earlier_versions(
    changes: dict[str, Any], side: tuple[int, int], digest: str
) -> None:
    """A change here breaks the resumption of unfinished runs. In small images, some attempts find no rectangle."""
    with np.errstate(all="raise"):
        params = augment.sample_params(Augment(**changes), np.arange(400), side, 3, 2)
    arrays = [params.erase_box, params.resized_box, params.policy_operations]
    content = b"".join(array.numpy().astype("<i8").tobytes() for array in arrays if array is not None)
    assert content
    assert hashlib.sha256(content).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("changes", "loaded"),
    [({}, []), ({"hue": 0.1}, ["color"]), ({"policy": "rand"}, ["policy"]),
     ({"policy": "trivial", "contrast": 0.2}, ["color", "policy"])],
)  # fmt: skip
def test_the_loops_of_the_parameters_are_loaded(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], loaded: list[str]
) -> None:
    """Before the first batch, because loading takes seconds where they have to be compiled; and no others."""
    calls: list[str] = []
    monkeypatch.setattr(color, "load_loop", lambda: calls.append("color"))
    monkeypatch.setattr(policy, "load_loop", lambda: calls.append("policy"))
    augment.load_loops(Augment(**changes))
    assert calls == loaded


def test_erasing_blanks_the_box() -> None:
    images = augment.erase(torch.ones(2, 8, 10, 3), torch.tensor([[2, 3, 5, 9], [0, 0, 0, 0]]))
    expected = torch.ones(2, 8, 10, 3)
    expected[0, 2:5, 3:9] = 0
    assert torch.equal(images, expected)


EVERYTHING = Augment(
    random_resized_crop=0.2, crop_padding=4, flip="random", policy="trivial", brightness=0.2, hue=0.1, cutout=4,
    erase=0.5, repeats=3,
)  # fmt: skip


@given(
    chosen=st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 9)), min_size=1, max_size=20),
    seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=25, deadline=None, derandomize=True)
def test_all_parameters_are_a_function_of_seed_epoch_sample_and_copy(
    chosen: list[tuple[int, int]], seed: int, epoch: int
) -> None:
    """Not of the other images beside it: those of the first image alone, and last of all, are the same."""
    samples, copies = np.array(chosen).T

    def sampled(which: Any) -> augment.AugmentParams:
        keys = order.copy_keys(samples[which], copies[which])
        return augment.sample_params(EVERYTHING, keys, (32, 32), seed, epoch)

    whole = sampled(slice(None))
    for which in (slice(0, 1), slice(None, None, -1)):
        for name, values in vars(sampled(which)).items():
            np.testing.assert_array_equal(values.numpy(), getattr(whole, name).numpy()[which])


def test_copies_are_augmented_independently_and_the_first_like_the_sample_itself() -> None:
    samples = np.arange(20_000)
    first, second = (
        augment.sample_params(EVERYTHING, order.copy_keys(samples, np.full(20_000, copy)), (32, 32), 0, 0)
        for copy in (0, 1)
    )
    alone = augment.sample_params(EVERYTHING, samples, (32, 32), 0, 0)
    for name, values in vars(first).items():
        assert torch.equal(values, getattr(alone, name))
        a, b = (v.numpy().reshape(20_000, -1)[:, 0] for v in (values, getattr(second, name)))
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


def test_copies_of_a_sample_are_in_one_batch_and_far_apart() -> None:
    """Two batches of six slots: within each, first copy 0 of every sample, then copy 1, then copy 2."""
    assert order.repeated_slots(12, 3, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_a_copy_has_the_same_numbers_in_every_version() -> None:
    """A resumed run continues with the augmentation of the version that began it."""
    assert order.copy_keys(np.array([5, 5, 0]), np.array([0, 2, 1])).tolist() == [5, 5 + 2 * 2**32, 2**32]
