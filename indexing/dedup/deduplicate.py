"""The stage `dedup`: find training pictures that copy each other or an evaluation picture, and
write the embeddings without them.

Three passes look for equal bytes, for equal looks and for near embeddings; each pass judges the
rows that the pass before left. Evaluation pictures always stay. Of several training pictures the
largest stays, then the one with the lowest key. Reads an embed folder and the shards. Writes the
same embed layout (prior and decoder train on it), keep.parquet (up-samplers train on it),
groups.parquet, groups.png and threshold.json. Memory: about 200 bytes a pair, and what
indexing.dedup.near_pairs takes; tables and small copies are read in pieces.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from indexing.ann.keys import hashes_of
from indexing.data.contact_sheet import SHEET_SCALE, contact_sheet
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
from indexing.data.images import Pixels, read_picture, write_png
from indexing.dedup.grouping import MAX_BITS, MAX_RMS, exact, groups, perceptual, semantic
from indexing.dedup.perceptual_hash import LOCATION, READ_PX, PictureHashes, hash_pictures
from indexing.metrics.clip_score import EncodeImages
from infra.compute.memory import PeakMemory
from infra.errors import DataError
from infra.schemas import EMBEDDED, open_parquet
from infra.settings import Section
from infra.storage.manifest_schema import StageCounts
from infra.storage.shard_reader import ShardReader

REASONS = ("", "equal", "alike", "near", "evaluation_equal", "evaluation_alike", "evaluation_near")
"""Why a pair is dropped; the last three are copies of an evaluation picture. "" is a pair that
stays."""
MAX_LISTED_GROUPS, MAX_LISTED_COPIES = 12, 6
STEPS = np.concatenate([np.arange(0.5, 0.99, 0.0025), np.arange(0.99, 0.99995, 0.0001)])
"""Thresholds to choose from: cosines, ascending."""
GROUPS = pa.schema(
    [
        ("key", pa.string()),
        ("keeper", pa.string()),
        ("reason", pa.string()),
        ("score", pa.float32()),
    ]
)


class Copy(TypedDict):
    """A row of GROUPS: a pair that is dropped."""

    key: str
    keeper: str
    """Key of the pair that stays."""
    reason: str
    score: float
    """Cosine of the two pictures."""


class DedupCounts(StageCounts):
    """The counts of the stage's manifest; the last three where near embeddings count as copies."""

    groups: int
    peak_bytes: NotRequired[int]
    threshold: NotRequired[float | None]
    precision: NotRequired[float]
    recall: NotRequired[float]


class DedupConfig(Section):
    """[dedup]: which training pictures count as copies, of each other or of evaluation pictures,
    and are left out of training.
    """

    max_hash_bits: int = Field(default=MAX_BITS, ge=0, le=15)
    """Maximum number of pHash's 64 bits that may differ between pictures that look alike; `max_rms`
    must hold as well."""
    max_rms: float = Field(default=MAX_RMS, ge=0, le=255)
    """Maximum root mean square difference (0 to 255) of the 8 px colour copies of pictures that
    look alike: pHash does not see colours."""
    semantic: bool = True
    """Whether near embeddings count as copies, too."""
    threshold: float | None = Field(default=None, gt=0, le=1)
    """Minimum cosine of near embeddings; by default the lowest that has the precision on the
    labelled sample."""
    precision: float = Field(default=0.995, gt=0.5, le=1)
    """Share of the labelled pairs at or above the threshold that must be copies."""
    sample: int = Field(default=256, ge=16)
    """Number of pictures in the labelled sample; every known transformation is applied to each."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sample and of the cells."""


class Pairs(NamedTuple):
    """What the passes know of every pair besides its picture (N,)."""

    keys: NDArray[np.bytes_]
    digests: NDArray[np.bytes_]
    """SHA-256 of the pictures' bytes, in hexadecimal."""
    concepts: NDArray[np.uint64]
    """Hash of the pair's concept, or of its key where it has no concept."""
    pixels: NDArray[np.int64]
    is_train: NDArray[np.bool_]


@dataclass(frozen=True)
class Inputs:
    """What the stage reads: all pairs, their image vectors ((n, D) parts), their hashes, and where
    metadata and shards are.
    """

    pairs: Pairs
    parts: list[NDArray[Any]]
    picture_hashes: PictureHashes
    metadata: Path
    shards: ShardReader


@dataclass(frozen=True)
class Threshold:
    """A cosine threshold and what it does on the labelled sample; threshold.json holds these
    fields.
    """

    threshold: float | None
    """None where no threshold has the precision: the other fields then describe the best one."""
    precision: float
    recall: float
    copies: int
    """Pairs of the judging half that are copies."""
    others: int
    """Pairs of the judging half that are not copies."""
    recall_of: dict[str, float]
    """Recall of each transformation."""
    curve: list[list[float]]
    """[threshold, precision, recall] for every threshold."""


class Verdicts:
    """Which row stays for each row, and why the others are dropped, pass after pass."""

    def __init__(self, pairs: Pairs) -> None:
        """Start with all rows; the best rows come first in `order`: evaluation pictures, then large
        ones, then low keys.
        """
        self.is_train = pairs.is_train
        self.keeper = np.arange(len(pairs.keys))
        self.reason = np.zeros(len(pairs.keys), np.int8)  # index into REASONS
        self.order = np.lexsort((pairs.keys, -pairs.pixels, pairs.is_train)).astype(np.int64)

    def drop(self, keeper_of: Rows, why: str) -> None:
        """Drop the training rows for which `keeper_of` (N,) names another row, for the reason
        `why`.
        """
        is_copy = keeper_of != np.arange(len(keeper_of))
        dropped_rows = np.flatnonzero(is_copy & self.is_train & (self.reason == 0))
        self.keeper[dropped_rows] = keeper_of[dropped_rows]
        self.reason[dropped_rows] = np.where(
            self.is_train[keeper_of[dropped_rows]],
            REASONS.index(why),
            REASONS.index(f"evaluation_{why}"),
        )
        self.order = self.order[self.reason[self.order] == 0]

    def final_keeper(self) -> Rows:
        """Return the row that stays for each row (N,): one that stayed in a pass may be dropped in
        the next, for another one.
        """
        keeper = self.keeper
        while (keeper[keeper] != keeper).any():
            keeper = keeper[keeper]
        return keeper


def run(
    config: DedupConfig,
    shards: ShardReader,
    embed: Path,
    encode_images: EncodeImages,
    side_px: int,
    out: Path,
) -> DedupCounts:
    """Write the embeddings without copies and return the counts.

    `encode_images` is the CLIP that made the embeddings, for squares of `side_px`. Raises DataError
    where a picture cannot be read or no training picture is left.
    """
    with PeakMemory() as memory, tempfile.TemporaryDirectory(dir=out, prefix=".hashes-") as staging:
        inputs = _read_inputs(embed, shards, Path(staging) / "thumbs")
        counts = _run(config, inputs, embed, encode_images, side_px, out)
    return {**counts, "peak_bytes": memory.bytes}


def _read_inputs(embed: Path, shards: ShardReader, thumbs: Path) -> Inputs:
    """Read the pairs and look at all pictures once; their small copies go to the file `thumbs`."""
    _, count, dim = read_facts(embed)
    metadata = embed / "metadata"
    return Inputs(
        read_pairs(metadata, count),
        open_parts(embed / "img_emb", count, dim),
        hash_pictures(metadata_batches(metadata, LOCATION), shards.sequential(), thumbs),
        metadata,
        shards,
    )


def _run(
    config: DedupConfig,
    inputs: Inputs,
    embed: Path,
    encode_images: EncodeImages,
    side_px: int,
    out: Path,
) -> DedupCounts:
    verdicts = Verdicts(inputs.pairs)
    verdicts.drop(exact(inputs.pairs.digests, verdicts.order), "equal")
    alike = perceptual(*inputs.picture_hashes, verdicts.order, config.max_hash_bits, config.max_rms)
    verdicts.drop(alike, "alike")
    chosen = choose_threshold(config, inputs, encode_images, side_px) if config.semantic else None
    if chosen and chosen.threshold is not None:
        near = semantic(inputs.parts, chosen.threshold, verdicts.order, config.seed)
        verdicts.drop(near, "near")
    is_keeper = verdicts.reason == 0
    if not (is_keeper & inputs.pairs.is_train).any():
        raise DataError(
            "no training picture is left after [dedup]: raise [dedup] threshold, or leave the "
            "section out"
        )
    keeper = verdicts.final_keeper()
    write_keepers(embed, out, is_keeper)
    write_groups(inputs.pairs, inputs.parts, keeper, verdicts.reason, out / "groups.parquet")
    (out / "threshold.json").write_text(json.dumps(asdict(chosen) if chosen else {}, indent=1))
    copy_groups = groups(keeper)
    _draw_largest(copy_groups, inputs, out / "groups.png")
    return _counts(verdicts.reason, len(copy_groups), chosen)


def _draw_largest(copy_groups: Sequence[tuple[int, list[int]]], inputs: Inputs, file: Path) -> None:
    """Draw the largest groups, titled with their sizes."""
    largest = copy_groups[:MAX_LISTED_GROUPS]
    listed = np.array([row for keeper, copies in largest for row in (keeper, *copies)], np.int64)
    locations = metadata_of(inputs.metadata, listed, LOCATION)
    titles = [f"{1 + len(copies)} of a kind" for _, copies in largest]
    show(largest, dict(zip(listed.tolist(), locations, strict=True)), inputs.shards, titles, file)


def _counts(reason: NDArray[np.int8], group_count: int, chosen: Threshold | None) -> DedupCounts:
    """Return what the stage's manifest says: pairs in and out, dropped for each reason, and the
    threshold.
    """
    numbers = np.bincount(reason, minlength=len(REASONS)).tolist()
    dropped = {
        why: number for why, number in sorted(zip(REASONS[1:], numbers[1:], strict=True)) if number
    }
    counts: DedupCounts = {
        "in": len(reason),
        "out": numbers[0],
        "dropped": dropped,
        "groups": group_count,
    }
    if chosen is not None:
        counts["threshold"] = chosen.threshold
        counts["precision"] = chosen.precision
        counts["recall"] = chosen.recall
    return counts


def read_pairs(metadata: Path, count: int) -> Pairs:
    """Read what the passes need to know of every pair.

    Raises DataError unless there are `count` pairs.
    """
    columns = ["key", "sha256", "concept", "width_px", "height_px", "split"]
    pieces = [_pairs_of(batch) for batch in metadata_batches(metadata, columns)]
    pairs = Pairs(*(np.concatenate(column) for column in zip(*pieces, strict=True)))
    if len(pairs.keys) != count:
        raise DataError(f"{metadata}: {len(pairs.keys)} rows of metadata for {count} vectors")
    return pairs


def _pairs_of(batch: pa.RecordBatch) -> Pairs:
    concepts = pc.fill_null(batch["concept"], "")
    concept_or_key = pc.if_else(pc.equal(concepts, ""), batch["key"], concepts)
    return Pairs(
        keys=np.array([key.encode() for key in batch["key"].to_pylist()], "S"),
        digests=np.array(batch["sha256"].to_pylist(), "S64"),
        concepts=hashes_of(pa.chunked_array([concept_or_key])),
        pixels=batch["width_px"].to_numpy().astype(np.int64) * batch["height_px"].to_numpy(),
        is_train=pc.equal(batch["split"], "train").to_numpy(zero_copy_only=False),
    )


def transformations(rng: np.random.Generator) -> list[tuple[str, Callable[[Pixels], Pixels]]]:
    """Return named functions that make a copy of a picture, RGB uint8 (S, S, 3), which a person
    takes for the same picture; `rng` draws the noise.
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
    config: DedupConfig, inputs: Inputs, encode_images: EncodeImages, side_px: int
) -> Threshold:
    """Return the threshold with its precision and recall on pairs whose truth is known.

    The positive pairs are sampled pictures with their own transformations. The negative pairs are
    the hardest: each sampled picture with the nearest picture of another concept that does not look
    alike. One half of the sampled pictures chooses the lowest threshold that has the precision; the
    figures are those of the other half. A threshold in the recipe is measured in the same way.
    Where no threshold has the precision, it is None and no pair is dropped for a near embedding;
    the figures are those of the threshold with the highest precision.
    """
    rng = np.random.default_rng(config.seed)
    count = len(inputs.pairs.keys)
    rows = np.sort(rng.choice(count, min(config.sample, count), replace=False))
    locations = metadata_of(inputs.metadata, rows, LOCATION)
    pictures = np.stack([read_picture(location, inputs.shards, side_px) for location in locations])
    originals = _unit_vectors(encode_images, pictures)
    copies: dict[str, Floats] = {}  # cosines (S,) of each transformation
    for name, change in transformations(rng):
        changed = np.stack([change(picture) for picture in pictures])
        copies[name] = np.einsum("nd,nd->n", originals, _unit_vectors(encode_images, changed))
    return _pick(config, copies, hardest_others(config, inputs, rows, originals))


def _unit_vectors(encode_images: EncodeImages, pictures: Pixels) -> Floats:
    return unit(np.asarray(encode_images(pictures), np.float32))


def _pick(config: DedupConfig, copies: Mapping[str, Floats], others: Floats) -> Threshold:
    """Choose the threshold on the even sampled pictures and measure it on the odd ones.

    `copies` holds the cosines (S,) of each transformation, `others` those of the negative pairs.
    """
    thresholds = STEPS if config.threshold is None else np.array([config.threshold])
    positives = [
        np.concatenate([cosines[half::2] for cosines in copies.values()]) for half in (0, 1)
    ]
    negatives = [others[0::2], others[1::2]]
    right, wrong = (
        np.array([(cosines[None] >= thresholds[:, None]).sum(1) for cosines in kind])
        for kind in (positives, negatives)
    )
    precision = right / np.maximum(right + wrong, 1)  # (2 halves, T thresholds)
    recall = right[1] / len(positives[1])
    good = np.flatnonzero((precision[0] >= config.precision) & (right[0] > 0))
    is_met = len(good) > 0 or config.threshold is not None
    at = int(good[0]) if len(good) else int(precision[0].argmax())
    threshold = float(thresholds[at])
    return Threshold(
        threshold=round(threshold, 4) if is_met else None,
        precision=float(precision[1][at]),
        recall=float(recall[at]),
        copies=len(positives[1]),
        others=int((negatives[1] > -1).sum()),
        recall_of={
            name: float((cosines[1::2] >= threshold).mean()) for name, cosines in copies.items()
        },
        curve=[
            [round(float(t), 4), float(p), float(r)]
            for t, p, r in zip(thresholds, precision[1], recall, strict=True)
        ],
    )


def hardest_others(config: DedupConfig, inputs: Inputs, rows: Rows, originals: Floats) -> Floats:
    """Return each sampled row's best cosine (S,) with a picture of another concept that does not
    look alike; -1 where there is none. `originals` (S, D) are the unit vectors of the rows.
    """
    pairs, picture_hashes = inputs.pairs, inputs.picture_hashes
    best = np.full(len(rows), -1, np.float32)
    for start in range(0, len(pairs.keys), CHUNK_ROWS):
        piece = np.arange(start, min(start + CHUNK_ROWS, len(pairs.keys)))
        scores = originals @ unit(take(inputs.parts, piece)).T
        for number, row in enumerate(rows):
            is_other = pairs.concepts[piece] != pairs.concepts[row]
            bits = np.bitwise_count(picture_hashes.hashes[piece] ^ picture_hashes.hashes[row])
            near = piece[is_other & (bits <= config.max_hash_bits)]
            apart = picture_hashes.thumbs[near].astype(np.float32) - picture_hashes.thumbs[row]
            is_alike = np.sqrt((apart * apart).mean((1, 2, 3))) <= config.max_rms
            is_other[near[is_alike] - start] = False
            best[number] = max(best[number], scores[number][is_other].max(initial=-1))
    return best


def write_keepers(embed: Path, out: Path, is_keeper: NDArray[np.bool_]) -> None:
    """Write the rows that stay (N,) in the embed layout, one file for each input file, and to
    keep.parquet.
    """
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
                    for parquet in (keep, writer):
                        parquet.write_table(keepers.select(EMBEDDED.names).cast(EMBEDDED))
    facts = json.loads((embed / "facts.json").read_text())
    (out / "facts.json").write_text(json.dumps(facts | {"count": int(is_keeper.sum())}, indent=1))


def write_groups(
    pairs: Pairs, parts: Sequence[NDArray[Any]], keeper: Rows, reason: NDArray[np.int8], file: Path
) -> None:
    """Write a row for each dropped pair: its key, the key that stays for it, the reason, and the
    cosine of the two.
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
    shards: ShardReader,
    titles: Sequence[str],
    file: Path,
) -> None:
    """Draw the largest groups, each below its title: the picture that stays, then its copies.

    `locations` says for each row which shard holds its picture, and where.
    """
    if not copy_groups:
        return
    white = np.full((READ_PX, READ_PX, 3), 255, np.uint8)
    rows = []
    for keeper, copies_of in copy_groups[:MAX_LISTED_GROUPS]:
        drawn = [
            read_picture(locations[row], shards, READ_PX)
            for row in [keeper, *copies_of[: MAX_LISTED_COPIES - 1]]
        ]
        rows.append(drawn + [white] * (MAX_LISTED_COPIES - len(drawn)))
    write_png(contact_sheet(rows, titles[:MAX_LISTED_GROUPS], scale=SHEET_SCALE), file)
