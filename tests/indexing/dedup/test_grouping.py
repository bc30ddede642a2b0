"""A copy is dropped for a row that stays, and looks survive resizing and compression."""

import cv2
import faiss
import numpy as np
import pytest

from indexing.dedup.grouping import (
    exact,
    groups,
    hash_picture,
    is_alike,
    keeper_rows,
    semantic,
)

THRESHOLD = 0.95


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def test_a_row_is_dropped_only_for_one_that_stays_and_never_over_a_chain() -> None:
    angles = np.deg2rad([0, 15, 30, 45, 60])  # every angle is near to its neighbours only
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    keeper = semantic([vectors], np.cos(np.deg2rad(16)), np.arange(5))
    assert keeper.tolist() == [0, 0, 2, 2, 4]
    assert semantic([vectors], np.cos(np.deg2rad(16)), np.array([3, 1, 0, 2, 4])).tolist() == [
        1,
        1,
        3,
        3,
        3,
    ]
    assert keeper_rows(keeper).tolist() == [0, 2, 4] and groups(keeper) == [(0, [1]), (2, [3])]
    assert semantic([vectors], 0.999, np.arange(5)).tolist() == [0, 1, 2, 3, 4], (
        "without near pairs all rows stay"
    )


def test_equal_bytes_are_dropped_for_the_first_in_order() -> None:
    assert exact(np.array([b"a", b"a", b"a"]), np.array([2, 0])).tolist() == [2, 1, 2], (
        "rows outside the order do not change"
    )
    assert exact(np.array([b"a", b"b", b"a", b"a"]), np.array([2, 0, 1, 3])).tolist() == [
        2,
        1,
        2,
        2,
    ]


def photo(seed: int, side_px: int = 96) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return cv2.resize(
        rng.integers(0, 256, (6, 6, 3)).astype(np.uint8),
        (side_px, side_px),
        interpolation=cv2.INTER_CUBIC,
    )


def test_looks_survive_resizing_and_compression_and_tell_colours() -> None:
    for seed in range(20):
        picture = photo(seed)
        small = cv2.resize(picture, (60, 60), interpolation=cv2.INTER_AREA)
        coded = cv2.imdecode(
            cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR
        )
        assert is_alike(hash_picture(picture), hash_picture(small)) and is_alike(
            hash_picture(picture), hash_picture(coded)
        )
        assert not is_alike(hash_picture(picture), hash_picture(photo(seed + 100)))
        other = np.ascontiguousarray(picture[..., ::-1])
        assert not is_alike(hash_picture(picture), hash_picture(other)), (
            "the same drawing in another colour is another picture"
        )
