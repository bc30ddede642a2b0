"""Pictures that a client sends as a query: hostile bytes, bounded before they are decoded.

Returns RGB squares as the evaluation's pictures are; knows nothing of models and of HTTP.
"""

import base64
import binascii
import io
import struct
import warnings

import cv2
import numpy as np
from PIL import Image, ImageOps

from indexing.pictures import Pixels, square

MAX_BYTES = 8 << 20
MAX_PIXELS = 32 << 20
MAX_SIDE_PX = 4096
FORMATS = ("PNG", "JPEG", "WEBP")
HOSTILE = (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError, struct.error, MemoryError)
"""What Pillow raises for broken files."""


def from_base64(text: str) -> bytes:
    """Return the bytes of a picture in base64, with or without a `data:` prefix. Raises ValueError for what is none, or too much."""
    body = text.partition(",")[2] if text.startswith("data:") else text
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ValueError(f"the picture has more than {MAX_BYTES >> 20} MiB")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the picture is not in base64") from None


def decode(data: bytes, side_px: int) -> Pixels:
    """Decode a PNG, JPEG or WebP file to an upright RGB square (S, S, 3) on white. Raises ValueError that says what is wrong."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"the picture has more than {MAX_BYTES >> 20} MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound follows
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise PictureTooLargeError(
                        f"the picture is {opened.width} x {opened.height} pixels: at most {MAX_PIXELS >> 20} million are taken"
                    )
                opened.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.BOX)  # a thin one made square would need its side squared
                upright = np.asarray(ImageOps.exif_transpose(opened).convert("RGBA"))
    except PictureTooLargeError:
        raise
    except (*HOSTILE, Image.DecompressionBombError):
        raise ValueError("the picture cannot be read: give a PNG, JPEG or WebP file") from None
    return square(cv2.cvtColor(upright, cv2.COLOR_RGBA2BGRA), side_px)


class PictureTooLargeError(ValueError):
    """A picture that is too large to decode."""
