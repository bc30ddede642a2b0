"""The main colour of a drawing, measured on its pixels, for captions such as `a red apple`.

A colour is named only if it fills at least `MIN_SHARE` of the drawn pixels, so outlines and small
parts do not count. Reads image files.
"""

import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

MIN_SHARE = 0.55
MAX_PIXELS = 16 << 20
NAMES = (
    "",
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "grey",
    "white",
)
# Bands of OpenCV's hue (0 to 179) whose name is clear; a hue between two bands has no name.
HUES = (
    (0, 5, "red"), (10, 18, "orange"), (20, 32, "yellow"), (38, 85, "green"), (92, 125, "blue"),
    (128, 150, "purple"), (152, 164, "pink")
)  # fmt: skip


def main_colour(file: Path) -> str:
    """Return the name of the colour that fills at least `MIN_SHARE` of the drawn pixels, or "".

    A file that is no 8-bit colour image, or has more than MAX_PIXELS, has no main colour.
    """
    if not 0 < _count_pixels(file) <= MAX_PIXELS:
        return ""
    image = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    if image is None or image.ndim != 3 or image.dtype != np.uint8:
        return ""
    step = max(1, max(image.shape[:2]) // 64)
    image = image[::step, ::step]
    drawn = image[image[..., 3] > 128][:, :3] if image.shape[2] == 4 else image.reshape(-1, 3)
    if len(drawn) < 64:
        return ""
    counts = np.bincount(colour_numbers(drawn), minlength=len(NAMES))
    best = int(counts.argmax())
    return NAMES[best] if counts[best] >= MIN_SHARE * len(drawn) else ""


def _count_pixels(file: Path) -> int:
    """Return the pixels that a file's head declares, 0 for no image that can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our bound is lower
            with Image.open(file) as image:
                return image.width * image.height
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0


def colour_numbers(bgr: np.ndarray) -> np.ndarray:
    """Return the index in NAMES of every pixel's colour, 0 if unclear: (N, 3) uint8 to (N,)."""
    hsv = cv2.cvtColor(bgr[None], cv2.COLOR_BGR2HSV)[0].astype(np.int32)
    hue, saturation, value = hsv[:, 0], hsv[:, 1], hsv[:, 2]
    hue = np.where(hue >= 171, 0, hue)  # red is on both sides of 0
    is_vivid = (saturation >= 110) & (value >= 120)
    numbers = np.zeros(len(bgr), np.int64)
    for low, high, name in HUES:
        numbers[is_vivid & (hue >= low) & (hue <= high)] = NAMES.index(name)
    numbers[
        is_vivid & (numbers == NAMES.index("orange")) & ((saturation < 170) | (value < 220))
    ] = 0  # tan
    numbers[(hue <= 8) & (saturation >= 40) & (saturation < 130) & (value >= 200)] = NAMES.index(
        "pink"
    )
    numbers[(hue <= 18) & (saturation >= 60) & (value >= 50) & (value <= 165)] = NAMES.index(
        "brown"
    )
    numbers[(value < 50) | ((value < 75) & (saturation < 110))] = NAMES.index("black")
    is_grey = (saturation < 30) & (value >= 85)
    numbers[is_grey & (value <= 210)] = NAMES.index("grey")
    numbers[is_grey & (value >= 225)] = NAMES.index("white")
    return numbers
