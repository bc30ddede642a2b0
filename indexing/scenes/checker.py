"""An exact checker of scenes: finds coloured shapes in the pixels of a picture and says whether
they are what a caption asked for.

It sees pixels only. Hue tells colours apart, connected pieces are objects, overlap with the ideal
shape in the same box names them. A scene is shown when every claim of it holds: each thing there
with its colour and number, nothing else, and the relation between them.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from indexing.scenes.scenes import COLOURS, SHAPES, Scene, Thing, corners

LEAST_SATURATION = 0.5
"""Share of a colour's own span between its channels: what is paler, such as an edge that covers
less than half a pixel, is background."""
HUE_TOLERANCE = 32
"""Degrees from a colour's own hue; what lies between two colours is neither."""
JUDGED_PX = 128
"""Side to which a picture is enlarged, so that outlines lie between its pixels; all lengths below
are shares of the side."""
BLUR = 0.02
LEAST_THICKNESS = 0.042
"""From the middle of an object to its edge; a blended seam between two colours is thinner."""
LEAST_OVERLAP = 0.78
CUTS = (3, 6)
SIZE_LIMIT = 0.205
"""Half the larger side: what is large lies above."""
SLACK = 0.1
"""How far what touches may stand apart."""


@dataclass(frozen=True)
class Object:
    """A piece of one colour: its box in shares of the side, its outline filled (JUDGED_PX,
    JUDGED_PX), its shape or "" where none fits.
    """

    shape: str
    colour: str
    left: float
    top: float
    right: float
    bottom: float
    mask: NDArray[np.bool_]

    @property
    def x(self) -> float:
        """The middle of its box, from the left, in shares of the side."""
        return (self.left + self.right) / 2

    @property
    def y(self) -> float:
        """The middle of its box, from the top."""
        return (self.top + self.bottom) / 2


def objects(picture: NDArray[np.uint8]) -> list[Object]:
    """Find the objects of a picture, uint8 (S, S, 3) RGB, left to right."""
    large = cv2.resize(picture, (JUDGED_PX, JUDGED_PX), interpolation=cv2.INTER_CUBIC)
    large = np.asarray(cv2.GaussianBlur(large, (0, 0), BLUR * JUDGED_PX), np.uint8)
    span, hue = large.max(2) - large.min(2), _hues(large)
    detected = []
    for colour, rgb in COLOURS.items():
        away = np.abs((hue - _hues(np.array([[rgb]], np.uint8))[0, 0] + 180) % 360 - 180)
        mask = ((span >= LEAST_SATURATION * np.ptp(rgb)) & (away <= HUE_TOLERANCE)).astype(np.uint8)
        count, pieces = cv2.connectedComponents(mask, connectivity=4)
        for piece in range(1, count):
            piece_mask = (pieces == piece).astype(np.uint8)
            if (
                cv2.distanceTransform(np.pad(piece_mask, 1), cv2.DIST_L2, 5).max()
                < LEAST_THICKNESS * JUDGED_PX
            ):
                continue
            outlines, _ = cv2.findContours(piece_mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            filled = cv2.drawContours(
                np.zeros_like(piece_mask), outlines, -1, 1, cv2.FILLED
            ).astype(bool)
            left, top, width, height = cv2.boundingRect(filled.astype(np.uint8))
            shape = shape_of(filled[top : top + height, left : left + width])
            box = [edge / JUDGED_PX for edge in (left, top, left + width, top + height)]
            detected.append(Object(shape, colour, box[0], box[1], box[2], box[3], filled))
    return sorted(detected, key=lambda one_object: (one_object.x, one_object.y))


def _hues(picture: NDArray[Any]) -> NDArray[np.float32]:
    scaled = np.asarray(picture, np.float32) / 255
    return np.asarray(cv2.cvtColor(scaled, cv2.COLOR_RGB2HSV)[..., 0], np.float32)


def shape_of(mask: NDArray[np.bool_]) -> str:
    """Name the shape whose ideal form overlaps best with a mask cut to its box (H, W), or "" where
    none fits or the box is no square.
    """
    height, width = mask.shape
    if not 0.65 < height / width < 1.5:
        return ""
    overlaps = {}
    for shape in SHAPES:
        overlaps[shape] = max(
            _overlap(mask, shape, cut) for cut in ((0, *CUTS) if shape == "triangle" else (0,))
        )
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= LEAST_OVERLAP else ""


def _overlap(mask: NDArray[np.bool_], shape: str, cut: int) -> float:
    """Return intersection over union with an ideal shape whose `cut` topmost rows, an apex too thin
    to be seen, are missing.
    """
    height, width = mask.shape
    ideal = _ideal(shape, width, height + cut)[cut:]
    return float((mask & ideal).sum() / (mask | ideal).sum())


def _ideal(shape: str, width: int, height: int) -> NDArray[np.bool_]:
    points = corners(shape)
    points = (points - points.min(0)) / np.ptp(points, axis=0) * [width - 1, height - 1]
    return cv2.fillPoly(
        np.zeros((height, width), np.uint8), [points.round().astype(np.int32)], 1
    ).astype(bool)


def claims(picture: NDArray[np.uint8], scene: Scene) -> list[bool]:
    """Return what holds of a scene's claims, always as many: each thing is there in its number,
    nothing else is, the relation holds.

    Raises ValueError for a sign, whose word a reader of text must judge.
    """
    if scene.word:
        raise ValueError(f"{scene.caption}: the checker knows shapes, not writing")
    seen = objects(picture)
    taken: set[int] = set()
    groups: list[list[Object]] = []
    for thing in sorted(
        scene.things, key=lambda thing: not thing.colour
    ):  # the ones that ask for most choose first
        matching = [
            number
            for number, candidate in enumerate(seen)
            if number not in taken and is_a(candidate, thing)
        ]
        taken.update(matching[: thing.count])
        groups.append([seen[number] for number in matching[: thing.count]])
    of_thing = dict(
        zip(
            sorted(range(len(scene.things)), key=lambda number: not scene.things[number].colour),
            groups,
            strict=True,
        )
    )
    counts_right = [
        len(of_thing[number]) == thing.count for number, thing in enumerate(scene.things)
    ]
    held = [*counts_right, len(seen) == sum(thing.count for thing in scene.things)]
    if scene.relation:
        held.append(all(counts_right) and stands(of_thing[0][0], of_thing[1][0], scene.relation))
    return held


def is_a(candidate: Object, thing: Thing) -> bool:
    """Whether an object is such a thing."""
    half = max(candidate.right - candidate.left, candidate.bottom - candidate.top) / 2
    has_size = not thing.size or (half > SIZE_LIMIT) == (thing.size == "large")
    return candidate.shape == thing.shape and thing.colour in ("", candidate.colour) and has_size


def stands(first: Object, second: Object, relation: str) -> bool:
    """Whether the first object stands in a relation to the second."""
    if relation == "inside":
        return bool(
            (first.mask & second.mask).sum() >= 0.95 * first.mask.sum()
            and first.mask.sum() < second.mask.sum()
        )
    if relation == "on top of":
        over = min(first.right, second.right) - max(first.left, second.left)
        touches = abs(first.bottom - second.top) <= SLACK
        return (
            touches
            and first.y < second.y
            and over >= 0.4 * min(first.right - first.left, second.right - second.left)
        )
    if relation == "to the left of":
        level = min(first.bottom, second.bottom) - max(first.top, second.top)
        return first.right <= second.left + SLACK / 4 and level > 0
    raise ValueError(f"no such relation: {relation}")


def shows(picture: NDArray[np.uint8], scene: Scene) -> bool:
    """Whether a picture shows a scene exactly."""
    return all(claims(picture, scene))


def share_held(picture: NDArray[np.uint8], scene: Scene) -> float:
    """Return the share of a scene's claims that hold: 1 exactly where `shows` is true."""
    held = claims(picture, scene)
    return sum(held) / len(held)
