"""The stage `dedup`: which training pictures are copies of each other or of an evaluation picture, and the embeddings without them.

Three passes, each judging what the one before has kept: equal bytes, equal looks, near embeddings. Evaluation pictures stay whatever
happens; of training pictures the larger one stays, then the lower key. Reads an embed folder and the shards; writes the same embed layout
(which prior and decoder then train on), keep.parquet, groups.parquet, groups.png and threshold.json.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from indexing.dedup import exact, groups, look_of, perceptual, semantic
from indexing.embeddings import CHUNK_ROWS, Floats, Rows, open_parts, read_facts, read_metadata, take, unit
from indexing.generation import EncodeImages
from indexing.pictures import Pixels, read_picture, sheet, write_png
from infra.errors import DataError
from infra.settings import Section
from infra.tables import EMBEDDED

READERS = 4
LOOK_PX = 64
SHOWN_GROUPS, SHOWN_COPIES = 12, 6
STEPS = np.concatenate([np.arange(0.5, 0.99, 0.0025), np.arange(0.99, 0.99995, 0.0001)])
GROUPS = pa.schema([("key", pa.string()), ("keeper", pa.string()), ("reason", pa.string()), ("score", pa.float32())])


class DedupConfig(Section):
    """[dedup]: leaving the section out leaves the stage out."""

    max_hash_bits: int = Field(default=6, ge=0, le=15)
    """Pictures look alike with at most so many of pHash's 64 bits apart, and ..."""
    max_rms: float = Field(default=12, ge=0, le=255)
    """... their 8 px copies at most this far apart, of 255: pHash knows no colours."""
    semantic: bool = True
    """Whether near embeddings count as copies, too."""
    threshold: float | None = Field(default=None, gt=0, le=1)
    """Least cosine of near embeddings; by default the lowest that has the precision on the labelled sample."""
    precision: float = Field(default=0.995, gt=0.5, le=1)
    """Share of the labelled pairs at or above the threshold that must be copies."""
    sample: int = Field(default=256, ge=16)
    """Pictures of the labelled sample, each with every known transformation."""
    seed: int = Field(default=0, ge=0)
    """Draws the sample and the cells."""


def run(config: DedupConfig, shards: Path, embed: Path, encode_images: EncodeImages, side_px: int, out: Path) -> dict[str, Any]:
    """Write the embeddings without copies and return the counts. `encode_images` is the CLIP that made them, for squares of `side_px`.

    Raises DataError where a picture cannot be read or no training picture is left.
    """
    _, count, dim = read_facts(embed)
    table = read_metadata(embed / "metadata", EMBEDDED.names, count)
    parts = open_parts(embed / "img_emb", count, dim)
    places = table.select(["shard", "member", "offset", "size_bytes"]).to_pylist()
    with ThreadPoolExecutor(READERS) as pool:
        looks = list(pool.map(lambda place: look_of(read_picture(place, shards, LOOK_PX)), places))
    hashes, thumbs = np.array([each[0] for each in looks], np.uint64), np.stack([each[1] for each in looks])
    is_train = np.array([split == "train" for split in table["split"].to_pylist()])
    order = judged_order(table, is_train)
    keeper = np.arange(count)
    reason = np.full(count, "", "U16")

    def settle(found: Rows, why: str) -> None:
        nonlocal order
        gone = np.flatnonzero((found != np.arange(count)) & is_train & (reason == ""))
        keeper[gone] = found[gone]
        reason[gone] = [("evaluation_" if not is_train[found[row]] else "") + why for row in gone]
        order = order[reason[order] == ""]

    settle(exact(table["sha256"].to_pylist(), order), "equal")
    settle(perceptual(hashes, thumbs, order, config.max_hash_bits, config.max_rms), "alike")
    chosen: dict[str, Any] = {}
    if config.semantic:
        chosen = choose_threshold(config, table, parts, looks, shards, encode_images, side_px)
        if chosen["threshold"] is not None:
            settle(semantic(parts, chosen["threshold"], order, config.seed), "near")
    while (keeper[keeper] != keeper).any():  # what stayed in one pass may have gone in the next
        keeper = keeper[keeper]
    is_kept = reason == ""
    if not (is_kept & is_train).any():
        raise DataError("no training picture is left after [dedup]: raise [dedup] threshold, or leave the section out")
    write_kept(embed, out, table, is_kept, count, dim)
    scores = np.einsum("nd,nd->n", unit(take(parts, np.flatnonzero(~is_kept))), unit(take(parts, keeper[~is_kept])))
    keys = np.array(table["key"].to_pylist())
    listed = {"key": keys[~is_kept], "keeper": keys[keeper[~is_kept]], "reason": reason[~is_kept], "score": scores.astype(np.float32)}
    pq.write_table(pa.table(listed, schema=GROUPS), out / "groups.parquet")
    (out / "threshold.json").write_text(json.dumps(chosen, indent=1))
    found = groups(keeper)
    show(found, places, shards, [f"{1 + len(gone)} of a kind" for _, gone in found], out / "groups.png")
    dropped = {str(why): int(number) for why, number in zip(*np.unique(reason[~is_kept], return_counts=True), strict=True)}
    told: dict[str, Any] = {name: chosen[name] for name in ("threshold", "precision", "recall") if name in chosen}
    return {"in": count, "out": int(is_kept.sum()), "dropped": dropped, "groups": len(found), **told}


def judged_order(table: pa.Table, is_train: NDArray[np.bool_]) -> Rows:
    """Return the rows, the best first: evaluation pictures, then larger pictures, then lower keys."""
    pixels = table["width_px"].to_numpy().astype(np.int64) * table["height_px"].to_numpy()
    keys = np.array(table["key"].to_pylist())
    return np.lexsort((keys, -pixels, is_train)).astype(np.int64)


def transformations(rng: np.random.Generator) -> list[tuple[str, Callable[[Pixels], Pixels]]]:
    """Return what makes a copy of a picture that a person takes for the same: RGB uint8 (S, S, 3) in and out."""

    def resized(picture: Pixels) -> Pixels:
        small = cv2.resize(picture, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
        return np.asarray(cv2.resize(small, picture.shape[1::-1], interpolation=cv2.INTER_CUBIC), np.uint8)

    def compressed(picture: Pixels) -> Pixels:
        coded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 50])[1]
        return np.ascontiguousarray(np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)[..., ::-1])

    def shifted(picture: Pixels) -> Pixels:
        step = max(1, picture.shape[0] // 32)
        return np.asarray(cv2.copyMakeBorder(picture[step:, step:], 0, step, 0, step, cv2.BORDER_REPLICATE), np.uint8)

    def brighter(picture: Pixels) -> Pixels:
        return np.clip(picture.astype(np.float32) * 1.08, 0, 255).astype(np.uint8)

    def cropped(picture: Pixels) -> Pixels:
        edge = max(1, picture.shape[0] // 24)
        return np.asarray(cv2.resize(picture[edge:-edge, edge:-edge], picture.shape[1::-1], interpolation=cv2.INTER_AREA), np.uint8)

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
    table: pa.Table,
    parts: Sequence[NDArray[Any]],
    looks: Sequence[tuple[np.uint64, NDArray[np.uint8]]],
    shards: Path,
    encode_images: EncodeImages,
    side_px: int,
) -> dict[str, Any]:
    """Return the threshold with its precision and recall on pairs whose truth is known, and the recall of each transformation.

    Copies are sampled pictures against their own transformations. Of what is no copy, the hardest: the nearest other picture with another
    concept that does not look alike. A threshold in the recipe is measured the same. Where no threshold has the precision, it is None:
    this CLIP cannot tell copies from the rest, and nothing goes on its word; the figures are those of the best one.
    """
    rng = np.random.default_rng(config.seed)
    rows = np.sort(rng.choice(len(table), min(config.sample, len(table)), replace=False))
    places = table.take(rows).to_pylist()
    pictures = np.stack([read_picture(place, shards, side_px) for place in places])
    own = unit(np.asarray(encode_images(pictures), np.float32))
    copies = {
        name: np.einsum("nd,nd->n", own, unit(np.asarray(encode_images(np.stack([change(each) for each in pictures])), np.float32)))
        for name, change in transformations(rng)
    }
    others = hardest_others(config, table, parts, looks, rows, own)
    positives = np.concatenate(list(copies.values()))
    thresholds = STEPS if config.threshold is None else np.array([config.threshold])
    right = (positives[None] >= thresholds[:, None]).sum(1)
    wrong = (others[None] >= thresholds[:, None]).sum(1)
    precision = right / np.maximum(right + wrong, 1)
    good = np.flatnonzero((precision >= config.precision) & (right > 0))
    is_met = len(good) > 0 or config.threshold is not None
    at = int(good[0]) if len(good) else int(precision.argmax())
    threshold = float(thresholds[at])
    return {
        "threshold": round(threshold, 4) if is_met else None,
        "precision": float(precision[at]),
        "recall": float(right[at] / len(positives)),
        "copies": len(positives),
        "others": len(others),
        "recall_of": {name: float((cosines >= threshold).mean()) for name, cosines in copies.items()},
        "curve": [[round(float(t), 4), float(p), float(r / len(positives))] for t, p, r in zip(thresholds, precision, right, strict=True)],
    }


def hardest_others(
    config: DedupConfig,
    table: pa.Table,
    parts: Sequence[NDArray[Any]],
    looks: Sequence[tuple[np.uint64, NDArray[np.uint8]]],
    rows: Rows,
    own: Floats,
) -> Floats:
    """Return for each sampled row (S,) its best cosine with a picture of another concept that does not look alike."""
    concepts = np.array([concept or key for concept, key in zip(table["concept"].to_pylist(), table["key"].to_pylist(), strict=True)])
    hashes, thumbs = np.array([each[0] for each in looks], np.uint64), np.stack([each[1] for each in looks]).reshape(len(looks), -1)
    best = np.full(len(rows), -1, np.float32)
    for start in range(0, len(table), CHUNK_ROWS):
        piece = np.arange(start, min(start + CHUNK_ROWS, len(table)))
        scores = own @ unit(take(parts, piece)).T
        for place, row in enumerate(rows):
            bits = np.bitwise_count(hashes[piece] ^ hashes[row])
            rms = np.sqrt(((thumbs[piece].astype(np.float32) - thumbs[row]) ** 2).mean(1))
            is_other = (concepts[piece] != concepts[row]) & ~((bits <= config.max_hash_bits) & (rms <= config.max_rms))
            best[place] = max(best[place], scores[place][is_other].max(initial=-1))
    return best[best > -1]


def write_kept(embed: Path, out: Path, table: pa.Table, is_kept: NDArray[np.bool_], count: int, dim: int) -> None:
    """Write the embed layout of the rows that stay, and keep.parquet."""
    for name in ("img_emb", "text_emb"):
        (out / name).mkdir()
        start = 0
        for number, part in enumerate(open_parts(embed / name, count, dim)):
            np.save(out / name / f"{name}_{number:04d}.npy", part[is_kept[start : start + len(part)]])
            start += len(part)
    kept = table.filter(pa.array(is_kept)).cast(EMBEDDED)
    (out / "metadata").mkdir()
    pq.write_table(kept, out / "metadata" / "metadata_0000.parquet")
    pq.write_table(kept, out / "keep.parquet")
    facts = json.loads((embed / "facts.json").read_text())
    (out / "facts.json").write_text(json.dumps(facts | {"count": kept.num_rows}, indent=1))


def show(
    found: Sequence[tuple[int, list[int]]],
    places: Sequence[dict[str, Any]] | Mapping[int, dict[str, Any]],
    shards: Path,
    titles: Sequence[str],
    file: Path,
) -> None:
    """Draw the largest groups, each below its title: the picture that stays, then those that go for it. `places` says where a row's is."""
    if not found:
        return
    white = np.full((LOOK_PX, LOOK_PX, 3), 255, np.uint8)
    rows = []
    for keeper, gone in found[:SHOWN_GROUPS]:
        drawn = [read_picture(places[row], shards, LOOK_PX) for row in [keeper, *gone[: SHOWN_COPIES - 1]]]
        rows.append(drawn + [white] * (SHOWN_COPIES - len(drawn)))
    write_png(sheet(rows, titles[:SHOWN_GROUPS]), file)
