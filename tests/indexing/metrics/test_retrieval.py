"""Recall equals a slow count, equal captions or pictures count once, chance is hypergeometric."""

import numpy as np
import pytest
from scipy import stats

from indexing.metrics.retrieval import chance_of_hit, retrieval, retrieval_of_all, right_ranks
from tests.helpers.embed_folders import vectors

ROOT = np.sqrt(0.5)


def test_recall_by_hand() -> None:
    # Pictures at 0 and 90 degrees, their captions at 80 and 10: both are nearer to the wrong one.
    images = np.array([[1, 0], [0, 1]], np.float32)
    texts = np.array([[0.17, 0.98], [0.98, 0.17]], np.float32)
    figures = retrieval(images, texts, ["p", "q"], ["one", "two"], ["g", "h"], 500, 0)
    for direction in ("image_to_text", "text_to_image"):
        assert figures[direction]["recall@1"] == figures[direction]["recall@1"] | {
            "value": 0.0,
            "n": 2,
            "chance": 0.5,
        }
        assert (
            figures[direction]["recall@5"]["value"]
            == figures[direction]["recall@5"]["chance"]
            == 1.0
        )


def test_recall_agrees_with_counting_one_by_one() -> None:
    rng = np.random.default_rng(0)
    count = 300
    images, texts = (
        vectors(count, 16).astype(np.float32),
        vectors(count, 16, seed=1).astype(np.float32),
    )
    texts = texts + 0.9 * images
    words = [f"caption {number}" for number in rng.integers(0, 120, count)]
    for word in set(words):  # one caption, one embedding
        texts[[row for row, other in enumerate(words) if other == word]] = texts[words.index(word)]
    figures = retrieval(images, texts, range(count), words, range(count), 500, 0)
    captions = sorted(set(words), key=words.index)
    first = [words.index(caption) for caption in captions]
    for k in (1, 5, 10):
        to_text = [
            words[row] in [captions[c] for c in np.argsort(-(texts[first] @ images[row]))[:k]]
            for row in range(count)
        ]
        to_image = [
            captions[c] in [words[row] for row in np.argsort(-(images @ texts[first[c]]))[:k]]
            for c in range(len(captions))
        ]
        assert figures["image_to_text"][f"recall@{k}"]["value"] == pytest.approx(np.mean(to_text))
        assert figures["text_to_image"][f"recall@{k}"]["value"] == pytest.approx(np.mean(to_image))
    chances = [1 - stats.hypergeom(count, words.count(caption), 5).pmf(0) for caption in captions]
    assert figures["text_to_image"]["recall@5"]["chance"] == pytest.approx(np.mean(chances))
    assert (figures["n"], figures["pictures"], figures["captions"]) == (count, count, len(captions))
    assert figures["text_to_image"]["recall@1"]["n"] == len(captions)


def test_a_caption_on_two_pictures_is_right_for_both() -> None:
    images = np.array([[1, 0], [0, 1]], np.float32)
    texts = np.array([[ROOT, ROOT], [ROOT, ROOT]], np.float32)
    figures = retrieval(images, texts, ["p", "q"], ["same", "same"], ["g", "h"], 500, 0)
    assert figures["captions"] == 1
    assert (
        figures["image_to_text"]["recall@1"]["value"]
        == figures["text_to_image"]["recall@1"]["value"]
        == 1.0
    )


def test_a_picture_with_many_captions_may_find_any_of_them() -> None:
    images = np.array([[1, 0], [1, 0], [0, 1]], np.float32)  # the first picture is in two pairs
    texts = np.array([[-1, 0], [0.9, 0.4], [0.5, 0.86]], np.float32)
    figures = retrieval(
        images, texts, ["p", "p", "q"], ["far", "near", "other"], ["g", "g", "h"], 500, 0
    )
    assert (figures["pictures"], figures["captions"]) == (2, 3)
    assert figures["image_to_text"]["recall@1"] == figures["image_to_text"]["recall@1"] | {
        "value": 1.0,
        "n": 2,
    }
    assert figures["image_to_text"]["recall@1"]["chance"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert figures["text_to_image"]["recall@1"]["value"] == pytest.approx(
        2 / 3
    )  # "far" finds the other picture


def test_a_constant_model_finds_nothing_in_many() -> None:
    same = np.tile(vectors(1, 16).astype(np.float32), (40, 1))
    figures = retrieval(same, same, range(40), [str(i) for i in range(40)], range(40), 500, 0)
    assert (
        figures["image_to_text"]["recall@10"]["value"]
        == figures["text_to_image"]["recall@10"]["value"]
        == 0
    )


def test_a_random_model_reaches_chance() -> None:
    count = 2000
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, count, 64)).astype(np.float32)
    words = [str(number) for number in rng.integers(0, 500, count)]
    figures = retrieval(images, texts, range(count), words, range(count), 1000, 0)["image_to_text"][
        "recall@10"
    ]
    assert figures["low"] <= figures["chance"] <= figures["high"]
    assert figures["chance"] == pytest.approx(10 / 500, rel=0.05)


@pytest.mark.parametrize(
    ("right", "size", "k"), [(1, 100, 1), (4, 100, 10), (3, 12, 10), (5, 5, 5), (1, 4, 10)]
)
def test_chance_is_hypergeometric(right: int, size: int, k: int) -> None:
    drawn = min(k, size)
    assert chance_of_hit(right, size, k) == pytest.approx(
        1 - stats.hypergeom(size, right, drawn).pmf(0)
    )


def test_ranks_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, gallery = vectors(50, 8).astype(np.float32), vectors(70, 8, seed=3).astype(np.float32)
    is_right = np.random.default_rng(0).random((50, 70)) < 0.05
    is_right[:, 0] = True
    pairs = np.random.default_rng(1).permutation(np.argwhere(is_right)).T
    whole = right_ranks(queries, gallery, *pairs)
    scores = queries @ gallery.T
    by_hand = [
        int((row[~right] >= row[right].max()).sum())
        for row, right in zip(scores, is_right, strict=True)
    ]
    monkeypatch.setattr("indexing.metrics.retrieval.QUERIES_AT_ONCE", 7)
    assert right_ranks(queries, gallery, *pairs).tolist() == whole.tolist() == by_hand


def test_all_captions_of_a_picture_count() -> None:
    # Picture p is called by two captions, one near it and one near q; "both" stands on p and q
    # alike.
    images = np.array([[1, 0], [0, 1]], np.float32)
    vector_of = {"near": [0.9, 0.4], "far": [0.1, 0.95], "both": [ROOT, ROOT], "own": [0.3, 0.9]}
    encoded: list[list[str]] = []

    def encode(texts: list[str]) -> np.ndarray:
        encoded.append(texts)
        return np.array([vector_of[text] for text in texts], np.float32)

    figures = retrieval_of_all(
        images, ["p", "q"], [["near", "far", "both"], ["both", "own"]], encode, ["g", "h"], 500, 0
    )
    assert encoded == [["near", "far", "both", "own"]]  # each text once
    assert (figures["n"], figures["pictures"], figures["captions"]) == (5, 2, 4)
    one = figures["image_to_text"]["recall@1"]
    assert (
        one["value"] == 0.5 and one["n"] == 2
    )  # "near" comes first for p; for q "far" stands before its own
    assert one["chance"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    back = figures["text_to_image"]["recall@1"]
    assert back["value"] == 3 / 4 and back["n"] == 4  # "far" finds q alone
    assert back["chance"] == pytest.approx((0.5 + 0.5 + 1 + 0.5) / 4)


def test_all_captions_agree_with_counting_one_by_one() -> None:
    rng = np.random.default_rng(2)
    images = vectors(60, 8).astype(np.float32)
    captions = [
        [f"caption {number}" for number in rng.choice(150, rng.integers(1, 6), replace=False)]
        for _ in range(60)
    ]
    distinct = sorted({text for texts_of in captions for text in texts_of})
    texts = {
        text: vectors(1, 8, seed=10 + row)[0].astype(np.float32)
        for row, text in enumerate(distinct)
    }
    figures = retrieval_of_all(
        images,
        range(60),
        captions,
        lambda batch: np.stack([texts[text] for text in batch]),
        range(60),
        500,
        0,
    )
    table = np.stack([texts[text] for text in distinct])
    for k in (1, 5, 10):
        to_text = [
            any(distinct[i] in texts_of for i in np.argsort(-(table @ image))[:k])
            for image, texts_of in zip(images, captions, strict=True)
        ]
        to_image = [
            any(text in captions[i] for i in np.argsort(-(images @ texts[text]))[:k])
            for text in distinct
        ]
        assert figures["image_to_text"][f"recall@{k}"]["value"] == pytest.approx(np.mean(to_text))
        assert figures["text_to_image"][f"recall@{k}"]["value"] == pytest.approx(np.mean(to_image))
