"""The curate stage: reads every shard once and writes the keep list, one row for each pair that the
models may see.

The section [curate] says what is kept and how it is split. Pairs of the styles in
`held_out_styles` are held out. So are pairs whose concept a hash chooses, whoever drew them. All
others are for training. Shards are not rewritten: a row points at the image's bytes in its tar.
Reads INGEST/shards, writes OUT/keep.parquet and OUT/dropped.parquet.
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
from infra.storage.removal_log import Removals
from infra.storage.shard_reader import ShardReader
from infra.storage.stage_files import StageFiles
from training.data.stored_image import pixels_of

MAX_PHRASINGS = 16
BATCH_ROWS = 10_000
# What decides who stays of equal images: held-out ones, so that a duplicate across splits leaves
# the training split; then the lowest key.
RANK = np.dtype([("image", "S16"), ("is_train", "?"), ("key", "S16")])

Counts = dict[str, Any]
Row = dict[str, Any]


class CurateConfig(Section):
    """Section [curate]: what is kept, and who may train on it."""

    held_out_styles: tuple[str, ...] = ()
    """Styles (vendors) that are never trained on."""
    held_out_concept_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the concepts that are never trained on, whoever drew them; chosen by hash."""
    seed: int = 0
    """Seed of the choice of these concepts."""
    min_side_px: int = Field(16, ge=1)
    """Shorter side of the picture as it was downloaded, in pixels; below it, too_small."""
    min_caption_chars: int = Field(2, ge=1)
    """Shorter captions are dropped as caption_too_short."""
    max_caption_chars: int = Field(200, ge=8)
    """Longer captions are cut at a word."""
    drop_duplicates: bool = True
    """Whether of images that are equal byte for byte only one is kept: a held-out one if there is
    one, else the lowest key."""
    decontaminate: bool = False
    """Whether training images that look like a held-out one (pHash and colours) are dropped as
    evaluation_alike: no model sees them."""

    def keyed(self) -> dict[str, Any]:
        """Leave out `decontaminate` where it is off: lists made before it was there are the
        same.
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
) -> Counts:
    """Write the keep list of an ingest folder and return the counts; `in` = `out` + all that was
    dropped.

    Rows are in the order of shards, within a shard of keys: the same images give the same list.
    Memory: a shard's rows, and some 50 bytes for each pair. Raises DataError for a shard that does
    not read, or when nothing is left to train on.
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
            evaluation_images = leaks(candidates, ranks["is_train"], reader)
        is_keeper = keepers(ranks) if config.drop_duplicates else np.ones(len(ranks), bool)
        splits = write_keep_list(
            candidates, out / "keep.parquet", dropped, ranks, is_keeper, evaluation_images, reasons
        )
    candidates.unlink()
    assert seen == splits.total() + reasons.total()
    counts = {"dropped": dict(sorted((+reasons).items())), "splits": dict(sorted(splits.items()))}
    if not splits["train"]:
        raise DataError(
            f"no pair is left to train on of {seen:,} (dropped: {counts['dropped']}, splits: "
            f"{counts['splits']}): loosen [curate]"
        )
    return {"in": seen, "out": splits.total(), **counts}


def write_keep_list(
    candidates: Path,
    keep_list: Path,
    dropped: pq.ParquetWriter,
    ranks: np.ndarray,
    is_keeper: np.ndarray,
    evaluation_images: np.ndarray,
    reasons: Counter[str],
) -> Counter[str]:
    """Write the candidates that stay, and the others as dropped; return the pairs by split.

    is_keeper: no other image is equal; evaluation_images: the row of the held-out image that a
    training image looks like, else -1; `reasons` gets the counts of what is dropped.
    """
    splits: Counter[str] = Counter()
    start = 0
    with pq.ParquetWriter(keep_list, KEEP) as keep:
        for batch in open_parquet(candidates).iter_batches(BATCH_ROWS):
            rows = slice(start, start + batch.num_rows)
            start += batch.num_rows
            is_kept, leaked_by = is_keeper[rows], evaluation_images[rows]
            is_leaked = is_kept & (leaked_by >= 0)
            masks = (is_kept & ~is_leaked, ~is_kept, is_leaked)
            kept_rows, duplicate_rows, leaked_rows = (
                batch.filter(pa.array(mask)) for mask in masks
            )
            splits.update(kept_rows.column("split").to_pylist())
            keep.write_batch(kept_rows)
            dropped.write_table(duplicates(duplicate_rows))
            dropped.write_table(alike(leaked_rows, ranks["key"][leaked_by[is_leaked]]))
            reasons.update(duplicate=duplicate_rows.num_rows, evaluation_alike=leaked_rows.num_rows)
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
    """Judge every image of the shards; returns how many there were, the ranks of those that passed,
    the others' reasons.
    """
    ranks: list[np.ndarray] = []
    reasons: Counter[str] = Counter()
    seen = 0
    with pq.ParquetWriter(path, KEEP) as writer, Progress("curate", images) as progress:
        for shard in shards:
            judgements = sorted(
                (
                    (row, "removed" if removals.has(row) else reason)
                    for row, reason in judged(ingest, shard, config)
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


def judged(ingest: StageFiles, shard: str, config: CurateConfig) -> Iterator[tuple[Row, str]]:
    """Yield (row of KEEP, reason to drop it or "") for every image of a shard, reading the tar once
    from front to back.

    Raises DataError when tar and parquet disagree or the tar does not read whole.
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
                        f"shard {shard} holds {member.name}, of which its parquet knows nothing: "
                        "run the ingest stage again"
                    )
                yield judge(stream.read(), by_key.pop(key), Path(shard).name, member, config)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"shard {shard} does not read ({error}): run the ingest stage again"
        ) from error
    if by_key:
        raise DataError(
            f"shard {shard} lacks {len(by_key)} images that its parquet names, such as "
            f"{min(by_key)}: run the ingest stage again"
        )


def judge(
    image: bytes, item: Row, shard: str, member: tarfile.TarInfo, config: CurateConfig
) -> tuple[Row, str]:
    """Make the KEEP row of one image and say why it must go, or ""."""
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
        # Not a column of KEEP: the removal log is compared with it.
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
    """Return the split of a pair."""
    if style in config.held_out_styles:
        return "held_out_style"
    hashed = int.from_bytes(hashlib.sha256(f"{config.seed} {concept}".encode()).digest()[:8])
    return "held_out_concept" if hashed < config.held_out_concept_fraction * 2**64 else "train"


def keepers(ranks: np.ndarray) -> np.ndarray:
    """Return which of the images (RANK) stay: the first of each group of equal ones, in RANK's
    order.
    """
    order = np.argsort(ranks, order=("image", "is_train", "key"))
    images = ranks["image"][order]
    is_keeper = np.zeros(len(ranks), bool)
    is_keeper[order[np.concatenate([[True], images[1:] != images[:-1]])[: len(ranks)]]] = True
    return is_keeper


def detail_of(row: Row, reason: str) -> str:
    """Return the last column of dropped.parquet; the digest of what was taken down, so that
    compaction finds its bytes in the shard.
    """
    return f"sha256 {row['sha256']}" if reason == "removed" else f"{row['shard']}/{row['member']}"


def duplicates(batch: pa.RecordBatch) -> pa.Table:
    """Return the rows of dropped.parquet for exact duplicates."""
    columns = zip(
        *(batch.column(name).to_pylist() for name in ("key", "origin", "sha256")), strict=True
    )
    rows = [
        {"key": key, "origin": origin, "reason": "duplicate", "detail": f"sha256 {sha256}"}
        for key, origin, sha256 in columns
    ]
    return pa.Table.from_pylist(rows, DROPPED)


def leaks(candidates: Path, is_train: np.ndarray, shards: ShardReader) -> np.ndarray:
    """Return for each training image the row of the held-out one that it looks like, else -1.
    Memory: some 50 bytes an image.
    """
    from indexing.dedup.perceptual_hash import LOCATION, hash_pictures, like_evaluation

    thumbs = candidates.with_suffix(".thumbs")
    with open_parquet(candidates) as opened:
        hashes = hash_pictures(opened.iter_batches(BATCH_ROWS, columns=LOCATION), shards, thumbs)
    lookalikes = like_evaluation(hashes, is_train)
    thumbs.unlink()
    return lookalikes


def alike(batch: pa.RecordBatch, evaluation_images: np.ndarray) -> pa.Table:
    """Return the rows of dropped.parquet for images that look like a held-out one, whose keys are
    given.
    """
    columns = [
        *(batch.column(name) for name in ("key", "origin")),
        ["evaluation_alike"] * batch.num_rows,
    ]
    return pa.table(
        [*columns, [f"looks like {key.decode()}" for key in evaluation_images.tolist()]],
        schema=DROPPED,
    )
