"""Charts of the report's further sections as inline SVG: lines with intervals, and bars on both
sides of zero.

Colours are the page's custom properties; a series is told by its colour, its dash and its name
below the picture, where a long one has room on a phone too. Knows numbers only.
"""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from indexing.report.curve_svg import round_step, short, ticks

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 40
SERIES_COLOURS = 6
NAME_PX = 17
"""Height of a line of the legend."""
BAR_PX, LETTER_PX, MAX_NAMES_PX = 24, 6.2, 200


def plot(chart: Mapping[str, Any]) -> str:
    """Draw a chart of indexing.report.sections as SVG; one without a single value is a sentence."""
    return lines(chart) if chart["kind"] == "lines" else bars(chart)


def lines(chart: Mapping[str, Any]) -> str:
    """Draw figures over x: lines, dots and intervals as whiskers; x is linear or logarithmic, a
    point's `name` stands for it.
    """
    series = {
        name: [point for point in points if point["value"] is not None]
        for name, points in chart["series"].items()
    }
    series = {name: points for name, points in series.items() if points}
    if not series:
        return f"<p>{escape(chart['title'])}: nothing was measured.</p>"
    every = [point for points in series.values() for point in points]
    bounds = [
        bound
        for point in every
        for bound in (point["low"], point["high"], point["value"])
        if bound is not None
    ]
    xs = sorted({point["x"] for point in every})
    names = {point["x"]: point["name"] for point in every if "name" in point}
    is_share = all(0 <= bound <= 1 for bound in bounds)
    low = min(0.0, *bounds)
    step = round_step((1.0 if is_share and max(bounds) > 0.7 else max(bounds)) - low, 4)
    bottom, top = (
        math.floor(low / step + 1e-9) * step,
        (math.ceil(max(bounds) / step - 1e-9) * step) or step,
    )
    is_log = chart["is_log_x"] and xs[0] > 0 and xs[-1] > xs[0]

    def x_at(x: float) -> float:
        first, last = (math.log(xs[0]), math.log(xs[-1])) if is_log else (xs[0], xs[-1])
        share = ((math.log(x) if is_log else x) - first) / ((last - first) or 1)
        return LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 8)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    title = escape(chart["title"])
    whole = HEIGHT + NAME_PX * len(series) + 4
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {whole}" role="img" '
        f'aria-label="{title}"><title>{title}</title>'
    ]
    for tick in ticks(bottom, top, step):
        written = f"{short(round(100 * tick, 6))} %" if is_share else short(round(tick, 6))
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(tick):.1f}" '
            f'y2="{y_at(tick):.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{y_at(tick) + 3.5:.1f}" text-anchor="end">{written}</text>'
        )
    for x in _spread_labels(xs, x_at):
        parts.append(
            f'<text x="{x_at(x):.1f}" y="{HEIGHT - BOTTOM + 15}" '
            f'text-anchor="middle">{escape(names.get(x, short(x)))}</text>'
        )
    parts.append(
        f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" '
        f'text-anchor="end">{escape(chart["x_label"])}</text>'
    )
    parts.append(f'<text class="label" x="4" y="{TOP - 12}">{escape(chart["y_label"])}</text>')
    for number, (name, points) in enumerate(series.items()):
        points = sorted(points, key=lambda point: point["x"])
        points_text = " ".join(
            f"{x_at(point['x']):.1f},{y_at(point['value']):.1f}" for point in points
        )
        parts.append(
            f'<g class="series s{number % SERIES_COLOURS}"><polyline points="{points_text}"/>'
        )
        for point in points:
            x = x_at(point["x"])
            if point["low"] is not None:
                parts.append(
                    f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" '
                    f'y1="{y_at(point["low"]):.1f}" y2="{y_at(point["high"]):.1f}"/>'
                )
            parts.append(f'<circle cx="{x:.1f}" cy="{y_at(point["value"]):.1f}" r="3"/>')
        y = HEIGHT + NAME_PX * (number + 0.5)
        parts.append(
            f'<polyline class="key" points="{LEFT},{y:.1f} {LEFT + 34},{y:.1f}"/><circle '
            f'cx="{LEFT + 17}" cy="{y:.1f}" r="3"/>'
        )
        parts.append(f'<text x="{LEFT + 42}" y="{y + 4:.1f}">{escape(name)}</text></g>')
    return "".join([*parts, "</svg>"])


def bars(chart: Mapping[str, Any]) -> str:
    """Draw one bar a row from zero to its value, green to the right and red to the left, its
    interval as a line, its value in words.
    """
    rows = [row for row in chart["rows"] if row["value"] is not None]
    if not rows:
        return f"<p>{escape(chart['title'])}: nothing was measured.</p>"
    bounds = [
        bound
        for row in rows
        for bound in (row["low"], row["high"], row["value"])
        if bound is not None
    ]
    low, high = min(0.0, *bounds), max(0.0, *bounds)
    height = TOP + BAR_PX * len(rows) + BOTTOM
    span = (high - low) or 1.0
    names_px = min(MAX_NAMES_PX, 12 + round(LETTER_PX * max(len(row["name"]) for row in rows)))

    def x_at(value: float) -> float:
        return names_px + (value - low) / span * (WIDTH - names_px - 60)

    title = escape(chart["title"])
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{title}"><title>{title}</title>'
    ]
    for tick in ticks(low, high, round_step(span, 4)):
        parts.append(
            f'<line class="rule" x1="{x_at(tick):.1f}" x2="{x_at(tick):.1f}" y1="{TOP - 4}" '
            f'y2="{height - BOTTOM + 4}"/>'
        )
        parts.append(
            f'<text x="{x_at(tick):.1f}" y="{height - BOTTOM + 17}" '
            f'text-anchor="middle">{short(round(100 * tick, 6))}</text>'
        )
    for number, row in enumerate(rows):
        middle = TOP + BAR_PX * (number + 0.5)
        left, right = sorted((x_at(0), x_at(row["value"])))
        side = "gain" if row["value"] >= 0 else "loss"
        parts.append(
            f'<rect class="{side}" x="{left:.1f}" y="{middle - 7:.1f}" width="{right - left:.1f}" '
            'height="14"/>'
        )
        if row["low"] is not None:
            parts.append(
                f'<line class="whisker" x1="{x_at(row["low"]):.1f}" x2="{x_at(row["high"]):.1f}" '
                f'y1="{middle:.1f}" y2="{middle:.1f}"/>'
            )
        parts.append(
            f'<text x="{names_px - 8}" y="{middle + 4:.1f}" '
            f'text-anchor="end">{escape(row["name"])}</text>'
        )
        beside = x_at(max(0.0, row["value"], row["high"] or 0.0)) + 6
        parts.append(
            f'<text x="{beside:.1f}" y="{middle + 4:.1f}">{100 * row["value"]:+.1f}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{x_at(0):.1f}" x2="{x_at(0):.1f}" y1="{TOP - 4}" '
        f'y2="{height - BOTTOM + 4}"/>'
    )
    parts.append(
        f'<text class="label" x="{WIDTH - 4}" y="{height - 5}" '
        f'text-anchor="end">{escape(chart["x_label"])}</text>'
    )
    return "".join([*parts, "</svg>"])


def _spread_labels(xs: list[float], x_at: Any) -> list[float]:
    """Return the values of x whose labels do not run into each other."""
    label_xs: list[float] = []
    for x in xs:
        if not label_xs or x_at(x) - x_at(label_xs[-1]) >= 30:
            label_xs.append(x)
    return label_xs
