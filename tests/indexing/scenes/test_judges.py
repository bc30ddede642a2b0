"""Judges give 1 to what is right alone, and best of n is what enumerating every subset gives."""

from itertools import combinations

import numpy as np
import pytest

from indexing.scenes.judges import best_of, character_accuracy, edit_distance, judge_of
from indexing.scenes.scenes import draw, parse


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(0)
    for ties in (False, True):
        scores = rng.integers(0, 3, 7).astype(float) if ties else rng.normal(size=7)
        values = rng.integers(0, 2, 7).astype(float)
        for n in range(1, 8):
            expected = []
            for subset in combinations(range(7), n):
                own = scores[list(subset)]
                expected.append(values[list(subset)][own == own.max()].mean())
            assert best_of(scores, values, n) == pytest.approx(np.mean(expected))
        assert best_of(scores, values, 1) == pytest.approx(values.mean())
        assert best_of(scores, values, 7) == pytest.approx(values[scores == scores.max()].mean())


def test_best_of_n_by_the_truth_is_the_chance_that_one_is_right() -> None:
    right = np.array([1.0, 0, 0, 0, 0, 1, 0, 0])
    for n in range(1, 9):
        missed = [subset for subset in combinations(range(8), n) if not right[list(subset)].any()]
        assert best_of(right, right, n) == pytest.approx(
            1 - len(missed) / len(list(combinations(range(8), n)))
        )
    with pytest.raises(ValueError, match="best of 9"):
        best_of(right, right, 9)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("cat", "", 3), ("kitten", "sitting", 3), ("deep", "deep", 0), ("ab", "ba", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_character_accuracy_ignores_case_and_signs() -> None:
    assert character_accuracy("C a-T!", "cat") == 1
    assert character_accuracy("", "cat") == 0 and character_accuracy("cart", "cat") == 0.75


def test_each_caption_gets_its_judge() -> None:
    scene = parse("a red circle on top of a blue square")
    assert scene is not None
    picture = draw(scene, 32, np.random.default_rng(0))
    judge, other = (
        judge_of(scene.caption, None),
        judge_of("a blue square on top of a red circle", None),
    )
    assert judge is not None and other is not None and judge(picture) == 1 > other(picture)
    reader = judge_of("a sign that says cat", lambda picture: "cot")
    assert reader is not None and reader(picture) == pytest.approx(2 / 3)
    assert (
        judge_of("a sign that says cat", None) is None
        and judge_of("a red heart", lambda picture: "") is None
    )
