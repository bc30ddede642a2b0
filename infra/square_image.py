"""Makes a decoded picture of any shape a square: the whole picture, centred on white."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

BAND_ROWS = 256
"""Rows of a transparent picture that are put on white at a time: floats take several times the
memory of the picture."""
WHITE = (255, 255, 255)


def square(picture: NDArray[Any], side_px: int) -> NDArray[np.uint8]:
    """Convert a picture, uint8 grey, BGR or BGRA, to an RGB square (S, S, 3), resized by area."""
    picture = on_white(picture)
    height, width = picture.shape[:2]
    if height != width:
        top, left = max(width - height, 0) // 2, max(height - width, 0) // 2
        bottom, right = max(width - height, 0) - top, max(height - width, 0) - left
        borders = (top, bottom, left, right)
        picture = cv2.copyMakeBorder(picture, *borders, cv2.BORDER_CONSTANT, value=WHITE)
    if picture.shape[0] != side_px:
        picture = cv2.resize(picture, (side_px, side_px), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(picture[..., ::-1], np.uint8)


def on_white(picture: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert a picture, uint8 grey, BGR or BGRA, to BGR; transparent areas become white."""
    if picture.ndim == 2:
        return np.asarray(cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR), np.uint8)
    if picture.shape[2] == 3:
        return picture
    bands = [picture[top : top + BAND_ROWS] for top in range(0, len(picture), BAND_ROWS)]
    return np.concatenate([_blended(band) for band in bands])


def _blended(band: NDArray[Any]) -> NDArray[np.uint8]:
    alpha = band[..., 3:].astype(np.float32) / 255
    return np.asarray((band[..., :3] * alpha + 255 * (1 - alpha)).round(), np.uint8)
