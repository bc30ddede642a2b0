"""Zero-shot scores are right where they can be computed by hand, and a model that tells nothing
apart scores nothing.
"""

import numpy as np
import pytest

from indexing.metrics.zero_shot import class_embeddings, member_scores, ranks, score
from tests.helpers.embed_folders import vectors


def test_prompts_are_averaged_in_embedding_space() -> None:
    vector_of = {
        "a cat": [3.0, 0.0],
        "the cat": [0.0, 1.0],
        "a dog": [0.0, 2.0],
        "the dog": [0.0, 5.0],
    }
    result = class_embeddings(
        lambda texts: np.array([vector_of[text] for text in texts]),
        ["cat", "dog"],
        ["a {}", "the {}"],
    )
    assert np.allclose(
        result, [[np.sqrt(0.5), np.sqrt(0.5)], [0, 1]]
    )  # prompts have equal weights, whatever their vectors' lengths


def test_a_name_with_braces_is_inserted_unchanged() -> None:
    prompts: list[str] = []
    class_embeddings(
        lambda texts: prompts.extend(texts) or np.ones((len(texts), 2)), ["{0} {}"], ["a {}"]
    )
    assert prompts == ["a {0} {}"]


def test_scores_by_hand() -> None:
    scores = np.array(
        [[0.9, 0.5, 0.1], [0.2, 0.8, 0.7], [0.3, 0.2, 0.1], [0.1, 0.2, 0.3]], np.float32
    )
    result = score(scores, [0, 2, 0, 0], ["a", "b", "c"], ["w", "x", "y", "z"], 500, seed=0)
    assert result["top_1"]["value"] == 0.5  # right, second, right, third
    assert result["top_5"] == result["top_5"] | {"value": 1.0, "chance": 1.0}
    assert result["top_1"]["chance"] == pytest.approx(1 / 3)
    assert result["top_1"]["majority"] == 0.75
    assert result["mean_per_class"]["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert result["per_class"] == [
        {"class": "a", "n": 3, "value": pytest.approx(2 / 3)},
        {"class": "c", "n": 1, "value": 0.0},
    ]
    assert (result["n"], result["classes"]) == (4, 3)


def test_top_five_agrees_with_sorting() -> None:
    scores = np.random.default_rng(0).normal(size=(200, 30)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 30, 200)
    result = score(scores, labels, [str(i) for i in range(30)], range(200), 500, seed=0)
    best = np.argsort(-scores, axis=1)
    assert result["top_1"]["value"] == (best[:, 0] == labels).mean()
    assert result["top_5"]["value"] == pytest.approx((best[:, :5] == labels[:, None]).any(1).mean())
    assert result["top_5"]["chance"] == pytest.approx(5 / 30)


def test_constant_embeddings_get_nothing_right() -> None:
    images = np.tile(vectors(1, 16).astype(np.float32), (50, 1))
    classes = np.tile(vectors(1, 16, seed=2).astype(np.float32), (7, 1))
    result = score(images @ classes.T, [0] * 50, [str(i) for i in range(7)], range(50), 500, seed=0)
    assert result["top_1"]["value"] == result["top_5"]["value"] == 0


def test_ranks_of_ties() -> None:
    assert ranks(
        np.array([[0.5, 0.5, 0.1], [0.1, 0.5, 0.5]], np.float32), np.array([0, 0])
    ).tolist() == [1, 2]


def test_a_class_has_the_score_of_its_best_member() -> None:
    images, members = (
        vectors(30, 16).astype(np.float32),
        vectors(200, 16, seed=5).astype(np.float32),
    )
    class_of = np.random.default_rng(0).choice([0, 2, 3], 200)
    result = member_scores(images, members, class_of, 5)
    for number in (0, 2, 3):
        assert np.allclose(
            result[:, number], (images @ members[class_of == number].T).max(1), atol=1e-6
        )
    assert (result[:, [1, 4]] == -1).all()
