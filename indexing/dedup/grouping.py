"""Deduplication: which pictures are copies of others, by their bytes, their look or their
embedding, and which copy stays.

Pure functions. Each returns `keeper` (N,): for each row the row that stays, its own number where it
stays itself. A row is dropped only for a near row that stays; likeness is never followed over a
chain of rows. Rows are judged in the order `order`, the best first: rows that must stay (for
example evaluation pictures), then the more valuable ones. Rows outside the order do not change.
Legend: N rows.
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
MAX_BITS, MAX_RMS = 6, 12
"""Pictures look alike when at most so many of their hashes' 64 bits differ and the root mean square
difference of their small copies is at most so much (of 255)."""
HASHED_PX, HASH_SIDE, THUMB_PX = 32, 8, 8


def exact(contents: NDArray[Any], order: Rows) -> Rows:
    """Group rows with equal contents (SHA-256 digests, (N,))."""
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
    """Group pictures that look alike (see hash_picture).

    Their pHashes (N,) differ in at most `max_bits` of 64 bits, and the root mean square difference
    of their 8 px copies (N, 8, 8, 3) is at most `max_rms`, of 255.
    """
    return _first_in_order(
        len(hashes), order, NearPictures(hashes, thumbs, max_bits, max_rms, order).earlier
    )


def semantic(parts: Sequence[NDArray[Any]], threshold: float, order: Rows, seed: int = 0) -> Rows:
    """Group embeddings, (n, D) parts, whose cosine is at least the threshold."""
    return _first_in_order(
        sum(len(part) for part in parts), order, NearVectors(parts, threshold, order, seed).earlier
    )


def keeper_rows(keeper: Rows) -> Rows:
    """Return the rows that stay, ascending."""
    return np.flatnonzero(keeper == np.arange(len(keeper)))


def groups(keeper: Rows) -> list[tuple[int, list[int]]]:
    """Return (the row that stays, its copies) of every group with copies, the largest groups
    first.
    """
    copies = np.flatnonzero(keeper != np.arange(len(keeper)))
    copies_of: dict[int, list[int]] = {}
    for row in copies.tolist():
        copies_of.setdefault(int(keeper[row]), []).append(row)
    return sorted(copies_of.items(), key=lambda item: (-len(item[1]), item[0]))


def hash_picture(picture: NDArray[np.uint8]) -> tuple[np.uint64, NDArray[np.uint8]]:
    """Return the 64-bit perceptual hash and the 8 px colour copy of an RGB picture (H, W, 3).

    The hash is pHash: a bit for each of the 8 x 8 lowest frequencies of the cosine transform of the
    grey 32 px picture, set where the frequency is above their median.
    """
    small = cv2.resize(picture, (HASHED_PX, HASHED_PX), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    low = cv2.dct(grey)[:HASH_SIDE, :HASH_SIDE]
    thumb = cv2.resize(small, (THUMB_PX, THUMB_PX), interpolation=cv2.INTER_AREA).astype(np.uint8)
    return np.packbits(low > np.median(low)).view(np.uint64)[0], thumb


def is_alike(
    left: tuple[np.uint64, NDArray[np.uint8]], right: tuple[np.uint64, NDArray[np.uint8]]
) -> bool:
    """Return whether two pictures look alike, for two results of `hash_picture`."""
    apart = left[1].astype(np.float32) - right[1].astype(np.float32)
    return bool(
        np.bitwise_count(left[0] ^ right[0]) <= MAX_BITS
        and np.sqrt((apart * apart).mean()) <= MAX_RMS
    )


def _first_in_order(
    count: int, order: Rows, earlier: Callable[[int, int, Mask], NearPairs]
) -> Rows:
    """Go through the rows in order; drop a row that is near to one that stays, for the nearest of
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
