"""The source of drawn scenes: rows are true of their pictures, equal sections give equal tables,
and shares are kept.
"""

from collections import Counter
from pathlib import Path

import cv2
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from flows.sources.drawn_scenes import ScenesSource, draw_all
from flows.sources.url_table import DataConfig, content_of, write_url_table
from indexing.scenes.checker import shows
from indexing.scenes.scenes import parse


def source(**changes: object) -> ScenesSource:
    return ScenesSource.model_validate({"kind": "scenes", "count": 120} | changes)


def test_pictures_lie_there_and_show_what_their_captions_say(tmp_path: Path) -> None:
    drawn = list(draw_all(source(), 32, tmp_path))
    assert [each.number for each in drawn] == list(range(120)) and {
        each.row for each in drawn
    } == set(source().shares)
    good = 0
    for each in drawn:
        picture = cv2.imread(str(each.file))
        assert picture.shape == (32, 32, 3)
        scene = parse(each.captions[0])
        assert scene is not None and scene.row == each.row and scene.concept == each.concept
        good += bool(scene.word) or shows(picture[..., ::-1].copy(), scene)
    assert good >= 119


def test_the_same_section_is_drawn_once_and_equal(tmp_path: Path) -> None:
    first = list(draw_all(source(), 32, tmp_path / "a"))
    stamps = {each.file: each.file.stat().st_mtime_ns for each in first}
    assert list(draw_all(source(), 32, tmp_path / "a")) == first and stamps == {
        each.file: each.file.stat().st_mtime_ns for each in first
    }
    other = list(draw_all(source(), 32, tmp_path / "b"))
    assert [each.file.read_bytes() for each in other] == [each.file.read_bytes() for each in first]
    assert not list(tmp_path.rglob(".*"))
    assert [each.captions for each in draw_all(source(seed=1), 32, tmp_path / "a")] != [
        each.captions for each in first
    ]


def test_shares_are_kept(tmp_path: Path) -> None:
    counts = Counter(
        each.row
        for each in draw_all(source(count=400, shares={"colours": 1, "position": 3}), 16, tmp_path)
    )
    assert counts.keys() == {"colours", "position"} and 260 < counts["position"] < 340


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({"colour": 1}, "'colour' is not a kind of scene"),
        ({"colours": 0}, "above 0"),
        ({}, "at least 1 item"),
    ],
)
def test_impossible_shares_are_refused(shares: dict[str, float], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        source(shares=shares)


def test_the_table_of_urls_holds_every_scene_with_its_concept(tmp_path: Path) -> None:
    config = DataConfig.model_validate(
        {"sources": [source(count=50).model_dump()], "image_size_px": 32}
    )
    (tmp_path / "out").mkdir()
    assert write_url_table(config, tmp_path / "out", tmp_path / "cache") == 50
    rows = pq.read_table(tmp_path / "out" / "urls.parquet").to_pylist()
    assert {each["style"] for each in rows} == {"scenes"}
    for each in rows:
        scene = parse(each["caption"])
        assert (
            scene is not None
            and (scene.concept, scene.row) == (each["concept"], each["category"])
            and each["origin"].startswith("scenes/")
        )
    assert content_of(config.sources[0]) == "drawing 1"
