"""The report's section on the prior: cosines of predicted z_i to the z_i of unseen pictures.

As in DALLE2-pytorch's guide to its prior, the baselines are z_t itself, the mean of the training
pictures, and the prediction for another pair's caption. The prior is a callable. Writes nothing.
Legend: N pairs, D dimensions.
"""

from collections.abc import Callable, Sequence

import numpy as np

from indexing.data.embedding_store import Floats, take
from indexing.data.held_out import Embedded, Pairs, read_pairs
from indexing.evaluation.context import Subject
from indexing.metrics.bootstrap import mean_figure
from indexing.metrics.clip_score import SCALE
from indexing.report.sections import Cell, ReportSection, section, table

Predict = Callable[[list[str], int, int | None], Floats]
"""(captions, seed, best_of) -> unit vectors (N, D); with best_of None the prior's default number of
candidates."""

MAX_PAIRS = 96
ROWS_AT_ONCE = 8192


def prior_section(subject: Subject, predict: Predict, kind: str, best_of: int) -> ReportSection:
    """Return the section for a prior on unseen concepts, and on training pairs to show overfitting.

    `kind` names the prior in the text; `best_of` is its default number of candidates.
    """
    embedded, resamples, seed = subject.embedded, subject.resamples, subject.seed
    mean = mean_image(embedded)
    tables = []
    for split, name in (
        ("held_out_concept", "Pairs of unseen concepts"),
        ("train", "Training pairs"),
    ):
        pairs = read_pairs(embedded, split, MAX_PAIRS, seed)
        if not pairs.rows:
            continue
        rows: list[list[Cell]] = [
            [
                label,
                *(
                    mean_figure(SCALE * cosine, pairs.groups, resamples, seed, unit="score")
                    for cosine in cosines
                ),
            ]
            for label, cosines in prior_cosines(pairs, mean, predict, best_of, seed).items()
        ]
        tables.append(
            table(
                f"{name} ({len(pairs.rows)})",
                ["z_i from", "100 cos to the picture's z_i", "100 cos to z_t"],
                rows,
            )
        )
    text = [
        f"The {kind} prior draws z_i from the caption and z_t. It is useful where its z_i is "
        "nearer to the picture's own z_i than z_t is, and than the z_i that it draws for another "
        "pair's caption. The best of several candidates is chosen by its cosine to z_t alone."
    ]
    return section(
        "Prior", text if tables else ["Not measured: no held-out or training pairs."], tables
    )


def prior_cosines(
    pairs: Pairs, mean: Floats, predict: Predict, best_of: int, seed: int
) -> dict[str, tuple[Floats, Floats]]:
    """Return, by source of z_i, its cosines to the pictures' own z_i and to z_t, both (N,)."""
    captions = [row["caption"] for row in pairs.rows]
    drawn = {f"the prior, best of {best_of}": predict(captions, seed, None)}
    if best_of > 1:
        drawn["the prior, one candidate"] = predict(captions, seed, 1)
    other = another(captions)
    drawn["the prior, another pair's caption"] = next(iter(drawn.values()))[other]
    drawn["z_t itself"] = pairs.texts
    drawn["the mean training picture"] = np.broadcast_to(mean, pairs.images.shape)
    return {
        name: (_cosines(z, pairs.images), _cosines(z, pairs.texts)) for name, z in drawn.items()
    }


def another(captions: Sequence[str]) -> list[int]:
    """Return for every pair the position of the next pair, cyclically, with another caption.

    Return its own position where all captions are equal.
    """
    count = len(captions)
    result = []
    for start in range(count):
        following = ((start + step) % count for step in range(1, count))
        result.append(next((n for n in following if captions[n] != captions[start]), start))
    return result


def mean_image(embedded: Embedded) -> Floats:
    """Return the normalised mean (D,) of the training pictures' embeddings."""
    rows, total = embedded.rows("train"), np.zeros(embedded.image_parts[0].shape[1])
    for start in range(0, len(rows), ROWS_AT_ONCE):
        vectors = take(embedded.image_parts, rows[start : start + ROWS_AT_ONCE])
        total += vectors.sum(0, dtype=np.float64)
    return (total / max(float(np.linalg.norm(total)), 1e-12)).astype(np.float32)


def _cosines(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.einsum("nd,nd->n", a, b), np.float32)
