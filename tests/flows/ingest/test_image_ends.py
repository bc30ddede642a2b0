"""A PNG or JPEG is whole when its decoder reads every row, whatever stands behind its end."""

import io

import cv2
import numpy as np
import pytest

from flows.ingest.http_fetch import FetchError, Rules, check_image
from flows.ingest.image_ends import is_whole, with_end
from flows.ingest.plain_image import to_plain
from tests.helpers.hostile_server import encoded, picture

RULES = Rules(timeout_s=1, retries=0, max_bytes=10**7, max_pixels=10**7, allow_private=True)
NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
JPEG, PNG = encoded(NOISE, ".jpg"), encoded(NOISE)
PROGRESSIVE = cv2.imencode(".jpg", NOISE, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
CLIP = b"\0\0\0\x18ftypmp42" + JPEG[: len(JPEG) // 2]  # with a scan that has no end
IMAGES = {"PNG": PNG, "JPEG": JPEG, "progressive JPEG": PROGRESSIVE}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("behind", [b"", bytes(500), CLIP, b"<!-- served in 3 ms -->"])
def test_bytes_behind_the_end_take_nothing_away(name: str, behind: bytes) -> None:
    whole = IMAGES[name]
    check_image(whole + behind, RULES)
    pixels = cv2.imdecode(
        np.frombuffer(to_plain(io.BytesIO(whole + behind)).getvalue(), np.uint8),
        cv2.IMREAD_UNCHANGED,
    )
    assert np.array_equal(pixels, cv2.imdecode(np.frombuffer(whole, np.uint8), -1))


@pytest.mark.parametrize(
    ("name", "cut"),
    [("PNG", 12), ("PNG", 4), ("JPEG", 2), ("JPEG", 1), ("progressive JPEG", 2)],
)
@pytest.mark.parametrize("padding", [b"", bytes(500)])
def test_an_image_that_lacks_its_end_alone_is_kept_and_closed(
    name: str, cut: int, padding: bytes
) -> None:
    whole = IMAGES[name]
    body = whole[:-cut] + (padding if "JPEG" in name and cut == 2 else b"")
    check_image(body, RULES)
    pixels = cv2.imdecode(
        np.frombuffer(to_plain(io.BytesIO(body)).getvalue(), np.uint8), cv2.IMREAD_UNCHANGED
    )
    assert np.array_equal(pixels, cv2.imdecode(np.frombuffer(whole, np.uint8), -1))


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("behind", [b"", bytes(500)])
def test_an_image_that_lacks_rows_is_truncated(name: str, share: float, behind: bytes) -> None:
    whole = IMAGES[name]
    body = whole[: int(len(whole) * share)] + behind
    with pytest.raises(FetchError, match="decode_error"):
        check_image(body, RULES)


def test_a_whole_image_is_not_decoded_or_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", None)
    for kind, body in (("PNG", PNG), ("JPEG", JPEG), ("GIF", b"GIF89a")):
        assert with_end(kind, body) is body and is_whole(kind, body)


def test_a_flat_grey_jpeg_that_was_cut_is_truncated() -> None:
    """Its decoder goes on with the grey that the picture has."""
    grey = encoded(np.full((256, 256, 3), 128, np.uint8), ".jpg")
    assert not is_whole("JPEG", grey[:-20])
    assert is_whole("JPEG", encoded(picture(1), ".jpg")[:-2])
