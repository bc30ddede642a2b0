"""Deduplication: which pictures are copies of others, by their bytes, by their look and by what
CLIP sees, and which copy stays.

Pure functions. Each returns `keeper` (N,): the row that stays for each row, its own number where it
stays itself. A row goes only if it is near to a row that stays, never over a chain of likenesses.
Rows are judged in a given `order`, the best first: what must stay (evaluation pictures, say), then
what is worth more. Rows outside the order are left alone. Legend: N rows.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import Rows
from indexing.dedup.near_pairs import Mask, NearPairs, NearPictures, NearVectors

BLOCK_ROWS = 8192
MAX_BITS, MAX_RMS = 6, 12.0
"""Pictures look alike when their hashes differ in at most so many of 64 bits and their small copies
by at most so much of 255."""
HASHED_PX, HASH_SIDE, THUMB_PX = 32, 8, 8


def exact(contents: NDArray[Any], order: Rows) -> Rows:
    """Group rows with equal contents (SHA-256 digests)."""
    keeper = np.arange(len(contents))
    _, first, same = np.unique(contents[order], return_index=True, return_inverse=True)
    keeper[order] = order[first[same]]
    return keeper


def perceptual(
    hashes: NDArray[np.uint64],
    thumbs: NDArray[np.uint8],
    order: Rows,
    max_bits: int = MAX_BITS,
    max_rms: float = MAX_RMS,
) -> Rows:
    """Group pictures that look alike: pHash at most `max_bits` of 64 apart, 8 px copies at most
    `max_rms` of 255 (see look_of).
    """
    return _first_in_order(
        len(hashes), order, NearPictures(hashes, thumbs, max_bits, max_rms, order).earlier
    )


def semantic(parts: Sequence[NDArray[Any]], threshold: float, order: Rows, seed: int = 0) -> Rows:
    """Group embeddings ((n, D) parts, memory-mapped or not) with a cosine of at least the
    threshold.
    """
    return _first_in_order(
        sum(len(part) for part in parts), order, NearVectors(parts, threshold, order, seed).earlier
    )


def keeper_rows(keeper: Rows) -> Rows:
    """Return the rows that stay, ascending."""
    return np.flatnonzero(keeper == np.arange(len(keeper)))


def groups(keeper: Rows) -> list[tuple[int, list[int]]]:
    """Return (the row that stays, the rows that go for it) of every group with copies, the largest
    groups first.
    """
    copies = np.flatnonzero(keeper != np.arange(len(keeper)))
    copies_of: dict[int, list[int]] = {}
    for row in copies.tolist():
        copies_of.setdefault(int(keeper[row]), []).append(row)
    return sorted(copies_of.items(), key=lambda item: (-len(item[1]), item[0]))


def look_of(picture: NDArray[np.uint8]) -> tuple[np.uint64, NDArray[np.uint8]]:
    """Return the 64-bit perceptual hash and the 8 px colour copy of an RGB picture (H, W, 3).

    The hash is pHash: of the grey 32 px picture's cosine transform the 8 x 8 lowest frequencies,
    each above their median or not.
    """
    small = cv2.resize(picture, (HASHED_PX, HASHED_PX), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    low = cv2.dct(grey)[:HASH_SIDE, :HASH_SIDE]
    thumb = cv2.resize(small, (THUMB_PX, THUMB_PX), interpolation=cv2.INTER_AREA).astype(np.uint8)
    return np.packbits(low > np.median(low)).view(np.uint64)[0], thumb


def is_alike(
    left: tuple[np.uint64, NDArray[np.uint8]], right: tuple[np.uint64, NDArray[np.uint8]]
) -> bool:
    """Say whether two pictures, as `look_of` sees them, look alike."""
    apart = left[1].astype(np.float32) - right[1].astype(np.float32)
    return bool(
        np.bitwise_count(left[0] ^ right[0]) <= MAX_BITS
        and np.sqrt((apart * apart).mean()) <= MAX_RMS
    )


def _first_in_order(
    count: int, order: Rows, earlier: Callable[[int, int, Mask], NearPairs]
) -> Rows:
    """Go through the rows in order; one that is near to a row kept so far goes, for the nearest of
    those.
    """
    keeper = np.arange(count)
    stays = np.ones(len(order), bool)
    for start in range(0, len(order), BLOCK_ROWS):
        matches = earlier(start, min(start + BLOCK_ROWS, len(order)), stays)
        by_query = np.lexsort((-matches.nearness, matches.query))
        query, member = matches.query[by_query], matches.member[by_query]
        starts = np.flatnonzero(np.diff(query, prepend=-1))
        for first, last in itertools.pairwise([*starts, len(query)]):
            near = member[first:last]
            near = near[stays[near]]
            if len(near):
                keeper[order[query[first]]] = order[near[0]]
                stays[query[first]] = False
    return keeper
