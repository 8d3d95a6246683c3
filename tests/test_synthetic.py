import numpy as np

from data_prep import synthetic


def test_deterministic_and_a_smaller_set_is_a_prefix() -> None:
    images, labels = synthetic.draw(2_500, seed=1, split=0)
    again, _ = synthetic.draw(100, seed=1, split=0)
    np.testing.assert_array_equal(images[:100], again)
    assert np.bincount(labels).tolist() == [250] * 10


def test_seeds_and_splits_differ() -> None:
    drawn = [synthetic.draw(10, seed, split)[0] for seed in (0, 1) for split in (0, 1)]
    assert len({images.tobytes() for images in drawn}) == 4


def test_known_pixels() -> None:
    """Another NumPy must not silently draw another set."""
    images, _ = synthetic.draw(20, seed=0, split=0)
    assert images.shape == (20, 32, 32, 3)
    assert images.dtype == np.uint8
    assert abs(float(images.mean()) - 127) < 25
    assert images[0].std() > 20
