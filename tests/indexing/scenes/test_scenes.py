"""Captions of scenes read back, and pictures depend on the seed alone."""

import numpy as np
import pytest

from indexing.scenes.checker import shows
from indexing.scenes.scenes import (
    Scene,
    Thing,
    draw,
    every_scene,
    parse,
    phrasings,
)

SCENES = list(every_scene())
SHAPED = [scene for scene in SCENES if not scene.word]
RED_ON_BLUE = Scene((Thing("square", "red"), Thing("square", "blue")), "on top of")


def drawn(scene: Scene, seed: int = 0, noise: float = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    picture = draw(scene, 32, rng) + rng.normal(size=(32, 32, 3)) * noise
    return np.clip(picture, 0, 255).astype(np.uint8)


def test_every_caption_reads_back_as_its_scene_and_says_it_once() -> None:
    assert all(parse(scene.caption) == scene for scene in SCENES)
    assert len({scene.concept for scene in SCENES}) == len(SCENES) > 500
    assert {scene.row for scene in SCENES} == {
        "colours",
        "sizes",
        "counting",
        "attribution",
        "position",
        "writing",
    }
    assert (
        parse("a circle").row == "single object"
        and parse("A circle  and a square").row == "two objects"
    )  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    [
        "a red cube",
        "a circles",
        "two circle",
        "a red circle on a square",
        "",
        "a sign that says 7",
        "red circle",
    ],
)
def test_what_is_no_scene_is_none(text: str) -> None:
    assert parse(text) is None


def test_every_phrasing_that_is_a_scene_is_true_of_the_picture() -> None:
    for number, scene in enumerate(SHAPED[::7]):
        read = [parse(caption) for caption in phrasings(scene, np.random.default_rng(number))]
        assert read[0] is not None and read[0].concept == scene.concept
        assert all(shows(drawn(scene, number), other) for other in read if other)


def test_equal_seeds_draw_equal_pictures_and_others_do_not() -> None:
    assert np.array_equal(drawn(RED_ON_BLUE, 1), drawn(RED_ON_BLUE, 1))
    assert not np.array_equal(drawn(RED_ON_BLUE, 1), drawn(RED_ON_BLUE, 2))
