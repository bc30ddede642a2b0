"""Perceptual hashes and small copies of all pictures, and the training pictures that look like an
evaluation picture.

Reads tables with the columns LOCATION, and ingest's shards once. Hashes are in memory, 8 bytes a
picture; small copies are in a memory-mapped file, 192 bytes a picture. Legend: N pictures.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from indexing.data.embedding_store import Rows
from indexing.data.images import read_picture
from indexing.dedup.grouping import BLOCK_ROWS, MAX_BITS, MAX_RMS, THUMB_PX, hash_picture
from indexing.dedup.near_pairs import NearPictures
from infra.errors import DataError
from infra.schemas import STORED_SHA256
from infra.storage.shard_reader import ShardReader

READERS = 4
READ_PX = 64
"""Side of the squares that pictures are read as."""
LOCATION = ["shard", "member", "offset", "size_bytes", STORED_SHA256]


class PictureHashes(NamedTuple):
    """Hashes (N,) and small copies (N, 8, 8, 3), as grouping.hash_picture makes them."""

    hashes: NDArray[np.uint64]
    thumbs: NDArray[np.uint8]


def hash_pictures(
    batches: Iterable[pa.RecordBatch], shards: ShardReader, file: Path
) -> PictureHashes:
    """Read the pictures of all rows and return their hashes; the small copies go to `file`.

    Raises DataError where a picture cannot be read or there is none.
    """
    hashes = [np.zeros(0, np.uint64)]

    def read_and_hash(location: dict[str, Any]) -> tuple[np.uint64, NDArray[np.uint8]]:
        return hash_picture(read_picture(location, shards, READ_PX))

    with file.open("wb") as thumbs, ThreadPoolExecutor(READERS) as pool:
        for batch in batches:
            hashed = list(pool.map(read_and_hash, batch.select(LOCATION).to_pylist()))
            hashes.append(np.array([hash_value for hash_value, _ in hashed], np.uint64))
            thumbs.write(np.array([thumb for _, thumb in hashed], np.uint8).tobytes())
    hashes_read = np.concatenate(hashes)
    if not len(hashes_read):
        raise DataError(f"{shards}: there is no picture to deduplicate")
    return PictureHashes(
        hashes_read, np.memmap(file, np.uint8, "r", shape=(len(hashes_read), THUMB_PX, THUMB_PX, 3))
    )


def like_evaluation(hashes: PictureHashes, is_train: NDArray[np.bool_]) -> Rows:
    """Return for each training picture (N,) the row of the evaluation picture that it looks most
    like, -1 where it looks like none.
    """
    order = np.argsort(is_train, kind="stable")
    evaluation_count = int(np.count_nonzero(~is_train))
    near = NearPictures(*hashes, MAX_BITS, MAX_RMS, order)
    stays = np.arange(len(order)) < evaluation_count
    nearest_rows = np.full(len(order), -1, np.int64)
    for start in range(evaluation_count, len(order), BLOCK_ROWS):
        pairs = near.earlier(start, min(start + BLOCK_ROWS, len(order)), stays)
        by_nearness = np.argsort(pairs.nearness, kind="stable")  # the nearest is written last
        nearest_rows[order[pairs.query[by_nearness]]] = order[pairs.member[by_nearness]]
    return nearest_rows
