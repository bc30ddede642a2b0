"""Writes the folders that a training job reads: an ingest folder, its keep list, and for the later
models a CLIP and its embeddings.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from flows.ingest import curate
from infra.storage.stage_files import FolderFiles
from tests.flows.ingest.test_curate import NO_HELD_OUT, item, write_shard
from tests.helpers.stage_folders import shards_in
from training.data.image_reader import Pictures, read_table
from training.jobs import train
from training.models import clip as clip_model
from training.models.clip import CLIP
from training.models.tokenizer import Tokenizer
from training.sections.clip_section import ClipConfig
from training.sections.tokenizer_section import TokenizerConfig

COUNT = 44
SHARDS = (30, 11, 3)
"""Pictures of each shard: uneven."""
TINY = ClipConfig(
    image_size_px=16,
    width=16,
    depth=1,
    text_width=32,
    text_depth=1,
    embed_dim=16,
    images=160,
    batch_size=8,
)


def write_kept(root: Path) -> Path:
    """Write `root`/ingest and `root`/curate."""
    first = 0
    for number, count in enumerate(SHARDS):
        write_shard(root / "ingest", number, [item(first + place) for place in range(count)])
        first += count
    curate.run(NO_HELD_OUT, FolderFiles(root / "ingest"), root / "curate")
    return root


def write_tokenizer(root: Path, folder: Path) -> Tokenizer:
    """Fit a tokenizer to the keep list's captions and write it into a work folder."""
    captions = read_table(root / "curate" / "keep.parquet")["caption"].to_pylist()
    tokenizer = Tokenizer.fit(captions, TokenizerConfig(vocab_size=280, context=12))
    tokenizer.save(folder / "tokenizer.json")
    return tokenizer


def write_embedded(root: Path) -> None:
    """Write `root`/clip, a CLIP that has learnt nothing, and `root`/embed."""
    (root / "clip").mkdir()
    tokenizer = write_tokenizer(root, root / "clip")
    torch.manual_seed(0)
    model = CLIP(TINY, tokenizer.vocab_size, tokenizer.context)
    train.write_model("clip", model, model.state_dict(), TINY, root / "clip")
    table = read_table(root / "curate" / "keep.parquet")
    images = clip_model.embed_images(
        model, Pictures(table, shards_in(root / "ingest"), 16)[range(table.num_rows)]
    )
    for name in ("img_emb", "metadata"):
        (root / "embed" / name).mkdir(parents=True)
    np.save(root / "embed" / "img_emb" / "img_emb_0000.npy", images.numpy().astype(np.float16))
    pq.write_table(table, root / "embed" / "metadata" / "metadata_0000.parquet")
    (root / "embed" / "facts.json").write_text(
        json.dumps({"clip_key": "key", "dim": 16, "count": table.num_rows})
    )
