"""The source kind "scenes": images drawn from a seed, with captions that say what they show.

`indexing.scenes.scenes` and `indexing.scenes.puzzles` define what is drawn and how it is worded.
Writes PNG files into the cache, once per section; they are served and ingested like any source's.
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
"""Raise it when the same seed gives other pictures."""


class ScenesSource(Section):
    """Drawn scenes: coloured shapes in numbers and relations, signs with a word."""

    kind: Literal["scenes"]
    count: int = Field(12_000, ge=1, le=10_000_000)
    """Pictures."""
    seed: int = Field(0, ge=0)
    """Seed of what is drawn and where."""
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
    """How much of each row there is, in proportion: colours, sizes, counting, attribution,
    position, writing; 24-puzzle, cube."""

    @field_validator("shares")
    @classmethod
    def _shares_are_of_drawn_rows(cls, shares: dict[str, float]) -> dict[str, float]:
        for row, share in shares.items():
            if row not in rows():
                raise ValueError(f"{row!r} is not drawn: choose from {', '.join(sorted(rows()))}")
            if share <= 0:
                raise ValueError(f"the share of {row!r} must be above 0")
        return shares


@dataclass(frozen=True)
class Drawn:
    """One drawn picture: where it lies and what is true of it."""

    file: Path
    number: int
    captions: tuple[str, ...]
    concept: str
    row: str


@cache
def rows() -> dict[str, list[Scene | Puzzle]]:
    """Return everything that is drawn, by row."""
    by_row: dict[str, list[Scene | Puzzle]] = {}
    every: list[Scene | Puzzle] = [*scenes.every_scene(), *puzzles.every_puzzle()]
    for scene in every:
        by_row.setdefault(scene.row, []).append(scene)
    return by_row


def draw_all(source: ScenesSource, side_px: int, cache_folder: Path) -> Iterator[Drawn]:
    """Yield the pictures of a source in order; what the cache lacks is drawn first, into a folder
    that is whole once it has its name.
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
            if not folder.is_dir():  # else another run was faster, and its pictures are the same
                raise
            shutil.rmtree(staging)
    yield from drawn


def folder_of(source: ScenesSource, side_px: int, cache_folder: Path) -> Path:
    """Return where a source's pictures lie."""
    content = json.dumps([DRAWING, side_px, source.keyed()], sort_keys=True)
    return cache_folder / "scenes" / hashlib.sha256(content.encode()).hexdigest()[:16]
