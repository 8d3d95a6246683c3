"""`policy.apply` as a compiled CPU loop, cached on disk: each image runs only its own operations.

As in `color_cpu`, every constant is a float32, so that the bits are those of the reference.
"""

import numba
import numpy as np

# After a change in one of these modules, delete the cached loop: numba looks for changes in this file alone.
from runner.data.kernels.color_cpu import ONE, ZERO, blend, gray, to_byte
from runner.data.policy_operations import AUTO_CONTRAST, BRIGHTNESS, COLOR, CONTRAST, IDENTITY, POSTERIZE, SHARPNESS

HALF, FROM_BYTE = np.float32(0.5), np.float32(1 / 255)


@numba.njit
def move(image: np.ndarray, before: np.ndarray, matrix: np.ndarray) -> None:
    """Shears, translates or rotates image `before` (H, W, 3) by an inverse affine map (2, 3) into `image`."""
    height, width, _ = image.shape
    half_height, half_width = np.float32(height) * HALF, np.float32(width) * HALF
    for i in range(height):
        y = np.float32(i) - (half_height - HALF)
        for j in range(width):
            x = np.float32(j) - (half_width - HALF)
            column = np.rint((x * matrix[0, 0] + y * matrix[0, 1] + matrix[0, 2] + ONE) * half_width - HALF)
            row = np.rint((x * matrix[1, 0] + y * matrix[1, 1] + matrix[1, 2] + ONE) * half_height - HALF)
            if column >= ZERO and column < np.float32(width) and row >= ZERO and row < np.float32(height):
                source = before[np.uint64(row), np.uint64(column)]
                for channel in range(3):
                    image[i, j, channel] = source[channel]
            else:
                for channel in range(3):
                    image[i, j, channel] = 0


@numba.njit
def change_color(image: np.ndarray, factor: np.float32) -> None:
    """Blends each pixel of an image (H, W, 3) with its gray."""
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            blend(image[i, j], gray(image[i, j]), factor)


@numba.njit
def change_contrast(image: np.ndarray, factor: np.float32) -> None:
    """Blends an image (H, W, 3) with its mean gray."""
    height, width, _ = image.shape
    total = 0
    for i in range(height):
        for j in range(width):
            total += int(gray(image[i, j]))
    mean = np.float32(total) / np.float32(height * width)
    for i in range(height):
        for j in range(width):
            blend(image[i, j], mean, factor)


@numba.njit
def sharpen(image: np.ndarray, before: np.ndarray, factor: np.float32) -> None:
    """Blends image `before` (H, W, 3), smoothed, with itself into `image`; the pixels at the border stay."""
    height, width, _ = image.shape
    rest = ONE - factor
    above_, here_, below_ = before[:-2], before[1:-1], before[2:]
    for i in range(height - 2):
        above, here, below = above_[i].ravel(), here_[i].ravel(), below_[i].ravel()
        target = image[i + 1].ravel()
        for k in range(3, 3 * width - 3):
            total = np.int32(0)
            for line in (above, here, below):
                total += np.int32(line[k - 3]) + np.int32(line[k]) + np.int32(line[k + 3])
            center = np.int32(here[k])
            smooth = np.int32((np.uint32(total + np.int32(4) * center) * np.uint32(2) + np.uint32(13)) // np.uint32(26))
            target[k] = to_byte(np.float32(center) + np.float32(smooth - center) * rest)


@numba.njit
def fill_table(table: np.ndarray, operation: int, factor: np.float32) -> None:
    """Fills a table (3, 256) of brightness, posterize or solarize."""
    for k in range(256):
        level = np.uint8(k)
        if operation == BRIGHTNESS:
            level = to_byte(np.float32(k) * factor)
        elif operation == POSTERIZE:
            level = np.uint8(k & int(factor))
        elif np.float32(k) >= factor:
            level = np.uint8(255 - k)
        table[0, k] = table[1, k] = table[2, k] = level


@numba.njit
def fill_table_of_channel(table: np.ndarray, histogram: np.ndarray, pixels: int, operation: int) -> None:
    """Fills a table (256,) of autocontrast or equalize from the channel's histogram (256,)."""
    low, high = 0, 255
    while histogram[low] == 0:
        low += 1
    while histogram[high] == 0:
        high -= 1
    step = (pixels - histogram[high]) // 255
    unchanged = low == high if operation == AUTO_CONTRAST else step == 0
    scale, below = np.float32(high - low) * FROM_BYTE, 0
    for k in range(256):
        if unchanged:
            table[k] = k
        elif operation == AUTO_CONTRAST:
            table[k] = to_byte((np.float32(k) - np.float32(low)) / scale)
        else:
            table[k] = min((below + step // 2) // step, 255)
            below += histogram[k]


@numba.njit
def look_up(image: np.ndarray, table: np.ndarray, histogram: np.ndarray, operation: int, factor: np.float32) -> None:
    """Replaces each value of an image (H, W, 3) with its entry in the table of its channel."""
    pixels = image.reshape(-1, 3)
    if operation < AUTO_CONTRAST:
        fill_table(table, operation, factor)
    else:
        histogram[:] = 0
        for p in range(len(pixels)):
            for channel in range(3):
                histogram[channel, pixels[p, channel]] += 1
        for channel in range(3):
            fill_table_of_channel(table[channel], histogram[channel], len(pixels), operation)
    for p in range(len(pixels)):
        for channel in range(3):
            pixels[p, channel] = table[channel, pixels[p, channel]]


@numba.njit(parallel=True, cache=True, error_model="numpy")
def apply(images: np.ndarray, operations: np.ndarray, matrices: np.ndarray, factors: np.ndarray, threads: int) -> None:
    """Applies the operations of each layer to images (n, H, W, 3) uint8 in place; see `policy.apply`."""
    count = len(images)
    share = (count + threads - 1) // threads
    for thread in numba.prange(threads):
        before = np.empty(images.shape[1:], np.uint8)
        table, histogram = np.empty((3, 256), np.uint8), np.empty((3, 256), np.int64)
        for i in range(thread * share, min(count, (thread + 1) * share)):
            image = images[i]
            for layer in range(operations.shape[1]):
                operation, factor = operations[i, layer], factors[i, layer]
                if operation == COLOR:
                    change_color(image, factor)
                elif operation == CONTRAST:
                    change_contrast(image, factor)
                elif operation >= BRIGHTNESS:
                    look_up(image, table, histogram, operation, factor)
                elif operation != IDENTITY:
                    before[:] = image
                    if operation == SHARPNESS:
                        sharpen(image, before, factor)
                    else:
                        move(image, before, matrices[i, layer])
