"""Two puzzles, drawn and judged exactly: a 24-puzzle with even row sums, and a cube after turns.

A caption describes a puzzle completely: many grids fit the first kind, exactly one picture fits
the second. Pictures are laid out on 40 x 40 pixels, where a number or sticker is a few pixels wide.
Legend: grid (5, 5) of numbers, 0 is the gap; stickers (6, 3, 3) in the order of FACES.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

LAID_OUT_PX = 40
SIDE, CELL_PX, STICKER_PX = 5, 8, 3
EVEN = "a 24 puzzle whose rows sum to even numbers"
ANY = "a 24 puzzle"
FACES = "ULFRBD"
COLOURS = {
    "U": (255, 255, 255),
    "L": (245, 130, 20),
    "F": (30, 150, 70),
    "R": (220, 40, 40),
    "B": (45, 75, 215),
    "D": (245, 205, 20),
}
FACE_CORNERS = {"U": (0, 3), "L": (3, 0), "F": (3, 3), "R": (3, 6), "B": (3, 9), "D": (6, 3)}
"""Row and column of a face's first sticker in the unfolded cube."""
NORMALS = {
    "U": (0, 1, 0),
    "D": (0, -1, 0),
    "F": (0, 0, 1),
    "B": (0, 0, -1),
    "R": (1, 0, 0),
    "L": (-1, 0, 0),
}
TURNS = tuple(face + way for face in FACES for way in ("", "'"))
TURNED = re.compile(rf"a cube after the turns? ((?:[{FACES.lower()}]'? ?)+)")
INK, PAPER, GAP = (25, 25, 30), (250, 240, 200), (90, 90, 95)
MIN_READABLE = 0.85
"""Minimum similarity of a cell to a number: 1 minus the squared error over the variance."""
GLYPHS = {
    "0": "111101101101111", "1": "010110010010111", "2": "111001111100111", "3": "111001111001111",
    "4": "101101111001001",
    "5": "111100111001111", "6": "111100111101111", "7": "111001010010010", "8": "111101111101111",
    "9": "111101111001111",
}  # fmt: skip


@dataclass(frozen=True)
class Puzzle:
    """The content of a picture: a cube after turns, or, without turns, a grid."""

    turns: tuple[str, ...] = ()
    is_even: bool = False

    @property
    def caption(self) -> str:
        """The caption, which `parse` reads back."""
        if self.turns:
            return (
                f"a cube after the turn{'s' if len(self.turns) > 1 else ''} "
                f"{' '.join(self.turns).lower()}"
            )
        return EVEN if self.is_even else ANY

    @property
    def concept(self) -> str:
        """The key by which splits are made: the caption."""
        return self.caption

    @property
    def row(self) -> str:
        """Row of the relations section (indexing.evaluation.relations)."""
        return "cube" if self.turns else "24-puzzle"


def parse(caption: str) -> Puzzle | None:
    """Return the puzzle of a caption, or None where it describes no puzzle."""
    text = " ".join(caption.lower().split())
    if text in (EVEN, ANY):
        return Puzzle(is_even=text == EVEN)
    match = TURNED.fullmatch(text)
    puzzle = Puzzle(tuple(match[1].upper().split())) if match else None
    return puzzle if puzzle and puzzle.caption == text else None


def every_puzzle() -> Iterator[Puzzle]:
    """Yield all puzzles for training: both grids, and cubes after one turn or two.

    Two turns that undo each other are left out.
    """
    yield from (Puzzle(is_even=is_even) for is_even in (True, False))
    for turn in TURNS:
        yield Puzzle((turn,))
        yield from (
            Puzzle((turn, other))
            for other in TURNS
            if turned((turn, other)).tolist() != turned(()).tolist()
        )


def phrasings(puzzle: Puzzle, rng: np.random.Generator) -> list[str]:
    """Return captions that are true for a picture of the puzzle, its own first."""
    return [puzzle.caption, f"a picture of {puzzle.caption}"]


def draw(puzzle: Puzzle, side_px: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a puzzle, uint8 (S, S, 3) RGB; `rng` draws the numbers of a grid."""
    page = _cube(turned(puzzle.turns)) if puzzle.turns else _grid(numbers(puzzle.is_even, rng))
    if side_px == LAID_OUT_PX:
        return page
    resized = cv2.resize(page, (side_px, side_px), interpolation=cv2.INTER_AREA)
    return np.asarray(resized, np.uint8)


def numbers(is_even: bool, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw a grid (5, 5) of the numbers 0 (the gap) to 24, with `is_even` one with even row sums.

    About one grid in 16 has them, so drawing repeats until one does.
    """
    while True:
        grid = rng.permutation(SIDE * SIDE).reshape(SIDE, SIDE)
        if not is_even or not (grid.sum(1) % 2).any():
            return np.asarray(grid, np.int64)


def claims(picture: NDArray[np.uint8], puzzle: Puzzle) -> list[bool]:
    """Return for each claim of a puzzle whether it holds in a picture.

    The claims of a grid are that each number is there and, with `is_even`, that each row sum is
    even; those of a cube are that each sticker is right.
    """
    page, size = picture, (LAID_OUT_PX, LAID_OUT_PX)
    if len(picture) != LAID_OUT_PX:
        page = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC), np.uint8)
    if puzzle.turns:
        right: list[bool] = (read_cube(page) == turned(puzzle.turns)).ravel().tolist()
        return right
    grid = read_grid(page)
    held = [number in grid for number in range(SIDE * SIDE)]
    if puzzle.is_even:
        held += [bool((row >= 0).all() and row.sum() % 2 == 0) for row in grid]
    return held


def read_grid(page: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Read a picture (40, 40, 3) as a grid (5, 5); -1 where a cell looks like no number."""
    templates = (
        np.stack([_cell(number) for number in range(SIDE * SIDE)])
        .reshape(SIDE * SIDE, -1)
        .astype(np.float64)
    )
    cells = (
        page.reshape(SIDE, CELL_PX, SIDE, CELL_PX, 3)
        .swapaxes(1, 2)
        .reshape(SIDE * SIDE, -1)
        .astype(np.float64)
    )
    away = ((cells[:, None] - templates) ** 2).mean(2)  # (25, 25)
    best = away.argmin(1)
    level = templates.std(1).mean() ** 2
    return np.where(away.min(1) <= (1 - MIN_READABLE) * level, best, -1).reshape(SIDE, SIDE)


def read_cube(page: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Read a picture (40, 40, 3) as stickers (6, 3, 3), by the colour nearest to their mean."""
    palette = np.array([COLOURS[face] for face in FACES], np.float64)
    faces = np.zeros((6, 3, 3), np.int64)
    for face, name in enumerate(FACES):
        for row, column in np.ndindex(3, 3):
            y, x = _corner(name, row, column)
            mean = page[y : y + STICKER_PX, x : x + STICKER_PX].reshape(-1, 3).mean(0)
            faces[face, row, column] = ((mean - palette) ** 2).sum(1).argmin()
    return faces


@cache
def _moves() -> dict[str, NDArray[np.int64]]:
    """Return, by turn, which sticker (54,) moves to each position.

    Computed by rotating the stickers of the layer about its axis.
    """
    sticker_cells = {}
    for face, name in enumerate(FACES):
        normal = np.array(NORMALS[name])
        for row, column in np.ndindex(3, 3):
            sticker_cells[(face, row, column)] = (_position(name, row, column), normal)
    where = {
        (*position, *normal): number
        for number, (position, normal) in enumerate(
            (tuple(p), tuple(n)) for p, n in sticker_cells.values()
        )
    }
    turned_stickers = {}
    for turn in TURNS:
        axis = np.array(NORMALS[turn[0]])
        clockwise = (
            -1 if len(turn) == 1 else 1
        )  # seen from outside, a quarter turn against the axis' right hand
        order = np.arange(54)
        for position, normal in sticker_cells.values():
            if position @ axis == 1:
                moved = (*_quarter(position, axis, clockwise), *_quarter(normal, axis, clockwise))
                order[where[moved]] = where[(*position, *normal)]
        turned_stickers[turn] = order
    return turned_stickers


def _quarter(vector: NDArray[np.int64], axis: NDArray[np.int64], way: int) -> tuple[int, ...]:
    """Rotate a vector by 90 degrees about an axis (Rodrigues); way = 1 is right-handed."""
    along = axis * int(vector @ axis)
    return tuple(int(coordinate) for coordinate in along + way * np.cross(axis, vector))


def _position(name: str, row: int, column: int) -> NDArray[np.int64]:
    """Return the position (3,) of a sticker's small cube, coordinates -1 to 1.

    x points right, y up, z to the viewer. Faces are unfolded around the front.
    """
    a, b = column - 1, row - 1
    return np.array(
        {
            "U": (a, 1, b),
            "D": (a, -1, -b),
            "F": (a, -b, 1),
            "B": (-a, -b, -1),
            "R": (1, -b, -a),
            "L": (-1, -b, a),
        }[name],
        np.int64,
    )


def turned(turns: tuple[str, ...]) -> NDArray[np.int64]:
    """Return the stickers (6, 3, 3) of a solved cube after the turns, as numbers of faces."""
    stickers = np.repeat(np.arange(6), 9)
    for turn in turns:
        stickers = stickers[_moves()[turn]]
    return stickers.reshape(6, 3, 3)


def _corner(name: str, row: int, column: int) -> tuple[int, int]:
    top, left = FACE_CORNERS[name]
    return 6 + (top + row) * STICKER_PX, 2 + (left + column) * STICKER_PX


def _cube(stickers: NDArray[np.int64]) -> NDArray[np.uint8]:
    page = np.full((LAID_OUT_PX, LAID_OUT_PX, 3), GAP, np.uint8)
    for face, name in enumerate(FACES):
        for row, column in np.ndindex(3, 3):
            y, x = _corner(name, row, column)
            page[y : y + STICKER_PX, x : x + STICKER_PX] = COLOURS[
                FACES[stickers[face, row, column]]
            ]
    return page


def _grid(grid: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.concatenate(
        [np.concatenate([_cell(int(number)) for number in row], 1) for row in grid]
    )


def _cell(number: int) -> NDArray[np.uint8]:
    """Draw a cell (8, 8, 3): a number in glyphs of 3 x 5 pixels; 0 is the gap."""
    cell = np.full((CELL_PX, CELL_PX, 3), PAPER if number else GAP, np.uint8)
    cell[-1], cell[:, -1] = GAP, GAP
    text = str(number) if number else ""
    for position, digit in enumerate(text):
        glyph = np.array(list(GLYPHS[digit])).reshape(5, 3) == "1"
        left = 4 * position if len(text) == 2 else 2
        cell[1:6, left : left + 3][glyph] = INK
    return cell
