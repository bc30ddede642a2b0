"""A query picture is decoded upright and as a mean of its pixels, in little memory, whatever its
size and mode.
"""

import base64
import io
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from indexing.service.image_upload import PictureDecoders, from_base64
from indexing.service.picture_decoder import MAX_SCANS, count_scans, decode_upright
from infra.compute.bounded_processes import RefusedError
from infra.square_image import BAND_ROWS, square

SIDE_PX = 32
DECODERS = PictureDecoders(limit_s=60)
decode = DECODERS.decode


def encoded(picture: Image.Image, kind: str = "PNG", **more: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


def gradient(width: int, height: int) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], -1).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(2000, 1400), (700, 2100), (40, 30)])
def test_a_large_picture_looks_as_when_it_is_resized_at_once(
    kind: str, size: tuple[int, int]
) -> None:
    pixels = gradient(*size)
    found = decode(encoded(Image.fromarray(pixels), kind), SIDE_PX)
    right = square(pixels[..., ::-1], SIDE_PX)
    assert found.shape == (SIDE_PX, SIDE_PX, 3)
    assert np.abs(found.astype(int) - right.astype(int)).mean() < (1 if kind == "PNG" else 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_is_made_smaller_as_it_is_seen(mode: str) -> None:
    stripes = np.zeros((1200, 1600), np.uint8)
    stripes[:, ::2] = (
        255  # their mean is grey, and a picture that takes every other pixel is black or white
    )
    picture = Image.fromarray(stripes.astype(np.uint16) * 257 if mode == "I;16" else stripes)
    picture = picture if mode == "I;16" else picture.convert(mode)
    found = decode(encoded(picture, "JPEG" if mode == "CMYK" else "PNG"), SIDE_PX)
    middle = found[SIDE_PX // 2, SIDE_PX // 2].astype(int)
    assert (np.abs(middle - 128) < 20).all(), middle


@pytest.mark.parametrize("side", [100, 1600])
def test_sixteen_bit_grey_is_scaled_and_its_transparent_value_is_white(side: int) -> None:
    values = np.full((side, side), 30_000, np.uint16)
    values[: side // 2] = 7
    opaque, transparent = encoded(Image.fromarray(values)), io.BytesIO()
    Image.fromarray(values).save(transparent, "PNG", transparency=7)
    pixels = decode(opaque, SIDE_PX)
    assert pixels[4, 16].tolist() == [0] * 3 and pixels[28, 16].tolist() == [117] * 3
    pixels = decode(transparent.getvalue(), SIDE_PX)
    assert pixels[4, 16].tolist() == [255] * 3 and pixels[28, 16].tolist() == [117] * 3


@pytest.mark.parametrize("line_break", ["\n", "\r\n", " "])
def test_base64_may_have_line_breaks(line_break: str) -> None:
    data = bytes(range(256)) * 10
    text = line_break.join(base64.encodebytes(data).decode().split())
    assert from_base64(text) == from_base64(f"data:image/png;base64,{text}{line_break}") == data
    with pytest.raises(ValueError, match="not in base64"):
        from_base64(text + "%")


def test_transparent_is_white_in_a_large_picture_too() -> None:
    pixels = np.zeros((1500, 1500, 4), np.uint8)
    pixels[700:800, 700:800] = (255, 0, 0, 255)
    assert (decode(encoded(Image.fromarray(pixels)), SIDE_PX)[0, 0] == 255).all()
    assert decode(encoded(Image.fromarray(pixels)), SIDE_PX)[15, 15].tolist() == [255, 0, 0]


@pytest.mark.parametrize("side", [100, 1600])
def test_a_picture_that_lies_on_its_side_is_turned(side: int) -> None:
    pixels = np.full((side, side, 3), 255, np.uint8)
    pixels[: side // 2] = 0
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    found = decode(encoded(Image.fromarray(pixels), "JPEG", exif=exif), SIDE_PX)
    assert found[16, 4].mean() > 250 and found[16, 28].mean() < 5


def test_bands_of_a_transparent_picture_are_laid_on_white_as_the_whole_is() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (2 * BAND_ROWS + 7, 40, 4), dtype=np.uint8)
    alpha = picture[..., 3:].astype(np.float32) / 255
    whole = (picture[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    assert (square(picture, 64) == square(whole, 64)).all()


MEASURE = """
import sys
from pathlib import Path
from indexing.service.picture_decoder import decode_upright
def told(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)) // 1024
large, small = (Path(each).read_bytes() for each in sys.argv[1:])
decode_upright(small, 1792)
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = told("VmRSS")
decode_upright(large, 1792)
print(told("VmHWM") - before)
"""  # noqa: E501


@pytest.mark.parametrize(
    ("mode", "kind", "side", "most_mb"), [("RGBA", "PNG", 5792, 400), ("RGB", "WEBP", 4096, 400)]
)
def test_the_largest_picture_takes_a_bounded_memory(
    tmp_path: Path, mode: str, kind: str, side: int, most_mb: int
) -> None:
    (tmp_path / "large").write_bytes(encoded(Image.new(mode, (side, side)), kind))
    (tmp_path / "small").write_bytes(encoded(Image.new(mode, (640, 640)), kind))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "small")]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(told.stdout) < most_mb


def test_a_picture_of_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexing.service.picture_decoder.MAX_PIXELS", 10_000)
    for kind, side in (("PNG", 100), ("WEBP", 70)):
        assert decode_upright(encoded(Image.new("RGB", (side, side)), kind), 99).width <= side
        with pytest.raises(RefusedError, match="million are allowed"):
            decode_upright(encoded(Image.new("RGB", (side + 1, side + 1)), kind), 99)


def many_scans(scans: int, side: int = 64) -> bytes:
    """Return a progressive JPEG with further scans, each a copy of its last one."""
    data = encoded(Image.fromarray(gradient(side, side)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * (scans - count_scans(data)) + data[-2:]


def test_scans_are_counted_as_a_decoder_sees_them() -> None:
    plain = encoded(Image.fromarray(gradient(64, 64)), "JPEG")
    comment = b"\xff\xfe" + (2 + 8).to_bytes(2) + b"\xff\xda\x00\x04" * 2
    assert count_scans(plain) == 1
    assert count_scans(plain[:2] + comment + plain[2:] + b"\xff\xda" * 100) == 1
    assert count_scans(many_scans(300)) == 300
    assert count_scans(b"") == count_scans(b"\xff\xd8\xff") == 0


def test_a_jpeg_of_many_scans_is_not_decoded() -> None:
    assert decode(many_scans(MAX_SCANS), SIDE_PX).shape == (SIDE_PX, SIDE_PX, 3)
    with pytest.raises(ValueError, match=f"400 progressive scans: at most {MAX_SCANS}"):
        decode(many_scans(400), SIDE_PX)


def test_a_picture_that_takes_too_long_is_ended_and_the_next_one_is_decoded() -> None:
    decoders = PictureDecoders(limit_s=0.001)
    large = encoded(Image.fromarray(gradient(3000, 3000)), "JPEG", progressive=True)
    with pytest.raises(ValueError, match="s to decode"):
        decoders.decode(large, SIDE_PX)
    decoders.processes.limit_s = 60
    assert decoders.decode(large, SIDE_PX).shape == (SIDE_PX, SIDE_PX, 3)
    decoders.close()


def test_a_decoder_that_dies_refuses_its_picture_only() -> None:
    decoders = PictureDecoders(limit_s=60)
    picture = encoded(Image.new("RGB", (20, 20)))
    decoders.decode(picture, SIDE_PX)
    decoders.processes._idle[0].kill()
    with pytest.raises(ValueError, match="cannot be read"):
        decoders.decode(picture, SIDE_PX)
    assert decoders.decode(picture, SIDE_PX).shape == (SIDE_PX, SIDE_PX, 3)
    decoders.close()


def test_closing_ends_pictures_that_are_being_decoded() -> None:
    decoders = PictureDecoders(limit_s=600)
    process = decoders.processes._take()  # one that will never answer
    refusals: list[str] = []

    def decode_one() -> None:
        try:
            decoders.decode(many_scans(MAX_SCANS, 4000), SIDE_PX)
        except ValueError as error:
            refusals.append(str(error))

    thread = threading.Thread(target=decode_one)
    thread.start()
    while len(decoders.processes._busy) < 2:
        time.sleep(0.01)
    decoders.close()
    thread.join()
    assert len(refusals) == 1 and process.wait() == -signal.SIGKILL
    with pytest.raises(ValueError, match="the service is ending"):
        decoders.decode(b"", SIDE_PX)
