"""Writes generated images and their contact sheet as PNG files.

Every file holds its prompt or labels, its seed and its settings as PNG text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from indexing.data.contact_sheet import contact_sheet
from infra.storage.store import one_line_errors


def write_pictures(
    images: np.ndarray, prompts: Sequence[str], seed: int, settings: Mapping[str, object], out: Path
) -> tuple[list[Path], Path]:
    """Write `images`, uint8 (P prompts, C count, H, W, 3); return the single files and the sheet.

    The sheet has one row for every prompt. File names depend only on prompt and seed, so the same
    command writes the same files. Raises StorageError if `out` cannot be written.
    """
    files = []
    with one_line_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for prompt, row in zip(prompts, images, strict=True):
            for column, picture in enumerate(row):
                file = out / f"{slug(prompt)}-seed{seed}-{column:02d}.png"
                _write(
                    file, picture, {"prompt": prompt, "seed": seed, "picture": column, **settings}
                )
                files.append(file)
        others = f"-and-{len(prompts) - 1}-more" if len(prompts) > 1 else ""
        grid = out / f"{slug(prompts[0])}{others}-seed{seed}-grid.png"
        _write(
            grid,
            contact_sheet(images, prompts),
            {"prompts": list(prompts), "seed": seed, **settings},
        )
    return files, grid


def write_grid(
    images: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    name: str,
    seed: int,
    settings: Mapping[str, object],
    out: Path,
) -> tuple[list[Path], Path]:
    """Write `images`, uint8 (R, C, H, W, 3); return the single files, row by row, and the sheet.

    File names depend only on `name` and seed, so the same command writes the same files. Raises
    StorageError if `out` cannot be written.
    """
    files = []
    with one_line_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for r, row in enumerate(images):
            for c, picture in enumerate(row):
                file = out / f"{slug(name)}-seed{seed}-{r:02d}-{c:02d}.png"
                _write(
                    file,
                    picture,
                    {"row_label": rows[r], "column_label": columns[c], "seed": seed, **settings},
                )
                files.append(file)
        grid = out / f"{slug(name)}-seed{seed}-grid.png"
        write_sheet(images, rows, columns, grid, {"seed": seed, **settings})
    return files, grid


def write_sheet(
    images: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    file: Path,
    facts: Mapping[str, object],
) -> None:
    """Write `images`, uint8 (R, C, H, W, 3), as a sheet with `facts` and labels as PNG text."""
    _write(
        file,
        contact_sheet(images, rows, columns),
        {"row_labels": list(rows), "column_labels": list(columns), **facts},
    )


def slug(text: str) -> str:
    """Return a text as part of a file name: a to z, digits and dashes, at most 60 of them."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-") or "picture"


def _write(file: Path, picture: np.ndarray, facts: Mapping[str, object]) -> None:
    about = PngInfo()
    for name, value in facts.items():
        about.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    Image.fromarray(picture).save(file, pnginfo=about)
