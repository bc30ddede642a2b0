"""Query pictures that clients send: checks their size, decodes them and returns RGB squares.

The bytes may be hostile, so they are bounded before they are decoded. Knows nothing of models and
HTTP.
"""

import base64
import binascii
import io
import struct
import warnings

import cv2
import numpy as np
from PIL import Image, ImageOps

from indexing.data.images import Pixels, Square, square

MAX_BYTES = 8 << 20
MAX_PIXELS = 32 << 20
SIDES, LEAST_PX = 8, 512
"""A picture is first reduced to SIDES times the encoder's side, but not below LEAST_PX."""
FORMATS = ("PNG", "JPEG", "WEBP")
HOSTILE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    struct.error,
    MemoryError,
)
"""Exceptions that Pillow raises for broken files."""


def from_base64(text: str) -> bytes:
    """Return the bytes of a picture in base64, with or without a `data:` prefix. Raises ValueError
    if it is not base64 or has more than MAX_BYTES.
    """
    body = text.partition(",")[2] if text.lstrip().startswith("data:") else text
    body = "".join(body.split())  # many encoders break lines
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ValueError(f"the picture is larger than {MAX_BYTES >> 20} MiB")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the picture is not in base64") from None


def decode(data: bytes, side_px: int, square: Square = square) -> Pixels:
    """Decode a PNG, JPEG or WebP file to an upright RGB square (S, S, 3), on white unless `square`
    crops. Raises ValueError with the reason.

    Takes at most about 12 bytes per pixel of the file, of which there are at most MAX_PIXELS; a
    large JPEG takes less, because it is reduced while it is decoded.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"the picture is larger than {MAX_BYTES >> 20} MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound follows
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                max_pixels = (
                    MAX_PIXELS // 2 if opened.format == "WEBP" else MAX_PIXELS
                )  # Pillow holds a WebP file's pixels twice
                if opened.width * opened.height > max_pixels:
                    raise PictureTooLargeError(
                        f"the picture has {opened.width} x {opened.height} pixels: at most "
                        f"{max_pixels >> 20} million are allowed"
                    )
                max_side_px = max(LEAST_PX, SIDES * side_px)
                upright = np.asarray(
                    ImageOps.exif_transpose(_smaller(_eight_bit(opened), max_side_px)).convert(
                        "RGBA"
                    )
                )
    except PictureTooLargeError:
        raise
    except (*HOSTILE, Image.DecompressionBombError):
        raise ValueError("the picture cannot be read: give a PNG, JPEG or WebP file") from None
    return square(cv2.cvtColor(upright, cv2.COLOR_RGBA2BGRA), side_px)


def _eight_bit(opened: Image.Image) -> Image.Image:
    """Return a picture with 8 bits per channel; Pillow itself clips 16-bit grey at 255."""
    if not opened.mode.startswith("I"):
        return opened
    values = np.asarray(opened)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = opened.info.get("transparency")
    if isinstance(transparent, int):
        alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
        grey = Image.merge("LA", (grey, Image.fromarray(alpha)))
    if "exif" in opened.info:
        grey.info["exif"] = opened.info["exif"]
    return grey


def _smaller(opened: Image.Image, max_side_px: int) -> Image.Image:
    """Return a picture with sides of at most `max_side_px`, reduced by the mean of pixels."""
    if max(opened.size) <= max_side_px:
        return opened
    opened.draft(
        None, (max_side_px, max_side_px)
    )  # a JPEG can be decoded at a half, a quarter or an eighth
    if opened.mode in ("1", "P", "PA"):  # palette indexes have no mean
        opened = opened.convert("RGBA")
    scale = max_side_px / max(opened.size)
    size = max(1, round(opened.width * scale)), max(1, round(opened.height * scale))
    return opened.resize(size, Image.Resampling.BOX) if scale < 1 else opened


class PictureTooLargeError(ValueError):
    """A picture that is too large to decode."""
