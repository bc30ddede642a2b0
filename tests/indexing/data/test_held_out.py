"""What training has seen is counted, and a split is read whole or by a stated sample."""

from pathlib import Path

import numpy as np

from indexing.data.held_out import (
    licences,
    open_embedded,
    read_pairs,
    seen_in_training,
    trained_captions,
)
from tests.helpers.evaluation_run import direction, row, usual_rows, write_run

HELD_OUT = ("held_out_concept", "held_out_style")


def test_pairs_come_with_their_own_vectors(tmp_path: Path) -> None:
    write_run(tmp_path, usual_rows())
    pairs = read_pairs(open_embedded(tmp_path / "embed"), "held_out_concept", 100, 0)
    assert [pair["caption"] for pair in pairs.rows] == [
        f"colour {number}" for number in (12, 12, 13, 13, 14, 14, 15, 15)
    ]
    assert np.allclose(
        pairs.images, [direction(number) for number in (12, 12, 13, 13, 14, 14, 15, 15)], atol=1e-3
    )
    assert pairs.groups == ["c12", "c12", "c13", "c13", "c14", "c14", "c15", "c15"]


def test_a_large_split_is_sampled_by_the_seed(tmp_path: Path) -> None:
    write_run(tmp_path, usual_rows())
    embedded = open_embedded(tmp_path / "embed")
    drawn = [
        [pair["key"] for pair in read_pairs(embedded, "held_out_style", 5, seed).rows]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 5


def test_a_pair_without_a_concept_stands_for_itself(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        [
            row(1, "plain", "held_out_style", concept=""),
            row(2, "plain", "held_out_style", concept=""),
        ],
    )
    pairs = read_pairs(open_embedded(tmp_path / "embed"), "held_out_style", 5, 0)
    assert len(set(pairs.groups)) == 2


def test_pictures_and_concepts_of_the_training_split_are_counted(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        [
            *usual_rows(),
            row(3, "plain", "held_out_concept"),
            *(row(4, "plain", split, concept="") for split in ("train", "held_out_concept")),
        ],
    )
    counts = seen_in_training(open_embedded(tmp_path / "embed"), HELD_OUT)
    assert counts == {
        "train": {"pairs": 25},
        "held_out_concept": {"pairs": 10, "picture_in_training": 0, "concept_in_training": 1},
        "held_out_style": {"pairs": 16, "picture_in_training": 0, "concept_in_training": 12},
    }
    import pyarrow.parquet as pq

    file = tmp_path / "embed" / "metadata" / "metadata_0000.parquet"
    table = pq.read_table(file)
    same = [table["sha256"][0].as_py()] * table.num_rows
    pq.write_table(
        table.set_column(
            table.schema.get_field_index("sha256"), table.schema.field("sha256"), [same]
        ),
        file,
    )
    assert (
        seen_in_training(open_embedded(tmp_path / "embed"), HELD_OUT)["held_out_style"][
            "picture_in_training"
        ]
        == 16
    )


def test_splits_without_pairs_count_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, [row(1, "plain", "train")])
    counts = seen_in_training(open_embedded(tmp_path / "embed"), HELD_OUT)
    assert counts["held_out_style"] == {
        "pairs": 0,
        "picture_in_training": 0,
        "concept_in_training": 0,
    }


def test_a_training_caption_is_known_in_any_phrasing_and_case(tmp_path: Path) -> None:
    write_run(tmp_path, usual_rows())
    embedded = open_embedded(tmp_path / "embed")
    assert trained_captions(embedded, ["A Colour 3", "colour 11", "colour 12", "a colour"]) == [
        True,
        True,
        False,
        False,
    ]


def test_licences_are_counted(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        [
            row(1, "plain", "train", licence="B"),
            row(2, "plain", "train", licence=""),
            row(3, "plain", "train", licence="B"),
        ],
    )
    assert licences(open_embedded(tmp_path / "embed")) == {"B": 2, "not stated": 1}
