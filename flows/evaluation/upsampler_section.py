"""The report's sections on a run's up-samplers: PSNR compared with interpolation, pictures, memory.

Reads the figures and the picture that the up-sampler's stage wrote beside its weights; measures
only the memory of sampling. Copies the picture into the report's folder.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flows.runs.stage import UPSAMPLERS

if TYPE_CHECKING:
    from indexing.report.sections import Cell, Picture, ReportSection, Table
    from training.generation.upsampling_eval import PsnrFigures
    from training.models.upsampler import Upsampler

WAYS = {"bicubic": "bicubic", "lanczos": "Lanczos", "up-sampler": "up-sampler"}


def sections(folders: Mapping[str, Path], out: Path) -> "list[ReportSection]":
    """Return one section for every up-sampler; copy their pictures into `out`/pictures.

    `folders` are the stage folders by name.
    """
    return [_section(name, folders[name], out) for name in UPSAMPLERS if name in folders]


def _section(stage: str, folder: Path, out: Path) -> "ReportSection":
    from indexing.report.sections import section, table
    from training.models import upsampler_cascade
    from training.models.upsampler import TILES_AT_ONCE

    model = upsampler_cascade.load(folder)
    config = model.config
    comparison: dict[str, PsnrFigures] = json.loads((folder / "comparison.json").read_text())
    side_px = config.image_size_px
    text = [
        f"A convolutional diffusion model of {sum(p.numel() for p in model.parameters()):,} "
        "parameters that draws pictures at "
        f"{config.factor} times their side in {config.sampling_steps} steps, trained on crops of "
        f"{config.crop_px} px of pictures of "
        f"{side_px} px. Held-out pictures are shrunk by area and enlarged again; PSNR favours the "
        "blurred mean of all that may have been."
    ]
    tables = [
        table(
            f"{split.replace('_', ' ')} ({figures['n']} pictures)",
            ["Enlarged by", "PSNR, dB", "Standard error, dB", "Up-sampler is better on"],
            [_row(name, figures) for name in WAYS],
        )
        for split, figures in comparison.items()
    ]
    if not comparison:
        text.append("There is no held-out picture to compare on.")
    tables.append(_memory_table(model))
    text.append(
        f"It is drawn in tiles of {config.crop_px} px, at most {TILES_AT_ONCE} at a time, so that "
        "memory grows with the picture's "
        "own pixels alone; the table's figures are measured, as the largest sum of tensors alive "
        "during one step."
    )
    title = f"Up-sampler to {side_px} px" + (" (second)" if stage != UPSAMPLERS[0] else "")
    return section(title, text, tables, _copy_picture(stage, folder, out))


def _memory_table(model: "Upsampler") -> "Table":
    """Measure the memory of a sampling step at the trained side and at twice that side."""
    from indexing.report.sections import table
    from training.generation.upsampling_eval import peak_bytes

    side_px, crop_px = model.config.image_size_px, model.config.crop_px
    rows: list[list[Cell]] = []
    for side in (side_px, 2 * side_px):
        peaks = [peak_bytes(model, side, tile_px) / 1e6 for tile_px in (crop_px, side)]
        rows.append([f"{side} px", *peaks])
    return table(
        "Most memory held by a sampling step beside the weights",
        ["Side drawn", "In tiles, MB", "In one piece, MB"],
        rows,
    )


def _copy_picture(stage: str, folder: Path, out: Path) -> "list[Picture]":
    """Copy the stage's comparison picture into the report; return its entry, or [] if none."""
    from indexing.report.sections import picture

    if not (folder / "comparison.png").exists():
        return []
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "comparison.png", out / "pictures" / f"{stage}.png")
    alt = (
        "Held-out pictures in rows: small, enlarged by bicubic and Lanczos interpolation "
        "and by the up-sampler, and real"
    )
    caption = "Held-out pictures that the up-sampler has not seen."
    return [picture(f"pictures/{stage}.png", alt, caption)]


def _row(name: str, figures: "PsnrFigures") -> "list[Cell]":
    error, better = figures["standard_error_db"].get(name), figures["better_than"].get(name)
    return [
        WAYS[name],
        figures["psnr_db"][name],
        error,
        None if better is None else f"{100 * better:.0f} %",
    ]
