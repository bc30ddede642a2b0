"""Zero-shot scores are right where they can be computed by hand, and a model that tells nothing
apart scores nothing.
"""

import numpy as np
import pytest

from indexing.data.embedding_store import unit
from indexing.metrics.zero_shot import class_embeddings, member_scores, ranks, score
from tests.helpers.embed_folders import vectors


def test_prompts_are_averaged_in_embedding_space() -> None:
    told = {"a cat": [3.0, 0.0], "the cat": [0.0, 1.0], "a dog": [0.0, 2.0], "the dog": [0.0, 5.0]}
    found = class_embeddings(
        lambda texts: np.array([told[text] for text in texts]), ["cat", "dog"], ["a {}", "the {}"]
    )
    assert np.allclose(
        found, [[np.sqrt(0.5), np.sqrt(0.5)], [0, 1]]
    )  # each prompt counts alike, whatever its length


def test_a_name_with_braces_is_put_in_as_it_is() -> None:
    asked: list[str] = []
    class_embeddings(
        lambda texts: asked.extend(texts) or np.ones((len(texts), 2)), ["{0} {}"], ["a {}"]
    )
    assert asked == ["a {0} {}"]


def test_unit_leaves_zeros() -> None:
    assert unit(np.array([[0.0, 0.0], [3.0, 4.0]], np.float32)).tolist() == [
        [0, 0],
        pytest.approx([0.6, 0.8]),
    ]


def test_scores_by_hand() -> None:
    scores = np.array(
        [[0.9, 0.5, 0.1], [0.2, 0.8, 0.7], [0.3, 0.2, 0.1], [0.1, 0.2, 0.3]], np.float32
    )
    found = score(scores, [0, 2, 0, 0], ["a", "b", "c"], ["w", "x", "y", "z"], 500, seed=0)
    assert found["top_1"]["value"] == 0.5  # right, second, right, third
    assert found["top_5"] == found["top_5"] | {"value": 1.0, "chance": 1.0}
    assert found["top_1"]["chance"] == pytest.approx(1 / 3)
    assert found["top_1"]["majority"] == 0.75
    assert found["mean_per_class"]["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["per_class"] == [
        {"class": "a", "n": 3, "value": pytest.approx(2 / 3)},
        {"class": "c", "n": 1, "value": 0.0},
    ]
    assert (found["n"], found["classes"]) == (4, 3)


def test_top_five_agrees_with_sorting() -> None:
    scores = np.random.default_rng(0).normal(size=(200, 30)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 30, 200)
    found = score(scores, labels, [str(i) for i in range(30)], range(200), 500, seed=0)
    best = np.argsort(-scores, axis=1)
    assert found["top_1"]["value"] == (best[:, 0] == labels).mean()
    assert found["top_5"]["value"] == pytest.approx((best[:, :5] == labels[:, None]).any(1).mean())
    assert found["top_5"]["chance"] == pytest.approx(5 / 30)


def test_constant_embeddings_get_nothing_right() -> None:
    images = np.tile(vectors(1, 16).astype(np.float32), (50, 1))
    classes = np.tile(vectors(1, 16, seed=2).astype(np.float32), (7, 1))
    found = score(images @ classes.T, [0] * 50, [str(i) for i in range(7)], range(50), 500, seed=0)
    assert found["top_1"]["value"] == found["top_5"]["value"] == 0


def test_ranks_of_ties() -> None:
    assert ranks(
        np.array([[0.5, 0.5, 0.1], [0.1, 0.5, 0.5]], np.float32), np.array([0, 0])
    ).tolist() == [1, 2]


def test_members_speak_for_their_class() -> None:
    images, members = (
        vectors(30, 16).astype(np.float32),
        vectors(200, 16, seed=5).astype(np.float32),
    )
    class_of = np.random.default_rng(0).choice([0, 2, 3], 200)
    found = member_scores(images, members, class_of, 5)
    for each in (0, 2, 3):
        assert np.allclose(found[:, each], (images @ members[class_of == each].T).max(1), atol=1e-6)
    assert (found[:, [1, 4]] == -1).all()
