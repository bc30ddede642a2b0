"""Decode an image as a shard stores it. Curate keeps what this module reads, and training reads it.

Works on bytes in memory; knows neither torch nor shards.
"""

import cv2
import numpy as np


def pixels_of(data: bytes) -> np.ndarray | None:
    """Decode a stored image: uint8, grey (H, W), BGR or BGRA (H, W, C).

    Returns None for what does not decode, has more than 8 bits a channel or another number of
    channels.
    """
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    except cv2.error:
        return None
    if pixels is None or pixels.dtype != np.uint8:
        return None
    return pixels if pixels.shape[2:] in ((), (3,), (4,)) else None
