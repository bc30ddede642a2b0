"""A section of any content reaches the page and report.json, whole and escaped."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import indexing
from indexing.data.images import write_png
from indexing.evaluation.evaluate import EvaluateConfig, evaluate
from indexing.metrics.bootstrap import mean_figure
from indexing.report.page import figure_bounds, figure_text
from indexing.report.sections import bars, lines, picture, section, table
from tests.helpers.evaluation_run import HOSTILE, generate, manifest, subject, usual_rows, write_run
from tests.indexing.report.test_page import Page, assert_stands_alone

HALF = mean_figure([0, 1] * 20, range(40), 200, 0)
SCORE = mean_figure([123.4, 125.6], range(2), 200, 0, unit="score")
SCHEMA = json.loads((Path(indexing.__file__).parent / "report" / "report.schema.json").read_text())


def everything(out: Path) -> dict[str, Any]:
    write_png(np.full((8, 8, 3), 7, np.uint8), out / "pictures" / "more.png")
    return section(
        f"More {HOSTILE}",
        [f"Words {HOSTILE}"],
        [
            table(
                f"A table {HOSTILE}",
                ["Row", HOSTILE, "Score"],
                [[HOSTILE, HALF, SCORE], ["empty", None, 12345]],
            )
        ],
        [picture("pictures/more.png", f"A grey square {HOSTILE}", HOSTILE, is_pixelated=True)],
        [
            lines(HOSTILE, "calls", "share", {HOSTILE: [(1, HALF), (8, HALF)]}, is_log_x=True),
            bars(HOSTILE, "points", [(HOSTILE, HALF)]),
        ],
    )


def test_a_section_is_on_the_page_escaped_and_keeps_to_the_schema(tmp_path: Path) -> None:
    write_run(tmp_path, usual_rows())
    out = tmp_path / "out"
    out.mkdir()
    config = EvaluateConfig(prompts=("colour 3",), count=1, resamples=200)
    returned = evaluate(
        config,
        {"config": {}},
        [manifest("ingest")],
        {},
        subject(tmp_path),
        generate,
        [lambda: everything(out)],
    )
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads((out / "report.json").read_text()))
    assert returned["sections"][0]["tables"][0]["rows"][0][1]["value"] == 0.5
    page = Page((out / "report.html").read_text())
    assert_stands_alone(page)
    words = " ".join(HOSTILE.split())
    assert (
        f"More {words}" in page.text
        and f"Words {words}" in page.text
        and f"A table {words}" in page.text
    )
    assert "50.0 %" in page.text and "124.5" in page.text and "12,345" in page.text
    shown = [
        attributes
        for tag, attributes in page.tags
        if tag == "img" and attributes["alt"].startswith("A grey square")
    ]
    assert len(shown) == 1 and shown[0]["class"] == "pixelated"


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="'b' has 1 cells and the head 2"):
        table("t", ["Row", "Value"], [["a", 1], ["b"]])


def test_figures_are_written_in_their_unit() -> None:
    assert figure_text({"value": 0.5}) == "50.0 %"
    assert figure_text({"value": None}) == "–"
    score = {"value": 12.345, "low": 1.0, "high": 1234.5, "unit": "score"}
    assert (figure_text(score), figure_bounds(score)) == ("12.3", "1 to 1,234.5")
    assert figure_bounds({"value": 0.5, "low": 0.25, "high": 0.75}) == "25.0 to 75.0"
