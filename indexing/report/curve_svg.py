"""Inline SVG charts of the report: a training curve with axes, and a figure with its interval.

Input is numbers and labels, output is SVG text. Colours come from the page (`currentColor` and its
custom properties), so the charts follow light and dark mode.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 38
LOG_ABOVE = 8
"""Ratio of largest to smallest loss above which the y axis is logarithmic."""
STRIP_WIDTH, STRIP_HEIGHT = 120, 16
SMOOTHED_SHARE = 1 / 20
"""Window of the running mean, as a share of all points."""


@dataclass(frozen=True)
class _Axes:
    """Ranges of both axes, their ticks, and the positions of values in px. x starts at 0."""

    x_high: float
    y_low: float
    y_high: float
    is_log: bool
    x_ticks: list[float]
    y_ticks: list[float]

    def x_px(self, x: float) -> float:
        return LEFT + x / self.x_high * (WIDTH - LEFT - RIGHT)

    def y_px(self, y: float) -> float:
        low, high = self.y_low, self.y_high
        if self.is_log:
            share = math.log(y / low) / math.log(high / low)
        else:
            share = (y - low) / ((high - low) or 1)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def curve(points: Sequence[tuple[float, float]], x_label: str, y_label: str, title: str) -> str:
    """Return an SVG of (x, y) points, sorted by x: a faint line and its running mean, with axes."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes = _fit_axes(xs, ys)
    parts = [
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        *_axis_parts(axes, x_label, y_label),
        _polyline(axes, xs, ys, "points"),
        _polyline(axes, xs, smoothed(ys), "mean"),
        "</svg>",
    ]
    return "".join(parts)


def _fit_axes(xs: Sequence[float], ys: Sequence[float]) -> _Axes:
    """Choose the ranges: y is logarithmic where the loss falls by more than LOG_ABOVE."""
    low, high = min(ys), max(ys)
    is_log = low > 0 and high / low > LOG_ABOVE
    if is_log:
        y_ticks = log_ticks(low, high)
    else:
        step = round_step(high - low, 4)
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        y_ticks = ticks(low, high, step)
    x_ticks = ticks(0, max(xs), round_step(max(xs), 4))
    return _Axes(max(xs) or 1, low, high, is_log, x_ticks, y_ticks)


def _axis_parts(axes: _Axes, x_label: str, y_label: str) -> list[str]:
    """Return rules and ticks with their numbers, the x axis and both labels."""
    parts = []
    for tick in axes.y_ticks:
        y = axes.y_px(tick)
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    for tick in axes.x_ticks:
        x = axes.x_px(tick)
        anchor = "end" if x > WIDTH - 2 * RIGHT else "middle"
        parts.append(
            f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" '
            f'y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" '
            f'text-anchor="{anchor}">{short(tick)}</text>'
        )
    scale = f"{y_label}{', log scale' if axes.is_log else ''}"
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" '
        f'y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" '
        f'text-anchor="end">{escape(x_label)}</text>'
        f'<text class="label" x="{LEFT}" y="{TOP - 12}">{escape(scale)}</text>'
    )
    return parts


def _polyline(axes: _Axes, xs: Sequence[float], ys: Sequence[float], name: str) -> str:
    points = " ".join(f"{axes.x_px(x):.1f},{axes.y_px(y):.1f}" for x, y in zip(xs, ys, strict=True))
    return f'<polyline class="{name}" points="{points}"/>'


def strip(value: float, low: float | None, high: float | None, chance: float | None) -> str:
    """Return an SVG of a share (0 to 1): a dot, its interval as a bar, chance as a tick."""
    middle = STRIP_HEIGHT / 2

    def x_px(share: float) -> float:
        return round(5 + min(max(share, 0.0), 1.0) * (STRIP_WIDTH - 10), 1)

    parts = [
        f'<svg class="strip" viewBox="0 0 {STRIP_WIDTH} {STRIP_HEIGHT}" width="{STRIP_WIDTH}" '
        f'height="{STRIP_HEIGHT}" aria-hidden="true">'
    ]
    parts.append(f'<line class="rule" x1="{x_px(0)}" x2="{x_px(1)}" y1="{middle}" y2="{middle}"/>')
    parts += [
        f'<line class="rule" x1="{x_px(share)}" x2="{x_px(share)}" y1="{middle - 3}" '
        f'y2="{middle + 3}"/>'
        for share in (0, 0.5, 1)
    ]
    if chance is not None:
        parts.append(
            f'<line class="chance" x1="{x_px(chance)}" x2="{x_px(chance)}" y1="1" '
            f'y2="{STRIP_HEIGHT - 1}"/>'
        )
    if low is not None and high is not None:
        parts.append(
            f'<line class="interval" x1="{x_px(low)}" x2="{x_px(high)}" '
            f'y1="{middle}" y2="{middle}"/>'
        )
    parts += [f'<circle class="dot" cx="{x_px(value)}" cy="{middle}" r="3.5"/>', "</svg>"]
    return "".join(parts)


def round_step(span: float, about: int) -> float:
    """Return a tick step (1, 2 or 5 times a power of ten) for about `about` steps in the span.

    Return 1 where the span is 0 or negative.
    """
    if span <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    return next(
        power * factor for factor in (1, 2, 5, 10) if power * factor >= span / about * 0.999
    )


def ticks(low: float, high: float, step: float) -> list[float]:
    """Return the multiples of `step` from low to high, both included."""
    return [
        number * step
        for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Return ticks for a log scale: 1, 2 and 5 times powers of ten from low to high.

    Use fewer factors (1 and 3, then 1 alone) until there are at most 6 ticks. Return [low, high]
    where no such number lies between them.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        in_range = [
            factor * 10.0**power
            for power in powers
            for factor in factors
            if low <= factor * 10.0**power <= high
        ]
        if len(in_range) <= 6:
            break
    return in_range or [low, high]


def short(number: float) -> str:
    """Format a tick: 50k, 1.2M, 0.05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:g}{letter}"
    return f"{number:.4g}"


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the running mean of the values; the window shrinks at both ends. Same length."""
    max_half = int(len(values) * SMOOTHED_SHARE / 2)
    means = []
    for i in range(len(values)):
        half = min(max_half, i, len(values) - 1 - i)
        means.append(sum(values[i - half : i + half + 1]) / (2 * half + 1))
    return means
