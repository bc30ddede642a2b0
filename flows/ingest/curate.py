"""The curate stage: read every shard once and write the keep list, one row per pair for the models.

The section [curate] decides which pairs are kept and how they are split: held out by *style* (a
drawing style that is never trained on), held out by *concept* (chosen by a hash, so that another
vendor's drawing of the same concept does not leak), and all others for training. Shards are not
rewritten: a row points at the image's bytes in its tar. Reads INGEST/shards, writes
OUT/keep.parquet and OUT/dropped.parquet.
"""

import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from infra.captions import clean_caption
from infra.console.progress import Progress
from infra.errors import DataError
from infra.schemas import (
    DOWNLOAD_SHA256,
    DROPPED,
    KEEP,
    SHARD_COLUMNS,
    STORED_SHA256,
    open_parquet,
)
from infra.settings import Section
from infra.storage.manifest_schema import StageCounts
from infra.storage.removal_log import Removals
from infra.storage.shard_reader import ShardReader
from infra.storage.stage_files import StageFiles
from training.data.stored_image import pixels_of

MAX_PHRASINGS = 16
BATCH_ROWS = 10_000
# Sort order among equal images, of which the first is kept: held-out ones first, so that a
# duplicate across splits is removed from the training split; then the lowest key.
RANK = np.dtype([("image", "S16"), ("is_train", "?"), ("key", "S16")])

Row = dict[str, Any]


class CurateCounts(StageCounts):
    """The counts of the stage's manifest."""

    splits: dict[str, int]


class CurateConfig(Section):
    """Section [curate]: which pairs are kept, and which of them are held out of training."""

    held_out_styles: tuple[str, ...] = ()
    """Styles (vendors) that are never trained on."""
    held_out_concept_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the concepts that are never trained on, in any style; chosen by hash."""
    seed: int = 0
    """Seed that chooses the held-out concepts."""
    min_side_px: int = Field(16, ge=1)
    """Minimum shorter side of a picture as downloaded, in pixels; smaller ones are dropped as
    too_small."""
    min_caption_chars: int = Field(2, ge=1)
    """Minimum characters of a caption; shorter ones are dropped as caption_too_short."""
    max_caption_chars: int = Field(200, ge=8)
    """Maximum characters of a caption; longer ones are cut at a word boundary."""
    drop_duplicates: bool = True
    """Whether only one of several byte-identical images is kept: a held-out one if there is one,
    else the one with the lowest key."""
    decontaminate: bool = False
    """Whether training images that look like a held-out one (by pHash and colours) are dropped as
    evaluation_alike, so that no model sees them."""

    def keyed(self) -> dict[str, Any]:
        """Return the fields that the stage's key depends on.

        `decontaminate` is left out if it is off, so that older keep lists keep their key.
        """
        return {
            name: value
            for name, value in super().keyed().items()
            if name != "decontaminate" or value
        }


def run(
    config: CurateConfig,
    ingest: StageFiles,
    out: Path,
    removals: Removals = Removals(),
    images: int | None = None,
) -> CurateCounts:
    """Write the keep list of an ingest folder; return the counts, with `in` = `out` + all dropped.

    Rows are sorted by shard, then by key, so that the same images give the same list. Memory: the
    rows of one shard and about 50 bytes per pair. Raises DataError if a shard cannot be read, or if
    no pair is left for training.
    """
    out.mkdir(parents=True, exist_ok=True)
    shards = sorted(ingest.names("shards/*.tar"), key=lambda name: int(Path(name).stem))
    if not shards:
        raise DataError(f"{ingest.address()} holds no shard: run the ingest stage first")
    candidates = out / "candidates.parquet"
    with pq.ParquetWriter(out / "dropped.parquet", DROPPED) as dropped:
        seen, ranks, reasons = write_candidates(
            config, ingest, shards, candidates, dropped, removals, images
        )
        evaluation_images = np.full(len(ranks), -1)
        if config.decontaminate:
            reader = ShardReader(ingest, is_sequential=True)
            evaluation_images = evaluation_lookalikes(candidates, ranks["is_train"], reader)
        is_keeper = first_of_equals(ranks) if config.drop_duplicates else np.ones(len(ranks), bool)
        splits = write_keep_list(
            candidates, out / "keep.parquet", dropped, ranks, is_keeper, evaluation_images, reasons
        )
    candidates.unlink()
    assert seen == splits.total() + reasons.total()
    counts: CurateCounts = {
        "in": seen,
        "out": splits.total(),
        "dropped": dict(sorted((+reasons).items())),
        "splits": dict(sorted(splits.items())),
    }
    if not splits["train"]:
        raise DataError(
            f"no pair is left to train on of {seen:,} (dropped: {counts['dropped']}, splits: "
            f"{counts['splits']}): loosen [curate]"
        )
    return counts


def write_keep_list(
    candidates: Path,
    keep_list: Path,
    dropped: pq.ParquetWriter,
    ranks: np.ndarray,
    is_keeper: np.ndarray,
    evaluation_images: np.ndarray,
    reasons: Counter[str],
) -> Counter[str]:
    """Write the kept candidates to `keep_list` and the others to `dropped`; count pairs by split.

    is_keeper (one per candidate): first of its byte-identical images. evaluation_images: row of the
    held-out image that a training image looks like, else -1. Adds the dropped rows to `reasons`.
    """
    splits: Counter[str] = Counter()
    start = 0
    with pq.ParquetWriter(keep_list, KEEP) as keep:
        for batch in open_parquet(candidates).iter_batches(BATCH_ROWS):
            rows = slice(start, start + batch.num_rows)
            start += batch.num_rows
            is_first, leaked_by = is_keeper[rows], evaluation_images[rows]
            is_leaked = is_first & (leaked_by >= 0)
            masks = (is_first & ~is_leaked, ~is_first, is_leaked)
            remaining, duplicates, leaked = (batch.filter(pa.array(mask)) for mask in masks)
            splits.update(remaining.column("split").to_pylist())
            keep.write_batch(remaining)
            dropped.write_table(duplicate_rows(duplicates))
            dropped.write_table(lookalike_rows(leaked, ranks["key"][leaked_by[is_leaked]]))
            reasons.update(duplicate=duplicates.num_rows, evaluation_alike=leaked.num_rows)
    return splits


def write_candidates(
    config: CurateConfig,
    ingest: StageFiles,
    shards: list[str],
    path: Path,
    dropped: pq.ParquetWriter,
    removals: Removals,
    images: int | None,
) -> tuple[int, np.ndarray, Counter[str]]:
    """Check every image of the shards; write the good rows to `path`, the others to `dropped`.

    Returns the number of images, the RANK array of the good rows, and the drop reasons' counts.
    """
    ranks: list[np.ndarray] = []
    reasons: Counter[str] = Counter()
    seen = 0
    with pq.ParquetWriter(path, KEEP) as writer, Progress("curate", images) as progress:
        for shard in shards:
            judgements = sorted(
                (
                    (row, "removed" if removals.has(row) else reason)
                    for row, reason in judge_shard(ingest, shard, config)
                ),
                key=lambda judgement: str(judgement[0]["key"]),
            )
            good = [row for row, reason in judgements if not reason]
            bad = [
                {
                    "key": row["key"],
                    "origin": row["origin"],
                    "reason": reason,
                    "detail": detail_of(row, reason),
                }
                for row, reason in judgements
                if reason
            ]
            writer.write_table(pa.Table.from_pylist(good, KEEP))
            dropped.write_table(pa.Table.from_pylist(bad, DROPPED))
            ranks.append(
                np.array(
                    [
                        (bytes.fromhex(row["sha256"])[:16], row["split"] == "train", row["key"])
                        for row in good
                    ],
                    RANK,
                )
            )
            reasons.update(row["reason"] for row in bad)
            seen += len(judgements)
            progress.update(seen)
    return seen, np.concatenate(ranks), reasons


def judge_shard(ingest: StageFiles, shard: str, config: CurateConfig) -> Iterator[tuple[Row, str]]:
    """Yield (row of KEEP, reason to drop it or "") for every image of a shard, in tar order.

    Raises DataError if tar and parquet differ, or if the tar cannot be read completely.
    """
    with ingest.open(shard.replace(".tar", ".parquet")) as file:
        table = pq.read_table(file)
    by_key = {item["key"]: item for item in table.to_pylist() if item["status"] == "success"}
    try:
        with ingest.open(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if suffix in ("txt", "json"):
                    continue
                stream = tar.extractfile(member)
                if stream is None or key not in by_key:
                    raise DataError(
                        f"shard {shard} holds {member.name}, which is not in its parquet file: run "
                        "the ingest stage again"
                    )
                yield judge(stream.read(), by_key.pop(key), Path(shard).name, member, config)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"shard {shard} cannot be read ({error}): run the ingest stage again"
        ) from error
    if by_key:
        raise DataError(
            f"shard {shard} lacks {len(by_key)} images of its parquet file, such as "
            f"{min(by_key)}: run the ingest stage again"
        )


def judge(
    image: bytes, item: Row, shard: str, member: tarfile.TarInfo, config: CurateConfig
) -> tuple[Row, str]:
    """Return the KEEP row of one image and the reason to drop it, or ""."""
    captions = [
        text
        for text in dict.fromkeys(
            clean_caption(caption, config.max_caption_chars) for caption in item["captions"]
        )
        if text
    ]
    row = {
        "key": item[SHARD_COLUMNS["key"]],
        **{
            name: item[name]
            for name in ("origin", "licence", "concept", "style", "category", "subcategory")
        },
        "caption": captions[0] if captions else "",
        "captions": captions[:MAX_PHRASINGS],
        "split": split_of(item["concept"], item["style"], config),
        "shard": shard,
        "member": member.name,
        "offset": member.offset_data,
        "size_bytes": len(image),
        STORED_SHA256: hashlib.sha256(image).hexdigest(),
        # Not a column of KEEP: only compared with the removal log.
        DOWNLOAD_SHA256: item.get(SHARD_COLUMNS[DOWNLOAD_SHA256]) or "",
    }
    pixels = pixels_of(image)
    if pixels is None:
        return row, "decode_error"
    row["height_px"], row["width_px"] = pixels.shape[:2]
    if min(item["original_width"], item["original_height"]) < config.min_side_px:
        return row, "too_small"
    if np.ptp(pixels) == 0:
        return row, "blank"
    if len(row["caption"]) < config.min_caption_chars:
        return row, "caption_too_short"
    return row, ""


def split_of(concept: str, style: str, config: CurateConfig) -> str:
    """Return the split of a pair: "train", "held_out_style" or "held_out_concept"."""
    if style in config.held_out_styles:
        return "held_out_style"
    hashed = int.from_bytes(hashlib.sha256(f"{config.seed} {concept}".encode()).digest()[:8])
    return "held_out_concept" if hashed < config.held_out_concept_fraction * 2**64 else "train"


def first_of_equals(ranks: np.ndarray) -> np.ndarray:
    """Return a mask of the images (RANK) that are first of their group of equal ones, in RANK's
    order.
    """
    order = np.argsort(ranks, order=("image", "is_train", "key"))
    images = ranks["image"][order]
    is_keeper = np.zeros(len(ranks), bool)
    is_keeper[order[np.concatenate([[True], images[1:] != images[:-1]])[: len(ranks)]]] = True
    return is_keeper


def detail_of(row: Row, reason: str) -> str:
    """Return the `detail` of a row of dropped.parquet.

    For a removed image it is the image's digest, by which compaction finds its bytes in the shard.
    """
    return f"sha256 {row['sha256']}" if reason == "removed" else f"{row['shard']}/{row['member']}"


def duplicate_rows(batch: pa.RecordBatch) -> pa.Table:
    """Return the rows of dropped.parquet for exact duplicates."""
    columns = zip(
        *(batch.column(name).to_pylist() for name in ("key", "origin", "sha256")), strict=True
    )
    rows = [
        {"key": key, "origin": origin, "reason": "duplicate", "detail": f"sha256 {sha256}"}
        for key, origin, sha256 in columns
    ]
    return pa.Table.from_pylist(rows, DROPPED)


def evaluation_lookalikes(
    candidates: Path, is_train: np.ndarray, shards: ShardReader
) -> np.ndarray:
    """Return for each image the row of the held-out one that it looks like, or -1.

    Only training images are compared with held-out ones. Memory: about 50 bytes per image.
    """
    from indexing.dedup.perceptual_hash import LOCATION, hash_pictures, like_evaluation

    thumbs = candidates.with_suffix(".thumbs")
    with open_parquet(candidates) as opened:
        hashes = hash_pictures(opened.iter_batches(BATCH_ROWS, columns=LOCATION), shards, thumbs)
    lookalikes = like_evaluation(hashes, is_train)
    thumbs.unlink()
    return lookalikes


def lookalike_rows(batch: pa.RecordBatch, evaluation_images: np.ndarray) -> pa.Table:
    """Return the rows of dropped.parquet for training images that look like held-out ones.

    evaluation_images: the keys of those held-out images, as bytes.
    """
    columns = [
        *(batch.column(name) for name in ("key", "origin")),
        ["evaluation_alike"] * batch.num_rows,
    ]
    return pa.table(
        [*columns, [f"looks like {key.decode()}" for key in evaluation_images.tolist()]],
        schema=DROPPED,
    )
