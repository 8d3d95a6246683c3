"""The fused CPU pass of `pixels.make`, compiled once and cached on disk.

What it waits for is memory: the images of a batch lie anywhere in the split. So each thread touches the image
after the one it is working on, and the processor has fetched it by the time it is wanted.
"""

import numba
import numpy as np

ONE, TWO, THREE, CACHE_LINE = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(64)


@numba.njit(inline="always")
def mirror(line: np.ndarray, mirrored: np.ndarray) -> None:
    """Turns a row of RGB pixels round, (3 W,) uint8. Unsigned, or each index would be checked for its sign."""
    run = np.uint64(len(line))
    for pixel in range(run // THREE):
        k = THREE * pixel
        mirrored[k] = line[run - k - THREE]
        mirrored[k + ONE] = line[run - k - TWO]
        mirrored[k + TWO] = line[run - k - ONE]


@numba.njit(inline="always")
def reflected(at: int, size: int) -> int:
    """The position within 0..size-1 that a position outside mirrors, the edge itself not repeated."""
    if at < 0:
        return -at
    return 2 * (size - 1) - at if at >= size else at


@numba.njit(inline="always")
def fill(line: np.ndarray, x: int, image: np.ndarray, pixel: int) -> None:
    """Copies one RGB pixel of an image to place x of a line."""
    for channel in range(3):
        line[3 * x + channel] = image[3 * pixel + channel]


@numba.njit(inline="always")
def touch(image: np.ndarray) -> np.uint8:
    """Reads a byte of each cache line of an image; the result only keeps the compiler from leaving it out."""
    seen = np.uint8(0)
    for k in range(np.uint64(0), np.uint64(len(image)), CACHE_LINE):
        seen |= image[k]
    return seen


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
    """Gathers, crops, flips and normalises into `out` (n, H, W, 3), float32 or uint8; see `pixels.make`.

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
    share = (count + threads - 1) // threads
    for thread in numba.prange(threads):
        # One row of the crop, and the same mirrored; what lies outside of the image is 0, or reflected.
        line, mirrored = np.zeros(run, np.uint8), np.empty(run, np.uint8)
        seen = np.zeros(1, np.int64)
        stop = min(count, (thread + 1) * share)
        for i in range(thread * share, stop):
            if i + 1 < stop:
                seen[0] += touch(flat[index[i + 1]])
            image = flat[index[i]]
            left, right = max(0, -column[i]), min(width, width - column[i])  # of its pixels, those inside
            first, last, start = left * channels, right * channels, column[i] * channels
            for k in range(run):
                line[k] = 0
            for y in range(height):
                source, target = y + row[i], made[i * height + y]
                if reflect:
                    source = reflected(source, height)
                elif source < 0 or source >= height:
                    for k in range(run):
                        target[k] = shifts[k]
                    continue
                inside = image[source * run + first + start : source * run + last + start]
                place = line[first:last]
                for k in range(len(place)):
                    place[k] = inside[k]
                if reflect:
                    for x in range(left):
                        fill(line, x, image, source * width + reflected(x + column[i], width))
                    for x in range(right, width):
                        fill(line, x, image, source * width + reflected(x + column[i], width))
                if flip[i]:
                    mirror(line, mirrored)
                    for k in range(run):
                        target[k] = np.float32(mirrored[k]) * scales[k] + shifts[k]
                else:
                    for k in range(run):
                        target[k] = np.float32(line[k]) * scales[k] + shifts[k]
