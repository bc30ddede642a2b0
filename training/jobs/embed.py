"""Embeds every readable image and its first caption with the run's frozen CLIP, in clip-retrieval's
layout.

Reads curate's keep list, ingest's shards and a `clip` folder; writes `img_emb/`, `text_emb/`
(float16, unit rows), `metadata/` and `facts.json`. Ray tasks, on any nodes, embed the parts and put
them into the output, so a killed run keeps its finished parts. Pairs that the same CLIP has
embedded before (`know`) are not embedded again.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from infra.compute.cluster import ClusterConfig, spread
from infra.console.progress import Progress
from infra.errors import CallerError
from infra.row_hash import row_hashes
from infra.schemas import open_parquet
from infra.storage.atomic_files import atomic_file
from infra.storage.manifest_schema import StageCounts
from infra.storage.shard_reader import ShardReader
from infra.storage.stage_files import StageFiles
from infra.storage.stage_output import StageOutput
from infra.storage.work_folder import WorkFolder
from training.data import shard_check
from training.data.image_reader import Pictures, read_file, read_rows
from training.models import clip as clip_model
from training.sections.clip_section import ClipConfig
from training.sections.embed_section import EmbedConfig
from training.sections.preprocessing import Look

KEEP_LIST = "keep.parquet"
KNOWN = ("known_marks.npy", "known_rows.npy")
"""Hashes of the pairs that were embedded before, sorted, and the rows of their vectors."""
MARKED = ["key", "sha256"]
READ_ROWS = 1 << 16
PARTS = 10_000
"""Maximum number of parts: four digits keep them in order when files are sorted by name, as
clip-retrieval does."""


class PartFacts(TypedDict):
    """Facts in the record of an embedded part."""

    rows: int
    reused: int
    """Rows whose embeddings were taken from earlier ones."""
    dim: int


class EmbedCounts(StageCounts):
    """The counts of the stage's manifest."""

    dim: int
    taken_over: int
    """Embeddings that were taken from earlier ones."""


@dataclass(frozen=True)
class EmbedFolders:
    """What embedding reads and writes, on whatever node; travels to the tasks."""

    ingest: StageFiles
    curate: StageFiles
    clip: StageFiles
    output: StageOutput
    work: WorkFolder
    previous: StageFiles | None = None
    """Embeddings that the same CLIP has made before, some of which may be used again."""


def run(
    config: EmbedConfig, cluster: ClusterConfig, folders: EmbedFolders, clip_key: str, out: Path
) -> EmbedCounts:
    """Embed the keep list on the running Ray; return the counts.

    The tasks put their parts into the output; `facts.json` goes to `out`. Raises CallerError if the
    list is empty or has too many parts.
    """
    table = read_rows(folders.curate, KEEP_LIST, columns=shard_check.READ)
    row_count = table.num_rows
    if not row_count:
        raise CallerError("curate kept no pair: loosen [curate] or give [data] more sources")
    if row_count > PARTS * config.rows_per_part:
        raise CallerError(
            f"[embed] rows_per_part = {config.rows_per_part} makes over {PARTS:,} parts: set "
            f"{-(-row_count // PARTS)} or more"
        )
    shards = ShardReader(folders.ingest, is_sequential=True)
    dropped = shard_check.settle(table, shards, config.broken_pictures, folders.work)
    del table
    parts, count = cut(config, folders.curate, folders.work)
    if folders.previous and folders.work.fetch(KNOWN[0]) is None:
        know(folders.previous, folders.work)
    threads = max(1, int(cluster.cpus_per_worker))
    finished = folders.output.finished_parts()
    done = sum(part["facts"]["rows"] for part in finished.values())
    arguments = [
        (config, number, threads, cluster.use_gpu, folders)
        for number in range(parts)
        if f"{number:04}" not in finished
    ]
    with Progress("embed", count, "pairs") as progress:
        progress.update(done)
        for rows in spread(
            cluster, _embed_part, arguments, int(cluster.use_gpu), cluster.embed_workers
        ):
            done += sum(rows)
            progress.update(done)
    facts: list[PartFacts] = [part["facts"] for part in folders.output.finished_parts().values()]
    dim = facts[0]["dim"]
    (out / "facts.json").write_text(
        json.dumps({"clip_key": clip_key, "dim": dim, "count": count}, indent=1)
    )
    reused = sum(part["reused"] for part in facts)
    return {"in": row_count, "out": count, "dropped": dropped, "dim": dim, "taken_over": reused}


def cut(config: EmbedConfig, curate: StageFiles, work: WorkFolder) -> tuple[int, int]:
    """Publish the readable pairs as rows_NNNN.parquet, one for each part; return parts and pairs.

    The list is read in pieces, so that neither this process nor a part holds all of it.
    """
    parts = count = 0
    waiting: list[pa.Table] = []
    left_out = shard_check.left_out_keys(work)

    def write(rows: int) -> None:
        nonlocal parts, waiting
        pairs = pa.concat_tables(waiting)
        with atomic_file(work.path(_rows_name(parts))) as part:
            pq.write_table(pairs.slice(0, rows), part)
        work.publish(_rows_name(parts))
        parts, waiting = parts + 1, [pairs.slice(rows)]

    with curate.open(KEEP_LIST) as keep_list, open_parquet(keep_list) as file:
        for batch in file.iter_batches(READ_ROWS):
            piece = pa.Table.from_batches([batch])
            waiting.append(piece.filter(pa.array(shard_check.is_left_in(piece, left_out))))
            count += waiting[-1].num_rows
            while count - parts * config.rows_per_part >= config.rows_per_part:
                write(config.rows_per_part)
    if count > parts * config.rows_per_part:
        write(count - parts * config.rows_per_part)
    return parts, count


def _rows_name(number: int) -> str:
    return f"rows_{number:04}.parquet"


def know(previous: StageFiles, work: WorkFolder) -> None:
    """Publish which pairs the embeddings in `previous` belong to.

    Takes 24 bytes for each pair.
    """
    tables = [
        read_rows(previous, name, columns=MARKED) for name in previous.names("metadata/*.parquet")
    ]
    marked = np.concatenate([marks(table) for table in tables])
    order = np.argsort(marked, kind="stable")
    for name, array in zip(reversed(KNOWN), (order, marked[order]), strict=True):
        with atomic_file(work.path(name)) as part, part.open("wb") as file:
            np.save(file, array)
        work.publish(name)


def marks(rows: pa.Table) -> np.ndarray:
    """Return a 64-bit hash of each row's key and image bytes, uint64 (rows,).

    The key identifies the origin and the first caption.
    """
    pairs = zip(rows["key"].to_pylist(), rows["sha256"].to_pylist(), strict=True)
    return row_hashes(f"{key}{sha256}".encode() for key, sha256 in pairs)


def _reused_rows(
    table: pa.Table, folders: EmbedFolders
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return which rows were embedded before, bool (rows,), and their vectors, float16 (n, D)."""
    if folders.previous is None:
        return np.zeros(table.num_rows, bool), {}
    marked, rows = (np.load(folders.work.fetched(name), mmap_mode="r") for name in KNOWN)
    wanted = marks(table)
    positions = np.minimum(np.searchsorted(marked, wanted), len(marked) - 1)
    is_reused = marked[positions] == wanted
    source_rows = np.asarray(rows[positions[is_reused]])
    kinds = ("img_emb", "text_emb")
    return is_reused, {kind: _take(folders.previous, kind, source_rows) for kind in kinds}


def _take(previous: StageFiles, kind: str, rows: np.ndarray) -> np.ndarray:
    """Return vectors of former embeddings by their rows over all parts, float16 (rows, D)."""
    names = previous.names(f"{kind}/*.npy")
    start, taken = 0, np.empty((0, 0), np.float16)
    for name in names:
        with previous.local_copy(name) as folder:
            part = np.load(folder / name, mmap_mode="r")
            if not taken.size:
                taken = np.empty((len(rows), part.shape[1]), np.float16)
            inside = (rows >= start) & (rows < start + len(part))
            taken[inside] = part[rows[inside] - start]
            start += len(part)
    return taken


def _embed_part(
    config: EmbedConfig, number: int, threads: int, use_gpu: bool, folders: EmbedFolders
) -> int:
    """Embed one part and put it into the output; return its rows."""
    torch.set_num_threads(threads)
    table = pq.read_table(folders.work.fetched(_rows_name(number)))
    is_reused, reused = _reused_rows(table, folders)
    is_new = ~is_reused
    new: dict[str, np.ndarray] = {}
    if is_new.any():
        new = _embed_rows(config, table.filter(pa.array(is_new)), use_gpu, folders)
    output, files = folders.output, []
    with output.temporary_folder() as folder:
        for kind in ("img_emb", "text_emb"):
            vectors = np.empty((table.num_rows, (new or reused)[kind].shape[1]), np.float16)
            for rows, rows_vectors in ((is_reused, reused), (is_new, new)):
                if rows.any():
                    vectors[rows] = rows_vectors[kind]
            np.save(folder / "part.npy", vectors)
            files.append(output.put(folder / "part.npy", f"{kind}/{kind}_{number:04}.npy"))
        pq.write_table(table, folder / "part.parquet")
        name = f"metadata/metadata_{number:04}.parquet"
        files.append(output.put(folder / "part.parquet", name))
    facts: PartFacts = {
        "rows": table.num_rows,
        "reused": int(is_reused.sum()),
        "dim": vectors.shape[1],
    }
    output.record(f"{number:04}", files, facts)
    return table.num_rows


def _embed_rows(
    config: EmbedConfig, table: pa.Table, use_gpu: bool, folders: EmbedFolders
) -> dict[str, np.ndarray]:
    """Return the vectors of every row by kind, float16 (rows, D)."""
    with folders.clip.local_copy() as clip:
        model, tokenizer = clip_model.load(clip)
    model.to("cuda" if use_gpu else "cpu")
    shards = ShardReader(folders.ingest, is_sequential=True)
    pictures = Pictures(table, shards, model.config.image_size_px, model.config.look)
    rows = torch.arange(len(pictures)).split(config.batch_size)
    vectors = []
    for part, after in zip(rows, [*rows[1:], rows[-1][:0]], strict=True):
        squares = pictures[part]
        pictures.read_ahead(after)
        vectors.append(clip_model.embed_images(model, squares, config.batch_size))
    shards.close()
    images = torch.cat(vectors)
    texts = clip_model.embed_texts(
        model, tokenizer, table["caption"].to_pylist(), config.batch_size
    )
    return {
        "img_emb": images.numpy().astype(np.float16),
        "text_emb": texts.numpy().astype(np.float16),
    }


def embed_texts(clip: Path, texts: list[str]) -> np.ndarray:
    """Embed texts with the CLIP of a `clip` folder, float32 (B, D)."""
    model, tokenizer = clip_model.load(clip)
    return clip_model.embed_texts(model, tokenizer, texts).numpy()


def embed_images(clip: Path, files: Sequence[Path]) -> np.ndarray:
    """Embed image files with the CLIP of a `clip` folder, float32 (B, D).

    Raises CallerError for a file that is not an image.
    """
    model, _ = clip_model.load(clip)
    pictures = [
        torch.from_numpy(read_file(file, model.config.image_size_px, model.config.look))
        for file in files
    ]
    return clip_model.embed_images(model, torch.stack(pictures)).numpy()


def read_look(clip: Path) -> Look:
    """Return how the CLIP of a `clip` folder wants its images made square."""
    return ClipConfig.model_validate(json.loads((clip / "config.json").read_text())["clip"]).look


def encoders(
    clip: Path,
) -> tuple[Callable[[list[str]], np.ndarray], Callable[[np.ndarray], np.ndarray], int]:
    """Load the CLIP of a `clip` folder once; return its text encoder, its image encoder and its
    side S.

    The image encoder takes uint8 squares (B, S, S, 3). Both return float32 (B, D) and may be called
    from any thread.
    """
    model, tokenizer = clip_model.load(clip)

    def texts(captions: list[str]) -> np.ndarray:
        return clip_model.embed_texts(model, tokenizer, captions).numpy()

    def images(pixels: np.ndarray) -> np.ndarray:
        return clip_model.embed_images(model, torch.from_numpy(pixels)).numpy()

    return texts, images, model.config.image_size_px
