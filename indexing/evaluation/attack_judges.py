"""What the decoder makes of attacked pictures, and who says so: the attacked CLIP, a network it
never met, and a reader of text.

CLIP alone cannot tell what a variation looks like: it is what was attacked, and what the decoder
draws for. So an ImageNet network finds the labelled picture that looks most like it, and an OCR
reads whether the word itself was drawn. Models are callables.
Legend: N pictures, K labels, G labelled pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
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

MAX_LABELLED = 8
"""Pictures of each label that a variation is held against."""

Looks = Callable[[Sequence[Pixels]], NDArray[np.int64]]
"""Pictures (N, S, S, 3) of any sides -> the label of the labelled picture that each looks most
like, (N,)."""


@dataclass(frozen=True)
class Witnesses:
    """Who judges besides the attacked CLIP: a network by name, features of uint8 (B, S, S, 3), and
    a reader; each may be missing.
    """

    name: str = ""
    network: Callable[[Pixels], NDArray[Any]] | None = None
    read_text: ReadText | None = None


@dataclass(frozen=True)
class Judged:
    """Pictures under all eyes: CLIP's label, the look-alike's or None, and the share of the word's
    characters that is read or None.
    """

    said: NDArray[np.int64]
    looks: NDArray[np.int64] | None
    read: NDArray[np.float64] | None


def look_alikes(
    witnesses: Witnesses,
    embedded: Embedded,
    names: Sequence[str],
    without: set[str],
    shards: Path,
    side_px: int,
    seed: int,
) -> tuple[Looks | None, int]:
    """Return what finds a picture's look-alike among G pictures of these names, and G; None without
    a network or for less than two names.

    The pictures are of any split, drawn by the seed, but for those of the keys `without`, which are
    under attack, and their equals.
    """
    if witnesses.network is None:
        return None, 0
    table = embedded.table
    named = table.filter(pc.is_in(table["caption"], pa.array(list(names), pa.string()))).to_pylist()
    attacked = {row["sha256"] for row in named if row["key"] in without}
    rows = [row for row in named if row["sha256"] not in attacked]
    chosen: list[dict[str, Any]] = []
    left = dict.fromkeys(names, MAX_LABELLED)
    for picked_row in np.random.default_rng(seed).permutation(len(rows)).tolist():
        if left[rows[picked_row]["caption"]]:
            left[rows[picked_row]["caption"]] -= 1
            chosen.append(rows[picked_row])
    if len({row["caption"] for row in chosen}) < 2:
        return None, len(chosen)
    labels = np.array([names.index(row["caption"]) for row in chosen], np.int64)
    network = witnesses.network
    features = np.asarray(
        network(np.stack([read_picture(row, shards, side_px) for row in chosen])), np.float32
    )
    middle = features.mean(0)
    gallery = unit(features - middle)

    def looks(pictures: Sequence[Pixels]) -> NDArray[np.int64]:
        features = unit(np.asarray(network(np.stack(pictures)), np.float32) - middle)
        return np.asarray(labels[(features @ gallery.T).argmax(1)], np.int64)

    return looks, len(chosen)


def judge(
    pictures: Pixels,
    words: Sequence[str],
    said: NDArray[np.int64],
    looks: Looks | None,
    read_text: ReadText | None,
) -> Judged:
    """Judge pictures (N, S, S, 3), on which the words (N) were written or might have been; `said`
    are CLIP's labels (N,).
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
    """Return how often CLIP's label is the object and the word, the same of the look-alike, and the
    share of characters read.
    """
    shares = [judged.said == objects, judged.said == others]
    rights: list[NDArray[Any] | None] = [
        *shares,
        *(
            (judged.looks == truth if judged.looks is not None else None)
            for truth in (objects, others)
        ),
    ]
    rights.append(judged.read)
    return [
        None if share is None else mean_figure(share, groups, resamples, seed) for share in rights
    ]


def probabilities(cosines: Floats, logit_scale: float) -> Floats:
    """Return CLIP's probabilities (N, K) of the labels at its own temperature."""
    scores = logit_scale * cosines
    exponentials = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(1, keepdims=True), np.float32)
