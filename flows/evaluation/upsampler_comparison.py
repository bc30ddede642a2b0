"""Compares a trained up-sampler with interpolation on held-out images: figures and an image sheet beside the weights."""

import json
from pathlib import Path
from typing import Any

COMPARED_AT_MOST, SHOWN_AT_MOST = 64, 6


def compare(stage: str, out: Path, ingest: Path, curate: Path) -> dict[str, Any]:
    """Write `comparison.json` and `comparison.png` beside the weights in `out` and return the figures by split."""
    import numpy as np

    from flows.images.png import write_sheet
    from training.data.image_reader import Pictures, read_table
    from training.generation import upsampling_eval
    from training.models import upsampler_cascade

    model = upsampler_cascade.load(out)
    found: dict[str, Any] = {}
    rows, shown = [], []
    for split in ("held_out_style", "held_out_concept"):
        table = read_table(curate / "keep.parquet", split)
        if not table.num_rows:
            continue
        places = np.unique(
            np.linspace(0, table.num_rows - 1, min(COMPARED_AT_MOST, table.num_rows))
            .round()
            .astype(int)
        )
        figures, made = upsampling_eval.compare(
            model,
            Pictures(table.take(places), ingest / "shards", model.config.image_size_px)[
                range(len(places))
            ].numpy(),
        )
        found[split] = figures
        for place in range(min(SHOWN_AT_MOST, len(places))):
            small = np.kron(
                made["small"][place], np.ones((model.config.factor,) * 2 + (1,), np.uint8)
            )
            shown.append(np.stack([small, *(made[name][place] for name in list(made)[1:])]))
            rows.append(
                f"{split.replace('_', ' ')}: {table['caption'][int(places[place])].as_py()}"
            )
    (out / "comparison.json").write_text(json.dumps(found, indent=1) + "\n")
    if shown:
        columns = ["small", "bicubic", "Lanczos", "up-sampler", "real"]
        write_sheet(
            np.stack(shown),
            rows,
            columns,
            out / "comparison.png",
            {"stage": stage, "comparison": found},
        )
    return found
