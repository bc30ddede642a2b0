"""Reads pictures from ingest's shards as squares, and writes PNG files.

A picture is uint8 (S, S, 3) RGB.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infra.errors import DataError
from infra.schemas import STORED_SHA256
from infra.square_image import square
from infra.storage.shard_reader import ShardReader

Pixels = NDArray[np.uint8]
Square = Callable[[NDArray[Any], int], Pixels]
"""Turns a decoded picture (grey, BGR or BGRA) into an RGB square with a side in pixels."""


def read_picture(row: Mapping[str, Any], shards: ShardReader, side_px: int) -> Pixels:
    """Read the picture of a row (schema infra.schemas.KEEP) as a square with that side; transparent
    and missing parts are white.

    Raises DataError where the shard cannot be read or holds no picture there.
    """
    name = f"{row['shard']}/{row['member']}"
    try:
        sha256 = row.get(STORED_SHA256, "")
        data = shards.read(row["shard"], row["offset"], row["size_bytes"], sha256)
    except OSError as error:
        raise DataError(
            f"cannot read {name} in {shards} ({error.strerror}): delete that ingest folder and "
            "run again"
        ) from error
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if picture is None or picture.dtype != np.uint8:
        raise DataError(f"{name} is not an 8-bit picture: delete that ingest folder and run again")
    return square(picture, side_px)


def write_png(picture: Pixels, file: Path) -> None:
    """Write a picture as PNG; equal pictures give equal files."""
    Image.fromarray(picture).save(file, optimize=True)
