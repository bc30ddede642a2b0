"""The source kind "scenes": images that are drawn from a seed, with exact captions.

`indexing.scenes.scenes` and `indexing.scenes.puzzles` define the drawings and the captions. Writes
PNG files into the cache, once per section; they are served and ingested like those of any source.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from pydantic import Field, field_validator

from indexing.scenes import puzzles, scenes
from indexing.scenes.puzzles import Puzzle
from indexing.scenes.scenes import Scene
from infra.settings import Section

DRAWING = 1
"""Version of the drawing code: increase it if the same seed gives other pictures."""


class ScenesSource(Section):
    """Drawn scenes: coloured shapes in different numbers and positions, and signs with a word."""

    kind: Literal["scenes"]
    count: int = Field(12_000, ge=1, le=10_000_000)
    """Number of pictures."""
    seed: int = Field(0, ge=0)
    """Seed of the random choice of scenes and positions."""
    shares: dict[str, float] = Field(
        default={
            "colours": 1,
            "sizes": 1,
            "counting": 2,
            "attribution": 2,
            "position": 4,
            "writing": 2,
        },
        min_length=1,
    )
    """Relative number of pictures of each kind of scene: colours, sizes, counting, attribution,
    position, writing, 24-puzzle, cube."""

    @field_validator("shares")
    @classmethod
    def _shares_are_of_drawn_rows(cls, shares: dict[str, float]) -> dict[str, float]:
        for row, share in shares.items():
            if row not in rows():
                raise ValueError(
                    f"{row!r} is not a kind of scene: choose from {', '.join(sorted(rows()))}"
                )
            if share <= 0:
                raise ValueError(f"the share of {row!r} must be above 0")
        return shares


@dataclass(frozen=True)
class Drawn:
    """One drawn picture: its file, captions, concept and kind of scene (`row`)."""

    file: Path
    number: int
    captions: tuple[str, ...]
    concept: str
    row: str


@cache
def rows() -> dict[str, list[Scene | Puzzle]]:
    """Return all scenes and puzzles, by kind of scene."""
    by_row: dict[str, list[Scene | Puzzle]] = {}
    every: list[Scene | Puzzle] = [*scenes.every_scene(), *puzzles.every_puzzle()]
    for scene in every:
        by_row.setdefault(scene.row, []).append(scene)
    return by_row


def draw_all(source: ScenesSource, side_px: int, cache_folder: Path) -> Iterator[Drawn]:
    """Yield the pictures of a source in order; draw them first if the cache does not have them.

    They are drawn into a temporary folder, so that a folder with its final name is complete.
    """
    folder = folder_of(source, side_px, cache_folder)
    chosen = list(source.shares)
    chances = np.array(list(source.shares.values())) / sum(source.shares.values())
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    is_drawn = folder.is_dir()
    if not is_drawn:
        staging.mkdir(parents=True)
    drawn = []
    for number in range(source.count):
        rng = np.random.default_rng([source.seed, number])
        row = chosen[int(rng.choice(len(chosen), p=chances))]
        scene = rows()[row][int(rng.integers(len(rows()[row])))]
        captions = tuple(
            puzzles.phrasings(scene, rng)
            if isinstance(scene, Puzzle)
            else scenes.phrasings(scene, rng)
        )
        name = f"{number:07d}.png"
        if not is_drawn:
            picture = (
                puzzles.draw(scene, side_px, rng)
                if isinstance(scene, Puzzle)
                else scenes.draw(scene, side_px, rng)
            )
            cv2.imwrite(str(staging / name), picture[..., ::-1])
        drawn.append(Drawn(folder / name, number, captions, scene.concept, row))
    if not is_drawn:
        try:
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another run has drawn the same pictures
                raise
            shutil.rmtree(staging)
    yield from drawn


def folder_of(source: ScenesSource, side_px: int, cache_folder: Path) -> Path:
    """Return the folder of a source's pictures in the cache."""
    content = json.dumps([DRAWING, side_px, source.keyed()], sort_keys=True)
    return cache_folder / "scenes" / hashlib.sha256(content.encode()).hexdigest()[:16]
