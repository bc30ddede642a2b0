"""A picture of any shape becomes a square that shows all of it on white."""

import numpy as np
import pytest

from infra.square_image import BAND_ROWS, on_white, square


@pytest.mark.parametrize(("height", "width"), [(10, 6), (6, 10), (7, 7), (9, 4)])
def test_the_whole_picture_stands_in_the_middle(height: int, width: int) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    side = max(height, width)
    drawn = square(picture, side)
    top, left = (side - height) // 2, (side - width) // 2
    assert np.array_equal(drawn[top : top + height, left : left + width], picture[..., ::-1])
    rest = np.ones((side, side), bool)
    rest[top : top + height, left : left + width] = False
    assert (drawn[rest] == 255).all() and drawn.flags.c_contiguous


def test_transparent_parts_are_white_in_every_band() -> None:
    picture = np.zeros((2 * BAND_ROWS + 1, 3, 4), np.uint8)
    picture[::2, :, 3] = 255
    opaque = on_white(picture)
    assert (opaque[::2] == 0).all() and (opaque[1::2] == 255).all()


def test_grey_becomes_three_equal_channels() -> None:
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert np.array_equal(square(grey, 4), np.stack([grey] * 3, -1))
