"""Reads text in pictures with the OCR of evaluation-packages.txt, where it is installed."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

ENLARGED_PX = 256
MARGIN_PX = 48
"""White margin around the enlarged picture, which the text detector needs."""


def text_reader() -> Callable[[NDArray[np.uint8]], str] | None:
    """Return a function that reads the text in a picture, uint8 (S, S, 3) RGB, or None where no OCR
    is installed.
    """
    return read_text if find_spec("rapidocr_onnxruntime") else None


def read_text(picture: NDArray[np.uint8]) -> str:
    """Return the text in a small picture, uint8 (S, S, 3) RGB; "" where there is none."""
    large = cv2.resize(picture, (ENLARGED_PX, ENLARGED_PX), interpolation=cv2.INTER_CUBIC)
    large = cv2.copyMakeBorder(large, *(MARGIN_PX,) * 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    lines, _ = _engine()(np.ascontiguousarray(large[..., ::-1]), use_cls=False)
    return " ".join(text for _, text, _ in lines or [])


@cache
def _engine() -> Any:
    from rapidocr_onnxruntime import RapidOCR

    return RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)
