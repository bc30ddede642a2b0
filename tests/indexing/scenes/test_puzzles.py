"""Puzzles read back as they were drawn, turns keep to the cube's group, and a wrong sum or sticker
is seen.
"""

import numpy as np
import pytest

from flows.config.run_config import load_recipe
from indexing.scenes.judges import judge_of
from indexing.scenes.puzzles import (
    ANY,
    EVEN,
    TURNS,
    Puzzle,
    claims,
    draw,
    every_puzzle,
    numbers,
    parse,
    read_cube,
    read_grid,
    turned,
)

RNG = np.random.default_rng(0)


def again(turns: tuple[str, ...], times: int) -> np.ndarray:
    return turned(turns * times)


def test_captions_read_back() -> None:
    every = list(every_puzzle())
    assert (
        all(parse(each.caption) == each for each in every)
        and len({each.concept for each in every}) == len(every) == 2 + 12 + 12 * 11
    )
    assert (
        parse("a cube after the turns r") is None
        and parse("a cube") is None
        and parse(EVEN.upper()) == Puzzle(is_even=True)
    )


def test_turns_have_the_cubes_orders() -> None:
    solved = turned(())
    for turn in TURNS:
        assert (again((turn,), 4) == solved).all() and not (again((turn,), 2) == solved).all()
        back = turn[0] if len(turn) > 1 else turn + "'"
        assert (turned((turn, back)) == solved).all()
        assert (np.bincount(turned((turn, "U", "F")).ravel()) == 9).all()
    # Known of the group: R U has order 105, R U R' U' order 6, R L commute.
    assert (again(("R", "U"), 105) == solved).all() and not any(
        (again(("R", "U"), n) == solved).all() for n in (5, 7, 15, 21, 35)
    )
    assert (again(("R", "U", "R'", "U'"), 6) == solved).all() and (
        turned(("R", "L")) == turned(("L", "R"))
    ).all()


def test_r_carries_the_fronts_right_column_up() -> None:
    up, _, front, right, back, down = turned(("R",))
    assert (up[:, 2] == 2).all() and (up[:, :2] == 0).all()  # front's colour
    assert (
        (front[:, 2] == 5).all()
        and (down[:, 2] == 4).all()
        and (back[:, 0] == 0).all()
        and (right == 3).all()
    )


@pytest.mark.parametrize("noise", [0, 15])
@pytest.mark.parametrize("side_px", [40, 64])
def test_what_is_drawn_is_read(noise: float, side_px: int) -> None:
    for puzzle in [Puzzle(is_even=True), Puzzle(), *list(every_puzzle())[2::9]]:
        picture = np.clip(
            draw(puzzle, side_px, RNG) + RNG.normal(size=(side_px, side_px, 3)) * noise, 0, 255
        ).astype(np.uint8)
        assert all(claims(picture, puzzle)), puzzle.caption


def test_sums_and_numbers_are_exact() -> None:
    grid = numbers(True, np.random.default_rng(1))
    assert not (grid.sum(1) % 2).any() and sorted(grid.ravel()) == list(range(25))
    picture = draw(Puzzle(is_even=True), 40, np.random.default_rng(1))
    assert (read_grid(picture) == grid).all()
    odd, even = (next((0, c) for c in range(5) if grid[0, c] % 2 == rest) for rest in (1, 0))
    other = next((r, c) for r in range(1, 5) for c in range(5) if grid[r, c] % 2 != grid[odd] % 2)
    swapped = picture.copy().reshape(5, 8, 5, 8, 3)
    swapped[odd[0], :, odd[1]], swapped[other[0], :, other[1]] = (
        swapped[other[0], :, other[1]].copy(),
        swapped[odd[0], :, odd[1]].copy(),
    )
    held = claims(swapped.reshape(40, 40, 3), Puzzle(is_even=True))
    assert all(held[:25]) and held[25:].count(False) == 2 and even
    twice = picture.copy().reshape(5, 8, 5, 8, 3)
    twice[0, :, 0] = twice[1, :, 1]
    assert claims(twice.reshape(40, 40, 3), Puzzle()).count(False) == 1
    blurred = np.full((40, 40, 3), 128, np.uint8)
    assert not any(claims(blurred, Puzzle(is_even=True))) and (read_grid(blurred) == -1).all()


def test_a_cube_that_was_turned_otherwise_is_refused() -> None:
    picture = draw(Puzzle(("R", "U")), 40, RNG)
    assert (read_cube(picture) == turned(("R", "U"))).all() and all(
        claims(picture, Puzzle(("R", "U")))
    )
    assert not all(claims(picture, Puzzle(("U", "R")))) and not all(claims(picture, Puzzle(("R",))))
    judge = judge_of("a cube after the turns u r", None)
    assert judge is not None and 0 <= judge(picture) < 1
    assert judge_of(ANY, None) is not None


def test_the_recipe_agrees_with_itself() -> None:
    config = load_recipe("puzzles")
    assert (
        config.data.image_size_px == config.decoder.image_size_px == 40
        and config.evaluate.relations is not None
    )
    assert len(config.data.sources) == 1 and set(config.data.sources[0].shares) == {
        "24-puzzle",
        "cube",
    }  # type: ignore[union-attr]
