"""Embeds many views of a run's pictures by its own CLIP, so that indexes are compared on embeddings
of real pictures that are many enough.

    python -m tests.benchmarks.picture_views OUT [--root unclip-data] [--views 20]

A view is a part of a picture, half of its side or more, maybe mirrored, laid over another picture
with a weight of 0 to 0.4, so that views
lie between pictures as well as around them. Writes OUT/img_emb/*.npy, for `index_vs_autofaiss
--embed OUT`. Without a run in ROOT nothing
happens.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np

from flows.live_index.lineage import lineage
from flows.runs.records import committed_of
from indexing.data.embedding_store import metadata_batches
from indexing.data.images import Pixels, read_picture
from indexing.dedup.perceptual_hash import LOCATION
from infra.console.progress import Progress
from infra.errors import CallerError
from infra.storage.shard_reader import ShardReader
from infra.storage.store import open_root
from training.jobs import embed

MOST_LAID = 0.4
BATCH = 256


def view(rng: np.random.Generator, picture: Pixels, other: Pixels) -> Pixels:
    """Return a view of a picture (S, S, 3) with another one below it."""
    side = picture.shape[0]
    size = int(rng.integers(side // 2, side + 1))
    top, left = rng.integers(0, side - size + 1, 2)
    part = cv2.resize(
        picture[top : top + size, left : left + size], (side, side), interpolation=cv2.INTER_AREA
    )
    weight = rng.uniform(0, MOST_LAID)
    made = (part[:, ::-1] if rng.random() < 0.5 else part) * (1 - weight) + other * weight
    return np.asarray(made.round(), np.uint8)


def main() -> int:
    """Embed and return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--root", default="unclip-data")
    parser.add_argument("--views", type=int, default=20)
    given = parser.parse_args()
    if given.out is None or not Path(given.root).is_dir():
        print("skipped: say where to, and give --root a folder with a run")
        return 0
    root = open_root(given.root)
    try:
        known = lineage(root, None)
    except CallerError as error:
        print(f"skipped: {error}")
        return 0
    _, images_of, side_px = embed.encoders(known.clip.local_folder)
    metadata = committed_of(root, known.record, "embed").local_folder / "metadata"
    shards = ShardReader(known.ingest.files)
    places = [
        place for batch in metadata_batches(metadata, LOCATION) for place in batch.to_pylist()
    ]
    pictures = np.stack([read_picture(place, shards, side_px) for place in places])
    rng = np.random.default_rng(0)
    total = len(pictures) * given.views
    made: list[np.ndarray] = []
    with Progress("views", total) as progress:
        for start in range(0, total, BATCH):
            rows = np.arange(start, min(start + BATCH, total)) % len(pictures)
            others = rng.integers(0, len(pictures), len(rows))
            views = [
                view(rng, pictures[row], pictures[other])
                for row, other in zip(rows, others, strict=True)
            ]
            made.append(np.asarray(images_of(np.stack(views)), np.float16))
            progress.update(start + len(rows))
    (given.out / "img_emb").mkdir(parents=True, exist_ok=True)
    np.save(given.out / "img_emb" / "img_emb_0000.npy", np.concatenate(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
