"""The fused CPU pass of `pixels.make`, compiled once and cached on disk."""

import numba
import numpy as np

CHUNK = 8  # images that share a thread's buffers
ONE, TWO, THREE = np.uint64(1), np.uint64(2), np.uint64(3)


@numba.njit(inline="always")
def mirror(line: np.ndarray, mirrored: np.ndarray) -> None:
    """Turns a row of RGB pixels round, (3 W,) uint8. Unsigned, or each index would be checked for its sign."""
    run = np.uint64(len(line))
    for pixel in range(run // THREE):
        k = THREE * pixel
        mirrored[k] = line[run - k - THREE]
        mirrored[k + ONE] = line[run - k - TWO]
        mirrored[k + TWO] = line[run - k - ONE]


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
    flat = images.reshape(len(images), height * run)
    made = out.reshape(count * height, run)
    scales, shifts = np.empty(run, np.float32), np.empty(run, np.float32)
    for k in range(run):
        scales[k], shifts[k] = scale[k % channels], shift[k % channels]
    chunks = (count + CHUNK - 1) // CHUNK
    for chunk in numba.prange(chunks):
        # One row of the crop, and the same mirrored; what lies outside of the image is 0.
        line, mirrored = np.empty(run, np.uint8), np.empty(run, np.uint8)
        for i in range(chunk * CHUNK, min(count, (chunk + 1) * CHUNK)):
            image = flat[index[i]]
            start = column[i] * channels  # of the crop in a row of the image
            first, last = max(0, -start), min(run, run - start)  # of its values that lie inside
            for k in range(run):
                line[k] = 0
            for y in range(height):
                source, target = y + row[i], made[i * height + y]
                if source < 0 or source >= height:
                    for k in range(run):
                        target[k] = shifts[k]
                    continue
                inside = image[source * run + first + start : source * run + last + start]
                place = line[first:last]
                for k in range(len(place)):
                    place[k] = inside[k]
                if flip[i]:
                    mirror(line, mirrored)
                    for k in range(run):
                        target[k] = np.float32(mirrored[k]) * scales[k] + shifts[k]
                else:
                    for k in range(run):
                        target[k] = np.float32(line[k]) * scales[k] + shifts[k]
