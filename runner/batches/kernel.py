"""The fused CPU pass of `pixels.make`, compiled once and cached on disk."""

import numba
import numpy as np


@numba.njit(inline="always")
def normalise(line: np.ndarray, scales: np.ndarray, shifts: np.ndarray, target: np.ndarray) -> None:
    """One run of values, (k,) uint8 to float32. Every index starts at 0, or numba would check each for its sign."""
    for k in range(len(target)):
        target[k] = np.float32(line[k]) * scales[k] + shifts[k]


@numba.njit(parallel=True, cache=True, error_model="numpy")
def make(
    images: np.ndarray,
    index: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    flip: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    out: np.ndarray,
) -> None:
    """Gathers, crops, flips and normalises into `out` (n, H, W, 3) float32; see `pixels.make` for the rest.

    A row of pixels is one run of 3 W values, with scale and shift repeated along it, so that the inner loops
    have no branches and the compiler makes vector instructions of them.
    """
    count, height, width, channels = out.shape
    run = width * channels
    images = images.reshape(len(images), height, run)
    out = out.reshape(count, height, run)
    scales, shifts = np.empty(run, np.float32), np.empty(run, np.float32)
    for k in range(run):
        scales[k], shifts[k] = scale[k % channels], shift[k % channels]
    for i in numba.prange(count):
        image, made = images[index[i]], out[i]
        start = column[i] * channels  # of the crop in a row of the image
        first, last = max(0, -start), min(run, run - start)  # of the crop's values that lie inside the image
        line = np.zeros(run, np.uint8)  # of the crop: what lies outside stays 0
        pixels_backwards = line.reshape(width, 3)[::-1]
        mirrored = np.empty(run, np.uint8)
        reversed_pixels = mirrored.reshape(width, 3)
        for y in range(height):
            source = y + row[i]
            if source < 0 or source >= height:
                made[y, :] = shifts
                continue
            line[first:last] = image[source, first + start : last + start]
            if flip[i]:
                for x in range(width):
                    for c in range(3):
                        reversed_pixels[x, c] = pixels_backwards[x, c]
                normalise(mirrored, scales, shifts, made[y])
            else:
                normalise(line, scales, shifts, made[y])
