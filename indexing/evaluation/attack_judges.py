"""Judges of attacked pictures and their variations: the attacked CLIP, a second network and OCR.

CLIP alone cannot judge what a variation shows: it is the model under attack, and the decoder draws
from its embeddings. So an ImageNet network finds the labelled picture that looks most similar, and
OCR reads whether the word itself was drawn. Models are callables. Writes nothing.
Legend: N pictures, K labels, G labelled pictures, S side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats, unit
from indexing.data.held_out import Embedded
from indexing.data.images import Pixels, read_picture
from indexing.metrics.bootstrap import Figure, mean_figure
from indexing.scenes.judges import ReadText, character_accuracy
from infra.storage.shard_reader import ShardReader

MAX_LABELLED = 8
"""Maximum number of pictures of a label that a variation is compared with."""

Looks = Callable[[Sequence[Pixels]], NDArray[np.int64]]
"""Pictures (N, S, S, 3) of any side -> the label (N,) of the most similar labelled picture."""


@dataclass(frozen=True)
class Witnesses:
    """The judges besides the attacked CLIP; each of them may be missing.

    `network` maps pictures uint8 (B, S, S, 3) to features (B, D); `name` is its name in the report.
    """

    name: str = ""
    network: Callable[[Pixels], NDArray[Any]] | None = None
    read_text: ReadText | None = None


@dataclass(frozen=True)
class Judged:
    """Results of all judges for N pictures; None where a judge is missing.

    `said` are CLIP's labels, `looks` the labels of the most similar pictures, `read` the share of
    the word's characters that OCR reads.
    """

    said: NDArray[np.int64]
    looks: NDArray[np.int64] | None
    read: NDArray[np.float64] | None


def look_alikes(
    witnesses: Witnesses,
    embedded: Embedded,
    names: Sequence[str],
    without: set[str],
    shards: ShardReader,
    side_px: int,
    seed: int,
) -> tuple[Looks | None, int]:
    """Return a function that labels pictures by similarity to G pictures of these names, and G.

    The function is None without a network or with fewer than two names. The G pictures are of any
    split and drawn by the seed, at most MAX_LABELLED of a name. Attacked pictures (the keys
    `without`) and byte-equal copies of them are left out.
    """
    if witnesses.network is None:
        return None, 0
    table = embedded.table
    named = table.filter(pc.is_in(table["caption"], pa.array(list(names), pa.string()))).to_pylist()
    attacked = {row["sha256"] for row in named if row["key"] in without}
    rows = [row for row in named if row["sha256"] not in attacked]
    chosen: list[dict[str, Any]] = []
    remaining = dict.fromkeys(names, MAX_LABELLED)
    for number in np.random.default_rng(seed).permutation(len(rows)).tolist():
        row = rows[number]
        if remaining[row["caption"]]:
            remaining[row["caption"]] -= 1
            chosen.append(row)
    if len({row["caption"] for row in chosen}) < 2:
        return None, len(chosen)
    labels = np.array([names.index(row["caption"]) for row in chosen], np.int64)
    network = witnesses.network
    features = np.asarray(
        network(np.stack([read_picture(row, shards, side_px) for row in chosen])), np.float32
    )
    mean = features.mean(0)
    gallery = unit(features - mean)

    def looks(pictures: Sequence[Pixels]) -> NDArray[np.int64]:
        features = unit(np.asarray(network(np.stack(pictures)), np.float32) - mean)
        return np.asarray(labels[(features @ gallery.T).argmax(1)], np.int64)

    return looks, len(chosen)


def judge(
    pictures: Pixels,
    words: Sequence[str],
    said: NDArray[np.int64],
    looks: Looks | None,
    read_text: ReadText | None,
) -> Judged:
    """Judge pictures (N, S, S, 3); `said` are CLIP's labels (N,).

    `words` (N) are the words that OCR looks for, whether or not they were written.
    """
    read = None
    if read_text is not None:
        spelled = ["".join(letter for letter in word.lower() if letter.isalnum()) for word in words]
        read = np.array(
            [
                character_accuracy(read_text(picture), word)
                for picture, word in zip(pictures, spelled, strict=True)
            ]
        )
    return Judged(said, looks(list(pictures)) if looks else None, read)


def figures(
    judged: Judged,
    objects: NDArray[np.int64],
    others: NDArray[np.int64],
    groups: Sequence[Any],
    resamples: int,
    seed: int,
) -> list[Figure | None]:
    """Return five figures; None where a judge is missing.

    The shares in which CLIP's label is the object (label (N,)) and the written word (`others`), the
    same two of the look-alike, and the share of characters that OCR reads.
    """
    columns: list[NDArray[Any] | None] = [judged.said == objects, judged.said == others]
    for labels in (objects, others):
        columns.append(None if judged.looks is None else judged.looks == labels)
    columns.append(judged.read)
    return [
        None if values is None else mean_figure(values, groups, resamples, seed)
        for values in columns
    ]


def probabilities(cosines: Floats, logit_scale: float) -> Floats:
    """Return the softmax over labels (N, K) of cosines at CLIP's own temperature."""
    scores = logit_scale * cosines
    exponentials = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(1, keepdims=True), np.float32)
