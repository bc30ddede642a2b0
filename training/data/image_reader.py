"""Reads images listed in a keep list directly from the tar shards: decoded ahead by threads, cached
if small.

Reads curate's `keep.parquet` (or embed's metadata, with the same schema) and ingest's `shards/`.
The bytes of every image are checked against the keep list's SHA-256. Also reads a person's image
files.
"""

import hashlib
import struct
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch import Tensor

from infra.errors import CallerError, DataError
from infra.square_image import on_white, square
from infra.storage.shard_reader import ShardReader
from infra.storage.stage_files import StageFiles
from training.data.stored_image import pixels_of
from training.sections.preprocessing import WHOLE, Interpolation, Look

READERS = 4
CACHE_BYTES = 4 << 30
FILE_BYTES, FILE_PIXELS, FILE_SIDE_PX = 64 << 20, 64 << 20, 4096
LOCATION = ("shard", "member", "offset", "size_bytes", "sha256")
"""Columns of a keep list with the position and the checksum of an image's bytes."""
FORMATS = ("PNG", "JPEG", "WEBP")
LONGEST = 16
"""Maximum ratio of the longer side to the shorter one before the centre is cropped; more is cut
first."""
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
    """Read a keep list: a parquet file, or a folder of them in name order.

    split, columns: read only these (default: all).
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    filters = None if split is None else [("split", "=", split)]
    return pa.concat_tables(
        [pq.read_table(file, columns=columns, filters=filters) for file in files]
    )


def read_rows(
    files: StageFiles, pattern: str, split: str | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read a stage's parquet files that match a glob, as `read_table` does."""
    filters = None if split is None else [("split", "=", split)]
    tables = []
    for name in files.names(pattern):
        with files.open(name) as file:
            tables.append(pq.read_table(file, columns=columns, filters=filters))
    return pa.concat_tables(tables)


def decode(data: bytes, side_px: int, name: str, look: Look = WHOLE) -> np.ndarray:
    """Decode a picture to an RGB square, uint8 (S, S, 3), as `as_square` says. Raises DataError."""
    picture = pixels_of(data)
    if picture is None:
        raise DataError(
            f"{name} is not an 8-bit picture that can be read: give a PNG, JPEG or WebP file"
        )
    return as_square(picture, side_px, look)


def as_square(picture: np.ndarray, side_px: int, look: Look = WHOLE) -> np.ndarray:
    """Convert a decoded image, uint8 grey, BGR or BGRA, to an RGB square of that side.

    Transparent areas become white.
    """
    if look == WHOLE:
        return square(picture, side_px)
    return _as_open_clip(on_white(picture)[..., ::-1], side_px, look)


def _as_open_clip(picture: np.ndarray, side_px: int, look: Look) -> np.ndarray:
    """Make an RGB image, uint8 (H, W, 3), square with Pillow, as open_clip's transforms do."""
    if look.resize == "shortest":
        # a very long image would be huge once resized, and only its centre is used
        (height, width), max_side = picture.shape[:2], LONGEST * min(picture.shape[:2])
        top, left = max(height - max_side, 0) // 2, max(width - max_side, 0) // 2
        picture = picture[top : top + max_side, left : left + max_side]
    image = Image.fromarray(np.ascontiguousarray(picture))
    width, height = side_px, side_px
    if look.resize != "squash":
        whole = max(image.size) if look.resize == "longest" else min(image.size)
        to_int = round if look.resize == "longest" else int  # timm rounds, torchvision truncates
        width, height = (max(1, to_int(side * side_px / whole)) for side in image.size)
    resized = image.resize((width, height), KERNELS[look.interpolation])
    if look.resize == "shortest":
        left, top = round((width - side_px) / 2), round((height - side_px) / 2)
        return np.array(resized.crop((left, top, left + side_px, top + side_px)))
    canvas = Image.new("RGB", (side_px, side_px), (look.fill,) * 3)
    canvas.paste(resized, ((side_px - width) // 2, (side_px - height) // 2))
    return np.array(canvas)


UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)
"""Exceptions that Pillow raises for broken files."""


def read_file(file: Path, side_px: int, look: Look = WHOLE) -> np.ndarray:
    """Read a person's image file as an RGB square, uint8 (S, S, 3), upright and on white.

    The file may be hostile: its size, and the size in its header, are checked before any pixel is
    decoded. Raises CallerError with one line.
    """
    try:
        _check_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            with Image.open(file, formats=FORMATS) as opened:
                _check_header(file, opened)
                picture = _upright_on_white(opened)
    except CallerError:
        raise
    except UNREADABLE as error:
        # only the type of most errors: Pillow's messages contain the whole header
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise CallerError(
            f"{file} cannot be read as a picture ({reason}): give a PNG, JPEG or WebP file"
        ) from None
    return as_square(np.asarray(picture)[..., ::-1], side_px, look)


def _check_file(file: Path) -> None:
    """Raise CallerError if the file does not exist or is too large."""
    if not file.is_file():
        raise CallerError(f"{file}: there is no such file")
    size_bytes = file.stat().st_size
    if size_bytes > FILE_BYTES:
        raise CallerError(
            f"{file} has {size_bytes >> 20} MiB: give a picture of at most {FILE_BYTES >> 20} MiB"
        )


def _check_header(file: Path, opened: Image.Image) -> None:
    """Raise CallerError if an opened image has too many pixels or more than 8 bits a channel."""
    if opened.width * opened.height > FILE_PIXELS:
        raise CallerError(
            f"{file} is {opened.width} x {opened.height} pixels: give one of at most "
            f"{FILE_PIXELS >> 20} million"
        )
    if opened.mode in ("I", "F") or opened.mode.startswith("I;"):
        raise CallerError(f"{file} has more than 8 bits a channel: save it with 8")


def _upright_on_white(opened: Image.Image) -> Image.Image:
    """Decode an image, at most FILE_SIDE_PX on each side, rotated as EXIF says, on white."""
    # a long thin image would become a square of its longer side
    opened.thumbnail((FILE_SIDE_PX, FILE_SIDE_PX), Image.Resampling.BOX)
    upright = ImageOps.exif_transpose(opened)
    alpha = upright.convert("RGBA").getchannel("A") if upright.has_transparency_data else None
    picture = Image.new("RGB", upright.size, "white")
    picture.paste(upright.convert("RGB"), mask=alpha)
    return picture


class Pictures:
    """The images of a table's rows at one side; `pictures[rows]` is uint8 (len(rows), S, S, 3) on
    the CPU.

    Holds the location of every row, some 140 bytes, and the images themselves if they fit into
    `cache_bytes` (default: CACHE_BYTES).
    """

    def __init__(
        self,
        table: pa.Table,
        shards: ShardReader,
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
        self.waited_s = 0.0
        """Seconds spent waiting for images that were not read yet."""
        self.cache: Tensor | None = None
        self.ahead: dict[int, Future[np.ndarray]] = {}
        if len(self) * side_px * side_px * 3 <= (
            CACHE_BYTES if cache_bytes is None else cache_bytes
        ):
            self.cache = self._read_all(in_order.tolist())

    def _read_all(self, in_order: list[int]) -> Tensor:
        """Read all images shard by shard; return them as uint8 (len(self), S, S, 3)."""
        cache = torch.empty(len(self), self.side_px, self.side_px, 3, dtype=torch.uint8)
        shards = self.shards.sequential()
        read = partial(self._read, shards=shards)
        for row, picture in zip(in_order, self.readers.map(read, in_order), strict=True):
            cache[row] = torch.from_numpy(picture)
        shards.close()
        return cache

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
        """Start to read and decode rows that are needed soon, in the order of the shards."""
        if self.cache is None:
            new = sorted({*rows.tolist()} - self.ahead.keys(), key=self.rank.__getitem__)
            self.ahead |= {row: self.readers.submit(self._read, row, self.shards) for row in new}

    def _read(self, row: int, shards: ShardReader) -> np.ndarray:
        location = {
            name: column[row].as_py()
            for name, column in zip(LOCATION, self.places.columns, strict=True)
        }
        name = f"{location['shard']}/{location['member']}"
        try:
            data = shards.read(
                location["shard"], location["offset"], location["size_bytes"], location["sha256"]
            )
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
            raise DataError(f"{name} has changed since curate (SHA-256 differs): {MEND}")
        return decode(data, self.side_px, name, self.look)
