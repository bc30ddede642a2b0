"""What says whether a picture shows its prompt: the checker for scenes, a reader of text for signs,
and exact expectations of best of n.

A judge maps a picture to a share of what was asked for; 1 is exactly right. Knows pixels and
captions, no model.
"""

from collections.abc import Callable
from math import comb

import numpy as np
from numpy.typing import NDArray

from indexing.scenes import checker, puzzles, scenes

Judge = Callable[[NDArray[np.uint8]], float]
ReadText = Callable[[NDArray[np.uint8]], str]


def judge_of(caption: str, read_text: ReadText | None) -> Judge | None:
    """Return what judges pictures of a caption, or None where nothing can: no scene and no puzzle,
    or a sign and no reader of text.
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
    """Return 1 minus the edit distance as a share of the longer word, of letters and digits in
    lower case; 1 is the word itself.
    """
    text = "".join(letter for letter in read.lower() if letter.isalnum())
    return 1 - edit_distance(text, word) / max(len(text), len(word), 1)


def edit_distance(a: str, b: str) -> int:
    """Return how many letters must be put in, taken out or replaced (Levenshtein 1966)."""
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
    """Return the mean value of the best-scored one of n, over all subsets of n of the M drawn (M,):
    exact, no subset is sampled.

    Among equal scores each is as likely. Raises ValueError where n > M.
    """
    total = len(scores)
    if not 1 <= n <= total:
        raise ValueError(f"best of {n} needs as many samples, there are {total}")
    expectation, below = 0.0, 0
    for level in np.unique(scores):
        equal = scores == level
        upto = below + int(equal.sum())
        expectation += (
            (comb(upto, n) - comb(below, n)) / comb(total, n) * float(values[equal].mean())
        )
        below = upto
    return expectation
