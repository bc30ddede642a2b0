"""The four albumentations transforms that img2dataset's Resizer applies, written with OpenCV only.

Download tasks use this module instead of albumentations (`flows/ingest/img2dataset_parts.py`),
whose import (with SciPy, pydantic and more) takes most of the start time of a task. Arithmetic and
pixels are the same.
Legend: images are uint8 (H, W) or (H, W, C).
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

Transform = Callable[..., dict[str, np.ndarray]]


def _transform(apply: Callable[[np.ndarray], np.ndarray]) -> Transform:
    return lambda image: {"image": apply(image)}


def _scaled(image: np.ndarray, scale: float, interpolation: int) -> np.ndarray:
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image
    return cv2.resize(image, (width, height), interpolation=interpolation)


def SmallestMaxSize(max_size: int, interpolation: int, p: float) -> Transform:  # noqa: N802
    """Scale the shorter side to max_size."""
    return _transform(lambda x: _scaled(x, max_size / min(x.shape[:2]), interpolation))


def LongestMaxSize(max_size: int, interpolation: int, p: float) -> Transform:  # noqa: N802
    """Scale the longer side to max_size."""
    return _transform(lambda x: _scaled(x, max_size / max(x.shape[:2]), interpolation))


def CenterCrop(height: int, width: int) -> Transform:  # noqa: N802
    """Crop the middle of an image that has at least this size."""

    def crop(image: np.ndarray) -> np.ndarray:
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        return image[top : top + height, left : left + width]

    return _transform(crop)


def PadIfNeeded(  # noqa: N802
    min_height: int, min_width: int, border_mode: int, value: Sequence[float], p: float
) -> Transform:
    """Pad an image on all sides to at least this size."""

    def pad(image: np.ndarray) -> np.ndarray:
        down, across = max(0, min_height - image.shape[0]), max(0, min_width - image.shape[1])
        top, left = down // 2, across // 2
        return cv2.copyMakeBorder(
            image, top, down - top, left, across - left, border_mode, value=value
        )

    return _transform(pad)
