"""The evaluation's generated pictures: drawn, scored by CLIP, and each shown beside the training
pictures nearest to it.

Reads training pictures from ingest's shards; writes PNG files. Models are callables. Legend: P
prompts, K pictures of each, M pictures.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats, Rows, take, unit
from indexing.data.held_out import Embedded, Pairs, trained_captions
from indexing.data.images import Pixels, read_picture, sheet, write_png
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

THUMBNAIL_PX = 64
READERS = 4
ROWS_AT_ONCE = 1024
MAX_REFERENCES = 200


def generation(
    subject: Subject,
    prompts: Sequence[str],
    count: int,
    pixel_pool: int,
    unseen: Pairs,
    generate: Generate,
) -> dict[str, Any]:
    """Draw `count` pictures of each prompt and return the report's `generation`; writes PNG files
    into the report's folder.

    `unseen` are real held-out pairs: what their pictures score, and how far they lie from the
    training pictures, is what the samples' figures are held against. At most `pixel_pool` training
    pictures, drawn by the seed, are compared pixel by pixel.
    """
    embedded, shards, resamples, seed = (
        subject.embedded,
        subject.shards,
        subject.resamples,
        subject.seed,
    )
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

    train = embedded.rows("train")
    pool = (
        train
        if len(train) <= pixel_pool
        else np.sort(np.random.default_rng(seed).choice(train, pixel_pool, replace=False))
    )
    references = _spread(len(unseen.rows), MAX_REFERENCES)
    real = [read_picture(unseen.rows[number], shards, flat.shape[1]) for number in references]
    queries = np.concatenate([flat, np.stack(real)]) if real else flat
    groups = [*np.repeat(list(prompts), count), *(unseen.groups[number] for number in references)]
    by_clip = nearest_by_embedding(
        np.concatenate([images, unseen.images[references]]), _vectors(embedded, train)
    )
    by_pixels = nearest_by_pixels(
        queries, _training_pictures(embedded, pool, shards, flat.shape[1])
    )
    nearest = {
        name: {
            "samples": mean_figure(
                values[: len(flat)], groups[: len(flat)], resamples, seed, unit=unit_name
            ),
            "unseen": mean_figure(
                values[len(flat) :], groups[len(flat) :], resamples, seed, unit=unit_name
            ),
        }
        for name, values, unit_name in (
            ("cosine", by_clip[0], "cosine"),
            ("rms", by_pixels[0], "of 255"),
        )
        if len(train)
    }
    folder = subject.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    sample_rows = []
    for number, (prompt, is_trained) in enumerate(
        zip(prompts, trained_captions(embedded, list(prompts)), strict=True)
    ):
        samples = []
        for draw in range(count):
            file = folder / f"{number:02d}-{slug(prompt)}-{draw}.png"
            write_png(pictures[number, draw], file)
            at = number * count + draw
            sample = {
                "picture": f"pictures/{file.name}",
                "clip_score": round(SCALE * max(0.0, float(cosines[number, draw])), 2),
            }
            if len(train):
                sample["nearest"] = {
                    "cosine": _neighbour(
                        embedded, int(train[by_clip[1][at]]), float(by_clip[0][at]), shards, folder
                    ),
                    "rms": _neighbour(
                        embedded,
                        int(pool[by_pixels[1][at]]),
                        float(by_pixels[0][at]),
                        shards,
                        folder,
                    ),
                }
            samples.append(sample)
        sample_rows.append(
            {"prompt": prompt, "is_training_caption": is_trained, "samples": samples}
        )
    write_png(sheet(list(pictures), list(prompts)), folder / "samples.png")
    return {
        "n": len(flat),
        "seed": seed,
        "side_px": int(flat.shape[1]),
        **scores,
        "real_pairs": pair_clip_score(unseen.images, unseen.texts, unseen.groups, resamples, seed),
        "nearest_training": {**nearest, "pixel_pool": len(pool), "training_pictures": len(train)},
        "sheet": "pictures/samples.png",
        "prompts": sample_rows,
    }


def slug(text: str) -> str:
    """Return a text as a part of a file name: nothing of a prompt but a to z and digits gets into a
    path.
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "prompt"


def write_training_picture(row: dict[str, Any], shards: Path, folder: Path) -> str:
    """Write a row's picture as the report shows it, once, and return its name in the report's
    folder.
    """
    file = folder / f"key-{slug(row['key'])}.png"
    if not file.exists():
        write_png(read_picture(row, shards, THUMBNAIL_PX), file)
    return f"{folder.name}/{file.name}"


def _spread(count: int, max_count: int) -> Rows:
    return np.unique(np.linspace(0, count - 1, min(count, max_count)).round().astype(np.int64))


def _vectors(embedded: Embedded, rows: Rows) -> Iterator[Floats]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield take(embedded.image_parts, rows[start : start + ROWS_AT_ONCE])


def _training_pictures(
    embedded: Embedded, rows: Rows, shards: Path, side_px: int
) -> Iterator[NDArray[np.uint8]]:
    def read(row: dict[str, Any]) -> Pixels:
        return read_picture(row, shards, side_px)

    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            yield np.stack(
                list(
                    readers.map(
                        read, embedded.table.take(rows[start : start + ROWS_AT_ONCE]).to_pylist()
                    )
                )
            )


def _neighbour(
    embedded: Embedded, row: int, value: float, shards: Path, folder: Path
) -> dict[str, Any]:
    sample = embedded.table.slice(row, 1).to_pylist()[0]
    about = {name: sample[name] for name in ("key", "caption", "style", "licence")}
    return {
        "value": round(value, 4),
        **about,
        "url": sample["origin"],
        "picture": write_training_picture(sample, shards, folder),
    }
