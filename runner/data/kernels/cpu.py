"""`crop.make_batch` as a compiled CPU loop, cached on disk.

The loop is memory-bound, because the images of a batch are scattered over the split. Each thread therefore
prefetches the next image while it works on the current one.
"""

import numba
import numpy as np

ONE, TWO, THREE, CACHE_LINE = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(64)


@numba.njit(inline="always")
def mirror(line: np.ndarray, mirrored: np.ndarray) -> None:
    """Reverses a row of RGB pixels, (3 W,) uint8. Unsigned indices save a check of the sign."""
    length = np.uint64(len(line))
    for pixel in range(length // THREE):
        k = THREE * pixel
        mirrored[k] = line[length - k - THREE]
        mirrored[k + ONE] = line[length - k - TWO]
        mirrored[k + TWO] = line[length - k - ONE]


@numba.njit(inline="always")
def reflected(position: int, size: int) -> int:
    """Maps a position outside 0..size-1 to its mirror image inside; the edge is not repeated."""
    if position < 0:
        return -position
    return 2 * (size - 1) - position if position >= size else position


@numba.njit(inline="always")
def fill(line: np.ndarray, x: int, image: np.ndarray, pixel: int) -> None:
    """Copies one RGB pixel of an image to position x of a line."""
    for channel in range(3):
        line[3 * x + channel] = image[3 * pixel + channel]


@numba.njit(inline="always")
def prefetch(image: np.ndarray) -> np.uint8:
    """Reads a byte of each cache line of an image; the result keeps the compiler from removing the reads."""
    checksum = np.uint8(0)
    for k in range(np.uint64(0), np.uint64(len(image)), CACHE_LINE):
        checksum |= image[k]
    return checksum


@numba.njit(parallel=True, cache=True, error_model="numpy")
def make(
    images: np.ndarray,
    index: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    flip: np.ndarray,
    reflect: bool,
    scale: np.ndarray,
    shift: np.ndarray,
    threads: int,
    out: np.ndarray,
) -> None:
    """Gathers, crops, flips and normalizes into `out` (n, H, W, 3), float32 or uint8; see `crop.make_batch`.

    A row of pixels is a vector of 3 W values, with scale and shift repeated along it, so that the inner loops have
    no branches and are vectorized. One function, because the loops over threads, images and rows share its buffers.
    """
    count, height, width, channels = out.shape
    length = width * channels
    flat = images.reshape(len(images), height * length)
    rows = out.reshape(count * height, length)
    scales, shifts = np.empty(length, np.float32), np.empty(length, np.float32)
    for k in range(length):
        scales[k], shifts[k] = scale[k % channels], shift[k % channels]
    share = (count + threads - 1) // threads
    for thread in numba.prange(threads):
        # A row of the crop, and its mirror image.
        line, mirrored = np.zeros(length, np.uint8), np.empty(length, np.uint8)
        checksum = np.zeros(1, np.int64)
        stop = min(count, (thread + 1) * share)
        for i in range(thread * share, stop):
            if i + 1 < stop:
                checksum[0] += prefetch(flat[index[i + 1]])
            image = flat[index[i]]
            left, right = max(0, -column[i]), min(width, width - column[i])  # columns of the crop inside the image
            first, last, start = left * channels, right * channels, column[i] * channels
            for k in range(length):
                line[k] = 0
            for y in range(height):
                source, target = y + row[i], rows[i * height + y]
                if reflect:
                    source = reflected(source, height)
                elif source < 0 or source >= height:
                    for k in range(length):
                        target[k] = shifts[k]
                    continue
                inside = image[source * length + first + start : source * length + last + start]
                target_columns = line[first:last]
                for k in range(len(target_columns)):
                    target_columns[k] = inside[k]
                if reflect:
                    for x in range(left):
                        fill(line, x, image, source * width + reflected(x + column[i], width))
                    for x in range(right, width):
                        fill(line, x, image, source * width + reflected(x + column[i], width))
                if flip[i]:
                    mirror(line, mirrored)
                    for k in range(length):
                        target[k] = np.float32(mirrored[k]) * scales[k] + shifts[k]
                else:
                    for k in range(length):
                        target[k] = np.float32(line[k]) * scales[k] + shifts[k]
