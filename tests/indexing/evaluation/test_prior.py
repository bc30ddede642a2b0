"""The prior's section tells a prior that knows the picture from one that repeats the text or says
the same for all.
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from indexing.data.held_out import Embedded, open_embedded, read_pairs
from indexing.evaluation.prior import another, mean_image, prior_cosines, prior_section
from tests.helpers.evaluation_run import (
    DIM,
    direction,
    encode_texts,
    subject,
    usual_rows,
    write_run,
)


@pytest.fixture
def embedded(tmp_path: Path) -> Embedded:
    write_run(tmp_path, usual_rows())
    return open_embedded(tmp_path / "embed")


def perfect(captions: list[str], seed: int, best_of: int | None) -> NDArray[np.float32]:
    return encode_texts(captions)


def test_a_perfect_prior_scores_100_and_its_baselines_do_not(
    embedded: Embedded, tmp_path: Path
) -> None:
    section = prior_section(subject(tmp_path), perfect, "diffusion", 2)
    assert [table["caption"] for table in section["tables"]] == [
        "Pairs of unseen concepts (8)",
        "Training pairs (24)",
    ]
    rows = {row[0]: row for row in section["tables"][0]["rows"]}
    assert rows["the prior, best of 2"][1]["value"] == pytest.approx(100, abs=0.1)
    assert (
        rows["the prior, best of 2"][1]["n"] == 8 and rows["the prior, best of 2"][1]["groups"] == 4
    )
    assert (
        rows["the prior, another pair's caption"][1]["value"] < 80
        and rows["the mean training picture"][1]["value"] < 80
    )
    assert rows["z_t itself"][2]["value"] == pytest.approx(100, abs=0.1)


def test_cosines_are_to_the_own_picture_and_to_the_own_text(embedded: Embedded) -> None:
    pairs = read_pairs(embedded, "held_out_concept", 99, 0)
    turned = -pairs.texts
    cosines = prior_cosines(
        type(pairs)(pairs.rows, pairs.images, turned), mean_image(embedded), perfect, 1, 0
    )
    assert "the prior, one candidate" not in cosines
    to_picture, to_text = cosines["the prior, best of 1"]
    assert to_picture.min() > 0.999 and to_text.max() < -0.999
    assert cosines["z_t itself"][0].max() < -0.999


def test_seeds_and_candidates_reach_the_prior(embedded: Embedded) -> None:
    asked = []
    prior_cosines(
        read_pairs(embedded, "train", 3, 0),
        mean_image(embedded),
        lambda captions, seed, best_of: (
            asked.append((len(captions), seed, best_of)) or perfect(captions, seed, best_of)
        ),
        4,
        7,
    )
    assert asked == [(3, 7, None), (3, 7, 1)]


def test_the_mean_is_that_of_the_training_pictures(embedded: Embedded) -> None:
    mean = np.mean([direction(concept) for concept in range(12)], 0)
    assert np.allclose(mean_image(embedded), mean / np.linalg.norm(mean), atol=2e-3) and mean_image(
        embedded
    ).shape == (DIM,)


def test_another_caption_is_another_one_where_there_is_one() -> None:
    assert another(["a", "a", "b", "c"]) == [2, 2, 3, 0]
    assert another(["a", "a"]) == [0, 1] and another(["a"]) == [0]


def test_no_pairs_are_no_error(tmp_path: Path) -> None:
    write_run(tmp_path, [row for row in usual_rows() if row["split"] == "held_out_style"])
    section = prior_section(subject(tmp_path), perfect, "diffusion", 2)
    assert section["tables"] == [] and section["text"] == [
        "Not measured: no held-out or training pairs."
    ]
