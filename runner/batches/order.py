"""The order of samples and the numbers behind each augmentation: pure functions, alike on every rank.

Nothing here has a state. Order is a function of (seed, epoch); what happens to an image is a function of
(seed, epoch, sample), what happens to a batch of (seed, epoch, step). So one process with 512 images and eight
with 64 see the same images with the same crops, and a resumed run sees what it would have seen.
"""

import numpy as np

# One stream of random numbers for each use, so that adding one changes no other.
CROP_ROW, CROP_COLUMN, FLIP, HOLE_ROW, HOLE_COLUMN, BRIGHTNESS, CONTRAST, SATURATION, HUE = range(9)
COLOUR_ORDER = 9  # and the three after it
RANK = 13
BATCH = 1  # in the high word of Philox's counter, far from the numbers that make the order


def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..samples-1, (N,) int64, as a function of (seed, epoch) alone."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(samples)


def batch_generator(seed: int, epoch: int, step: int) -> np.random.Generator:
    """A generator for what concerns a whole batch, as a function of (seed, epoch, step) alone."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, step, BATCH]))


def rank_seed(seed: int, rank: int) -> int:
    """A seed for a rank's own generator, of which no other rank and no other seed has the same."""
    return int(random_bits(np.array([rank]), seed, 0, RANK)[0] >> np.uint64(1))


def random_bits(samples: np.ndarray, seed: int, epoch: int, stream: int) -> np.ndarray:
    """64 random bits for each sample, (N,) uint64: a hash of (seed, epoch, stream, sample).

    The mixing function is splitmix64's finaliser (Steele, Lea, Flood 2014), applied once per ingredient.
    """
    with np.errstate(over="ignore"):
        state = np.uint64(0)
        for part in (seed, epoch, stream):
            state = _mix(state ^ _mix(np.uint64(part) + _GOLDEN))
        return _mix(state ^ _mix(samples.astype(np.uint64) + _GOLDEN))


def random_below(bound: int, samples: np.ndarray, seed: int, epoch: int, stream: int) -> np.ndarray:
    """A uniform integer in 0..bound-1 for each sample, (N,) int64 (the high 32 bits, scaled)."""
    high = random_bits(samples, seed, epoch, stream) >> np.uint64(32)
    return ((high * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def random_between(low: float, high: float, samples: np.ndarray, seed: int, epoch: int, stream: int) -> np.ndarray:
    """A uniform number in low..high for each sample, (N,) float32."""
    share = (random_bits(samples, seed, epoch, stream) >> np.uint64(11)).astype(np.float64) / 2**53
    return (low + (high - low) * share).astype(np.float32)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
