"""Near pairs equal those of brute force, and planted copies are all result."""

import faiss
import numpy as np
import pytest

from indexing.data.embedding_store import unit
from indexing.dedup import near_pairs
from indexing.dedup.grouping import perceptual, semantic

THRESHOLD = 0.95


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def planted(count: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return float16 vectors (N, D), the rows of copies, and the rows that they copy; their cosines
    lie between the threshold and 1.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(60, dim))
    vectors = unit(
        (centres[rng.integers(0, 60, count)] + rng.normal(size=(count, dim))).astype(np.float32)
    )
    source, copy = (
        rng.permutation(count // 2)[: count // 20],
        count // 2 + rng.permutation(count // 2)[: count // 20],
    )
    apart = rng.normal(size=(len(copy), dim)).astype(np.float32)
    apart = unit(apart - (apart * vectors[source]).sum(1, keepdims=True) * vectors[source])
    cosine = rng.uniform(THRESHOLD + 0.002, 1, (len(copy), 1)).astype(np.float32)
    vectors[copy] = cosine * vectors[source] + np.sqrt(1 - cosine**2) * apart
    return vectors.astype(np.float16), copy, source


def test_near_pairs_equal_those_of_brute_force() -> None:
    vectors, *_ = planted(6000, 64, seed=3)
    order = np.random.default_rng(0).permutation(6000)[:5900]
    near = near_pairs.NearVectors([vectors], 0.7, order)
    stays = np.arange(5900) % 7 != 0
    result = near.earlier(3000, 5900, stays)
    exact_vectors = unit(vectors.astype(np.float32))[order]
    right = np.argwhere(exact_vectors @ exact_vectors.T >= 0.7)
    right = {(a, b) for a, b in right.tolist() if a > b and a >= 3000 and stays[b]}
    pairs = set(zip(result.query.tolist(), result.member.tolist(), strict=True))
    assert pairs <= right and len(pairs) / len(right) > 0.999


@pytest.mark.parametrize("held_bytes", [1 << 30, 0])
def test_all_planted_copies_are_dropped_and_nothing_else(
    held_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_pairs, "HELD_BYTES", held_bytes)
    vectors, copy, source = planted(12_000, 96)
    keeper = semantic(np.array_split(vectors, 3), THRESHOLD, np.arange(len(vectors)))
    dropped = np.flatnonzero(keeper != np.arange(len(vectors)))
    assert np.isin(copy, dropped).mean() >= 0.999 and len(np.setdiff1d(dropped, copy)) == 0
    assert (keeper[copy] == source).mean() >= 0.999


def test_perceptual_groups_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 3000).astype(np.uint64)
    for place in range(0, 1000, 2):  # up to 8 flipped bits; up to 6 are near
        bits = rng.choice(64, rng.integers(0, 9), replace=False)
        hashes[2000 + place // 2] = hashes[place] ^ np.uint64(sum(1 << int(bit) for bit in bits))
    thumbs = np.zeros((3000, 8, 8, 3), np.uint8)
    monkeypatch.setattr(near_pairs, "ALL_PAIRS_UP_TO", 1000)
    by_bands = perceptual(hashes, thumbs, np.arange(3000))
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= 6
    right = np.array(
        [
            next((other for other in range(place) if near[place, other]), place)
            for place in range(3000)
        ]
    )
    assert (by_bands == right).all() and (by_bands != np.arange(3000)).sum() > 300
