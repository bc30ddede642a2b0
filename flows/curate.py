"""The curate stage: reads every shard once and writes the keep list, one row for each pair that the models may see.

The section [curate] says what is kept and how it is split: by *style* (a drawing style never trained on), by *concept* (a hash, so
that the same thing drawn by another vendor never leaks), the rest is for training. Shards are not rewritten: a row points at the
image's bytes in its tar. Reads INGEST/shards, writes OUT/keep.parquet and OUT/dropped.parquet.
"""

import hashlib
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from pydantic import Field

from infra.errors import DataError
from infra.progress import Progress
from infra.settings import Section
from infra.tables import DROPPED, KEEP

MAX_PHRASINGS = 16
BATCH_ROWS = 10_000
HELD_OUT_FIRST = {"held_out_concept": 0, "held_out_style": 0, "train": 1}

Counts = dict[str, Any]
Row = dict[str, Any]


class CurateConfig(Section):
    """Section [curate]: what is kept, and who may train on it."""

    held_out_styles: tuple[str, ...] = ()
    """Styles (vendors) that are never trained on."""
    held_out_concept_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the concepts that are never trained on, whoever drew them; chosen by hash."""
    seed: int = 0
    """Which concepts those are."""
    min_side_px: int = Field(16, ge=1)
    """Shorter side of the picture as it was downloaded, in pixels; below it, too_small."""
    min_caption_chars: int = Field(2, ge=1)
    """Shorter captions are dropped as caption_too_short."""
    max_caption_chars: int = Field(200, ge=8)
    """Longer captions are cut at a word."""
    drop_duplicates: bool = True
    """Whether of images that are equal byte for byte only one is kept: a held-out one if there is one, else the lowest key."""


def run(config: CurateConfig, ingest: Path, out: Path) -> Counts:
    """Write the keep list of an ingest folder and return the counts; `in` = `out` + all that was dropped.

    Memory: 25 bytes for each pair. Raises DataError for a shard that does not read, or when nothing is left to train on.
    """
    out.mkdir(parents=True, exist_ok=True)
    shards = sorted((ingest / "shards").glob("*.tar"), key=lambda shard: int(shard.stem))
    if not shards:
        raise DataError(f"{ingest / 'shards'} holds no shard: run the ingest stage first")
    total = sum(pq.ParquetFile(shard.with_suffix(".parquet")).metadata.num_rows for shard in shards)
    candidates = out / "candidates.parquet"
    hashes: list[bytes] = []
    ranks: list[tuple[int, str]] = []
    reasons: Counter[str] = Counter()
    seen = 0
    with pq.ParquetWriter(out / "dropped.parquet", DROPPED) as dropped:
        with pq.ParquetWriter(candidates, KEEP) as writer, Progress("curate", total) as progress:
            for shard in shards:
                good: list[Row] = []
                bad: list[Row] = []
                for row, reason in judged(shard, config):
                    seen += 1
                    if reason:
                        bad.append({"key": row["key"], "origin": row["origin"], "reason": reason, "detail": f"{shard.name}/{row['member']}"})
                    else:
                        good.append(row)
                hashes += [bytes.fromhex(row["sha256"])[:16] for row in good]
                ranks += [(HELD_OUT_FIRST[row["split"]], row["key"]) for row in good]
                reasons.update(row["reason"] for row in bad)
                writer.write_table(pa.Table.from_pylist(good, KEEP))
                dropped.write_table(pa.Table.from_pylist(bad, DROPPED))
                progress.update(seen)
        keeper = keepers(hashes, ranks) if config.drop_duplicates else [True] * len(hashes)
        splits: Counter[str] = Counter()
        with pq.ParquetWriter(out / "keep.parquet", KEEP) as keep:
            start = 0
            for batch in pq.ParquetFile(candidates).iter_batches(BATCH_ROWS):
                mask = pa.array(keeper[start : start + batch.num_rows], pa.bool_())
                start += batch.num_rows
                kept, doubled = batch.filter(mask), batch.filter(pa.compute.invert(mask))
                keep.write_batch(kept)
                splits.update(kept.column("split").to_pylist())
                reasons["duplicate"] += doubled.num_rows
                dropped.write_table(duplicates(doubled))
    candidates.unlink()
    kept_rows = sum(splits.values())
    assert seen == kept_rows + sum(reasons.values())
    if not splits["train"]:
        raise DataError(f"no pair is left to train on ({seen:,} read; dropped: {dict(reasons)}; splits: {dict(splits)}): see [curate]")
    return {"in": seen, "out": kept_rows, "dropped": {k: v for k, v in sorted(reasons.items()) if v}, "splits": dict(sorted(splits.items()))}


def judged(shard: Path, config: CurateConfig) -> Iterator[tuple[Row, str]]:
    """Yield (row of KEEP, reason to drop it or "") for every image of a shard, reading the tar once from front to back."""
    table = pq.read_table(shard.with_suffix(".parquet"))
    told = {item["key"]: item for item in table.to_pylist() if item["status"] == "success"}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if suffix in ("txt", "json"):
                    continue
                stream = tar.extractfile(member)
                if stream is None or key not in told:
                    raise DataError(f"shard {shard} holds {member.name}, of which its parquet knows nothing")
                yield judge(stream.read(), told.pop(key), shard.name, member, config)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"shard {shard} does not read: {error}") from error
    if told:
        raise DataError(f"shard {shard} lacks {len(told)} images that its parquet names, such as {next(iter(told))}")


def judge(image: bytes, item: Row, shard: str, member: tarfile.TarInfo, config: CurateConfig) -> tuple[Row, str]:
    """Make the KEEP row of one image and say why it must go, or ""."""
    captions = list(dict.fromkeys(filter(None, (clean(text, config.max_caption_chars) for text in item["captions"]))))
    row = {
        "key": item["sample"],
        **{name: item[name] for name in ("origin", "licence", "concept", "style", "category", "subcategory")},
        "caption": captions[0] if captions else "",
        "captions": captions[:MAX_PHRASINGS],
        "split": split_of(item["concept"], item["style"], config),
        "shard": shard,
        "member": member.name,
        "offset": member.offset_data,
        "size_bytes": len(image),
        "sha256": hashlib.sha256(image).hexdigest(),
    }
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR) if image else None
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


def clean(caption: str, max_chars: int) -> str:
    """Return a caption in Unicode's NFC, without control characters, single-spaced, cut at a word when too long."""
    text = unicodedata.normalize("NFC", caption)
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Zs") else c for c in text if unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn"))
    text = " ".join(text.split())
    if len(text) > max_chars:
        text = re.sub(r"\s+\S*$", "", text[: max_chars + 1])[:max_chars]
    return text


def split_of(concept: str, style: str, config: CurateConfig) -> str:
    """Return the split of a pair."""
    if style in config.held_out_styles:
        return "held_out_style"
    hashed = int.from_bytes(hashlib.sha256(f"{config.seed} {concept}".encode()).digest()[:8])
    return "held_out_concept" if hashed < config.held_out_concept_fraction * 2**64 else "train"


def keepers(hashes: list[bytes], ranks: list[tuple[int, str]]) -> list[bool]:
    """Return which of the images stay: of equal ones the best ranked, so that a duplicate across splits leaves the training split."""
    best: dict[bytes, tuple[int, str]] = {}
    for image, rank in zip(hashes, ranks, strict=True):
        best[image] = min(rank, best.get(image, rank))
    return [best[image] == rank for image, rank in zip(hashes, ranks, strict=True)]


def duplicates(batch: pa.RecordBatch) -> pa.Table:
    """Write the rows of dropped.parquet for exact duplicates."""
    rows = [
        {"key": key, "origin": origin, "reason": "duplicate", "detail": f"sha256 {sha256}"}
        for key, origin, sha256 in zip(*(batch.column(name).to_pylist() for name in ("key", "origin", "sha256")), strict=True)
    ]
    return pa.Table.from_pylist(rows, DROPPED)
