"""The order of samples, and the random numbers of augmentation, as stateless functions.

The order depends on (seed, epoch), the augmentation of an image on (seed, epoch, sample, copy), that of a batch on
(seed, epoch, step). One process with 512 images and eight with 64 therefore see the same images with the same crops,
and a resumed run sees what the uninterrupted one would have seen.
"""

from typing import Any

import numpy as np

COPY = 32  # bit at which `copy_keys` puts the number of a copy
RANK = 13  # random number stream of `rank_seed`; the other streams are in runner.data.augment
BATCH = 1  # in the high word of Philox's counter, far from the numbers used by `epoch_order`


def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns a permutation of 0..samples-1, (N,) int64, as a function of (seed, epoch)."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(samples)


def repeated_slots(samples: int, repeats: int, batch_size: int) -> np.ndarray:
    """Returns what each position of an epoch shows with repeated augmentation, (samples,) int64.

    Slot s is copy s % repeats of the sample at position s // repeats of `epoch_order`, so that an epoch shows the first
    samples / repeats of them (E. Hoffer et al., CVPR 2020; M. Berman et al., arXiv:1902.05509). The copies of a sample
    are in the same batch, or where its size is not a multiple of `repeats`, in consecutive ones. Within a batch of many
    samples they are far apart, so that mixup and CutMix, which mix neighbors, mix different samples.
    """
    slots = np.arange(samples)
    return np.lexsort((slots % repeats, slots // batch_size))


def batch_generator(seed: int, epoch: int, step: int) -> np.random.Generator:
    """Returns a generator for a whole batch, as a function of (seed, epoch, step)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, step, BATCH]))


def rank_seed(seed: int, rank: int) -> int:
    """Returns the seed of a rank's own generator, different for every (seed, rank)."""
    return int(random_bits(np.array([rank]), seed, 0, RANK)[0] >> np.uint64(1))


def copy_keys(samples: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Returns what identifies copies (N,) of samples (N,) in `random_bits`; for copy 0, the sample itself."""
    return samples + (copies << COPY)


def random_bits(samples: np.ndarray, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Returns 64 random bits for each sample, (N,) uint64: a hash of (seed, epoch, stream, sample).

    The hash mixes in one input after another, by the finalizer of splitmix64 (Steele, Lea, Flood 2014).
    """
    with np.errstate(over="ignore"):
        state: Any = np.uint64(0)
        for value in (seed, epoch, stream):
            state = _splitmix64(state ^ _splitmix64(np.uint64(value) + _GOLDEN))
        return _splitmix64(state ^ _splitmix64(samples.astype(np.uint64) + _GOLDEN))


def random_below(bound: int | np.ndarray, samples: np.ndarray, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Returns a uniform integer in 0..bound-1 for each sample, (N,) int64: the high 32 bits, scaled.

    The bound is at most 2**32, and may be one for each sample (N,).
    """
    high = random_bits(samples, seed, epoch, stream) >> np.uint64(32)
    return ((high * np.asarray(bound, np.uint64)) >> np.uint64(32)).astype(np.int64)


def random_between(low: float, high: float, samples: np.ndarray, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Returns a uniform number in low..high for each sample, (N,) float32."""
    fraction = (random_bits(samples, seed, epoch, stream) >> np.uint64(11)).astype(np.float64) / 2**53
    return (low + (high - low) * fraction).astype(np.float32)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
