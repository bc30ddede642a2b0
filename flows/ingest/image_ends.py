"""Find the end of a PNG or JPEG file, and check whether a file without an end marker is complete.

Works on bytes in memory. Data after the end (padding, an appended video clip) is ignored. A file
without an end marker is complete if a decoder reads all its rows.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator

import cv2
import numpy as np

SIGNATURE_BYTES = 8
IEND = b"IEND"
SOS, EOI = 0xDA, b"\xff\xd9"
MARKERS_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))
"""JPEG markers without a segment and its length: TEM, RST0 to RST7 and SOI."""
MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""The next JPEG marker after coded data; stuffed bytes and restart markers belong to the data."""
FILLINGS = tuple(
    np.random.default_rng(seed).integers(0, 255, 4096, np.uint8).tobytes() for seed in (1, 2)
)
"""Bytes that a JPEG decoder reads as coded data if the image still needs some."""


def with_end(kind: str, body: bytes) -> bytes:
    """Return `body` itself if it has its format's end marker, else a copy with one appended.

    `kind` is Pillow's name of the format; only "PNG" and "JPEG" are examined.
    """
    by_kind: dict[str, Callable[[bytes], bytes]] = {"PNG": with_png_end, "JPEG": with_jpeg_end}
    return by_kind[kind](body) if kind in by_kind else body


def png_chunks(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and data of a PNG's chunks up to IEND; the last one may be truncated."""
    position = SIGNATURE_BYTES
    while position + 8 <= len(body):
        length, kind = struct.unpack_from(">I4s", body, position)
        yield kind, body[position + 8 : position + 8 + length]
        position += 12 + length
        if kind == IEND:
            return


def with_png_end(body: bytes) -> bytes:
    """Return a PNG with an IEND chunk; a truncated chunk keeps the data that it has."""
    position = SIGNATURE_BYTES
    for kind, data in png_chunks(body):
        length = int.from_bytes(body[position : position + 4])
        end = position + 12 + length
        if kind == IEND and end <= len(body):
            return body
        if end > len(body):
            last = b"" if kind == IEND else _chunk(kind, data)
            return body[:position] + last + _chunk(IEND, b"")
        position = end
    return body[:position] + _chunk(IEND, b"")


def with_jpeg_end(body: bytes) -> bytes:
    """Return a JPEG with an EOI marker; trailing zeros of a file without one are padding."""
    position = 2
    while (marker := MARKER.search(body, position)) is not None:
        code, position = marker[1][0], marker.end()
        if code == EOI[1]:
            return body
        if code not in MARKERS_WITHOUT_LENGTH:
            if position + 2 > len(body):
                break
            position += int.from_bytes(body[position : position + 2])
    return body.rstrip(b"\0") + EOI


def is_whole(kind: str, body: bytes) -> bool:
    """Return whether an image is complete: a decoder can read all its rows.

    Only a PNG or JPEG without an end marker is decoded. `kind` is Pillow's name of the format.
    """
    if kind == "WEBP":
        return int.from_bytes(body[4:8], "little") + 8 <= len(body)
    complete = with_end(kind, body)
    if complete is body:
        return True
    return _has_all_rows(complete, (b"", *FILLINGS) if kind == "JPEG" else (b"",))


def _has_all_rows(complete: bytes, fillings: tuple[bytes, ...]) -> bool:
    """Return whether an image decodes to the same pixels with any of `fillings` before its end.

    A PNG without all its rows does not decode. A JPEG does: OpenCV decodes the missing rows from
    the filling. If all rows are there, OpenCV skips the filling.
    """
    digests = set()
    for filling in fillings:
        data = complete.removesuffix(EOI) + filling + EOI if filling else complete
        try:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error:
            return False
        if pixels is None:
            return False
        digests.add(hashlib.sha256(pixels.tobytes()).digest())
        del pixels
    return len(digests) == 1


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
