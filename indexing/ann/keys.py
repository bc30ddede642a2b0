"""Hashes of texts, computed from Arrow's buffers, and the 53-bit numbers of pair keys.

Legend: N texts.
"""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from indexing.data.embedding_store import CHUNK_ROWS, Rows

NUMBER_BITS = 53
"""Clients that store numbers as doubles (JavaScript) keep so many bits exactly."""


def number_of(key: str) -> int:
    """Return the number of a key, 0 to 2**53 - 1; it depends on the key alone."""
    return int(numbers_of(pa.chunked_array([[key]], pa.string()))[0])


def numbers_of(keys: pa.ChunkedArray) -> Rows:
    """Return the numbers of keys (N,)."""
    return (hashes_of(keys) >> np.uint64(64 - NUMBER_BITS)).astype(np.int64)


def hashes_of(texts: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each text (N,).

    The bytes go through the finaliser of splitmix64 (Steele et al. 2014), eight at a time.
    """
    hashes = [np.zeros(0, np.uint64)]
    for chunk in texts.chunks:
        hashes += [
            _hashes(chunk.slice(start, CHUNK_ROWS)) for start in range(0, len(chunk), CHUNK_ROWS)
        ]
    return np.concatenate(hashes)


def _hashes(texts: pa.Array) -> NDArray[np.uint64]:
    """Return the hashes of one chunk; texts of one length are hashed together."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(
        np.int64
    )
    encoded = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    sizes = np.diff(ends)
    mixed = np.zeros(len(texts), np.uint64)
    for size in np.unique(sizes[sizes > 0]).tolist():
        of_size = np.flatnonzero(sizes == size)
        padded = np.zeros((len(of_size), -(-size // 8) * 8), np.uint8)
        padded[:, :size] = encoded[ends[of_size, None] + np.arange(size)]
        value = np.zeros(len(of_size), np.uint64)
        for word in padded.view(np.uint64).T:
            # Words of zeros, such as padding, do not change the hash.
            value = np.where(word != 0, _mix(value ^ word), value)
        mixed[of_size] = value
    return mixed


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
