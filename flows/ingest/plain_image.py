"""Convert a downloaded image to a plain one, which img2dataset resizes correctly.

A plain image has 8 bits per channel and is upright. Reads and returns bytes in memory. An image
that is already plain is returned without decoding it.
"""

import io
import threading
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin

from flows.ingest.image_ends import png_chunks, with_end

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
DEEP_FORMATS = ("TIFF", "AVIF")
"""Formats that may have more than 8 bits per channel, which the first bytes do not show."""
OPAQUE_MODES = ("RGB", "L", "CMYK", "YCbCr", "1")
MATTED_PIXELS = 1 << 20
"""Larger images with transparency are blended on white here: img2dataset needs 80 bytes a pixel."""
ORIENTATION = 0x0112
"""The EXIF tag Orientation."""
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
IMAGE_WIDTH, IMAGE_LENGTH = 256, 257
BYTES_OF_16_BITS = np.rint(np.arange(1 << 16) / 257).astype(np.uint8)

decoding = threading.Lock()
"""Held while an image is decoded here: a process needs memory for only one at a time."""


@dataclass(frozen=True)
class Header:
    """Fields of an image's header."""

    kind: str
    """Pillow's name of the format."""
    width_px: int
    height_px: int
    orientation: int = 1
    """EXIF orientation that the decoder does not apply itself, 1 to 8; 1 is upright."""
    is_opaque: bool = False
    is_deep: bool = False
    """Whether channels may have more than 8 bits."""

    @property
    def is_plain(self) -> bool:
        """Whether img2dataset can resize the image without conversion."""
        is_large = self.width_px * self.height_px > MATTED_PIXELS
        is_matted_here = is_large and not self.is_opaque
        return self.orientation == 1 and not self.is_deep and not is_matted_here


def read_header(body: bytes) -> Header:
    """Read an image's header without decoding pixels.

    Raises any error of Pillow's parsers for invalid bytes.
    """
    try:
        with Image.open(io.BytesIO(body), formats=FORMATS) as image:
            kind = {"MPO": "JPEG"}.get(image.format or "", image.format or "")
            return Header(
                kind,
                *image.size,
                orientation=1 if kind == "TIFF" else _orientation(image, body),
                is_opaque=image.mode in OPAQUE_MODES and "transparency" not in image.info,
                is_deep=kind in DEEP_FORMATS or (kind == "PNG" and body[24] > 8),
            )
    except Image.UnidentifiedImageError:
        if not body.startswith(TIFF_STARTS):
            raise
        return Header("TIFF", *_tiff_size_px(body), is_deep=True)


def _orientation(image: Image.Image, body: bytes) -> int:
    """Return the orientation from EXIF or XMP; 1 if there is none or it cannot be parsed."""
    if image.format == "PNG":  # to find an eXIf chunk after the rows, Pillow would decode them
        image.info.update(("exif", data) for kind, data in png_chunks(body) if kind == b"eXIf")
    try:
        orientation = Image.Image.getexif(image).get(ORIENTATION, 1)
    except Exception:  # Pillow's parsers raise many types on hostile bytes
        return 1
    return orientation if orientation in range(1, 9) else 1


def _tiff_size_px(body: bytes) -> tuple[int, int]:
    """Return width and height of a TIFF whose pixel type Pillow does not support."""
    stream = io.BytesIO(body)
    tags = TiffImagePlugin.ImageFileDirectory_v2(
        stream.read(16 if body[2:4].strip(b"\0") == b"+" else 8)
    )
    stream.seek(tags.next)
    tags.load(stream)
    return int(tags[IMAGE_WIDTH]), int(tags[IMAGE_LENGTH])


def to_plain(stream: io.BytesIO) -> io.BytesIO:
    """Return an upright image with 8 bits per channel and an end marker.

    Returns `stream` itself if nothing has to change. Raises ValueError for pixel values without a
    defined 8-bit form, and cv2.error or an error of Pillow for an image that cannot be decoded.
    """
    body = stream.getvalue()
    header = read_header(body)
    complete = with_end(header.kind, body)
    if header.is_plain:
        return stream if complete is body else io.BytesIO(complete)
    with decoding:
        pixels = to_uint8(_decode(header.kind, complete))
        if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4):
            raise ValueError(f"{pixels.shape[2]} channels: only grey, RGB and RGBA are supported")
        if pixels.ndim == 3 and pixels.shape[2] == 4:
            pixels = _blend_on_white(pixels)
        upright = apply_orientation(pixels, header.orientation)
        del pixels
        return io.BytesIO(cv2.imencode(".bmp", upright)[1].tobytes())


def _decode(kind: str, body: bytes) -> np.ndarray:
    """Return pixels in the file's number type: grey (H, W), BGR or BGRA (H, W, C)."""
    if kind == "AVIF":  # OpenCV does not scale its 10 and 12 bits nor report their number
        with Image.open(io.BytesIO(body), formats=(kind,)) as image:
            has_alpha = image.has_transparency_data
            pixels = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
        return cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA if has_alpha else cv2.COLOR_RGB2BGR)
    decoded = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None:
        raise ValueError("Image decoding error")
    return decoded


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as uint8, scaled by the value of white in their type.

    White is 65535 for uint16; for floats it is the smallest of 1, 255 and 65535 that no value
    exceeds. Raises ValueError for any other type, and for floats that are negative, larger or NaN.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.uint16:
        return BYTES_OF_16_BITS[pixels]
    if pixels.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"pixels of type {pixels.dtype}: only uint8, uint16 and floats are supported"
        )
    low, high = float(pixels.min()), float(pixels.max())
    white = next((white for white in (1, 255, 65535) if low >= 0 and high <= white), None)
    if white is None:
        raise ValueError(
            f"floats from {low:g} to {high:g}: they must be in 0 to 1, 0 to 255 or 0 to 65535"
        )
    return np.rint(pixels * (255 / white)).astype(np.uint8)


def apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return stored pixels (H, W) or (H, W, C) turned upright, by EXIF orientation 1 to 8.

    Source: EXIF 2.32, tag 0x0112; the same result as Pillow's ImageOps.exif_transpose.
    """
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _blend_on_white(pixels: np.ndarray) -> np.ndarray:
    """Blend BGRA pixels on white with img2dataset's arithmetic, in pieces to bound memory."""
    flat = pixels.reshape(-1, 4)
    matted = np.empty((len(flat), 3), np.uint8)
    for start in range(0, len(flat), MATTED_PIXELS):
        piece = flat[start : start + MATTED_PIXELS]
        alpha = piece[:, 3, np.newaxis]
        matted[start : start + MATTED_PIXELS] = np.rint(
            (alpha / 255 * piece[:, :3] + 255 - alpha).clip(min=0, max=255)
        )
    return matted.reshape(*pixels.shape[:2], 3)
