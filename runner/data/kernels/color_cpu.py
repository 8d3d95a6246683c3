"""`color.jitter` as a compiled CPU loop, cached on disk: each image is read once and changed in place.

Every constant is a float32, because numba would compute in float64 otherwise, and the bits would differ.
"""

import numba
import numpy as np

ZERO, ONE, TWO, FOUR, SIX, MAXIMUM = (np.float32(value) for value in (0, 1, 2, 4, 6, 255))
RED, GREEN, BLUE = (np.float32(value) for value in (0.2989, 0.587, 0.114))
FROM_BYTE, TO_BYTE, SIXTH = np.float32(1 / 255), np.float32(256 - 1e-3), np.float32(1 / 6)


@numba.njit(inline="always")
def to_byte(value: np.float32) -> np.uint8:
    """Clamps to 0..255 and rounds down."""
    return np.uint8(min(max(value, ZERO), MAXIMUM))


@numba.njit(inline="always")
def unit(value: np.float32) -> np.float32:
    """Clamps to 0..1."""
    return min(max(value, ZERO), ONE)


@numba.njit(inline="always")
def gray(pixel: np.ndarray) -> np.float32:
    """The luma of a pixel (3,) uint8, rounded down."""
    return np.floor(np.float32(pixel[0]) * RED + np.float32(pixel[1]) * GREEN + np.float32(pixel[2]) * BLUE)


@numba.njit(inline="always")
def blend(pixel: np.ndarray, other: np.float32, factor: np.float32) -> None:
    """Blends a pixel with a gray (factor 0), in place."""
    rest = other * (ONE - factor)
    for channel in range(3):
        pixel[channel] = to_byte(np.float32(pixel[channel]) * factor + rest)


@numba.njit
def shift_hue(pixel: np.ndarray, shift: np.float32) -> None:
    """Shifts the hue of a pixel in HSV space by a fraction of the color circle, in place."""
    red, green, blue = (
        np.float32(pixel[0]) * FROM_BYTE, np.float32(pixel[1]) * FROM_BYTE, np.float32(pixel[2]) * FROM_BYTE,
    )  # fmt: skip
    value = max(red, max(green, blue))
    chroma = value - min(red, min(green, blue))
    saturated, divisor = ZERO, ONE
    if chroma != ZERO:
        saturated, divisor = chroma / value, chroma
    from_red, from_green, from_blue = (value - red) / divisor, (value - green) / divisor, (value - blue) / divisor
    if red == value:
        sector = from_blue - from_green
    elif green == value:
        sector = from_red + TWO - from_blue
    else:
        sector = from_green + FOUR - from_red
    turn = sector * SIXTH + ONE
    turn = turn - np.floor(turn) + shift
    turn = (turn - np.floor(turn)) * SIX
    floor = np.floor(turn)
    fraction = saturated * (turn - floor)
    falling = unit((ONE - fraction) * value)
    rising = unit((fraction + (ONE - saturated)) * value)
    low = unit((ONE - saturated) * value)
    sixth = int(floor) % 6
    if sixth == 0:
        red, green, blue = value, rising, low
    elif sixth == 1:
        red, green, blue = falling, value, low
    elif sixth == 2:
        red, green, blue = low, value, rising
    elif sixth == 3:
        red, green, blue = low, falling, value
    elif sixth == 4:
        red, green, blue = rising, low, value
    else:
        red, green, blue = value, low, falling
    pixel[0], pixel[1], pixel[2] = np.uint8(red * TO_BYTE), np.uint8(green * TO_BYTE), np.uint8(blue * TO_BYTE)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def jitter(images: np.ndarray, factors: np.ndarray, order: np.ndarray, threads: int) -> None:
    """Jitters images (n, H, W, 3) uint8 in place; see `color.jitter`."""
    count, height, width, channels = images.shape
    pixels = height * width
    flat = images.reshape(count, pixels, channels)
    share = (count + threads - 1) // threads
    for thread in numba.prange(threads):
        for i in range(thread * share, min(count, (thread + 1) * share)):
            for turn in range(4):
                operation = order[i, turn]
                factor = factors[i, operation]
                if operation == 0:
                    for p in range(pixels):
                        for channel in range(channels):
                            flat[i, p, channel] = to_byte(np.float32(flat[i, p, channel]) * factor)
                elif operation == 1:
                    total = 0
                    for p in range(pixels):
                        total += int(gray(flat[i, p]))
                    mean = np.float32(total) / np.float32(pixels)
                    for p in range(pixels):
                        blend(flat[i, p], mean, factor)
                elif operation == 2:
                    for p in range(pixels):
                        blend(flat[i, p], gray(flat[i, p]), factor)
                else:
                    for p in range(pixels):
                        shift_hue(flat[i, p], factor)
