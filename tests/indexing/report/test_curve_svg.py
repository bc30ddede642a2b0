"""Charts are well-formed, put points where they belong, and say what their axes are."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from indexing.report.curve_svg import (
    HEIGHT,
    WIDTH,
    curve,
    log_ticks,
    round_step,
    short,
    smoothed,
    strip,
    ticks,
)


def points_of(svg: str, name: str) -> np.ndarray:
    found = next(each for each in ElementTree.fromstring(svg) if each.get("class") == name)
    return np.array(
        [[float(number) for number in pair.split(",")] for pair in found.get("points", "").split()]
    )


def texts_of(svg: str) -> list[str]:
    return [each.text or "" for each in ElementTree.fromstring(svg) if each.tag == "text"]


def test_a_straight_line_is_straight() -> None:
    places = points_of(
        curve([(x, 2 + x / 50) for x in range(0, 101, 10)], "images seen", "loss", "Loss of clip"),
        "points",
    )
    assert np.allclose(np.diff(places, 2, axis=0), 0, atol=0.11)
    assert (np.diff(places[:, 0]) > 0).all()
    assert (np.diff(places[:, 1]) < 0).all()  # a larger loss is higher up
    assert (places >= 0).all()
    assert (places <= [WIDTH, HEIGHT]).all()


def test_a_loss_that_falls_far_is_drawn_on_a_log_scale() -> None:
    svg = curve([(x, 10 * 0.5**x) for x in range(11)], "images seen", "loss", "Loss of prior")
    assert "loss, log scale" in texts_of(svg)
    assert np.allclose(
        np.diff(points_of(svg, "points"), 2, axis=0), 0, atol=0.11
    )  # halving is a straight line there
    assert "loss" in texts_of(curve([(0, 1.0), (10, 0.5)], "images seen", "loss", "t"))


@pytest.mark.parametrize(
    "points",
    [
        [(0, 1.0)],
        [(5, 2.0), (10, 2.0)],
        [(0, 0.0), (1, 0.0)],
        [(0, -1.0), (1, 4e9)],
        [(1, 1e-9), (2, 1.0)],
    ],
)
def test_odd_losses_are_drawn(points: list[tuple[float, float]]) -> None:
    svg = curve(points, "images seen", "loss", "Loss")
    assert np.isfinite(points_of(svg, "mean")).all()
    assert "nan" not in svg


def test_axes_are_named_and_the_title_is_escaped() -> None:
    svg = curve([(0, 1.0), (130_000, 0.5)], "images seen", "loss", '<script>"&')
    assert {"images seen", "loss", "100k"} <= set(texts_of(svg))
    assert "<script>" not in svg
    assert ElementTree.fromstring(svg).get("aria-label") == '<script>"&'


def test_steps_are_round() -> None:
    assert ticks(0, 1, round_step(1, 4)) == pytest.approx([0, 0.5, 1])
    assert ticks(0, 130_000, round_step(130_000, 4)) == [0, 50_000, 100_000]
    assert ticks(0.13, 0.62, round_step(0.49, 4)) == pytest.approx([0.2, 0.4, 0.6])
    assert log_ticks(0.5, 6) == pytest.approx([0.5, 1, 2, 5])
    assert log_ticks(1e-4, 10) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1, 10])
    assert log_ticks(3.1, 3.9) == [3.1, 3.9]
    assert [short(each) for each in (0, 0.05, 12, 50_000, 1.2e6)] == [
        "0",
        "0.05",
        "12",
        "50k",
        "1.2M",
    ]


def test_smoothing_keeps_lines_and_length_and_calms_noise() -> None:
    line = [3 - 0.1 * x for x in range(200)]
    assert smoothed(line) == pytest.approx(line)
    noise = np.random.default_rng(0).normal(size=400)
    assert np.std(smoothed(noise.tolist())[20:-20]) < 0.4 * noise.std()
    assert smoothed([5.0]) == [5.0]


def test_a_strip_puts_value_interval_and_chance_on_one_scale() -> None:
    svg = ElementTree.fromstring(strip(0.5, 0.25, 0.75, 0.1))
    dot = next(each for each in svg if each.tag == "circle")
    interval = next(each for each in svg if each.get("class") == "interval")
    chance = next(each for each in svg if each.get("class") == "chance")
    low, high = float(interval.get("x1", "")), float(interval.get("x2", ""))
    assert float(dot.get("cx", "")) == pytest.approx((low + high) / 2, abs=0.1)
    assert float(chance.get("x1", "")) == float(chance.get("x2", "")) < low
    assert not re.search("interval|chance", strip(1.0, None, None, None))
