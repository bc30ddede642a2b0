"""Judges of pictures against their prompts, and the exact expectation of best of n.

The checker judges scenes, a reader of text judges signs. A judge maps a picture uint8 (S, S, 3) to
the share of the request that holds; 1 is exactly right. No model is involved.
"""

from collections.abc import Callable
from math import comb

import numpy as np
from numpy.typing import NDArray

from indexing.scenes import checker, puzzles, scenes

Judge = Callable[[NDArray[np.uint8]], float]
ReadText = Callable[[NDArray[np.uint8]], str]


def judge_of(caption: str, read_text: ReadText | None) -> Judge | None:
    """Return the judge of pictures of a caption.

    Return None where the caption is no scene and no puzzle, or a sign without a reader of text.
    """
    if puzzle := puzzles.parse(caption):
        wanted_puzzle = puzzle
        return lambda picture: float(np.mean(puzzles.claims(picture, wanted_puzzle)))
    scene = scenes.parse(caption)
    if scene is None or (scene.word and read_text is None):
        return None
    if scene.word:
        assert read_text is not None
        reader = read_text
        return lambda picture: character_accuracy(reader(picture), scene.word)
    return lambda picture: checker.share_held(picture, scene)


def character_accuracy(read: str, word: str) -> float:
    """Return 1 minus the edit distance over the length of the longer text, between 0 and 1.

    `read` is reduced to letters and digits in lower case; `word` must already be.
    """
    text = "".join(letter for letter in read.lower() if letter.isalnum())
    return 1 - edit_distance(text, word) / max(len(text), len(word), 1)


def edit_distance(a: str, b: str) -> int:
    """Return the number of letters to insert, delete or replace (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for position, letter in enumerate(a, 1):
        before, row[0] = row[0], position
        for other in range(1, len(b) + 1):
            before, row[other] = (
                row[other],
                min(row[other] + 1, row[other - 1] + 1, before + (letter != b[other - 1])),
            )
    return row[-1]


def best_of(scores: NDArray[np.float64], values: NDArray[np.float64], n: int) -> float:
    """Return the expected value of the best-scored of n samples, over all subsets of all M (M,).

    The result is exact; no subsets are sampled. Equal scores are equally likely to be the best.
    Raises ValueError unless 1 <= n <= M.
    """
    total = len(scores)
    if not 1 <= n <= total:
        raise ValueError(f"best of {n} needs n between 1 and the {total} samples")
    expectation, below = 0.0, 0
    for level in np.unique(scores):
        equal = scores == level
        upto = below + int(equal.sum())
        expectation += (
            (comb(upto, n) - comb(below, n)) / comb(total, n) * float(values[equal].mean())
        )
        below = upto
    return expectation
