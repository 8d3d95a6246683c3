"""Decodes image files to RGB and resizes them, in the same way for `data_prep prepare` and `runner predict`."""

import errno
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from runner.common import memory
from runner.common.errors import UserError

if TYPE_CHECKING:  # imported late, because option parsers import this module
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 64_000_000  # a larger image is refused before it is decoded
LARGEST_FILE = 64 * 2**20  # bytes; no image or batch file is larger
Fit = Literal["crop", "pad", "stretch"]


def read(path: Path) -> bytes:
    """Returns the content of an image file. Raises UserError if it is too large or cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        remedy = "; grant permission" if error.errno == errno.EACCES else ""
        raise UserError(f"{path}: cannot be read ({error.strerror}){remedy}") from None
    if len(content) > LARGEST_FILE:
        raise UserError(
            f"{path}: expected an image file of at most {LARGEST_FILE} bytes, found a larger one; remove it"
        )
    return content


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Raises UserError if `what` needs more bytes than are available, before the system would kill the process."""
    available = memory.available()
    if needed > available:
        raise UserError(f"{what} need {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB free; {remedy}")


def decode(name: str, content: bytes) -> "Image.Image":
    """Decodes an image file to 8-bit RGB, rotated upright according to its EXIF orientation.

    Palettes, gray and CMYK are converted, and an alpha channel is dropped, as torchvision's ImageFolder does. 16-bit
    gray is scaled to 8 bits.

    Args:
        name: name of the file, for error messages.
        content: content of the file.

    Raises:
        UserError: the file is not an image in one of FORMATS, is too large, or is animated.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # Pillow warns above its own limit; ours is checked below
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata; an image that cannot be decoded is an error
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{name}: {width}×{height} pixels; expected at most {MAX_PIXELS:,}; scale it down")
            # Cameras store previews as additional pictures in a JPEG (MPO); the first picture is the photograph.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise UserError(f"{name}: expected one image, found an animation or several pages; save one of them")
            return _to_rgb(name, ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Exception as error:  # decoders raise errors of many types
        reason = f"expected {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
        reason = reason if content else "the file is empty"
        raise UserError(f"{name}: not a readable image ({reason}); replace or remove it") from None


def _to_rgb(name: str, image: "Image.Image") -> "Image.Image":
    import numpy as np
    from PIL import Image

    if image.mode == "F":
        raise UserError(f"{name}: expected 8 or 16 bits per channel, found floating-point pixels; convert it")
    if image.mode == "I":
        raise UserError(f"{name}: expected 8 or 16 bits per channel, found 32; convert it")
    if image.mode.startswith("I"):  # Pillow's conversion would set all values above 255 to white
        gray = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def fit(image: "Image.Image", width: int, height: int, how: Fit) -> "Image.Image":
    """Resizes an RGB image with antialiased bilinear interpolation; returns the same object if it has the size already.

    `crop` scales the image to cover the size, then crops the center; `pad` scales it to fit inside, then pads with
    black; `stretch` ignores the aspect ratio.
    """
    from PIL import Image, ImageOps

    size = (width, height)
    if image.size == size:
        return image
    if how == "crop":
        return ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    if how == "pad":
        scale = min(width / image.width, height / image.height)  # ImageOps.pad fails if a side would round to 0
        inner = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BILINEAR
        )
        padded = Image.new("RGB", size)
        padded.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
        return padded
    return image.resize(size, Image.Resampling.BILINEAR)
