"""The checker accepts what was drawn, in every row, and refuses anything else."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from indexing.scenes.checker import claims, objects, share_held, shows
from indexing.scenes.scenes import COLOURS, RELATIONS, SHAPES, Scene, Thing, draw, every_scene

SHAPED = [scene for scene in every_scene() if not scene.word]
RED_ON_BLUE = Scene((Thing("square", "red"), Thing("square", "blue")), "on top of")


def drawn(scene: Scene, seed: int = 0, noise: float = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    picture = draw(scene, 32, rng) + rng.normal(size=(32, 32, 3)) * noise
    return np.clip(picture, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("noise", [0, 12])
def test_the_checker_sees_what_was_drawn(noise: float) -> None:
    seen = [shows(drawn(scene, number, noise), scene) for number, scene in enumerate(SHAPED[::2])]
    assert np.mean(seen) > (0.995 if noise == 0 else 0.97)


def test_the_checker_refuses_every_other_scene_of_the_same_row() -> None:
    rng = np.random.default_rng(3)
    wrong = 0
    for number, scene in enumerate(SHAPED[::5]):
        others = [other for other in SHAPED if other.row == scene.row and other != scene]
        other = others[int(rng.integers(len(others)))]
        wrong += shows(drawn(scene, number), other)
    assert wrong == 0


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_the_other_way_round_is_refused(relation: str) -> None:
    scene = replace(RED_ON_BLUE, relation=relation)
    turned = replace(scene, things=scene.things[::-1])
    for seed in range(8):
        assert claims(drawn(scene, seed), scene) == [True, True, True, True]
        assert claims(drawn(scene, seed), turned) == [True, True, True, False]
        assert share_held(drawn(scene, seed), turned) == 0.75


def test_relations_are_told_from_each_other() -> None:
    for relation in RELATIONS:
        picture = drawn(replace(RED_ON_BLUE, relation=relation))
        assert [
            other for other in RELATIONS if shows(picture, replace(RED_ON_BLUE, relation=other))
        ] == [relation]


def test_colours_bound_to_the_wrong_shapes_are_refused() -> None:
    scene = Scene((Thing("circle", "red"), Thing("square", "blue")))
    swapped = Scene((Thing("circle", "blue"), Thing("square", "red")))
    assert shows(drawn(scene), scene) and claims(drawn(scene), swapped) == [False, False, True]


def test_counts_are_exact() -> None:
    for count in (1, 2, 3, 4):
        picture = drawn(Scene((Thing("circle", "green", count=count),)), count)
        held = [shows(picture, Scene((Thing("circle", count=other),))) for other in (1, 2, 3, 4)]
        assert held == [other == count for other in (1, 2, 3, 4)]


def test_an_open_thing_does_not_take_what_a_named_one_needs() -> None:
    scene = Scene((Thing("circle"), Thing("circle", "red")))
    two = drawn(Scene((Thing("circle", "red"), Thing("circle", "blue")), "to the left of"))
    assert shows(two, scene)


def test_noise_white_and_a_blob_show_nothing() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    star = np.full((64, 64, 3), 255, np.uint8)
    arms = np.array(
        [
            [32 + r * np.cos(turn), 32 + r * np.sin(turn)]
            for turn, r in zip(np.arange(10) * np.pi / 5, [28, 9] * 5, strict=True)
        ]
    )
    cv2.fillPoly(star, [arms.astype(np.int32)], COLOURS["red"])
    for picture in (noise, np.full((32, 32, 3), 255, np.uint8), star):
        assert not any(shows(picture, Scene((Thing(shape),))) for shape in SHAPES)
    assert [shape.shape for shape in objects(star)] == [""] and objects(
        np.full((32, 32, 3), 255, np.uint8)
    ) == []


def test_boxes_are_where_the_shapes_are() -> None:
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[8:24, 4:20] = COLOURS["blue"]
    (square,) = objects(picture)
    assert (square.shape, square.colour) == ("square", "blue")
    assert np.allclose(
        [square.left * 32, square.top * 32, square.right * 32, square.bottom * 32],
        [4, 8, 20, 24],
        atol=0.6,
    )


def test_writing_is_not_for_the_checker() -> None:
    with pytest.raises(ValueError, match="not writing"):
        claims(drawn(Scene(word="cat")), Scene(word="cat"))
