"""A person's picture file becomes the right square, and a hostile one a single line."""

import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.errors import CallerError
from training.data.image_reader import decode, read_file


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """Return a PNG whose header says so much, whatever it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def test_it_is_the_square_that_training_saw(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shape in ((8, 8, 3), (16, 16, 3), (6, 10, 3), (9, 9, 4)):
        image = rng.integers(0, 256, shape, np.uint8)
        Image.fromarray(image).save(tmp_path / "x.png")
        seen = decode((tmp_path / "x.png").read_bytes(), 8, "x").astype(int)
        assert np.abs(read_file(tmp_path / "x.png", 8).astype(int) - seen).max() <= 1


def test_a_turned_photo_stands_upright(tmp_path: Path) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8] = 255  # the left half is light
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(image).save(tmp_path / "x.jpg", exif=exif, quality=95)
    found = read_file(tmp_path / "x.jpg", 16)
    assert found[:6].min() > 200 and found[10:].max() < 60


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("L", "x.png"),
        ("P", "x.png"),
        ("1", "x.png"),
        ("LA", "x.png"),
        ("CMYK", "x.jpg"),
        ("RGB", "x.webp"),
    ],
)
def test_every_8_bit_mode_is_read(mode: str, name: str, tmp_path: Path) -> None:
    Image.new(mode, (5, 5)).save(tmp_path / name)
    assert read_file(tmp_path / name, 4).shape == (4, 4, 3)


def test_a_thin_picture_costs_no_square_of_its_length(tmp_path: Path) -> None:
    Image.new("RGB", (60_000, 2), "red").save(tmp_path / "x.png")
    tracemalloc.start()
    assert read_file(tmp_path / "x.png", 8).shape == (8, 8, 3)
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as a picture"),
        (b"GIF89a not one that we take", "cannot be read as a picture"),
        (b"<html>no</html>", "cannot be read as a picture"),
        (png(100_000, 100_000), "is 100000 x 100000 pixels|DecompressionBombError"),
        (png(9_000, 9_000), "is 9000 x 9000 pixels: give one of at most 64 million"),
        (png(300, 300, b"\0" * 50), "cannot be read as a picture"),
        (png(0, 5), "cannot be read as a picture"),
        (png(8, 8, bytes(8 * 25))[:48], "cannot be read as a picture"),
    ],
)
def test_a_hostile_file_is_one_line(data: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(data)
    with pytest.raises(CallerError, match=message) as caught:
        read_file(file, 8)
    assert (
        "\n" not in str(caught.value)
        and str(file) in str(caught.value)
        and len(str(caught.value)) < 400
    )


def test_what_has_more_than_8_bits_and_what_is_no_file_is_said(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(CallerError, match="more than 8 bits"):
        read_file(tmp_path / "deep.png", 4)
    for name in (".", "nope.png", "/dev/zero"):
        with pytest.raises(CallerError, match="no such file"):
            read_file(tmp_path / name, 4)
    with (tmp_path / "big.png").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(CallerError, match="has 65 MiB"):
        read_file(tmp_path / "big.png", 4)
