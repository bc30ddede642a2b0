"""Training pictures are dropped for the evaluation picture that they look most like."""

import numpy as np
import pytest

from indexing.dedup import perceptual_hash
from indexing.dedup.grouping import MAX_BITS, MAX_RMS
from indexing.dedup.perceptual_hash import like_evaluation


def test_training_pictures_go_for_the_evaluation_picture_they_look_most_like(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(perceptual_hash, "BLOCK_ROWS", 64)
    rng = np.random.default_rng(0)
    hashes, is_train = rng.integers(0, 2**63, 500).astype(np.uint64), rng.random(500) < 0.7
    thumbs = rng.integers(0, 256, (500, 8, 8, 3)).astype(np.uint8)
    for row, other in rng.permutation(500)[:300].reshape(150, 2):
        hashes[row] = hashes[other] ^ np.uint64(
            sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 9), replace=False))
        )
        thumbs[row] = np.clip(thumbs[other] + rng.normal(0, 9, (8, 8, 3)), 0, 255)
    nearest = like_evaluation(perceptual_hash.PictureHashes(hashes, thumbs), is_train)
    flat = thumbs.reshape(500, -1).astype(np.float32)
    rms = np.sqrt(((flat[:, None] - flat[None]) ** 2).mean(2))
    is_alike = (
        (np.bitwise_count(hashes[:, None] ^ hashes[None]) <= MAX_BITS)
        & (rms <= MAX_RMS)
        & ~is_train[None]
    )
    right = np.where(is_alike.any(1) & is_train, np.where(is_alike, rms, np.inf).argmin(1), -1)
    assert (nearest == right).all() and (nearest >= 0).sum() > 20
