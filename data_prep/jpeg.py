"""JPEG records: encodes images as FFCV's writer does, decodes them with FFCV's decoder, and checks their headers.

Other decoders, such as Pillow's, round differently. FFCV's loader ignores the decoder's errors, and a picture of
another size would leave a part of its buffer as it was; so headers are checked before FFCV opens a file.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.errors import UserError

START, END = b"\xff\xd8", b"\xff\xd9"
FRAME, SCAN = b"\xff\xc0", b"\xff\xda"  # of a baseline picture; a progressive one has another marker
TABLES = (b"\xff\xe0", b"\xff\xdb", b"\xff\xc4")  # JFIF, quantization, Huffman
LARGEST_SIDE = 65_500  # pixels; OpenCV encodes no larger picture
LARGEST_HEADER = 4096  # bytes; those of OpenCV have 623


def encode(image: np.ndarray, quality: int) -> np.ndarray:
    """Returns an image (H, W, 3) uint8 RGB as a JPEG picture, (bytes,) uint8: the bytes that FFCV's writer stores.

    Raises UserError if a side is longer than LARGEST_SIDE.
    """
    import cv2

    side = max(image.shape)
    if side > LARGEST_SIDE:
        raise UserError(f"--records jpeg: expected sides of at most {LARGEST_SIDE} pixels, found {side}; use --size")
    _, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return content.reshape(-1)


def decode(record: np.ndarray, image: np.ndarray) -> bool:
    """Decodes a record (bytes,) uint8 into an image (H, W, 3) uint8 of the record's size, with FFCV's decoder.

    The pixels are those of FFCV's loader. Releases the GIL.

    Returns:
        Whether the record is complete and valid.
    """
    height, width, _ = image.shape
    source, target = record.ctypes.data, image.ctypes.data
    return _decoder()(source, record.size, height, width, target, height, width, 0, 0, 1, 1, False, False) == 0


@functools.cache
def _decoder() -> Any:
    """The function of FFCV's library; `import ffcv` would set torch to one thread."""
    package = importlib.util.find_spec("ffcv")
    if package is None:
        raise UserError("JPEG records: expected the package ffcv, which decodes them, found none; install it")
    (library,) = (
        file for root in package.submodule_search_locations or () for file in Path(root).glob("_libffcv.*.so")
    )
    decoder = ctypes.CDLL(str(library)).imdecode
    numbers = [ctypes.c_uint32] * 2, [ctypes.c_uint32] * 6
    decoder.argtypes = [
        ctypes.c_void_p, ctypes.c_uint64, *numbers[0], ctypes.c_void_p, *numbers[1], ctypes.c_bool, ctypes.c_bool
    ]  # fmt: skip
    return decoder


def header_of(record: np.ndarray, height: int, width: int) -> bytes | None:
    """Returns the header of a record (bytes,) uint8, up to its pixels.

    Returns None if it is not that of a baseline JPEG picture of this size in three colors of 8 bits.
    """
    content, position, frames = record[:LARGEST_HEADER].tobytes(), len(START), []
    if not content.startswith(START):
        return None
    while position + 4 <= len(content):
        marker, length = content[position : position + 2], int.from_bytes(content[position + 2 : position + 4])
        segment, position = content[position + 4 : position + 2 + length], position + 2 + length
        if marker == FRAME:
            frames.append(segment[:6])
        elif marker == SCAN:
            sound = frames == [bytes([8, *height.to_bytes(2), *width.to_bytes(2), 3])] and position < len(content)
            return content[:position] if sound else None
        elif marker not in TABLES:
            return None
    return None
