"""Decodes query pictures in a process of its own, which `indexing.service.image_upload` starts.

Hostile files cost at most this process (`infra.compute.bounded_processes`). A request is MAX_SIDE
and a file, an answer SIZE and RGBA pixels. Knows nothing of the service.
"""

import io
import re
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps

from infra.compute.bounded_processes import RefusedError, serve

MAX_SIDE = struct.Struct("<I")
"""Maximum side of the answer in pixels."""
SIZE = struct.Struct("<II")
"""Width and height of the picture."""
MAX_PIXELS = 32 << 20
MAX_SCANS = 32
"""Maximum scans of a progressive JPEG; encoders write about 10, and each takes as long as a whole
baseline JPEG."""
MEMORY_BYTES = 2 << 30
"""Maximum address space of the process; the largest picture takes a quarter of it."""
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
    Image.DecompressionBombError,
)
"""Exceptions that Pillow raises for broken files."""
MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)
SOS, SOI, EOI, TEM = 0xDA, 0xD8, 0xD9, 0x01


def decode_upright(data: bytes, max_side_px: int) -> Image.Image:
    """Decode a PNG, JPEG or WebP file to an upright RGBA picture with sides of at most
    `max_side_px`. Raises RefusedError with the reason.

    Takes at most about 12 bytes per pixel of the file, of which there are at most MAX_PIXELS; a
    large JPEG takes less, because it is reduced while it is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound follows
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                _check_cost(opened, data)
                smaller = _smaller(_eight_bit(opened), max_side_px)
                return ImageOps.exif_transpose(smaller).convert("RGBA")
    except RefusedError:
        raise
    except HOSTILE:
        raise RefusedError("the picture cannot be read: give a PNG, JPEG or WebP file") from None


def count_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG file."""
    position, scans = 2, 0
    while (match := MARKER.search(data, position)) and match[1][0] != EOI:
        marker, position = match[1][0], match.end()
        scans += marker == SOS
        if marker not in (SOI, TEM):
            position += int.from_bytes(data[position : position + 2])
    return scans


def _check_cost(opened: Image.Image, data: bytes) -> None:
    """Raise RefusedError for too many pixels or scans."""
    max_pixels = MAX_PIXELS
    if opened.format == "WEBP":
        max_pixels //= 2  # Pillow holds its pixels twice
    if opened.width * opened.height > max_pixels:
        raise RefusedError(
            f"the picture has {opened.width} x {opened.height} pixels: at most "
            f"{max_pixels >> 20} million are allowed"
        )
    scans = count_scans(data) if opened.format == "JPEG" else 1
    if scans > MAX_SCANS:
        raise RefusedError(
            f"the picture has {scans} progressive scans: at most {MAX_SCANS} are allowed"
        )


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


def answer(request: bytes) -> bytes:
    """Return SIZE and the RGBA pixels of a picture, for MAX_SIDE and its file."""
    (max_side_px,) = MAX_SIDE.unpack_from(request)
    picture = decode_upright(request[MAX_SIDE.size :], max_side_px)
    return SIZE.pack(*picture.size) + picture.tobytes()


if __name__ == "__main__":
    serve(answer, MEMORY_BYTES)
