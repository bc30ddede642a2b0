"""CLIP scores by hand, nearest pictures by brute force."""

import numpy as np
import pytest

from indexing.metrics.clip_score import (
    clip_scores,
    nearest_by_embedding,
    nearest_by_pixels,
    pair_clip_score,
)
from tests.helpers.embed_folders import vectors


def test_clip_scores_by_hand() -> None:
    texts = np.array([[1, 0], [0, 1]], np.float32)
    images = np.array([[[1, 0], [0.6, 0.8]], [[-0.6, 0.8], [0, 1]]], np.float32)  # (P, K, D)
    figures = clip_scores(images, texts, 500, 0)
    assert figures["clip_score"]["value"] == pytest.approx(100 * (1 + 0.6 + 0.8 + 1) / 4)
    assert figures["mismatched"]["value"] == pytest.approx(
        100 * (0 + 0.8 + 0 + 0) / 4
    )  # a negative cosine counts as 0
    assert figures["own_prompt_first"]["value"] == 0.75
    assert figures["own_prompt_first"]["chance"] == 0.5
    assert {figure["n"] for figure in figures.values()} == {4}
    assert {figure["groups"] for figure in figures.values()} == {2}


def test_a_single_prompt_has_no_mismatched_score() -> None:
    figures = clip_scores(
        np.ones((1, 3, 4), np.float32) / 2, np.ones((1, 4), np.float32) / 2, 500, 0
    )
    assert figures["clip_score"]["value"] == pytest.approx(100)
    assert figures["mismatched"]["value"] is None
    assert figures["own_prompt_first"]["value"] is None


def test_real_pairs_score_their_cosine() -> None:
    images, texts = vectors(50, 8).astype(np.float32), vectors(50, 8, seed=1).astype(np.float32)
    figures = pair_clip_score(images, texts, range(50), 500, 0)
    assert figures["value"] == pytest.approx(
        100 * np.mean([max(0, a @ b) for a, b in zip(images, texts, strict=True)]), rel=1e-5
    )


def test_nearest_by_embedding_agrees_with_brute_force() -> None:
    queries, gallery = (
        vectors(20, 16).astype(np.float32),
        vectors(500, 16, seed=1).astype(np.float32),
    )
    pieces = [gallery[:7], gallery[7:7], gallery[7:400], gallery[400:]]
    cosines, rows = nearest_by_embedding(queries, pieces)
    assert rows.tolist() == (queries @ gallery.T).argmax(1).tolist()
    assert np.allclose(cosines, (queries @ gallery.T).max(1), atol=1e-6)


def test_nearest_by_pixels_agrees_with_brute_force() -> None:
    rng = np.random.default_rng(0)
    gallery = rng.integers(0, 256, (90, 8, 8, 3), dtype=np.uint8)
    queries = np.concatenate([rng.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8), gallery[40:41]])
    distances, rows = nearest_by_pixels(queries, [gallery[:33], gallery[33:33], gallery[33:]])
    truth = np.sqrt(((queries[:, None].astype(float) - gallery[None]) ** 2).mean((2, 3, 4)))
    assert rows.tolist() == truth.argmin(1).tolist()
    assert np.allclose(distances, truth.min(1), atol=1e-3)
    assert (rows[-1], distances[-1]) == (40, 0)


def test_an_empty_gallery_has_no_nearest() -> None:
    assert nearest_by_embedding(np.ones((2, 4), np.float32), [])[1].tolist() == [-1, -1]
    assert nearest_by_pixels(np.ones((2, 4, 4, 3), np.uint8), [])[1].tolist() == [-1, -1]
