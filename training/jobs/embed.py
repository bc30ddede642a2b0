"""Embeds every kept picture and its first caption with the run's frozen CLIP, in clip-retrieval's
layout.

Reads curate's keep list, ingest's shards and a `clip` folder; writes `img_emb/`, `text_emb/`
(float16, unit rows), `metadata/` and `facts.json`. Parts are embedded by Ray tasks and renamed into
place, so a killed run keeps the parts it has. Pairs that the same CLIP has embedded before (`know`)
are not embedded again.
"""

import json
import shutil
from collections.abc import Callable, Sequence
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
"""Their four digits keep them in order for whoever sorts files by name, as clip-retrieval does."""


class EmbedConfig(Section):
    """How embeddings are made."""

    rows_per_part: int = Field(default=100_000, ge=1)
    """Rows of one file of embeddings."""
    batch_size: int = Field(default=256, ge=1)
    """Pictures or captions that go through CLIP at once."""
    broken_pictures: OnBroken = "stop"
    """What to do about pictures whose shard is missing, cut or altered: `stop`, or `skip` them,
    counted in the manifest."""

    outside_key: ClassVar[frozenset[str]] = frozenset({"batch_size"})


def run(
    config: EmbedConfig,
    cluster: ClusterConfig,
    ingest: Path,
    curate: Path,
    clip: Path,
    clip_key: str,
    out: Path,
    work: Path,
) -> dict[str, Any]:
    """Embed all of the keep list on the running Ray; returns the counts."""
    table = read_table(curate / "keep.parquet", columns=shard_check.READ)
    row_count = table.num_rows
    if not row_count:
        raise CallerError("curate kept no pair: loosen [curate] or give [data] more sources")
    if row_count > PARTS * config.rows_per_part:
        raise CallerError(
            f"[embed] rows_per_part = {config.rows_per_part} makes over {PARTS:,} parts: set "
            f"{-(-row_count // PARTS)} or more"
        )
    dropped = shard_check.settle(table, ingest / "shards", config.broken_pictures, work)
    del table
    parts, count = cut(config, curate / "keep.parquet", work)
    for folder in ("img_emb", "text_emb", "metadata"):
        (out / folder).mkdir(parents=True)
    threads = max(1, int(cluster.cpus_per_worker))
    arguments = [
        (config, number, threads, cluster.use_gpu, ingest, clip, out, work)
        for number in range(parts)
    ]
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
    """Write the pairs that `soundness.settle` kept as `work`/rows_NNNN.parquet, one for each part;
    return the parts and the pairs.

    The list is read in pieces, so that neither this process nor a part ever holds it.
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
    """Note in `work` what the embeddings in the folder `previous`, made by the same CLIP, are of.
    24 bytes a pair.
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
    """Return 64 bits for each row that tell apart pairs (origin and first caption) and their
    pictures' bytes, uint64 (rows,).
    """
    pairs = zip(rows["key"].to_pylist(), rows["sha256"].to_pylist(), strict=True)
    return row_hashes(f"{key}{sha256}".encode() for key, sha256 in pairs)


def _reused_rows(table: pa.Table, work: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return which rows have been embedded before (rows,), and their vectors of both kinds float16
    (those rows, D).
    """
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
    config: EmbedConfig,
    number: int,
    threads: int,
    use_gpu: bool,
    ingest: Path,
    clip: Path,
    out: Path,
    work: Path,
) -> int:
    """Embed one part unless a killed attempt left it whole in `work`; returns its rows."""
    torch.set_num_threads(threads)
    table = pq.read_table(work / f"rows_{number:04}.parquet")
    names = [
        f"img_emb/img_emb_{number:04}.npy",
        f"text_emb/text_emb_{number:04}.npy",
        f"metadata/metadata_{number:04}.parquet",
    ]
    if not all((work / Path(name).name).exists() for name in names):
        is_reused, vectors = _reused_rows(table, work)
        fresh = (
            _embed_rows(config, table.filter(pa.array(~is_reused)), use_gpu, ingest, clip)
            if not is_reused.all()
            else {}
        )
        for name, kind in zip(names, ("img_emb", "text_emb"), strict=False):
            both = np.empty((table.num_rows, (fresh or vectors)[kind].shape[1]), np.float16)
            for chosen, rows_of in ((is_reused, vectors), (~is_reused, fresh)):
                if chosen.any():
                    both[chosen] = rows_of[kind]
            with (work / f"part_{number:04}.tmp").open("wb") as file:
                np.save(file, both)
            (work / f"part_{number:04}.tmp").replace(work / Path(name).name)
        (work / f"known_{number:04}.count").write_text(str(int(is_reused.sum())))
        pq.write_table(table, work / f"table_{number:04}.tmp")
        (work / f"table_{number:04}.tmp").replace(work / Path(names[2]).name)
    for name in names:
        shutil.copyfile(work / Path(name).name, out / name)
    return table.num_rows


def _embed_rows(
    config: EmbedConfig, table: pa.Table, use_gpu: bool, ingest: Path, clip: Path
) -> dict[str, np.ndarray]:
    """Return both vectors of every row, float16 (rows, D)."""
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
    """Embed picture files with the CLIP of a `clip` folder, float32 (B, D). Raises CallerError
    naming a file that is no picture.
    """
    model, _ = clip_model.load(clip)
    pictures = [
        torch.from_numpy(read_file(file, model.config.image_size_px, model.config.look))
        for file in files
    ]
    return clip_model.embed_images(model, torch.stack(pictures)).numpy()


def look_of(clip: Path) -> Look:
    """Say how the CLIP of a `clip` folder wants its pictures made square."""
    return ClipConfig.model_validate(json.loads((clip / "config.json").read_text())["clip"]).look


def encoders(
    clip: Path,
) -> tuple[Callable[[list[str]], np.ndarray], Callable[[np.ndarray], np.ndarray], int]:
    """Load the CLIP of a `clip` folder once: return what embeds texts, what embeds uint8 squares
    (B, S, S, 3), and their side S.

    Both return float32 (B, D) and may be called from any thread.
    """
    model, tokenizer = clip_model.load(clip)

    def texts(captions: list[str]) -> np.ndarray:
        return clip_model.embed_texts(model, tokenizer, captions).numpy()

    def images(pixels: np.ndarray) -> np.ndarray:
        return clip_model.embed_images(model, torch.from_numpy(pixels)).numpy()

    return texts, images, model.config.image_size_px
