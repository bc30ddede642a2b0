"""Contact sheet: pictures in rows on white, with labels for rows and columns.

Pictures are uint8 (H, W, 3) RGB of one size. Reads and writes no files.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

GAP_PX, LINE_PX, FONT_PX = 4, 18, 13
CELL_PX = 96
"""Smaller images are enlarged by a whole factor to about this width.

Labels then fit, and single pixels stay visible."""
SHEET_SCALE = 2
"""Enlargement on sheets of the report, which show many pictures."""
INK, PAPER = (34, 37, 43), (255, 255, 255)

Pixels = NDArray[np.uint8]


def contact_sheet(
    rows: Sequence[Sequence[Pixels]] | Pixels,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    scale: int | None = None,
) -> Pixels:
    """Return rows of pictures as one sheet (H', W', 3); rows may differ in length.

    Row labels are above the rows, and column labels below the last row. A label that is too long is
    cut; an empty sequence means no labels. Pixels are enlarged `scale` times, by default to about
    CELL_PX.
    """
    R, C = len(rows), max(map(len, rows))
    height, width, _ = rows[0][0].shape
    assert len(row_labels) in (0, R) and len(column_labels) in (0, C), (
        "give a label for every row and column, or none"
    )
    scale = scale or max(1, round(CELL_PX / width))
    cell = (width * scale, height * scale)
    above, below = (LINE_PX if row_labels else 0), (LINE_PX if column_labels else 0)
    size = (C * (cell[0] + GAP_PX) + GAP_PX, R * (above + cell[1] + GAP_PX) + GAP_PX + below)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    for r, row in enumerate(rows):
        top = GAP_PX + r * (above + cell[1] + GAP_PX)
        if row_labels:
            _write(draw, row_labels[r], GAP_PX, top, size[0] - 2 * GAP_PX)
        for c, picture in enumerate(row):
            tile = Image.fromarray(picture).resize(cell, Image.Resampling.NEAREST)
            page.paste(tile, (GAP_PX + c * (cell[0] + GAP_PX), top + above))
    for c, label in enumerate(column_labels):
        _write(draw, label, GAP_PX + c * (cell[0] + GAP_PX), size[1] - LINE_PX, cell[0])
    return np.asarray(page)


def _write(draw: ImageDraw.ImageDraw, text: str, left: int, top: int, width_px: int) -> None:
    """Write one line of text, cut to the width."""
    text = " ".join(text.split())[:400]  # measuring a prompt of megabytes would take minutes
    while text and _font().getlength(text) > width_px:
        text = text[:-1]
    draw.text((left, top), text, fill=INK, font=_font())


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(FONT_PX)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font
