"""A contact sheet holds every image, enlarged by a whole factor, with labels beside them."""

import numpy as np
import pytest

from indexing.data.contact_sheet import CELL_PX, GAP_PX, LINE_PX, PAPER, contact_sheet

IMAGES = np.random.default_rng(0).integers(0, 200, (2, 3, 24, 24, 3), np.uint8)
STEP_PX = CELL_PX + GAP_PX


def test_every_image_stands_in_its_row_and_column() -> None:
    sheet = contact_sheet(IMAGES)
    assert sheet.shape == (2 * STEP_PX + GAP_PX, 3 * STEP_PX + GAP_PX, 3)
    for r in range(2):
        for c in range(3):
            top, left = GAP_PX + r * STEP_PX, GAP_PX + c * STEP_PX
            cell = sheet[top : top + CELL_PX : 4, left : left + CELL_PX : 4]
            assert np.array_equal(cell, IMAGES[r, c])


def test_labels_take_a_line_and_a_long_one_is_cut() -> None:
    sheet = contact_sheet(IMAGES, ["first", "second"], ["a", "b", "c" * 1000])
    plain = contact_sheet(IMAGES)
    assert sheet.shape == (plain.shape[0] + 3 * LINE_PX, *plain.shape[1:])
    assert (sheet[GAP_PX : GAP_PX + LINE_PX] != PAPER).any()
    assert (sheet[:, -GAP_PX:] == PAPER).all()


def test_a_label_for_some_of_the_rows_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="a label for every row"):
        contact_sheet(IMAGES, ["first"])


def test_rows_may_differ_in_length_and_a_scale_replaces_the_usual_width() -> None:
    sheet = contact_sheet([list(IMAGES[0]), list(IMAGES[1, :1])], ["first", "second"], scale=2)
    step_px = 2 * 24 + GAP_PX
    assert sheet.shape == (2 * (LINE_PX + step_px) + GAP_PX, 3 * step_px + GAP_PX, 3)
    top = GAP_PX + LINE_PX + step_px + LINE_PX
    assert np.array_equal(sheet[top : top + 48 : 2, GAP_PX : GAP_PX + 48 : 2], IMAGES[1, 0])
    assert (sheet[top:, GAP_PX + step_px :] == PAPER).all()
