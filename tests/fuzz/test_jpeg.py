"""Whatever bytes claim to be a JPEG: an image, or a documented refusal."""

import io
import struct

import cv2
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from flows.ingest.http_fetch import FetchError, Rules, check_image
from flows.ingest.plain_image import to_plain
from indexing.service.picture_decoder import (
    MAX_SCANS,
    count_scans,
    decode_upright,
)
from tests.helpers.bounds import bounded
from training.data.stored_image import pixels_of

RULES = Rules(timeout_s=1, retries=0, max_bytes=1 << 20, max_pixels=1 << 22, allow_private=False)
REASONS = {"too_large", "decode_error", "not_an_image"}
MARKERS = (
    b"\xff\xd8",
    b"\xff\xd9",
    b"\xff\xda",
    b"\xff\xc0",
    b"\xff\xc2",
    b"\xff\xdb",
    b"\xff\xff",
)


def jpeg(is_progressive: bool, orientation: int = 0) -> bytes:
    """Return a small JPEG, with EXIF if it has an orientation."""
    levels = np.arange(24 * 17 * 3, dtype=np.uint8).reshape(17, 24, 3)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", progressive=is_progressive, exif=exif)
    return file.getvalue()


FILES = [jpeg(False), jpeg(True), jpeg(False, 6), jpeg(True, 5)]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Return a small JPEG with bytes changed, inserted, repeated, swapped and cut off."""
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["byte", "marker", "size", "insert", "repeat", "remove"]))
        if kind == "byte":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "marker":
            data[at : at + 2] = draw(st.sampled_from(MARKERS))
        elif kind == "size":
            data[at : at + 2] = struct.pack(">H", draw(st.sampled_from([0, 1, 2, 255, 65535])))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=30))
        elif kind == "repeat":
            length = draw(st.integers(1, 400))
            data[at:at] = data[at : at + length] * draw(st.integers(1, 20))
        else:
            del data[at : at + draw(st.integers(1, 100))]
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@example(FILES[1])
@given(mutated())
def test_a_downloaded_jpeg_becomes_a_plain_image_or_a_counted_reason(data: bytes) -> None:
    with bounded():
        try:
            check_image(data, RULES)
        except FetchError as error:
            assert error.reason in REASONS and error.is_permanent and error.detail
            return
        try:
            plain = to_plain(io.BytesIO(data)).getvalue()
        except (ValueError, OSError, cv2.error):
            return  # counted as decode_error, see flows/ingest/shard_worker.py
        pixels = pixels_of(plain)
        assert pixels is None or pixels.size <= 4 * RULES.max_pixels


@example(FILES[1])
@given(mutated())
def test_a_query_picture_is_decoded_within_its_bounds_or_refused(data: bytes) -> None:
    with bounded():
        try:
            picture = decode_upright(data, 64)
        except ValueError as error:
            assert str(error).startswith("the picture ")
            return
    assert picture.mode == "RGBA" and max(picture.size) <= 64
    assert count_scans(data) <= MAX_SCANS
