"""Charts with intervals put figures where they belong."""

import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest

from indexing.metrics.bootstrap import mean_figure
from indexing.report.interval_svg import bars as draw_bars
from indexing.report.interval_svg import lines as draw_lines
from indexing.report.sections import bars, lines

HALF = mean_figure([0, 1] * 20, range(40), 200, 0)


def test_lines_rise_with_their_values_and_log_x_is_even() -> None:
    rising = [
        (x, {"value": y, "low": y - 0.05, "high": y + 0.05})
        for x, y in ((1, 0.1), (4, 0.4), (16, 0.7))
    ]
    root = ElementTree.fromstring(draw_lines(lines("t", "x", "y", {"a": rising}, is_log_x=True)))
    places = np.array(
        [
            [float(element) for element in pair.split(",")]
            for pair in next(root.iter("polyline")).get("points", "").split()
        ]
    )
    assert (
        np.allclose(np.diff(places, 2, axis=0), 0, atol=0.2)
        and (np.diff(places, axis=0) * [1, -1] > 0).all()
    )
    whiskers = [element for element in root.iter("line") if element.get("class") == "whisker"]
    assert len(whiskers) == 3 and all(
        float(element.get("y1", 0)) > float(element.get("y2", 0)) for element in whiskers
    )


def test_names_of_lines_that_end_together_do_not_cover_each_other() -> None:
    same = [(1, HALF), (2, HALF)]
    root = ElementTree.fromstring(draw_lines(lines("t", "x", "y", dict.fromkeys("abc", same))))
    heights = sorted(
        float(element.get("y", 0)) for element in root.iter("text") if element.text in set("abc")
    )
    assert np.diff(heights).min() >= 12.9


def test_bars_stand_on_their_side_of_zero() -> None:
    rows = [
        ("up", {"value": 0.2, "low": 0.1, "high": 0.3}),
        ("down", {"value": -0.4, "low": None, "high": None}),
    ]
    root = ElementTree.fromstring(draw_bars(bars("t", "points", rows)))
    zero = float(
        next(element for element in root.iter("line") if element.get("class") == "axis").get(
            "x1", 0
        )
    )
    bars_by_class = {
        element.get("class"): (float(element.get("x", 0)), float(element.get("width", 0)))
        for element in root.iter("rect")
    }
    assert bars_by_class["gain"][0] == pytest.approx(zero, abs=0.1) and sum(
        bars_by_class["loss"]
    ) == pytest.approx(zero, abs=0.2)
    assert bars_by_class["loss"][1] == pytest.approx(2 * bars_by_class["gain"][1], rel=0.02)
    assert "-40.0" in [element.text for element in root.iter("text")]


def test_nothing_measured_is_said() -> None:
    none: dict[str, Any] = {"value": None, "low": None, "high": None}
    assert "nothing was measured" in draw_lines(lines("t", "x", "y", {"a": [(1, none)]}))
    assert "nothing was measured" in draw_bars(bars("t", "x", [("a", none)]))
