"""Reads a run's pictures by the keep list: straight from their place in the tar shards, decoded
ahead by threads, cached when small.

Reads curate's `keep.parquet` (or embed's metadata, the same schema) and ingest's `shards/`. Every
picture's bytes are checked against the keep list's SHA-256 as they are read.
"""

import hashlib
import struct
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch import Tensor

from infra.errors import CallerError, DataError
from training.data.stored_image import pixels_of
from training.models.preprocessing import WHOLE, Interpolation, Look

READERS = 4
CACHE_BYTES = 4 << 30
FILE_BYTES, FILE_PIXELS, FILE_SIDE_PX = 64 << 20, 64 << 20, 4096
LOCATION = ("shard", "member", "offset", "size_bytes", "sha256")
"""Columns of a keep list that say where a picture's bytes lie and what they are."""
FORMATS = ("PNG", "JPEG", "WEBP")
LONGEST = 16
"""Times its shorter side that a picture's longer one counts where its middle is cut out."""
KERNELS: dict[Interpolation, Image.Resampling] = {
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
MEND = (
    'delete that ingest folder and run again, or set broken_pictures = "skip" in this stage\'s '
    "section"
)


def read_table(
    path: Path, split: str | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read a keep list (a parquet file, or a folder of them in name order), one split of it and
    some of its columns if named.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    filters = None if split is None else [("split", "=", split)]
    return pa.concat_tables(
        [pq.read_table(file, columns=columns, filters=filters) for file in files]
    )


def decode(data: bytes, side_px: int, name: str, look: Look = WHOLE) -> np.ndarray:
    """Decode a picture to an RGB square, uint8 (S, S, 3), as `as_square` says. Raises DataError."""
    picture = pixels_of(data)
    if picture is None:
        raise DataError(
            f"{name} is not an 8-bit picture that can be read: give a PNG, JPEG or WebP file"
        )
    return as_square(picture, side_px, look)


def as_square(picture: np.ndarray, side_px: int, look: Look = WHOLE) -> np.ndarray:
    """Turn a decoded picture, uint8 grey, BGR or BGRA, into an RGB square of that side: on white
    where it is transparent.
    """
    if picture.ndim == 2:
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR)
    if picture.shape[2] == 4:
        alpha = picture[..., 3:].astype(np.float32) / 255
        picture = (picture[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    if look != WHOLE:
        return _as_open_clip(picture[..., ::-1], side_px, look)
    height, width = picture.shape[:2]
    if height != width:
        top, left = max(width - height, 0) // 2, max(height - width, 0) // 2
        bottom, right = max(width - height, 0) - top, max(height - width, 0) - left
        picture = cv2.copyMakeBorder(
            picture, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(255, 255, 255)
        )
    if picture.shape[0] != side_px:
        picture = cv2.resize(picture, (side_px, side_px), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(picture[..., ::-1])


def _as_open_clip(picture: np.ndarray, side_px: int, look: Look) -> np.ndarray:
    """Make an RGB picture, uint8 (H, W, 3), a square by Pillow, whose resizing is what open_clip's
    transforms are made of.
    """
    if (
        look.resize == "shortest"
    ):  # of a very long one, which would be large at any side, only the middle is cropped anyway
        (height, width), max_side = picture.shape[:2], LONGEST * min(picture.shape[:2])
        top, left = max(height - max_side, 0) // 2, max(width - max_side, 0) // 2
        picture = picture[top : top + max_side, left : left + max_side]
    image = Image.fromarray(np.ascontiguousarray(picture))
    width, height = side_px, side_px
    if look.resize != "squash":
        whole = max(image.size) if look.resize == "longest" else min(image.size)
        as_it_rounds = round if look.resize == "longest" else int  # timm does, torchvision cuts
        width, height = (max(1, as_it_rounds(side * side_px / whole)) for side in image.size)
    resized = image.resize((width, height), KERNELS[look.interpolation])
    if look.resize == "shortest":
        left, top = round((width - side_px) / 2), round((height - side_px) / 2)
        return np.array(resized.crop((left, top, left + side_px, top + side_px)))
    square = Image.new("RGB", (side_px, side_px), (look.fill,) * 3)
    square.paste(resized, ((side_px - width) // 2, (side_px - height) // 2))
    return np.array(square)


def read_file(file: Path, side_px: int, look: Look = WHOLE) -> np.ndarray:
    """Read a person's picture file as an RGB square, uint8 (S, S, 3), upright and on white. Raises
    CallerError in one line.

    The file may be hostile: its size and the size that its header tells are bounded before a pixel
    is decoded.
    """
    try:
        if not file.is_file():
            raise CallerError(f"{file}: there is no such file")
        if file.stat().st_size > FILE_BYTES:
            raise CallerError(
                f"{file} has {file.stat().st_size >> 20} MiB: give a picture of at most "
                f"{FILE_BYTES >> 20} MiB"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound follows
            with Image.open(file, formats=FORMATS) as opened:
                if opened.width * opened.height > FILE_PIXELS:
                    raise CallerError(
                        f"{file} is {opened.width} x {opened.height} pixels: give one of at most "
                        f"{FILE_PIXELS >> 20} million"
                    )
                if opened.mode in ("I", "F") or opened.mode.startswith("I;"):
                    raise CallerError(f"{file} has more than 8 bits a channel: save it with 8")
                opened.thumbnail(
                    (FILE_SIDE_PX, FILE_SIDE_PX), Image.Resampling.BOX
                )  # a thin one made square would need its side squared
                upright = ImageOps.exif_transpose(opened)
                picture = Image.new("RGB", upright.size, "white")
                picture.paste(
                    upright.convert("RGB"),
                    mask=upright.convert("RGBA").getchannel("A")
                    if upright.has_transparency_data
                    else None,
                )
    except CallerError:
        raise
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        reason = (
            getattr(error, "strerror", None) or type(error).__name__
        )  # Pillow's messages hold the whole header
        raise CallerError(
            f"{file} cannot be read as a picture ({reason}): give a PNG, JPEG or WebP file"
        ) from None
    return as_square(np.asarray(picture)[..., ::-1], side_px, look)


class Pictures:
    """The pictures of a table's rows at one side length; `pictures[rows]` is uint8 (len(rows), S,
    S, 3) on the CPU.

    Holds PLACE of every row, some 140 bytes, and the pictures themselves where they fit into
    `cache_bytes` (CACHE_BYTES unless told).
    """

    def __init__(
        self,
        table: pa.Table,
        shards: Path,
        side_px: int,
        look: Look = WHOLE,
        readers: int = READERS,
        cache_bytes: int | None = None,
    ) -> None:
        self.shards, self.side_px, self.look = shards, side_px, look
        self.places = table.select(LOCATION).combine_chunks()
        in_order = pc.sort_indices(
            self.places, [("shard", "ascending"), ("offset", "ascending")]
        ).to_numpy()
        self.rank = np.empty(len(in_order), np.int64)
        self.rank[in_order] = np.arange(len(in_order))
        self.readers = ThreadPoolExecutor(readers)
        self.opened = threading.local()
        self.waited_s = 0.0
        """For how long it was waited for pictures that had not been read yet."""
        self.cache: Tensor | None = None
        self.ahead: dict[int, Future[np.ndarray]] = {}
        if len(self) * side_px * side_px * 3 <= (
            CACHE_BYTES if cache_bytes is None else cache_bytes
        ):
            cache = torch.empty(len(self), side_px, side_px, 3, dtype=torch.uint8)
            for row, picture in zip(
                in_order.tolist(), self.readers.map(self._read, in_order.tolist()), strict=True
            ):
                cache[row] = torch.from_numpy(picture)
            self.cache = cache

    def __len__(self) -> int:
        return int(self.places.num_rows)

    def __getitem__(self, rows: Tensor | Sequence[int]) -> Tensor:
        wanted = torch.as_tensor(rows)
        if self.cache is not None:
            return self.cache[wanted]
        self.read_ahead(wanted)
        started_s = time.perf_counter()
        decoded = {row: self.ahead.pop(row).result() for row in set(wanted.tolist())}
        self.waited_s += time.perf_counter() - started_s
        return torch.from_numpy(np.stack([decoded[row] for row in wanted.tolist()]))

    def read_ahead(self, rows: Tensor) -> None:
        """Begin to read and decode rows that will be asked for, as they lie in the shards, so that
        a step need not wait for them.
        """
        if self.cache is None:
            new = sorted({*rows.tolist()} - self.ahead.keys(), key=self.rank.__getitem__)
            self.ahead |= {row: self.readers.submit(self._read, row) for row in new}

    def _open(self, shard: str) -> BinaryIO:
        """Return a shard, open; each reader keeps the last one, since the next row mostly lies in
        it as well.
        """
        if getattr(self.opened, "shard", None) != shard:
            if hasattr(self.opened, "file"):
                self.opened.file.close()
            self.opened.shard, self.opened.file = None, (self.shards / shard).open("rb")
            self.opened.shard = shard
        file: BinaryIO = self.opened.file
        return file

    def _read(self, row: int) -> np.ndarray:
        location = {
            name: column[row].as_py()
            for name, column in zip(LOCATION, self.places.columns, strict=True)
        }
        name = f"{location['shard']}/{location['member']}"
        try:
            file = self._open(location["shard"])
            file.seek(location["offset"])
            data = file.read(location["size_bytes"])
        except FileNotFoundError:
            raise DataError(
                f"shard {location['shard']} is missing from {self.shards}: {MEND}"
            ) from None
        if len(data) < location["size_bytes"]:
            raise DataError(
                f"shard {location['shard']} in {self.shards} ends before {location['member']} "
                f"does: {MEND}"
            )
        if hashlib.sha256(data).hexdigest() != location["sha256"]:
            raise DataError(f"{name} is not what curate saw (SHA-256 differs): {MEND}")
        return decode(data, self.side_px, name, self.look)
