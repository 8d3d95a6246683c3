import hashlib

import numpy as np

from data_prep import synthetic


def test_a_smaller_dataset_is_a_prefix() -> None:
    images, labels = synthetic.draw(2_500, seed=1, split=0)
    again, _ = synthetic.draw(100, seed=1, split=0)
    np.testing.assert_array_equal(images[:100], again)
    assert np.bincount(labels).tolist() == [250] * 10


def test_seeds_and_splits_differ() -> None:
    drawn = [synthetic.draw(10, seed, split)[0] for seed in (0, 1) for split in (0, 1)]
    assert len({images.tobytes() for images in drawn}) == 4


def test_known_pixels() -> None:
    """Another version of NumPy must not silently change the dataset."""
    images, _ = synthetic.draw(20, seed=0, split=0)
    assert images.shape == (20, 32, 32, 3)
    assert images.dtype == np.uint8
    expected = "dc80b59bd923c0c1f63491da8faca159ee8a6611a2992250c3cdd0a67e6a8890"
    assert hashlib.sha256(images.tobytes()).hexdigest() == expected
