"""An exact checker of scenes: finds coloured shapes in a picture and compares them with a scene.

Input is pixels alone. Hue separates colours, connected areas of one colour are objects, and overlap
with an ideal shape in the same box names an object. A picture shows a scene if all claims hold:
every thing is there with its colour and number, there is nothing else, and the relation holds.
All lengths are shares of the picture's side.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from indexing.scenes.scenes import COLOURS, SHAPES, Scene, Thing, corners

MIN_SATURATION = 0.5
"""Minimum range between channels, as a share of the colour's own. Paler pixels are background, such
as an edge that covers less than half a pixel."""
HUE_TOLERANCE = 32
"""Maximum distance from a colour's hue in degrees; hues between two colours belong to neither."""
JUDGED_PX = 128
"""Side to which pictures are enlarged, so that outlines are finer than the original pixels."""
BLUR = 0.02
MIN_THICKNESS = 0.042
"""Minimum distance from an object's middle to its edge; a seam between two colours is thinner."""
MIN_OVERLAP = 0.78
CUTS = (3, 6)
"""Rows of a triangle's apex that may be too thin to be seen, in pixels of JUDGED_PX."""
SIZE_LIMIT = 0.205
"""Half the larger side of the box, above which an object is large."""
SLACK = 0.1
"""Maximum gap between objects that touch."""


@dataclass(frozen=True)
class Object:
    """A connected area of one colour; `shape` is "" where no shape fits.

    The box is in shares of the side; `mask` is the filled outline (JUDGED_PX, JUDGED_PX).
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
        """Centre of the box, from the left."""
        return (self.left + self.right) / 2

    @property
    def y(self) -> float:
        """Centre of the box, from the top."""
        return (self.top + self.bottom) / 2


def objects(picture: NDArray[np.uint8]) -> list[Object]:
    """Return the objects in a picture, uint8 (S, S, 3) RGB, from left to right."""
    large = cv2.resize(picture, (JUDGED_PX, JUDGED_PX), interpolation=cv2.INTER_CUBIC)
    large = np.asarray(cv2.GaussianBlur(large, (0, 0), BLUR * JUDGED_PX), np.uint8)
    span, hue = large.max(2) - large.min(2), _hues(large)
    detected = []
    for colour, rgb in COLOURS.items():
        away = np.abs((hue - _hues(np.array([[rgb]], np.uint8))[0, 0] + 180) % 360 - 180)
        mask = ((span >= MIN_SATURATION * np.ptp(rgb)) & (away <= HUE_TOLERANCE)).astype(np.uint8)
        count, pieces = cv2.connectedComponents(mask, connectivity=4)
        for piece in range(1, count):
            piece_mask = (pieces == piece).astype(np.uint8)
            depth = cv2.distanceTransform(np.pad(piece_mask, 1), cv2.DIST_L2, 5).max()
            if depth < MIN_THICKNESS * JUDGED_PX:
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
    """Return the shape that overlaps best with a mask (H, W) cut to its box.

    Return "" where the overlap is too small or the box is far from a square.
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
    return best if overlaps[best] >= MIN_OVERLAP else ""


def _overlap(mask: NDArray[np.bool_], shape: str, cut: int) -> float:
    """Return intersection over union with an ideal shape without its `cut` topmost rows."""
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
    """Return for each claim of a scene whether it holds in a picture.

    The claims are: each thing is there in its number, there is nothing else, and the relation holds
    (where there is one). Raises ValueError for a sign, which a reader of text must judge.
    """
    if scene.word:
        raise ValueError(f"{scene.caption}: the checker knows shapes, not writing: use OCR")
    seen = objects(picture)
    taken: set[int] = set()
    of_thing: dict[int, list[Object]] = {}
    # Things with a colour choose first: they accept fewer objects.
    for position in sorted(
        range(len(scene.things)), key=lambda number: not scene.things[number].colour
    ):
        thing = scene.things[position]
        matching = [
            number
            for number, candidate in enumerate(seen)
            if number not in taken and is_a(candidate, thing)
        ]
        taken.update(matching[: thing.count])
        of_thing[position] = [seen[number] for number in matching[: thing.count]]
    counts_right = [
        len(of_thing[number]) == thing.count for number, thing in enumerate(scene.things)
    ]
    held = [*counts_right, len(seen) == sum(thing.count for thing in scene.things)]
    if scene.relation:
        held.append(all(counts_right) and stands(of_thing[0][0], of_thing[1][0], scene.relation))
    return held


def is_a(candidate: Object, thing: Thing) -> bool:
    """Return whether an object has the shape, colour and size of a thing."""
    half = max(candidate.right - candidate.left, candidate.bottom - candidate.top) / 2
    has_size = not thing.size or (half > SIZE_LIMIT) == (thing.size == "large")
    return candidate.shape == thing.shape and thing.colour in ("", candidate.colour) and has_size


def stands(first: Object, second: Object, relation: str) -> bool:
    """Return whether the first object is in this relation to the second.

    Raises ValueError for a relation that is not in indexing.scenes.scenes.RELATIONS.
    """
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
    raise ValueError(f"unknown relation {relation!r}: use one of RELATIONS")


def shows(picture: NDArray[np.uint8], scene: Scene) -> bool:
    """Return whether a picture shows a scene exactly."""
    return all(claims(picture, scene))


def share_held(picture: NDArray[np.uint8], scene: Scene) -> float:
    """Return the share of a scene's claims that hold: 1 exactly where `shows` is true."""
    held = claims(picture, scene)
    return sum(held) / len(held)
