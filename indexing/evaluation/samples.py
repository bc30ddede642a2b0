"""Generated pictures of the evaluation: drawn, scored by CLIP, compared with training pictures.

Returns the report's `generation`. Reads training pictures from ingest's shards; writes PNG files.
Models are callables. Legend: P prompts, K pictures of each, M queries, S side.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexing.data.contact_sheet import SHEET_SCALE, contact_sheet
from indexing.data.embedding_store import Floats, Rows, take, unit
from indexing.data.held_out import Embedded, Pairs, trained_captions
from indexing.data.images import Pixels, read_picture, write_png
from indexing.evaluation.context import Subject
from indexing.metrics.bootstrap import mean_figure
from indexing.metrics.clip_score import (
    SCALE,
    Generate,
    clip_scores,
    encoded,
    nearest_by_embedding,
    nearest_by_pixels,
    pair_clip_score,
)
from indexing.report.report_types import (
    BesideUnseen,
    GeneratedPictures,
    NearestDistances,
    Neighbour,
    PromptSamples,
    Sample,
)
from infra.storage.shard_reader import ShardReader

THUMBNAIL_PX = 64
READERS = 4
ROWS_AT_ONCE = 1024
MAX_REFERENCES = 200


@dataclass(frozen=True)
class _Neighbours:
    """The training picture nearest to each query (M,): its row in the embed folder, its value."""

    rows: Rows
    values: Floats


@dataclass(frozen=True)
class _Nearest:
    """Neighbours of the samples, then of unseen real pictures: by cosine and by RMS in pixels."""

    cosine: _Neighbours
    rms: _Neighbours
    groups: list[str]
    """The prompt of each sample and the concept of each unseen picture."""
    pool_size: int
    """Training pictures that were compared pixel by pixel."""
    train_size: int


def generation(
    subject: Subject,
    prompts: Sequence[str],
    count: int,
    pixel_pool: int,
    unseen: Pairs,
    generate: Generate,
) -> GeneratedPictures:
    """Draw `count` pictures of each prompt and score them; return the report's `generation`.

    Writes PNG files into the report's folder. `unseen` are real held-out pairs: their CLIP score
    and their distance from the training pictures are the reference for the samples. At most
    `pixel_pool` training pictures, drawn by the seed, are compared pixel by pixel.
    """
    resamples, seed = subject.resamples, subject.seed
    pictures = np.asarray(generate(list(prompts), count, seed))
    assert pictures.dtype == np.uint8 and pictures.shape[:2] == (len(prompts), count), (
        "generate returns uint8 (P, K, H, W, 3)"
    )
    flat = pictures.reshape(-1, *pictures.shape[2:])  # (P * K, S, S, 3)
    images = encoded(subject.encode_images, flat)
    texts = unit(np.asarray(subject.encode_texts(list(prompts)), np.float32))
    by_prompt = images.reshape(len(prompts), count, -1)
    scores = clip_scores(by_prompt, texts, resamples, seed)
    cosines = np.einsum("pkd,pd->pk", by_prompt, texts)
    nearest = _nearest_training(
        subject, flat, images, np.repeat(list(prompts), count), unseen, pixel_pool
    )
    sample_rows = _write_samples(subject, prompts, pictures, cosines, nearest)
    page = contact_sheet(pictures, prompts, scale=SHEET_SCALE)
    write_png(page, subject.out / "pictures" / "samples.png")
    return {
        "n": len(flat),
        "seed": seed,
        "side_px": int(flat.shape[1]),
        **scores,
        "real_pairs": pair_clip_score(unseen.images, unseen.texts, unseen.groups, resamples, seed),
        "nearest_training": {
            **_nearest_figures(nearest, len(flat), resamples, seed),
            "pixel_pool": nearest.pool_size,
            "training_pictures": nearest.train_size,
        },
        "sheet": "pictures/samples.png",
        "prompts": sample_rows,
    }


def _nearest_training(
    subject: Subject,
    pictures: Pixels,
    images: Floats,
    prompt_of: NDArray[np.str_],
    unseen: Pairs,
    pixel_pool: int,
) -> _Nearest:
    """Find the nearest training pictures of samples (P * K) and of some unseen real pictures."""
    embedded, shards, side_px = subject.embedded, subject.shards, pictures.shape[1]
    train = embedded.rows("train")
    pool = train
    if len(train) > pixel_pool:
        rng = np.random.default_rng(subject.seed)
        pool = np.sort(rng.choice(train, pixel_pool, replace=False))
    references = _evenly_spaced(len(unseen.rows), MAX_REFERENCES)
    real = [read_picture(unseen.rows[number], shards, side_px) for number in references]
    cosine, cosine_rows = nearest_by_embedding(
        np.concatenate([images, unseen.images[references]]), _vectors(embedded, train)
    )
    rms, rms_rows = nearest_by_pixels(
        np.concatenate([pictures, np.stack(real)]) if real else pictures,
        _training_pictures(embedded, pool, shards, side_px),
    )
    # Without training pictures there are no rows to look up.
    return _Nearest(
        _Neighbours(train[cosine_rows] if len(train) else cosine_rows, cosine),
        _Neighbours(pool[rms_rows] if len(pool) else rms_rows, rms),
        [*prompt_of, *(unseen.groups[number] for number in references)],
        len(pool),
        len(train),
    )


def _nearest_figures(
    nearest: _Nearest, samples: int, resamples: int, seed: int
) -> NearestDistances:
    """Return the mean distance of samples and of unseen pictures to their nearest neighbours."""
    if not nearest.train_size:
        return {}

    def beside_unseen(neighbours: _Neighbours, unit_name: str) -> BesideUnseen:
        of_samples, of_unseen = (
            mean_figure(
                neighbours.values[rows], nearest.groups[rows], resamples, seed, unit=unit_name
            )
            for rows in (slice(samples), slice(samples, None))
        )
        return {"samples": of_samples, "unseen": of_unseen}

    return {
        "cosine": beside_unseen(nearest.cosine, "cosine"),
        "rms": beside_unseen(nearest.rms, "of 255"),
    }


def _write_samples(
    subject: Subject,
    prompts: Sequence[str],
    pictures: NDArray[np.uint8],
    cosines: Floats,
    nearest: _Nearest,
) -> list[PromptSamples]:
    """Write samples (P, K, S, S, 3) and their neighbours; return the report's `prompts`."""
    folder = subject.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    count = pictures.shape[1]
    is_trained = trained_captions(subject.embedded, list(prompts))
    prompt_rows: list[PromptSamples] = []
    for number, prompt in enumerate(prompts):
        samples: list[Sample] = []
        for draw in range(count):
            file = folder / f"{number:02d}-{slug(prompt)}-{draw}.png"
            write_png(pictures[number, draw], file)
            sample: Sample = {
                "picture": f"pictures/{file.name}",
                "clip_score": round(SCALE * max(0.0, float(cosines[number, draw])), 2),
            }
            if nearest.train_size:
                query = number * count + draw
                sample["nearest"] = {
                    "cosine": _neighbour(subject, nearest.cosine, query, folder),
                    "rms": _neighbour(subject, nearest.rms, query, folder),
                }
            samples.append(sample)
        prompt_rows.append(
            {"prompt": prompt, "is_training_caption": is_trained[number], "samples": samples}
        )
    return prompt_rows


def slug(text: str) -> str:
    """Return a text as part of a file name: only a to z, digits and hyphens, safe in a path."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "prompt"


def write_training_picture(row: dict[str, Any], shards: ShardReader, folder: Path) -> str:
    """Write the thumbnail of a row's picture unless it exists; return its name in the report."""
    file = folder / f"key-{slug(row['key'])}.png"
    if not file.exists():
        write_png(read_picture(row, shards, THUMBNAIL_PX), file)
    return f"{folder.name}/{file.name}"


def _evenly_spaced(count: int, max_count: int) -> Rows:
    """Return at most `max_count` of the numbers 0 to count - 1, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, max_count)).round().astype(np.int64))


def _vectors(embedded: Embedded, rows: Rows) -> Iterator[Floats]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield take(embedded.image_parts, rows[start : start + ROWS_AT_ONCE])


def _training_pictures(
    embedded: Embedded, rows: Rows, shards: ShardReader, side_px: int
) -> Iterator[NDArray[np.uint8]]:
    def read(row: dict[str, Any]) -> Pixels:
        return read_picture(row, shards, side_px)

    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = embedded.table.take(rows[start : start + ROWS_AT_ONCE]).to_pylist()
            yield np.stack(list(readers.map(read, batch)))


def _neighbour(subject: Subject, neighbours: _Neighbours, query: int, folder: Path) -> Neighbour:
    """Write a query's nearest training picture and return the report's entry for it."""
    row = subject.embedded.table.slice(int(neighbours.rows[query]), 1).to_pylist()[0]
    return {
        "value": round(float(neighbours.values[query]), 4),
        "key": row["key"],
        "caption": row["caption"],
        "style": row["style"],
        "licence": row["licence"],
        "url": row["origin"],
        "picture": write_training_picture(row, subject.shards, folder),
    }
