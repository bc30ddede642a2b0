"""Whatever an image's depth and orientation, a shard stores what Pillow shows of it."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from flows.ingest import plain_image
from flows.ingest.plain_image import read_header, to_plain, to_uint8
from tests.helpers.hostile_server import encoded, picture


def corners() -> np.ndarray:
    """Return an RGB picture (40, 80, 3) that looks otherwise after every turn."""
    image = np.zeros((40, 80, 3), np.uint8)
    image[:20, :40], image[:20, 40:], image[20:, :40] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return image


def decoded(stream: io.BytesIO) -> np.ndarray:
    """Return what img2dataset decodes of a stream, BGR."""
    return cv2.imdecode(np.frombuffer(stream.getvalue(), np.uint8), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright_as_pillow_shows_it(kind: str, orientation: int) -> None:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[plain_image.ORIENTATION] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    Image.fromarray(corners()).save(stream, kind, exif=exif, **lossless.get(kind, {}))
    shown = ImageOps.exif_transpose(Image.open(stream)).convert("RGB")
    pixels = decoded(to_plain(io.BytesIO(stream.getvalue())))
    assert pixels.shape == (80, 40, 3) if orientation >= 5 else (40, 80, 3)
    difference = np.asarray(shown).astype(int) - pixels[..., ::-1]
    assert np.abs(difference).max() <= (20 if kind in ("JPEG", "AVIF") else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_orientation_behind_the_pixels_of_a_png_counts_and_a_broken_one_does_not() -> None:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[plain_image.ORIENTATION] = 6
    Image.fromarray(corners()).save(stream, "PNG", exif=exif)
    body = stream.getvalue()
    start = body.index(b"eXIf") - 4
    chunk = body[start : start + 12 + int.from_bytes(body[start : start + 4])]
    without = body.replace(chunk, b"")
    behind = without[:-12] + chunk + without[-12:]
    assert (read_header(behind).orientation, read_header(without).orientation) == (6, 1)
    broken = io.BytesIO()
    Image.fromarray(corners()).save(broken, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_header(broken.getvalue()).orientation == 1


DEPTHS: list[tuple[str, np.number, tuple[int, ...]]] = [
    ("a.tif", np.uint16(65535), ()),
    ("a.png", np.uint16(65535), ()),
    ("a.tif", np.float32(1), ()),
    ("a.tif", np.float64(1), ()),
    ("a.tif", np.float32(255), ()),
    ("a.tif", np.float32(65535), ()),
    ("a.avif", np.uint16(1023), (cv2.IMWRITE_AVIF_DEPTH, 10)),
    ("a.avif", np.uint16(4095), (cv2.IMWRITE_AVIF_DEPTH, 12)),
]


@pytest.mark.parametrize(
    ("depth", "channels"),
    [
        (depth, channels)
        for depth in DEPTHS
        for channels in ((3, 4) if depth[2] else (1, 3, 4))  # OpenCV writes no deep grey AVIF
    ],
)
def test_every_depth_becomes_eight_bits_by_its_white(
    depth: tuple[str, np.number, tuple[int, ...]], channels: int
) -> None:
    name, white, parameters = depth
    shares = np.repeat(np.linspace(0, 1, 64)[np.newaxis], 48, 0)
    image = np.repeat(shares[..., np.newaxis], channels, 2)
    if channels == 4:
        image[..., 3] = 1
    deep = (image * white).round(0 if white > 1 else 9).astype(white.dtype)
    body = cv2.imencode(name[1:], deep, list(parameters))[1].tobytes()
    assert (read_header(body).width_px, read_header(body).height_px) == (64, 48)
    pixels = decoded(to_plain(io.BytesIO(body)))
    assert pixels.dtype == np.uint8
    difference = pixels.reshape(48, 64, -1)[..., 0] - (shares * 255)
    assert np.abs(difference).max() <= (4 if ".avif" in name else 0.51)


def test_ten_bits_in_a_tiff_are_scaled_by_ten_bits() -> None:
    width, height, bits = 64, 16, 10
    data = b"\xff" * (width * height * bits // 8)
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data))]
    entries = b"".join(
        np.array([tag, kind], "<u2").tobytes() + np.array([1, value], "<u4").tobytes()
        for tag, kind, value in tags
    )
    start = b"II*\0" + np.uint32(8 + len(data)).tobytes() + data
    body = start + np.uint16(len(tags)).tobytes() + entries + bytes(4)
    assert (decoded(to_plain(io.BytesIO(body))) == 255).all()


def test_pixels_without_an_agreed_form_are_refused_by_name() -> None:
    for pixels, words in (
        (np.full((4, 4), 30000, np.int32), "int32"),
        (np.full((4, 4), -1, np.float32), "floats from -1"),
        (np.full((4, 4), 1e9, np.float32), "floats from 1e"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan"),
    ):
        body = cv2.imencode(".tif", pixels)[1].tobytes()
        with pytest.raises(ValueError, match=words):
            to_plain(io.BytesIO(body))


def test_sixteen_bits_are_rounded() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(to_uint8(every), np.rint(every / 257).astype(np.uint8))


def test_a_plain_picture_is_passed_on_as_it_is() -> None:
    for suffix in (".png", ".jpg", ".webp"):
        stream = io.BytesIO(encoded(picture(1), suffix))
        assert to_plain(stream) is stream
