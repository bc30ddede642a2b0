"""Decodes query pictures in a process of its own, which `indexing.service.image_upload` starts.

Hostile files cost at most this process: its memory is limited, and a timer ends it if a picture
takes too long. Run as a script, it reads requests from stdin (HEAD and the file) and writes answers
to stdout (ANSWER and RGBA pixels, or the reason why there are none). Knows nothing of the service.
"""

import io
import re
import resource
import signal
import struct
import sys
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

HEAD = struct.Struct("<IId")
"""Bytes of the file, maximum side of the answer in pixels, seconds that decoding may take."""
ANSWER = struct.Struct("<III")
"""Width and height of the picture, 0 if it was refused; bytes that follow."""
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


class PictureRefusedError(ValueError):
    """A picture that would take too much to decode, or that cannot be read."""


def decode_upright(data: bytes, max_side_px: int) -> Image.Image:
    """Decode a PNG, JPEG or WebP file to an upright RGBA picture with sides of at most
    `max_side_px`. Raises PictureRefusedError with the reason.

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
    except PictureRefusedError:
        raise
    except HOSTILE:
        raise PictureRefusedError(
            "the picture cannot be read: give a PNG, JPEG or WebP file"
        ) from None


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
    """Raise PictureRefusedError for too many pixels or scans."""
    max_pixels = MAX_PIXELS
    if opened.format == "WEBP":
        max_pixels //= 2  # Pillow holds its pixels twice
    if opened.width * opened.height > max_pixels:
        raise PictureRefusedError(
            f"the picture has {opened.width} x {opened.height} pixels: at most "
            f"{max_pixels >> 20} million are allowed"
        )
    scans = count_scans(data) if opened.format == "JPEG" else 1
    if scans > MAX_SCANS:
        raise PictureRefusedError(
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


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    while head := requests.read(HEAD.size):
        size_bytes, max_side_px, limit_s = HEAD.unpack(head)
        data = requests.read(size_bytes)
        signal.setitimer(signal.ITIMER_REAL, limit_s)  # SIGALRM ends the process
        try:
            picture = decode_upright(data, max_side_px)
            size, payload = picture.size, picture.tobytes()
        except PictureRefusedError as error:
            size, payload = (0, 0), str(error).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(ANSWER.pack(*size, len(payload)) + payload)
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the service ends this process
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    serve(sys.stdin.buffer, sys.stdout.buffer)
