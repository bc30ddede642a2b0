"""Writes generated pictures: the single ones and a grid, each a PNG that carries its prompt, seed and settings as text."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from infra.storage import one_line_errors

GAP_PX = 2


def write_pictures(
    images: np.ndarray, prompts: Sequence[str], seed: int, settings: Mapping[str, Any], out: Path
) -> tuple[list[Path], Path]:
    """Write `images`, uint8 (P prompts, C count, H, W, 3), into `out` and return the single files and the grid (a row per prompt).

    File names come from prompt and seed, so the same command writes the same files. Raises StorageError.
    """
    files = []
    with one_line_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for prompt, row in zip(prompts, images, strict=True):
            for place, picture in enumerate(row):
                file = out / f"{_slug(prompt)}-seed{seed}-{place:02d}.png"
                _write(file, picture, {"prompt": prompt, "seed": seed, "picture": place, **settings})
                files.append(file)
        grid = out / f"{_slug(prompts[0])}{f'-and-{len(prompts) - 1}-more' if len(prompts) > 1 else ''}-seed{seed}-grid.png"
        _write(grid, tile(images), {"prompts": list(prompts), "seed": seed, **settings})
    return files, grid


def tile(images: np.ndarray) -> np.ndarray:
    """Return (R, C, H, W, 3) pictures as one (height, width, 3) picture on white, GAP_PX between them."""
    rows, columns, height, width, _ = images.shape
    grid = np.full((rows * (height + GAP_PX) - GAP_PX, columns * (width + GAP_PX) - GAP_PX, 3), 255, np.uint8)
    for r in range(rows):
        for c in range(columns):
            top, left = r * (height + GAP_PX), c * (width + GAP_PX)
            grid[top : top + height, left : left + width] = images[r, c]
    return grid


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"


def _write(file: Path, picture: np.ndarray, facts: Mapping[str, Any]) -> None:
    about = PngInfo()
    for name, value in facts.items():
        about.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    Image.fromarray(picture).save(file, pnginfo=about)
