"""The stage `dedup`: which training pictures are copies of each other or of an evaluation picture,
and the embeddings without them.

Three passes, each judging what the one before has kept: equal bytes, equal looks, near embeddings.
Evaluation pictures stay whatever happens; of training pictures the larger one stays, then the lower
key. Reads an embed folder and the shards; writes the same embed layout (which prior and decoder
then train on), keep.parquet (which up-samplers train on), groups.parquet, groups.png and
threshold.json. Memory: some 200 bytes a pair, and what indexing.dedup.near_pairs says; tables and
small copies are read a piece at a time.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from indexing.ann.keys import hashes_of
from indexing.data.embedding_store import (
    CHUNK_ROWS,
    Floats,
    Rows,
    metadata_batches,
    metadata_of,
    open_parts,
    part_files,
    read_facts,
    take,
    unit,
)
from indexing.data.images import Pixels, read_picture, sheet, write_png
from indexing.dedup.grouping import exact, groups, perceptual, semantic
from indexing.dedup.perceptual_hash import LOCATION, LOOK_PX, Looks, look_at
from indexing.metrics.clip_score import EncodeImages
from infra.compute.memory import PeakMemory
from infra.errors import DataError
from infra.schemas import EMBEDDED, open_parquet
from infra.settings import Section

REASONS = ("", "equal", "alike", "near", "evaluation_equal", "evaluation_alike", "evaluation_near")
"""Why a pair goes; the last three for an evaluation picture."""
MAX_LISTED_GROUPS, MAX_LISTED_COPIES = 12, 6
STEPS = np.concatenate([np.arange(0.5, 0.99, 0.0025), np.arange(0.99, 0.99995, 0.0001)])
GROUPS = pa.schema(
    [
        ("key", pa.string()),
        ("keeper", pa.string()),
        ("reason", pa.string()),
        ("score", pa.float32()),
    ]
)


class DedupConfig(Section):
    """[dedup]: which training pictures count as copies, of each other or of evaluation pictures,
    and are left out of training.
    """

    max_hash_bits: int = Field(default=6, ge=0, le=15)
    """Most of pHash's 64 bits in which pictures that look alike may differ; `max_rms` must hold as
    well."""
    max_rms: float = Field(default=12, ge=0, le=255)
    """Most that their 8 px colour copies may differ, root mean square of 255: pHash knows no
    colours."""
    semantic: bool = True
    """Whether near embeddings count as copies, too."""
    threshold: float | None = Field(default=None, gt=0, le=1)
    """Least cosine of near embeddings; by default the lowest that has the precision on the labelled
    sample."""
    precision: float = Field(default=0.995, gt=0.5, le=1)
    """Share of the labelled pairs at or above the threshold that must be copies."""
    sample: int = Field(default=256, ge=16)
    """Pictures of the labelled sample, each with every known transformation."""
    seed: int = Field(default=0, ge=0)
    """Draws the sample and the cells."""


class Pairs(NamedTuple):
    """What is judged of every pair, besides its picture (N,)."""

    keys: NDArray[np.bytes_]
    digests: NDArray[np.bytes_]
    """SHA-256 of the pictures' bytes, in hexadecimal."""
    concepts: NDArray[np.uint64]
    """Equal for pairs of one concept; a pair without one is alone."""
    pixels: NDArray[np.int64]
    is_train: NDArray[np.bool_]


def run(
    config: DedupConfig,
    shards: Path,
    embed: Path,
    encode_images: EncodeImages,
    side_px: int,
    out: Path,
) -> dict[str, Any]:
    """Write the embeddings without copies and return the counts. `encode_images` is the CLIP that
    made them, for squares of `side_px`.

    Raises DataError where a picture cannot be read or no training picture is left.
    """
    with PeakMemory() as memory, tempfile.TemporaryDirectory(dir=out, prefix=".looks-") as staging:
        counts = _run(config, shards, embed, encode_images, side_px, out, Path(staging) / "thumbs")
    return {**counts, "peak_bytes": memory.bytes}


def _run(
    config: DedupConfig,
    shards: Path,
    embed: Path,
    encode_images: EncodeImages,
    side_px: int,
    out: Path,
    thumbs: Path,
) -> dict[str, Any]:
    _, count, dim = read_facts(embed)
    metadata = embed / "metadata"
    pairs = read_pairs(metadata, count)
    parts = open_parts(embed / "img_emb", count, dim)
    looks = look_at(metadata_batches(metadata, LOCATION), shards, thumbs)
    order = np.lexsort((pairs.keys, -pairs.pixels, pairs.is_train)).astype(
        np.int64
    )  # the best first
    keeper = np.arange(count)
    reason = np.zeros(count, np.int8)  # of REASONS

    def settle(keeper_of: Rows, why: str) -> None:
        nonlocal order
        dropped_rows = np.flatnonzero(
            (keeper_of != np.arange(count)) & pairs.is_train & (reason == 0)
        )
        keeper[dropped_rows] = keeper_of[dropped_rows]
        reason[dropped_rows] = np.where(
            pairs.is_train[keeper_of[dropped_rows]],
            REASONS.index(why),
            REASONS.index(f"evaluation_{why}"),
        )
        order = order[reason[order] == 0]

    settle(exact(pairs.digests, order), "equal")
    settle(perceptual(*looks, order, config.max_hash_bits, config.max_rms), "alike")
    chosen: dict[str, Any] = {}
    if config.semantic:
        chosen = choose_threshold(
            config, pairs, parts, looks, metadata, shards, encode_images, side_px
        )
        if chosen["threshold"] is not None:
            settle(semantic(parts, chosen["threshold"], order, config.seed), "near")
    while (keeper[keeper] != keeper).any():  # what stayed in one pass may have gone in the next
        keeper = keeper[keeper]
    is_keeper = reason == 0
    if not (is_keeper & pairs.is_train).any():
        raise DataError(
            "no training picture is left after [dedup]: raise [dedup] threshold, or leave the "
            "section out"
        )
    write_keepers(embed, out, is_keeper)
    write_groups(pairs, parts, keeper, reason, out / "groups.parquet")
    (out / "threshold.json").write_text(json.dumps(chosen, indent=1))
    copy_groups = groups(keeper)
    listed = np.array(
        [
            row
            for stays, copies_of in copy_groups[:MAX_LISTED_GROUPS]
            for row in (stays, *copies_of)
        ],
        np.int64,
    )
    locations = dict(zip(listed.tolist(), metadata_of(metadata, listed, LOCATION), strict=True))
    show(
        copy_groups,
        locations,
        shards,
        [f"{1 + len(copies_of)} of a kind" for _, copies_of in copy_groups],
        out / "groups.png",
    )
    numbers = np.bincount(reason, minlength=len(REASONS)).tolist()
    dropped = {
        why: number for why, number in sorted(zip(REASONS[1:], numbers[1:], strict=True)) if number
    }
    summary: dict[str, Any] = {
        name: chosen[name] for name in ("threshold", "precision", "recall") if name in chosen
    }
    return {
        "in": count,
        "out": numbers[0],
        "dropped": dropped,
        "groups": len(copy_groups),
        **summary,
    }


def read_pairs(metadata: Path, count: int) -> Pairs:
    """Read what is judged of every pair. Raises DataError unless there are `count`."""
    columns: list[list[NDArray[Any]]] = [[] for _ in Pairs._fields]
    for batch in metadata_batches(
        metadata, ["key", "sha256", "concept", "width_px", "height_px", "split"]
    ):
        concepts = pc.fill_null(batch["concept"], "")
        alone = pc.if_else(pc.equal(concepts, ""), batch["key"], concepts)
        columns[0].append(np.array([key.encode() for key in batch["key"].to_pylist()], "S"))
        columns[1].append(np.array(batch["sha256"].to_pylist(), "S64"))
        columns[2].append(hashes_of(pa.chunked_array([alone])))
        columns[3].append(
            batch["width_px"].to_numpy().astype(np.int64) * batch["height_px"].to_numpy()
        )
        columns[4].append(pc.equal(batch["split"], "train").to_numpy(zero_copy_only=False))
    pairs = Pairs(*(np.concatenate(column) for column in columns))
    if len(pairs.keys) != count:
        raise DataError(f"{metadata}: {len(pairs.keys)} rows of metadata for {count} vectors")
    return pairs


def transformations(rng: np.random.Generator) -> list[tuple[str, Callable[[Pixels], Pixels]]]:
    """Return what makes a copy of a picture that a person takes for the same: RGB uint8 (S, S, 3)
    in and out.
    """

    def resized(picture: Pixels) -> Pixels:
        small = cv2.resize(picture, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
        return np.asarray(
            cv2.resize(small, picture.shape[1::-1], interpolation=cv2.INTER_CUBIC), np.uint8
        )

    def compressed(picture: Pixels) -> Pixels:
        coded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 50])[1]
        return np.ascontiguousarray(
            np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)[..., ::-1]
        )

    def shifted(picture: Pixels) -> Pixels:
        step = max(1, picture.shape[0] // 32)
        return np.asarray(
            cv2.copyMakeBorder(picture[step:, step:], 0, step, 0, step, cv2.BORDER_REPLICATE),
            np.uint8,
        )

    def brighter(picture: Pixels) -> Pixels:
        return np.clip(picture.astype(np.float32) * 1.08, 0, 255).astype(np.uint8)

    def cropped(picture: Pixels) -> Pixels:
        edge = max(1, picture.shape[0] // 24)
        return np.asarray(
            cv2.resize(
                picture[edge:-edge, edge:-edge], picture.shape[1::-1], interpolation=cv2.INTER_AREA
            ),
            np.uint8,
        )

    def noisy(picture: Pixels) -> Pixels:
        return np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)

    return [
        ("resized", resized),
        ("jpeg", compressed),
        ("shifted", shifted),
        ("brighter", brighter),
        ("cropped", cropped),
        ("noise", noisy),
    ]


def choose_threshold(
    config: DedupConfig,
    pairs: Pairs,
    parts: Sequence[NDArray[Any]],
    looks: Looks,
    metadata: Path,
    shards: Path,
    encode_images: EncodeImages,
    side_px: int,
) -> dict[str, Any]:
    """Return the threshold with its precision and recall on pairs whose truth is known, and the
    recall of each transformation.

    Copies are sampled pictures against their own transformations. Of what is no copy, the hardest:
    the nearest other picture with another concept that does not look alike. Every other sampled
    picture chooses the lowest threshold with the precision; the figures are those of the others,
    which had no say. A threshold in the recipe is measured the same. Where no threshold has the
    precision, it is None: this CLIP cannot tell copies from the rest, and nothing goes on its word;
    the figures are those at the one that was nearest to it.
    """
    rng = np.random.default_rng(config.seed)
    rows = np.sort(rng.choice(len(pairs.keys), min(config.sample, len(pairs.keys)), replace=False))
    pictures = np.stack(
        [
            read_picture(location, shards, side_px)
            for location in metadata_of(metadata, rows, LOCATION)
        ]
    )
    originals = unit(np.asarray(encode_images(pictures), np.float32))
    copies = {
        name: np.einsum(
            "nd,nd->n",
            originals,
            unit(
                np.asarray(
                    encode_images(np.stack([change(image) for image in pictures])), np.float32
                )
            ),
        )
        for name, change in transformations(rng)
    }
    others = hardest_others(config, pairs, parts, looks, rows, originals)
    thresholds = STEPS if config.threshold is None else np.array([config.threshold])
    positives, negatives = (
        [np.concatenate([changed[half::2] for changed in copies.values()]) for half in (0, 1)],
        [others[0::2], others[1::2]],
    )
    right, wrong = (
        np.array([(cosines[None] >= thresholds[:, None]).sum(1) for cosines in kind])
        for kind in (positives, negatives)
    )
    precision = right / np.maximum(right + wrong, 1)  # (2 halves, T thresholds)
    good = np.flatnonzero((precision[0] >= config.precision) & (right[0] > 0))
    is_met = len(good) > 0 or config.threshold is not None
    at = int(good[0]) if len(good) else int(precision[0].argmax())
    threshold = float(thresholds[at])
    recall = right[1] / len(positives[1])
    return {
        "threshold": round(threshold, 4) if is_met else None,
        "precision": float(precision[1][at]),
        "recall": float(recall[at]),
        "copies": len(positives[1]),
        "others": int((negatives[1] > -1).sum()),
        "recall_of": {
            name: float((cosines[1::2] >= threshold).mean()) for name, cosines in copies.items()
        },
        "curve": [
            [round(float(t), 4), float(p), float(r)]
            for t, p, r in zip(thresholds, precision[1], recall, strict=True)
        ],
    }


def hardest_others(
    config: DedupConfig,
    pairs: Pairs,
    parts: Sequence[NDArray[Any]],
    looks: Looks,
    rows: Rows,
    originals: Floats,
) -> Floats:
    """Return for each sampled row (S,) its best cosine with a picture of another concept that does
    not look alike; -1 without any.
    """
    best = np.full(len(rows), -1, np.float32)
    for start in range(0, len(pairs.keys), CHUNK_ROWS):
        piece = np.arange(start, min(start + CHUNK_ROWS, len(pairs.keys)))
        scores = originals @ unit(take(parts, piece)).T
        for number, row in enumerate(rows):
            is_other = pairs.concepts[piece] != pairs.concepts[row]
            near = piece[
                is_other
                & (
                    np.bitwise_count(looks.hashes[piece] ^ looks.hashes[row])
                    <= config.max_hash_bits
                )
            ]
            apart = looks.thumbs[near].astype(np.float32) - looks.thumbs[row]
            is_other[near[np.sqrt((apart * apart).mean((1, 2, 3))) <= config.max_rms] - start] = (
                False
            )
            best[number] = max(best[number], scores[number][is_other].max(initial=-1))
    return best


def write_keepers(embed: Path, out: Path, is_keeper: NDArray[np.bool_]) -> None:
    """Write the embed layout of the rows that stay (N,), in as many files, and keep.parquet."""
    for name in ("img_emb", "text_emb"):
        (out / name).mkdir()
        start = 0
        for file in part_files(embed / name):
            part = np.load(file, mmap_mode="r")
            np.save(out / name / file.name, part[is_keeper[start : start + len(part)]])
            start += len(part)
    (out / "metadata").mkdir()
    start = 0
    with pq.ParquetWriter(out / "keep.parquet", EMBEDDED) as keep:
        for file in sorted((embed / "metadata").glob("*.parquet")):
            with (
                open_parquet(file) as opened,
                pq.ParquetWriter(out / "metadata" / file.name, EMBEDDED) as writer,
            ):
                for batch in opened.iter_batches(CHUNK_ROWS):
                    keepers = pa.Table.from_batches([batch]).filter(
                        pa.array(is_keeper[start : start + batch.num_rows])
                    )
                    start += batch.num_rows
                    for resource in (keep, writer):
                        resource.write_table(keepers.select(EMBEDDED.names).cast(EMBEDDED))
    facts = json.loads((embed / "facts.json").read_text())
    (out / "facts.json").write_text(json.dumps(facts | {"count": int(is_keeper.sum())}, indent=1))


def write_groups(
    pairs: Pairs, parts: Sequence[NDArray[Any]], keeper: Rows, reason: NDArray[np.int8], file: Path
) -> None:
    """Write a row for each pair that goes: its key, the key that stays for it, why, and their
    cosine.
    """
    dropped_rows = np.flatnonzero(reason)
    with pq.ParquetWriter(file, GROUPS) as writer:
        for start in range(0, len(dropped_rows), CHUNK_ROWS):
            rows = dropped_rows[start : start + CHUNK_ROWS]
            keys = [
                [key.decode() for key in pairs.keys[row_numbers].tolist()]
                for row_numbers in (rows, keeper[rows])
            ]
            scores = np.einsum("nd,nd->n", unit(take(parts, rows)), unit(take(parts, keeper[rows])))
            writer.write_table(
                pa.table(
                    [*keys, [REASONS[code] for code in reason[rows]], scores.astype(np.float32)],
                    schema=GROUPS,
                )
            )


def show(
    copy_groups: Sequence[tuple[int, list[int]]],
    locations: Sequence[dict[str, Any]] | Mapping[int, dict[str, Any]],
    shards: Path,
    titles: Sequence[str],
    file: Path,
) -> None:
    """Draw the largest groups, each below its title: the picture that stays, then those that go for
    it. `places` says where a row's is.
    """
    if not copy_groups:
        return
    white = np.full((LOOK_PX, LOOK_PX, 3), 255, np.uint8)
    rows = []
    for keeper, copies_of in copy_groups[:MAX_LISTED_GROUPS]:
        drawn = [
            read_picture(locations[row], shards, LOOK_PX)
            for row in [keeper, *copies_of[: MAX_LISTED_COPIES - 1]]
        ]
        rows.append(drawn + [white] * (MAX_LISTED_COPIES - len(drawn)))
    write_png(sheet(rows, titles[:MAX_LISTED_GROUPS]), file)
