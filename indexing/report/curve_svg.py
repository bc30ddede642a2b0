"""Charts as inline SVG for reports: a training curve with axes, and a figure with its interval on a
scale.

Colours are the page's (`currentColor` and its custom properties), so that charts follow light and
dark. Knows numbers only.
"""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 38
LOG_ABOVE = 8
"""A loss that falls by more than this factor is drawn on a logarithmic scale."""
STRIP_WIDTH, STRIP_HEIGHT = 120, 16
SMOOTHED_SHARE = 1 / 20
"""How many of the points make one of the line that is drawn over them."""


def curve(points: Sequence[tuple[float, float]], x_label: str, y_label: str, title: str) -> str:
    """Draw (x, y) pairs in order of x as an SVG: the points as a faint line, their running mean
    above it; axes with round ticks.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    is_log = min(ys) > 0 and max(ys) / min(ys) > LOG_ABOVE
    step = round_step(max(ys) - min(ys), 4)
    low, high = (
        (min(ys), max(ys))
        if is_log
        else (math.floor(min(ys) / step) * step, math.ceil(max(ys) / step) * step)
    )
    y_ticks = log_ticks(low, high) if is_log else ticks(low, high, step)
    x_ticks = ticks(0, max(xs), round_step(max(xs), 4))
    x_high = max(xs) or 1

    def x_at(x: float) -> float:
        return LEFT + x / x_high * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        share = (
            math.log(y / low) / math.log(high / low) if is_log else (y - low) / ((high - low) or 1)
        )
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def line(values: Sequence[float], name: str) -> str:
        points_text = " ".join(
            f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in zip(xs, values, strict=True)
        )
        return f'<polyline class="{name}" points="{points_text}"/>'

    scale = f"{y_label}{', log scale' if is_log else ''}"
    parts = [
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
    ]
    for tick in y_ticks:
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(tick):.1f}" '
            f'y2="{y_at(tick):.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{y_at(tick) + 3.5:.1f}" '
            f'text-anchor="end">{short(tick)}</text>'
        )
    for tick in x_ticks:
        anchor = "end" if x_at(tick) > WIDTH - 2 * RIGHT else "middle"
        parts.append(
            f'<line class="tick" x1="{x_at(tick):.1f}" x2="{x_at(tick):.1f}" '
            f'y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
        )
        parts.append(
            f'<text x="{x_at(tick):.1f}" y="{HEIGHT - BOTTOM + 15}" '
            f'text-anchor="{anchor}">{short(tick)}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" '
        f'y2="{HEIGHT - BOTTOM}"/>'
    )
    parts.append(
        f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" '
        f'text-anchor="end">{escape(x_label)}</text>'
    )
    parts.append(f'<text class="label" x="{LEFT}" y="{TOP - 12}">{escape(scale)}</text>')
    parts += [line(ys, "points"), line(smoothed(ys), "mean"), "</svg>"]
    return "".join(parts)


def strip(value: float, low: float | None, high: float | None, chance: float | None) -> str:
    """Draw a share as a dot with its interval as a bar, on a scale from 0 to 100 %, chance as a
    tick across.
    """
    middle = STRIP_HEIGHT / 2

    def at(share: float) -> float:
        return round(5 + min(max(share, 0.0), 1.0) * (STRIP_WIDTH - 10), 1)

    parts = [
        f'<svg class="strip" viewBox="0 0 {STRIP_WIDTH} {STRIP_HEIGHT}" width="{STRIP_WIDTH}" '
        f'height="{STRIP_HEIGHT}" aria-hidden="true">'
    ]
    parts.append(f'<line class="rule" x1="{at(0)}" x2="{at(1)}" y1="{middle}" y2="{middle}"/>')
    parts += [
        f'<line class="rule" x1="{at(share)}" x2="{at(share)}" y1="{middle - 3}" '
        f'y2="{middle + 3}"/>'
        for share in (0, 0.5, 1)
    ]
    if chance is not None:
        parts.append(
            f'<line class="chance" x1="{at(chance)}" x2="{at(chance)}" y1="1" '
            f'y2="{STRIP_HEIGHT - 1}"/>'
        )
    if low is not None and high is not None:
        parts.append(
            f'<line class="interval" x1="{at(low)}" x2="{at(high)}" y1="{middle}" y2="{middle}"/>'
        )
    parts += [f'<circle class="dot" cx="{at(value)}" cy="{middle}" r="3.5"/>', "</svg>"]
    return "".join(parts)


def round_step(span: float, about: int) -> float:
    """Return 1, 2 or 5 times a power of ten that divides a span into roughly `about` parts; 1 for
    no span.
    """
    if span <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    return next(
        power * factor for factor in (1, 2, 5, 10) if power * factor >= span / about * 0.999
    )


def ticks(low: float, high: float, step: float) -> list[float]:
    """Return the multiples of a step within low..high."""
    return [
        number * step
        for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten within low..high, only the powers where there would be
    many.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        curves = [
            factor * 10.0**power
            for power in powers
            for factor in factors
            if low <= factor * 10.0**power <= high
        ]
        if len(curves) <= 6:
            break
    return curves or [low, high]


def short(number: float) -> str:
    """Write a tick: 50k, 1.2M, 0.05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:g}{letter}"
    return f"{number:.4g}"


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbours on both sides, fewer of them at the ends."""
    reach = int(len(values) * SMOOTHED_SHARE / 2)
    around = [min(reach, number, len(values) - 1 - number) for number in range(len(values))]
    return [
        sum(values[number - near : number + near + 1]) / (2 * near + 1)
        for number, near in enumerate(around)
    ]
