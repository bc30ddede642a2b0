"""Embeds every readable image and its first caption with the run's frozen CLIP, in clip-retrieval's
layout.

Reads curate's keep list, ingest's shards and a `clip` folder; writes `img_emb/`, `text_emb/`
(float16, unit rows), `metadata/` and `facts.json`. Ray tasks embed the parts and rename them into
place, so a killed run keeps its finished parts. Pairs that the same CLIP has embedded before
(`know`) are not embedded again.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field

from infra.compute.cluster import ClusterConfig, spread
from infra.console.progress import Progress
from infra.errors import CallerError
from infra.row_hash import row_hashes
from infra.schemas import open_parquet
from infra.settings import Section
from training.data import shard_check
from training.data.image_reader import Pictures, read_file, read_table
from training.models import clip as clip_model
from training.models.clip import ClipConfig
from training.models.preprocessing import Look
from training.optim.step import OnBroken

MARKED = ["key", "sha256"]
READ_ROWS = 1 << 16
PARTS = 10_000
"""Maximum number of parts: four digits keep them in order when files are sorted by name, as
clip-retrieval does."""


class EmbedConfig(Section):
    """How embeddings are made."""

    rows_per_part: int = Field(default=100_000, ge=1)
    """Rows in one file of embeddings."""
    batch_size: int = Field(default=256, ge=1)
    """Images or captions that CLIP encodes at once."""
    broken_pictures: OnBroken = "stop"
    """What to do about images whose shard is missing, truncated or altered: `stop` with an error,
    or `skip` them and count them in the manifest."""

    outside_key: ClassVar[frozenset[str]] = frozenset({"batch_size"})


@dataclass(frozen=True)
class EmbedFolders:
    """Folders of the stages that are read, of the result, and of the unfinished parts."""

    ingest: Path
    curate: Path
    clip: Path
    out: Path
    work: Path


def run(
    config: EmbedConfig, cluster: ClusterConfig, folders: EmbedFolders, clip_key: str
) -> dict[str, Any]:
    """Embed the keep list on the running Ray; return the counts.

    Raises CallerError if the list is empty or has too many parts.
    """
    curate, out, work = folders.curate, folders.out, folders.work
    table = read_table(curate / "keep.parquet", columns=shard_check.READ)
    row_count = table.num_rows
    if not row_count:
        raise CallerError("curate kept no pair: loosen [curate] or give [data] more sources")
    if row_count > PARTS * config.rows_per_part:
        raise CallerError(
            f"[embed] rows_per_part = {config.rows_per_part} makes over {PARTS:,} parts: set "
            f"{-(-row_count // PARTS)} or more"
        )
    dropped = shard_check.settle(table, folders.ingest / "shards", config.broken_pictures, work)
    del table
    parts, count = cut(config, curate / "keep.parquet", work)
    for folder in ("img_emb", "text_emb", "metadata"):
        (out / folder).mkdir(parents=True)
    threads = max(1, int(cluster.cpus_per_worker))
    arguments = [(config, number, threads, cluster.use_gpu, folders) for number in range(parts)]
    done = 0
    with Progress("embed", count, "pairs") as progress:
        for rows in spread(
            cluster, _embed_part, arguments, int(cluster.use_gpu), cluster.embed_workers
        ):
            done += sum(rows)
            progress.update(done)
    taken_over = sum(
        int((work / f"known_{number:04}.count").read_text()) for number in range(parts)
    )
    dim = int(np.load(out / "img_emb" / "img_emb_0000.npy", mmap_mode="r").shape[1])
    (out / "facts.json").write_text(
        json.dumps({"clip_key": clip_key, "dim": dim, "count": count}, indent=1)
    )
    return {"in": row_count, "out": count, "dropped": dropped, "dim": dim, "taken_over": taken_over}


def cut(config: EmbedConfig, keep_list: Path, work: Path) -> tuple[int, int]:
    """Write the readable pairs as `work`/rows_NNNN.parquet, one for each part; return parts and
    pairs.

    The list is read in pieces, so that neither this process nor a part holds all of it.
    """
    parts = count = 0
    waiting: list[pa.Table] = []

    def write(rows: int) -> None:
        nonlocal parts, waiting
        pairs = pa.concat_tables(waiting)
        pq.write_table(pairs.slice(0, rows), work / "rows.tmp")
        (work / "rows.tmp").replace(work / f"rows_{parts:04}.parquet")
        parts, waiting = parts + 1, [pairs.slice(rows)]

    with open_parquet(keep_list) as file:
        for batch in file.iter_batches(READ_ROWS):
            piece = pa.Table.from_batches([batch])
            waiting.append(piece.filter(pa.array(shard_check.is_readable(piece, work))))
            count += waiting[-1].num_rows
            while count - parts * config.rows_per_part >= config.rows_per_part:
                write(config.rows_per_part)
    if count > parts * config.rows_per_part:
        write(count - parts * config.rows_per_part)
    return parts, count


def know(previous: Path, work: Path) -> None:
    """Record in `work` which pairs the embeddings in `previous`, made by the same CLIP, belong to.

    Takes 24 bytes for each pair.
    """
    if not (work / "known.json").exists():
        marked = np.concatenate(
            [
                marks(pq.read_table(file, columns=MARKED))
                for file in sorted((previous / "metadata").glob("*.parquet"))
            ]
        )
        order = np.argsort(marked, kind="stable")
        np.save(work / "known_marks.npy", marked[order])
        np.save(work / "known_rows.npy", order)
        (work / "known.tmp").write_text(json.dumps(str(previous.absolute())))
        (work / "known.tmp").replace(work / "known.json")


def marks(rows: pa.Table) -> np.ndarray:
    """Return a 64-bit hash of each row's key and image bytes, uint64 (rows,).

    The key identifies the origin and the first caption.
    """
    pairs = zip(rows["key"].to_pylist(), rows["sha256"].to_pylist(), strict=True)
    return row_hashes(f"{key}{sha256}".encode() for key, sha256 in pairs)


def _reused_rows(table: pa.Table, work: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return which rows were embedded before, bool (rows,), and their vectors, float16 (n, D)."""
    if not (work / "known.json").exists():
        return np.zeros(table.num_rows, bool), {}
    previous = Path(json.loads((work / "known.json").read_text()))
    marked, rows = (
        np.load(work / f"known_{name}.npy", mmap_mode="r") for name in ("marks", "rows")
    )
    wanted = marks(table)
    positions = np.minimum(np.searchsorted(marked, wanted), len(marked) - 1)
    is_reused = marked[positions] == wanted
    source_rows = np.asarray(rows[positions[is_reused]])
    vectors = {}
    for kind in ("img_emb", "text_emb"):
        parts = [np.load(file, mmap_mode="r") for file in sorted((previous / kind).glob("*.npy"))]
        starts = np.cumsum([0, *(len(part) for part in parts)])
        taken = np.empty((len(source_rows), parts[0].shape[1]), np.float16)
        for start, part in zip(starts, parts, strict=False):
            inside = (source_rows >= start) & (source_rows < start + len(part))
            taken[inside] = part[source_rows[inside] - start]
        vectors[kind] = taken
    return is_reused, vectors


def _embed_part(
    config: EmbedConfig, number: int, threads: int, use_gpu: bool, folders: EmbedFolders
) -> int:
    """Embed one part, unless a killed attempt finished it in `work`; return its rows."""
    torch.set_num_threads(threads)
    work = folders.work
    table = pq.read_table(work / f"rows_{number:04}.parquet")
    names = [
        f"img_emb/img_emb_{number:04}.npy",
        f"text_emb/text_emb_{number:04}.npy",
        f"metadata/metadata_{number:04}.parquet",
    ]
    if not all((work / Path(name).name).exists() for name in names):
        is_reused, reused = _reused_rows(table, work)
        is_new = ~is_reused
        new: dict[str, np.ndarray] = {}
        if is_new.any():
            new_rows = table.filter(pa.array(is_new))
            new = _embed_rows(config, new_rows, use_gpu, folders.ingest, folders.clip)
        for name, kind in zip(names, ("img_emb", "text_emb"), strict=False):
            vectors = np.empty((table.num_rows, (new or reused)[kind].shape[1]), np.float16)
            for rows, rows_vectors in ((is_reused, reused), (is_new, new)):
                if rows.any():
                    vectors[rows] = rows_vectors[kind]
            with (work / f"part_{number:04}.tmp").open("wb") as file:
                np.save(file, vectors)
            (work / f"part_{number:04}.tmp").replace(work / Path(name).name)
        (work / f"known_{number:04}.count").write_text(str(int(is_reused.sum())))
        pq.write_table(table, work / f"table_{number:04}.tmp")
        (work / f"table_{number:04}.tmp").replace(work / Path(names[2]).name)
    for name in names:
        shutil.copyfile(work / Path(name).name, folders.out / name)
    return table.num_rows


def _embed_rows(
    config: EmbedConfig, table: pa.Table, use_gpu: bool, ingest: Path, clip: Path
) -> dict[str, np.ndarray]:
    """Return the vectors of every row by kind, float16 (rows, D)."""
    model, tokenizer = clip_model.load(clip)
    model.to("cuda" if use_gpu else "cpu")
    pictures = Pictures(table, ingest / "shards", model.config.image_size_px, model.config.look)
    rows = torch.arange(len(pictures)).split(config.batch_size)
    vectors = []
    for part, after in zip(rows, [*rows[1:], rows[-1][:0]], strict=True):
        squares = pictures[part]
        pictures.read_ahead(after)
        vectors.append(clip_model.embed_images(model, squares, config.batch_size))
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


def look_of(clip: Path) -> Look:
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
