"""Comparison of a trained up-sampler with interpolation, on held-out images.

Reads ingest's shards and the keep list; writes `comparison.json` and `comparison.png` beside the
weights.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from infra.storage.manifest_schema import StageCounts
from infra.storage.shard_reader import ShardReader
from infra.storage.stage_files import StageFiles
from infra.storage.stage_output import StageOutput

if TYPE_CHECKING:  # torch, which planning does not need
    from training.generation.upsampling_eval import PsnrFigures

MAX_COMPARED, MAX_IMAGE_ROWS = 64, 6


class UpsamplerCounts(StageCounts):
    """The counts of an up-sampler's manifest."""

    comparison: "dict[str, PsnrFigures]"
    """By split."""


def compare(
    stage: str, output: StageOutput, out: Path, shards: ShardReader, keep_list: StageFiles
) -> "dict[str, PsnrFigures]":
    """Compare the up-sampler in `output` with interpolation; return the figures by split.

    Writes `comparison.json` and, if there are held-out images, `comparison.png` into `out`.
    """
    import numpy as np

    from flows.images.png import write_sheet
    from training.data.image_reader import Pictures, read_rows
    from training.generation import upsampling_eval
    from training.models import upsampler_cascade

    with output.local_copy("config.json", "weights.safetensors") as folder:
        model = upsampler_cascade.load(folder)
    comparison: dict[str, PsnrFigures] = {}
    rows, image_rows = [], []
    for split in ("held_out_style", "held_out_concept"):
        table = read_rows(keep_list, "keep.parquet", split)
        if not table.num_rows:
            continue
        spread = np.linspace(0, table.num_rows - 1, min(MAX_COMPARED, table.num_rows))
        picks = np.unique(spread.round().astype(int))
        reader = Pictures(table.take(picks), shards, model.config.image_size_px)
        figures, enlarged = upsampling_eval.compare(model, reader[range(len(picks))].numpy())
        comparison[split] = figures
        for index in range(min(MAX_IMAGE_ROWS, len(picks))):
            small = np.kron(
                enlarged["small"][index], np.ones((model.config.factor,) * 2 + (1,), np.uint8)
            )
            image_rows.append(
                np.stack([small, *(enlarged[name][index] for name in list(enlarged)[1:])])
            )
            rows.append(f"{split.replace('_', ' ')}: {table['caption'][int(picks[index])].as_py()}")
    (out / "comparison.json").write_text(json.dumps(comparison, indent=1) + "\n")
    if image_rows:
        columns = ["small", "bicubic", "Lanczos", "up-sampler", "real"]
        write_sheet(
            np.stack(image_rows),
            rows,
            columns,
            out / "comparison.png",
            {"stage": stage, "comparison": comparison},
        )
    return comparison
