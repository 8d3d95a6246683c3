"""The built-in dataset `synthetic-10`: ten shapes in random colors, generated from a seed.

It is meant for machines without a dataset. It is learnable but not trivial: position, size, colors and noise are
random, and only the shape determines the class.
"""

import numpy as np

NAME = "synthetic-10"
CLASSES = (
    "checkerboard", "cross", "diagonal_stripes", "disc", "frame",
    "horizontal_stripes", "ring", "square", "triangle", "vertical_stripes",
)  # fmt: skip
SIDE = 32
CHUNK = 2_000
NOISE = 18.0  # standard deviation, in pixel values of 0..255


def draw(images: int, seed: int, split: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws a split. Image i has label i mod 10 and is a function of (seed, split, i).

    Args:
        images: number of images.
        seed: seed of the dataset.
        split: 0 for training, 1 for test.

    Returns:
        The images (N, 32, 32, 3) uint8 and labels (N,) int64.
    """
    labels = np.arange(images) % len(CLASSES)
    pixels = np.empty((images, SIDE, SIDE, 3), dtype=np.uint8)
    for start in range(0, images, CHUNK):
        rng = np.random.Generator(np.random.Philox(key=[seed * 2 + split, start // CHUNK]))
        # A full chunk is always drawn, so that a smaller dataset is a prefix of a larger one.
        chunk = _draw_chunk(np.arange(start, start + CHUNK) % len(CLASSES), rng)
        pixels[start : start + CHUNK] = chunk[: images - start]
    return pixels, labels


def _draw_chunk(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws the images (n, 32, 32, 3) uint8 of `labels` (n,)."""
    count = len(labels)
    uniform = rng.random((count, 12), dtype=np.float32)
    center_y, center_x = 10 + 12 * uniform[:, 0], 10 + 12 * uniform[:, 1]
    radius = 6 + 6 * uniform[:, 2]
    period = 3 + 3 * uniform[:, 3]
    background = 255 * uniform[:, 4:7]
    # The colors of shape and background differ by at least a third of the range in every channel.
    foreground = (background + 85 + 85 * uniform[:, 7:10]) % 255
    grid = np.arange(SIDE, dtype=np.float32)
    y = grid[None, :, None] - center_y[:, None, None]
    x = grid[None, None, :] - center_x[:, None, None]
    r = radius[:, None, None]
    p = period[:, None, None]
    box = np.maximum(abs(y), abs(x))
    distance = np.sqrt(y * y + x * x)
    stripes_y, stripes_x = np.floor(y / p) % 2 == 0, np.floor(x / p) % 2 == 0
    masks = [
        (stripes_y ^ stripes_x) & (box < 1.3 * r),
        (np.minimum(abs(y), abs(x)) < r / 3) & (box < r),
        (np.floor((y + x) / p) % 2 == 0) & (box < 1.3 * r),
        distance < r,
        (box < r) & (box > 0.6 * r),
        stripes_y & (box < 1.3 * r),
        (distance < r) & (distance > 0.6 * r),
        box < 0.85 * r,
        (y < 0.8 * r) & (abs(x) < (y + r) / 2),
        stripes_x & (box < 1.3 * r),
    ]
    mask = np.choose(labels[:, None, None], masks)[..., None]
    image = np.where(mask, foreground[:, None, None], background[:, None, None])
    image += NOISE * rng.standard_normal((count, SIDE, SIDE, 3), dtype=np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
