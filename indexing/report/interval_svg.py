"""Inline SVG charts of the report's sections: lines with intervals, and bars around zero.

Input is a chart of indexing.report.sections, output is SVG text. Colours are the page's custom
properties. A series has its own colour and dash, and its name stands below the plot, where a long
name fits on a phone too.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from indexing.report.curve_svg import round_step, short, ticks
from indexing.report.sections import BarChart, Chart, LineChart, LinePoint

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 40
SERIES_COLOURS = 6
NAME_PX = 17
"""Height of a line of the legend."""
BAR_PX, LETTER_PX, MAX_NAMES_PX = 24, 6.2, 200
MIN_LABEL_GAP_PX = 30


class _Mark(NamedTuple):
    """A figure that has a value, as a dot at x (lines) or as the bar of a name."""

    value: float
    low: float | None
    high: float | None
    name: str | None
    x: float = 0.0


def plot(chart: Chart) -> str:
    """Return a chart as SVG, or as one sentence of HTML where no figure has a value."""
    return lines(chart) if chart["kind"] == "lines" else bars(chart)


@dataclass(frozen=True)
class _LineAxes:
    """Ranges of a line chart and the positions of values in px."""

    xs: list[float]
    bottom: float
    top: float
    step: float
    is_log_x: bool
    is_share: bool

    def x_px(self, x: float) -> float:
        first, last = self.xs[0], self.xs[-1]
        if self.is_log_x:
            x, first, last = math.log(x), math.log(first), math.log(last)
        share = (x - first) / ((last - first) or 1)
        return LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 8)

    def y_px(self, y: float) -> float:
        return (
            HEIGHT - BOTTOM - (y - self.bottom) / (self.top - self.bottom) * (HEIGHT - TOP - BOTTOM)
        )


def lines(chart: LineChart) -> str:
    """Return an SVG of figures over x: a line and dots for each series, intervals as whiskers.

    x is linear or logarithmic (`is_log_x`). A point's `name` is written below the axis in place of
    its x.
    """
    marks = {name: _line_marks(points) for name, points in chart["series"].items()}
    series = {name: points for name, points in marks.items() if points}
    if not series:
        return _nothing_measured(chart)
    all_points = [point for points in series.values() for point in points]
    axes = _fit_line_axes(all_points, chart["is_log_x"])
    x_names = {point.x: point.name for point in all_points if point.name is not None}
    return "".join(
        [
            _opening(chart, HEIGHT + NAME_PX * len(series) + 4),
            *_line_axis_parts(axes, x_names, chart),
            *(
                _series_part(axes, number, name, sorted(points, key=lambda point: point.x))
                for number, (name, points) in enumerate(series.items())
            ),
            "</svg>",
        ]
    )


def _line_marks(points: Iterable[LinePoint]) -> list[_Mark]:
    return [
        _Mark(value, point["low"], point["high"], point.get("name"), point["x"])
        for point in points
        if (value := point["value"]) is not None
    ]


def _fit_line_axes(points: Sequence[_Mark], is_log_x: bool) -> _LineAxes:
    """Choose the ranges: y holds 0 and every bound; shares above 70 % get a scale up to 100 %."""
    xs = sorted({point.x for point in points})
    bounds = _bounds(points)
    is_share = all(0 <= bound <= 1 for bound in bounds)
    low, high = min(0.0, *bounds), max(bounds)
    step = round_step((1.0 if is_share and high > 0.7 else high) - low, 4)
    bottom = math.floor(low / step + 1e-9) * step
    top = (math.ceil(high / step - 1e-9) * step) or step
    return _LineAxes(xs, bottom, top, step, is_log_x and xs[0] > 0 and xs[-1] > xs[0], is_share)


def _line_axis_parts(axes: _LineAxes, x_names: Mapping[float, str], chart: LineChart) -> list[str]:
    """Return the horizontal rules with their numbers, the numbers below the x axis, both labels."""
    parts = []
    for tick in ticks(axes.bottom, axes.top, axes.step):
        y = axes.y_px(tick)
        text = f"{short(round(100 * tick, 6))} %" if axes.is_share else short(round(tick, 6))
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
        )
    for x in _spread_labels(axes.xs, axes.x_px):
        parts.append(
            f'<text x="{axes.x_px(x):.1f}" y="{HEIGHT - BOTTOM + 15}" '
            f'text-anchor="middle">{escape(x_names.get(x, short(x)))}</text>'
        )
    parts.append(
        f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" '
        f'text-anchor="end">{escape(chart["x_label"])}</text>'
        f'<text class="label" x="4" y="{TOP - 12}">{escape(chart["y_label"])}</text>'
    )
    return parts


def _series_part(axes: _LineAxes, number: int, name: str, points: Sequence[_Mark]) -> str:
    """Return one series, points sorted by x: its line, whiskers and dots, and its legend entry."""
    coordinates = " ".join(
        f"{axes.x_px(point.x):.1f},{axes.y_px(point.value):.1f}" for point in points
    )
    parts = [f'<g class="series s{number % SERIES_COLOURS}"><polyline points="{coordinates}"/>']
    for point in points:
        x = axes.x_px(point.x)
        if point.low is not None and point.high is not None:
            parts.append(
                f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" '
                f'y1="{axes.y_px(point.low):.1f}" y2="{axes.y_px(point.high):.1f}"/>'
            )
        parts.append(f'<circle cx="{x:.1f}" cy="{axes.y_px(point.value):.1f}" r="3"/>')
    y = HEIGHT + NAME_PX * (number + 0.5)
    parts.append(
        f'<polyline class="key" points="{LEFT},{y:.1f} {LEFT + 34},{y:.1f}"/><circle '
        f'cx="{LEFT + 17}" cy="{y:.1f}" r="3"/>'
        f'<text x="{LEFT + 42}" y="{y + 4:.1f}">{escape(name)}</text></g>'
    )
    return "".join(parts)


@dataclass(frozen=True)
class _BarAxes:
    """Range of a bar chart, the width of its column of names and its height in px."""

    low: float
    high: float
    names_px: int
    height: int

    @property
    def span(self) -> float:
        return (self.high - self.low) or 1.0

    def x_px(self, value: float) -> float:
        return self.names_px + (value - self.low) / self.span * (WIDTH - self.names_px - 60)


def bars(chart: BarChart) -> str:
    """Return an SVG with one bar a row from zero to its value, its interval and its value as text.

    Values are shares and are written in percent. Positive bars are green, negative ones red.
    """
    rows = [
        _Mark(value, row["low"], row["high"], row["name"])
        for row in chart["rows"]
        if (value := row["value"]) is not None
    ]
    if not rows:
        return _nothing_measured(chart)
    bounds = _bounds(rows)
    longest_name = max(len(row.name or "") for row in rows)
    axes = _BarAxes(
        min(0.0, *bounds),
        max(0.0, *bounds),
        min(MAX_NAMES_PX, 12 + round(LETTER_PX * longest_name)),
        TOP + BAR_PX * len(rows) + BOTTOM,
    )
    zero = axes.x_px(0)
    return "".join(
        [
            _opening(chart, axes.height),
            *_bar_rules(axes),
            *(_bar_part(axes, number, row) for number, row in enumerate(rows)),
            f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="{TOP - 4}" '
            f'y2="{axes.height - BOTTOM + 4}"/>',
            f'<text class="label" x="{WIDTH - 4}" y="{axes.height - 5}" '
            f'text-anchor="end">{escape(chart["x_label"])}</text>',
            "</svg>",
        ]
    )


def _bar_rules(axes: _BarAxes) -> list[str]:
    parts = []
    for tick in ticks(axes.low, axes.high, round_step(axes.span, 4)):
        x = axes.x_px(tick)
        parts.append(
            f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" '
            f'y2="{axes.height - BOTTOM + 4}"/>'
            f'<text x="{x:.1f}" y="{axes.height - BOTTOM + 17}" '
            f'text-anchor="middle">{short(round(100 * tick, 6))}</text>'
        )
    return parts


def _bar_part(axes: _BarAxes, number: int, row: _Mark) -> str:
    """Return one row: its bar, its whisker, its name to the left and its value to the right."""
    value = row.value
    middle = TOP + BAR_PX * (number + 0.5)
    left, right = sorted((axes.x_px(0), axes.x_px(value)))
    side = "gain" if value >= 0 else "loss"
    parts = [
        f'<rect class="{side}" x="{left:.1f}" y="{middle - 7:.1f}" width="{right - left:.1f}" '
        'height="14"/>'
    ]
    if row.low is not None and row.high is not None:
        parts.append(
            f'<line class="whisker" x1="{axes.x_px(row.low):.1f}" '
            f'x2="{axes.x_px(row.high):.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
        )
    value_left = axes.x_px(max(0.0, value, row.high or 0.0)) + 6
    parts.append(
        f'<text x="{axes.names_px - 8}" y="{middle + 4:.1f}" '
        f'text-anchor="end">{escape(row.name or "")}</text>'
        f'<text x="{value_left:.1f}" y="{middle + 4:.1f}">{100 * value:+.1f}</text>'
    )
    return "".join(parts)


def _opening(chart: Chart, height: int) -> str:
    title = escape(chart["title"])
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{title}"><title>{title}</title>'
    )


def _nothing_measured(chart: Chart) -> str:
    return f"<p>{escape(chart['title'])}: nothing was measured.</p>"


def _bounds(points: Iterable[_Mark]) -> list[float]:
    """Return all values and interval bounds of the points."""
    return [
        bound
        for point in points
        for bound in (point.low, point.high, point.value)
        if bound is not None
    ]


def _spread_labels(xs: Sequence[float], x_px: Callable[[float], float]) -> list[float]:
    """Return the values of x whose labels are at least MIN_LABEL_GAP_PX apart."""
    labels: list[float] = []
    for x in xs:
        if not labels or x_px(x) - x_px(labels[-1]) >= MIN_LABEL_GAP_PX:
            labels.append(x)
    return labels
