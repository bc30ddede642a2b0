"""Semantic deduplication of embeddings on one thread: the time, the planted copies that are found
and the rows that go for nothing.

    python -m tests.benchmarks.dedup [--rows 100000] [--dim 512] [--copies 5000] [--alone] [--stage]

Vectors of one decaying spectrum around rows / 50 centres; copies of some are planted, evenly at
cosines from just above the threshold to
nearly 1. Beside it: all pairs, in matrix products of 8,192 rows, and SemDeDup's way (Abbas et al.
2023: k-means, then pairs within a
cluster alone); --alone leaves those out. A row is dropped for nothing when its keeper is further
than the threshold by an exact product.
Vectors are read from a memory-mapped file as in the stage; memory is what the process itself holds
at most, mapped files aside. --stage
tells that of the whole stage as well, pictures, tables and all, over as many small drawn pictures.
"""

import argparse
import datetime
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

import cv2
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from indexing.data.embedding_store import Floats, Rows, unit
from indexing.data.images import Pixels
from indexing.dedup.deduplicate import DedupConfig, run
from indexing.dedup.grouping import semantic
from infra.compute.memory import PeakMemory
from infra.schemas import EMBEDDED
from tests.helpers.stage_folders import shards_in

THRESHOLD = 0.94
BLOCK = 8192


def planted(rows: int, dim: int, copies: int) -> tuple[Floats, Rows, Rows]:
    """Return vectors (rows, dim) float16, the copied rows and their copies; cosines lie evenly in
    THRESHOLD + 0.002 .. 0.999.
    """
    rng = np.random.default_rng(0)
    spectrum = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
    centres = rng.standard_normal((max(1, rows // 50), dim), dtype=np.float32) * spectrum
    made = centres[rng.integers(0, len(centres), rows)] + 0.7 * spectrum * rng.standard_normal(
        (rows, dim), dtype=np.float32
    )
    vectors = unit(made)
    place = rng.permutation(rows)
    source, copy = place[:copies], place[copies : 2 * copies]
    apart = spectrum * rng.standard_normal((copies, dim), dtype=np.float32)
    apart = unit(apart - (apart * vectors[source]).sum(1, keepdims=True) * vectors[source])
    cosine = np.linspace(THRESHOLD + 0.002, 0.999, copies, dtype=np.float32)[:, None]
    vectors[copy] = cosine * vectors[source] + np.sqrt(1 - cosine**2) * apart
    return vectors.astype(np.float16), source, copy


def all_pairs(vectors: Floats) -> float:
    """Return the seconds that comparing every row with every other takes, from a tenth of the rows
    compared with all.
    """
    started = time.perf_counter()
    for start in range(0, len(vectors) // 10, BLOCK):
        rows = vectors[start : min(start + BLOCK, len(vectors) // 10)]
        for other in range(0, len(vectors), BLOCK):
            np.argwhere(rows @ vectors[other : other + BLOCK].T >= THRESHOLD)
    return 10 * (time.perf_counter() - started)


def in_clusters(vectors: Floats, source: Rows, copy: Rows) -> float:
    """Return the share of planted pairs that meet in one of sqrt(rows) clusters, all pairs within
    which are compared.
    """
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        round(len(vectors) ** 0.5),
        niter=4,
        seed=0,
        spherical=True,
        max_points_per_centroid=64,
    )
    kmeans.train(vectors)
    cell = np.concatenate(
        [
            (vectors[at : at + BLOCK] @ kmeans.centroids.T).argmax(1)
            for at in range(0, len(vectors), BLOCK)
        ]
    )
    for number in range(len(kmeans.centroids)):
        inside = vectors[cell == number]
        assert not len(inside) or float((inside @ inside.T).max()) > 0
    return float((cell[source] == cell[copy]).mean())


def whole_stage(vectors: Floats, folder: Path) -> tuple[float, int, int]:
    """Run the stage over the vectors (N, D) and N drawn pictures; return seconds, the bytes held at
    most, and how many pairs it kept.
    """
    rng, dim = np.random.default_rng(1), vectors.shape[1]
    for name in ("shards", "out", "embed/img_emb", "embed/text_emb", "embed/metadata"):
        (folder / name).mkdir(parents=True)
    for name in ("img_emb", "text_emb"):
        np.save(folder / "embed" / name / f"{name}_0000.npy", vectors)
    (folder / "embed" / "facts.json").write_text(
        json.dumps({"clip_key": "drawn", "dim": dim, "count": len(vectors)})
    )
    place = 0
    with (
        (folder / "shards" / "0.tar").open("wb") as shard,
        pq.ParquetWriter(folder / "embed" / "metadata" / "0.parquet", EMBEDDED) as table,
    ):
        for start in range(0, len(vectors), BLOCK):
            rows = []
            for number in range(start, min(start + BLOCK, len(vectors))):
                data = cv2.imencode(".png", rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))[
                    1
                ].tobytes()
                shard.write(data)
                digest = hashlib.sha256(data).hexdigest()
                words = dict.fromkeys(EMBEDDED.names, "") | {
                    "key": f"{number:016x}",
                    "captions": ["drawn"],
                    "split": "train",
                }
                where = {
                    "shard": "0.tar",
                    "offset": place,
                    "size_bytes": len(data),
                    "sha256": digest,
                    "width_px": 8,
                    "height_px": 8,
                }
                rows.append(words | where)
                place += len(data)
            table.write_table(pa.Table.from_pylist(rows, EMBEDDED))
    projection = rng.standard_normal((8 * 8 * 3, dim)).astype(np.float32)

    def encode(pictures: Pixels) -> Floats:
        return unit(pictures.reshape(len(pictures), -1).astype(np.float32) @ projection)

    started = time.perf_counter()
    counts = run(
        DedupConfig(threshold=THRESHOLD),
        shards_in(folder),
        folder / "embed",
        encode,
        8,
        folder / "out",
    )
    return time.perf_counter() - started, counts["peak_bytes"], counts["out"]


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--copies", type=int, default=5000)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--stage", action="store_true")
    given = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made, source, copy = planted(given.rows, given.dim, given.copies)
        np.save(Path(folder) / "vectors.npy", made)
        del made
        halves = np.load(Path(folder) / "vectors.npy", mmap_mode="r")
        started, cpu = time.perf_counter(), time.process_time()
        with PeakMemory() as memory:
            keeper = semantic([halves], THRESHOLD, np.arange(given.rows))
        ours_s, ours_cpu_s = time.perf_counter() - started, time.process_time() - cpu
        gone = np.flatnonzero(keeper != np.arange(given.rows))

        def cosines(left: Rows, right: Rows) -> Floats:
            vectors = (unit(np.asarray(halves[rows], np.float32)) for rows in (left, right))
            return np.einsum("nd,nd->n", next(vectors), next(vectors))

        false_drops = int((cosines(gone, keeper[gone]) < THRESHOLD - 1e-4).sum())
        exact = cosines(source, copy) >= THRESHOLD
        told = (keeper[source] != source) | (keeper[copy] != copy)
        print(
            f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, one of {os.cpu_count()} cores, "
            f"{given.rows:,} x {given.dim}, "
            f"cosine {THRESHOLD}, load {os.getloadavg()[0]:.1f}; {memory.bytes / 1e6:,.0f} MB "
            f"held at most"
        )
        print(
            "| way | seconds | CPU seconds | planted copies found | rows dropped for nothing "
            "|\n|---|---|---|---|---|"
        )
        found = f"{told[exact].mean():.4f} of {int(exact.sum()):,}"
        print(
            f"| ours | {ours_s:.2f} | {ours_cpu_s:.2f} | {found} | {false_drops} of {len(gone):,} |",  # noqa: E501
            flush=True,
        )
        if given.stage:
            seconds, peak, kept = whole_stage(halves, Path(folder) / "stage")
            print(
                f"| the whole stage | {seconds:.2f} | | {kept:,} pairs kept | {peak / 1e6:,.0f} "
                f"MB held at most |",
                flush=True,
            )
        if given.alone:
            return
        vectors = unit(np.asarray(halves, np.float32))
        started = time.perf_counter()
        met = in_clusters(vectors, source[exact], copy[exact])
        print(
            f"| within clusters (SemDeDup's way) | {time.perf_counter() - started:.2f} | | "
            f"{met:.4f} | 0 |",
            flush=True,
        )
        print(f"| all pairs (from a tenth of them) | {all_pairs(vectors):.2f} | | 1.0000 | 0 |")


if __name__ == "__main__":
    main()
