"""What is done to each training image, as arrays of numbers computed before any pixel is touched."""

from dataclasses import dataclass

import numpy as np

from runner.batches import order
from runner.recipe import Augment


@dataclass(frozen=True)
class Placement:
    """Where each image of a batch is cut from its zero-padded self, and whether it is mirrored.

    row, column: (N,) int64, offset of the crop's corner from the unpadded image's, in -padding..padding.
    flip: (N,) bool.
    """

    row: np.ndarray
    column: np.ndarray
    flip: np.ndarray


def placement(augment: Augment | None, samples: np.ndarray, seed: int, epoch: int) -> Placement:
    """The placement of each of `samples` (N,) in an epoch; with None, every image as it is."""
    still = np.zeros(len(samples), dtype=np.int64)
    if augment is None:
        return Placement(still, still, still.astype(bool))
    span = 2 * augment.crop_padding + 1
    row = order.random_below(span, samples, seed, epoch, order.CROP_ROW) - augment.crop_padding
    column = order.random_below(span, samples, seed, epoch, order.CROP_COLUMN) - augment.crop_padding
    flip = order.random_below(2, samples, seed, epoch, order.FLIP) == 1
    return Placement(row, column, flip if augment.flip else still.astype(bool))
