"""What the up-samplers of a run add to a picture, as a section of its report: PSNR beside
interpolation, pictures, memory in tiles.

Figures and pictures are those that the stage left beside its weights; only the memory of sampling
is measured here.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.runs.stage import UPSAMPLERS

if TYPE_CHECKING:
    from indexing.report.sections import ReportSection

WAYS = {"bicubic": "bicubic", "lanczos": "Lanczos", "up-sampler": "up-sampler"}


def sections(folders: Mapping[str, Path], out: Path) -> "list[ReportSection]":
    """Return a section for each up-sampler among the stages' folders; copies their pictures into
    `out` / pictures.
    """
    return [_section(name, folders[name], out) for name in UPSAMPLERS if name in folders]


def _section(stage: str, folder: Path, out: Path) -> "ReportSection":
    from indexing.report.sections import picture, section, table
    from training.generation import upsampling_eval
    from training.models import upsampler_cascade
    from training.models.upsampler import TILES_AT_ONCE

    model = upsampler_cascade.load(folder)
    config = model.config
    comparison = json.loads((folder / "comparison.json").read_text())
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
    rows: list[list[Any]] = []
    for side in (side_px, 2 * side_px):
        peaks = [
            upsampling_eval.peak_bytes(model, side, tile_px) / 1e6
            for tile_px in (config.crop_px, side)
        ]
        rows.append([f"{side} px", *peaks])
    tables.append(
        table(
            "Most memory held by a sampling step beside the weights",
            ["Side drawn", "In tiles, MB", "In one piece, MB"],
            rows,
        )
    )
    text.append(
        f"It is drawn in tiles of {config.crop_px} px, at most {TILES_AT_ONCE} at a time, so that "
        "memory grows with the picture's "
        "own pixels alone; the table's figures are measured, as the largest sum of tensors alive "
        "during one step."
    )
    pictures = []
    if (folder / "comparison.png").exists():
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "comparison.png", out / "pictures" / f"{stage}.png")
        pictures.append(
            picture(
                f"pictures/{stage}.png",
                "Held-out pictures in rows: small, enlarged by bicubic and Lanczos interpolation "
                "and by the up-sampler, and real",
                "Held-out pictures that the up-sampler has not seen.",
            )
        )
    return section(
        f"Up-sampler to {side_px} px" + (" (second)" if stage != UPSAMPLERS[0] else ""),
        text,
        tables,
        pictures,
    )


def _row(name: str, figures: Mapping[str, Any]) -> list[Any]:
    error, better = figures["standard_error_db"].get(name), figures["better_than"].get(name)
    return [
        WAYS[name],
        figures["psnr_db"][name],
        error,
        None if better is None else f"{100 * better:.0f} %",
    ]
