"""Query pictures that clients send: checks their size, has them decoded in other processes and
returns RGB squares.

Knows nothing of models and HTTP.
"""

import base64
import binascii

import cv2
import numpy as np

from indexing.data.images import Pixels, Square
from indexing.service import picture_decoder
from indexing.service.picture_decoder import MAX_SIDE, SIZE
from infra.compute.bounded_processes import (
    BoundedProcesses,
    ClosedError,
    OverTimeError,
    ProcessEndedError,
)
from infra.square_image import square

MAX_BYTES = 8 << 20
SIDES, LEAST_PX = 8, 512
"""A picture is first reduced to SIDES times the encoder's side, but not below LEAST_PX."""
DECODE_S = 5.0
"""Maximum seconds for one picture."""


def from_base64(text: str) -> bytes:
    """Return the bytes of a picture in base64, with or without a `data:` prefix. Raises ValueError
    if it is not base64 or has more than MAX_BYTES.
    """
    body = text.partition(",")[2] if text.lstrip().startswith("data:") else text
    body = "".join(body.split())  # many encoders break lines
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ValueError(f"the picture is larger than {MAX_BYTES >> 20} MiB")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the picture is not in base64") from None


class PictureDecoders:
    """Decodes pictures in processes of their own, one for each thread that decodes at that time."""

    def __init__(self, limit_s: float = DECODE_S) -> None:
        self.processes = BoundedProcesses(picture_decoder.__name__, limit_s)

    def decode(self, data: bytes, side_px: int, square: Square = square) -> Pixels:
        """Decode a PNG, JPEG or WebP file to an upright RGB square (S, S, 3), on white unless
        `square` crops. Raises ValueError with the reason.
        """
        if len(data) > MAX_BYTES:
            raise ValueError(f"the picture is larger than {MAX_BYTES >> 20} MiB")
        max_side_px = max(LEAST_PX, SIDES * side_px)
        try:
            answer = self.processes.call(MAX_SIDE.pack(max_side_px) + data)
        except OverTimeError:
            limit_s = self.processes.limit_s
            raise ValueError(f"the picture takes more than {limit_s:g} s to decode") from None
        except ProcessEndedError:
            raise ValueError("the picture cannot be read: give a PNG, JPEG or WebP file") from None
        except ClosedError:
            raise ValueError("the service is ending") from None
        width, height = SIZE.unpack_from(answer)
        upright = np.frombuffer(answer, np.uint8, offset=SIZE.size).reshape(height, width, 4)
        return square(cv2.cvtColor(upright, cv2.COLOR_RGBA2BGRA), side_px)

    def close(self) -> None:
        """End all processes; pictures that are being decoded are refused."""
        self.processes.close()
