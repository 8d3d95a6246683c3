"""The fused CPU pass of the resident batches, compiled once and cached on disk."""

import numba
import numpy as np


@numba.njit(parallel=True, cache=True, fastmath=False, boundscheck=False)
def make(
    images: np.ndarray,
    chosen: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    flip: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    out: np.ndarray,
) -> None:
    """Gathers, crops, flips and normalises into `out` (n, H, W, 3) float32.

    images (N, H, W, 3) uint8; chosen, row, column (n,) int64; flip (n,) bool; scale, shift (3,) float32. Pixels
    outside the image are 0 before normalisation.
    """
    _, height, width, _ = images.shape
    for i in numba.prange(len(chosen)):
        image = images[chosen[i]]
        for y in range(height):
            source_y = y + row[i]
            for x in range(width):
                source_x = (width - 1 - x if flip[i] else x) + column[i]
                inside = 0 <= source_y < height and 0 <= source_x < width
                for c in range(3):
                    pixel = np.float32(image[source_y, source_x, c]) if inside else np.float32(0)
                    out[i, y, x, c] = pixel * scale[c] + shift[c]
