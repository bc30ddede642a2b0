"""The report tells of every pair that dedup left out, of how its threshold was chosen, and shows
the largest groups.
"""

import json
from pathlib import Path
from typing import Any

import cv2
import jsonschema
import numpy as np
import pytest

import indexing
from indexing.data.contact_sheet import LINE_PX
from indexing.dedup.deduplicate import DedupConfig, run
from indexing.evaluation.dedup_section import copies_section
from indexing.report.sections import ReportSection
from tests.helpers.evaluation_run import (
    HOSTILE,
    colour,
    direction,
    encode_images,
    row,
    usual_rows,
    write_run,
)
from tests.helpers.stage_folders import shards_in

SCHEMA = json.loads((Path(indexing.__file__).parent / "report" / "report.schema.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportSection, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("copies")
    copies = [row(2, "plain", "train", caption=f"again {turn} {HOSTILE}") for turn in range(8)]
    rows = [
        *(each for each in usual_rows() if each["split"] != "held_out_style"),
        *copies,
        row(13, "plain", "train", caption="leaked"),
    ]
    write_run(folder, rows)
    (folder / "dedup").mkdir()
    counts = run(
        DedupConfig(sample=16),
        shards_in(folder),
        folder / "embed",
        encode_images,
        20,
        folder / "dedup",
    )
    return (
        copies_section(
            folder / "dedup", folder / "embed", shards_in(folder), counts, folder / "report"
        ),
        counts,
        folder,
    )


def test_every_reason_is_counted_and_the_threshold_explained(
    made: tuple[ReportSection, dict[str, Any], Path],
) -> None:
    section, counts, folder = made
    left_out, sample, _ = section["tables"]
    assert sum(each[1] for each in left_out["rows"]) == counts["in"] - counts["out"] > 8
    assert f"{counts['in'] - counts['out']:,} of {counts['in']:,} pairs" in section["text"][0]
    told = json.loads((folder / "dedup" / "threshold.json").read_text())
    assert (
        f"{told['threshold']:.4f}" in section["text"][1]
        and f"{told['copies']:,} copies" in section["text"][1]
    )
    assert {name: figure["value"] for name, figure in sample["rows"]} == told["recall_of"]
    assert all(figure["low"] <= figure["value"] <= figure["high"] for _, figure in sample["rows"])


def test_the_section_keeps_to_the_reports_schema(
    made: tuple[ReportSection, dict[str, Any], Path],
) -> None:
    schema = {"$defs": SCHEMA["$defs"], **SCHEMA["properties"]["sections"]}
    jsonschema.Draft202012Validator(schema).validate([made[0]])


def test_groups_are_listed_as_they_are_drawn(
    made: tuple[ReportSection, dict[str, Any], Path],
) -> None:
    section, counts, folder = made
    listed = section["tables"][2]
    assert listed["caption"] == (
        "All groups" if counts["groups"] <= 12 else f"The largest groups of {counts['groups']:,}"
    )
    largest = listed["rows"][0]
    assert (
        largest[2] >= 8
        and largest[2] == max(each[2] for each in listed["rows"])
        and largest[4] > 0.9
    )
    drawn = cv2.imread(str(folder / "report" / section["pictures"][0]["picture"]))[..., ::-1]
    assert drawn is not None and len(listed["rows"]) == (drawn.shape[0] - 4) // (128 + LINE_PX + 4)
    inside = drawn[4 + LINE_PX + 64, [64, 64 + 132, 64 + 5 * 132]]
    assert (np.abs(inside.astype(int) - colour(2)) < 12).all(), (
        "the first row is the group of colour 2: what stays and five that go"
    )


def test_a_clip_that_cannot_tell_is_said_and_nothing_left_out_is_no_fault(tmp_path: Path) -> None:
    same = np.tile(direction(0), (12, 1))  # a CLIP that tells nothing apart
    write_run(tmp_path, usual_rows()[:24:2], same)
    (tmp_path / "dedup").mkdir()
    config, folders = DedupConfig(sample=16, max_rms=0), (shards_in(tmp_path), tmp_path / "embed")
    blind = run(config, *folders, lambda pictures: same[: len(pictures)], 20, tmp_path / "dedup")
    section = copies_section(
        tmp_path / "dedup", tmp_path / "embed", shards_in(tmp_path), blind, tmp_path / "report"
    )
    assert "0 of 12 pairs" in section["text"][0] and section["pictures"] == []
    assert "cannot tell them from the rest" in section["text"][1]
