"""Scenes of a few shapes, and signs with a word: captions and drawing (unCLIP, fig. 14 to 16).

A caption describes a scene completely: `parse` reads what `Scene.caption` writes. Rows are those of
GenEval (Ghosh et al. 2023), plus sizes and writing. Coordinates are shares of the side, y points
down. Pictures depend only on scene, side and generator; `indexing.scenes.checker` judges them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (220, 40, 40),
    "yellow": (245, 205, 20),
    "green": (30, 150, 70),
    "blue": (45, 75, 215),
}
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
RELATIONS = ("on top of", "to the left of", "inside")
NUMBERS = ("", "a", "two", "three", "four")
ROWS = (
    "single object",
    "two objects",
    "counting",
    "colours",
    "position",
    "attribution",
    "sizes",
    "writing",
)
INK = (25, 25, 30)
BOARD = (250, 240, 200)
SUPERSAMPLED = 8
TRIES, TRIES_PER_THING = 500, 20

_WORD_LIST = """
    ant arm art bag bat bed bee big box boy bus cab cap car cat cow cup day dog ear egg eye fan
    fig fly fox fun gas gum hat hen hot ice ink jam jar jet job key kid leg lip log man map mud
    net nut oak oil one owl pan pen pet pie pig pin pot red rib rug run sea sky sun tea ten tie
    toy two van wax wet win zoo deep open
"""
WORDS = tuple(_WORD_LIST.split())
"""Words of signs."""


@dataclass(frozen=True)
class Thing:
    """One or more equal shapes; an empty colour or size means any."""

    shape: str
    colour: str = ""
    size: str = ""
    count: int = 1

    def __str__(self) -> str:
        words = [
            NUMBERS[self.count],
            self.size,
            self.colour,
            self.shape + ("s" if self.count > 1 else ""),
        ]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Scene:
    """The content of a picture: one thing, two things with or without a relation, or a sign."""

    things: tuple[Thing, ...] = ()
    relation: str = ""
    word: str = ""

    @property
    def caption(self) -> str:
        """The caption, which `parse` reads back."""
        if self.word:
            return f"a sign that says {self.word}"
        return f" {self.relation or 'and'} ".join(map(str, self.things))

    @property
    def concept(self) -> str:
        """The caption with things in sorted order, unless a relation makes the order matter."""
        if self.relation:
            return self.caption
        return replace(self, things=tuple(sorted(self.things, key=str))).caption

    @property
    def row(self) -> str:
        """The row of ROWS that the scene belongs to."""
        if self.word:
            return "writing"
        if self.relation:
            return "position"
        first = self.things[0]
        if len(self.things) == 2:
            return "attribution" if first.colour else "two objects"
        if first.count > 1:
            return "counting"
        if first.size:
            return "sizes"
        return "colours" if first.colour else "single object"


@dataclass(frozen=True)
class Placed:
    """A shape in the picture; centre and radius are shares of the side."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


THING = (
    rf"(a|two|three|four) (?:({'|'.join(SIZES)}) )?"
    rf"(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})s?"
)
SCENE = re.compile(rf"{THING}(?: (and|{'|'.join(RELATIONS)}) {THING})?")
SIGN = re.compile(r"a sign that says ([a-z]{1,12})")


def parse(caption: str) -> Scene | None:
    """Return the scene of a caption, or None where it describes no scene."""
    text = " ".join(caption.lower().split())
    if sign := SIGN.fullmatch(text):
        return Scene(word=sign[1])
    match = SCENE.fullmatch(text)
    if not match:
        return None
    number, size, colour, shape, joint, *second = match.groups()
    things = [Thing(shape, colour or "", size or "", NUMBERS.index(number))]
    if joint:
        things.append(Thing(second[3], second[2] or "", second[1] or "", NUMBERS.index(second[0])))
    scene = Scene(tuple(things), "" if joint in (None, "and") else joint)
    return scene if scene.caption == text else None  # refuses "a circles"


def every_scene() -> Iterator[Scene]:
    """Yield every scene for training once, by concept.

    Two things in a scene always differ in colour.
    """
    coloured = [Thing(shape, colour) for shape in SHAPES for colour in COLOURS]
    for thing in coloured:
        yield Scene((thing,))
        yield from (Scene((replace(thing, size=size),)) for size in SIZES)
        yield from (Scene((replace(thing, count=count),)) for count in range(2, len(NUMBERS)))
        for other in coloured:
            if thing.colour != other.colour:
                yield from (Scene((thing, other), relation) for relation in RELATIONS)
                if thing.shape != other.shape and str(thing) < str(other):
                    yield Scene((thing, other))
    yield from (Scene(word=word) for word in WORDS)


def phrasings(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Return captions that are true for a picture of the scene.

    The scene's own caption comes first, in either order of its things. Then come the same without
    colours for some rows, and longer wordings.
    """
    if scene.word:
        return [scene.caption, f"a board with the word {scene.word}"]
    sentences = [scene.caption]
    if len(scene.things) == 2 and not scene.relation:
        sentences = [scene.caption, replace(scene, things=scene.things[::-1]).caption]
        sentences = sentences[:: int(rng.choice([1, -1]))]
    bare = replace(
        scene, things=tuple(replace(thing, colour="", size="") for thing in scene.things)
    )
    if scene.row in ("colours", "attribution"):
        sentences.append(bare.caption)
    return [*sentences, f"a picture of {scene.caption}"]


def arrange(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Draw the positions of a scene's shapes, from back to front, and colours that are not set."""
    things = [
        replace(thing, colour=thing.colour or str(rng.choice(list(COLOURS))))
        for thing in scene.things
    ]
    if scene.relation == "inside":
        return _inside(things[0], things[1], rng)
    if scene.relation:
        return _beside(things[0], things[1], scene.relation, rng)
    wanted = [thing for thing in things for _ in range(thing.count)]
    low, high = {1: (0.15, 0.3), 2: (0.15, 0.21)}.get(len(wanted), (0.135, 0.16))
    for _ in range(TRIES):
        placed: list[Placed] = []
        shared = rng.uniform(low, high)
        for thing in wanted:
            radius = {"small": rng.uniform(0.135, 0.165), "large": rng.uniform(0.27, 0.34)}.get(
                thing.size, shared
            )
            for _ in range(TRIES_PER_THING):
                x, y = rng.uniform(radius + 0.04, 0.96 - radius, 2)
                if all(
                    np.hypot(x - other.x, y - other.y) > 1.15 * (radius + other.radius) + 0.04
                    for other in placed
                ):
                    placed.append(Placed(thing.shape, thing.colour, x, y, radius))
                    break
        if len(placed) == len(wanted):
            return placed
    raise AssertionError(f"no room for {scene.caption} in {TRIES} tries")


def _inside(inner: Thing, outer: Thing, rng: np.random.Generator) -> list[Placed]:
    is_narrow = outer.shape == "triangle"  # it is widest below its middle
    radius = rng.uniform(0.4, 0.44) if is_narrow else rng.uniform(0.36, 0.42)
    x, y = rng.uniform(radius + 0.04, 0.96 - radius, 2)
    size_radius = rng.uniform(0.11, 0.125) if is_narrow else rng.uniform(0.13, 0.155)
    small = Placed(inner.shape, inner.colour, x, y + (0.1 if is_narrow else 0.0), size_radius)
    return [Placed(outer.shape, outer.colour, x, y, radius), small]


def _beside(first: Thing, second: Thing, relation: str, rng: np.random.Generator) -> list[Placed]:
    radii = rng.uniform(0.15, 0.185, 2)
    shift = rng.uniform(-0.05, 0.05)
    if relation == "on top of":
        tops, bottoms = zip(*(extent(thing.shape) for thing in (first, second)), strict=True)
        height = radii[0] * (tops[0] + bottoms[0]) + radii[1] * (tops[1] + bottoms[1])
        top, x = rng.uniform(0.04, 0.96 - height), rng.uniform(0.3, 0.7)
        y = top + radii[0] * tops[0]
        below = y + radii[0] * bottoms[0] + radii[1] * tops[1]
        return [
            Placed(first.shape, first.colour, x, y, radii[0]),
            Placed(second.shape, second.colour, x + shift, below, radii[1]),
        ]
    gap = rng.uniform(0.06, 0.14)
    width = 2 * radii.sum() + gap
    left, y = rng.uniform(0.04, 0.96 - width), rng.uniform(0.3, 0.7)
    x = left + radii[0]
    return [
        Placed(first.shape, first.colour, x, y, radii[0]),
        Placed(second.shape, second.colour, x + radii.sum() + gap, y + shift, radii[1]),
    ]


def corners(shape: str) -> NDArray[np.float64]:
    """Return the outline (P, 2) of a shape of radius 1 around the origin."""
    if shape == "circle":
        turns = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return np.stack([np.cos(turns), np.sin(turns)], 1)
    if shape == "square":
        return 0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], np.float64)
    return np.array([(0, -1), (1, 0.75), (-1, 0.75)], np.float64)


def extent(shape: str) -> tuple[float, float]:
    """Return how far a shape of radius 1 extends above and below its centre."""
    ys = corners(shape)[:, 1]
    return -float(ys.min()), float(ys.max())


def draw(scene: Scene, side_px: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a scene on white, uint8 (S, S, 3) RGB; equal generator states give equal pictures."""
    big = side_px * SUPERSAMPLED
    if scene.word:
        return _shrunk(_sign(scene.word, big, rng), side_px)
    canvas = np.full((big, big, 3), 255, np.uint8)
    for shape in arrange(scene, rng):
        centre = np.array([shape.x, shape.y])
        points = (centre + shape.radius * corners(shape.shape)) * big
        cv2.fillPoly(canvas, [points.round().astype(np.int32)], COLOURS[shape.colour])
    return _shrunk(canvas, side_px)


def _sign(word: str, big: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    page = Image.new("RGB", (big, big), (255, 255, 255))
    pen = ImageDraw.Draw(page)
    top = rng.uniform(0.08, 0.3) * big
    height, middle = 0.5 * big, big / 2
    pen.rectangle((middle - 0.03 * big, top + height, middle + 0.03 * big, big), fill=INK)
    pen.rectangle(
        (0.02 * big, top, 0.98 * big, top + height),
        fill=BOARD,
        outline=INK,
        width=round(0.03 * big),
    )
    size = 0.46 * big
    letters = ImageFont.load_default(size)
    while (box := pen.textbbox((0, 0), word, letters))[2] - box[0] > 0.84 * big:
        size *= 0.96
        letters = ImageFont.load_default(size)
    corner = (middle - (box[0] + box[2]) / 2, top + height / 2 - (box[1] + box[3]) / 2)
    pen.text(corner, word, fill=INK, font=letters, stroke_width=big // 160)
    return np.asarray(page)


def _shrunk(picture: NDArray[np.uint8], side_px: int) -> NDArray[np.uint8]:
    return np.asarray(
        cv2.resize(picture, (side_px, side_px), interpolation=cv2.INTER_AREA), np.uint8
    )
