"""Further sections of the report as plain data: words, tables, pictures and charts, one shape for
all of them.

Whoever measures something new returns `section(...)` and hands it to `evaluate` in a callable;
page, JSON schema and the comparison of runs then know it. A table's cell is a text, a number, None
or a figure of indexing.metrics.bootstrap; figures are written with their intervals. Writes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from indexing.metrics.bootstrap import Figure

ReportSection = dict[str, Any]
Cell = str | int | float | None | Figure
MakeSection = Callable[[], ReportSection | list[ReportSection]]
"""Measures and returns a section, or several; may write PNG files into the `pictures/` of the
report's folder."""


def section(
    title: str,
    text: Sequence[str] = (),
    tables: Sequence[Mapping[str, Any]] = (),
    pictures: Sequence[Mapping[str, Any]] = (),
    charts: Sequence[Mapping[str, Any]] = (),
) -> ReportSection:
    """Return a section of the report: paragraphs, then tables, charts and pictures; `title` must
    differ from other sections'.
    """
    return {
        "title": title,
        "text": list(text),
        "tables": list(tables),
        "charts": list(charts),
        "pictures": list(pictures),
    }


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> dict[str, Any]:
    """Return a table; a row's first cell is its name. Raises ValueError where a row is not as long
    as the head.
    """
    for row in rows:
        if len(row) != len(head):
            raise ValueError(
                f"table {caption!r}: the row {row[0]!r} has {len(row)} cells and the head "
                f"{len(head)}"
            )
    return {"caption": caption, "head": list(head), "rows": [list(row) for row in rows]}


def picture(name: str, alt: str, caption: str = "", is_pixelated: bool = False) -> dict[str, Any]:
    """Return a picture: its file's name in the report's folder, what it shows in words, what stands
    below it.
    """
    return {"picture": name, "alt": alt, "caption": caption, "is_pixelated": is_pixelated}


def lines(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[tuple[float, Figure]]],
    is_log_x: bool = False,
) -> dict[str, Any]:
    """Return a chart of figures over x, one line for each of the series, with their intervals."""
    points = {
        name: [{"x": x, **figure} for x, figure in figures] for name, figures in series.items()
    }
    return {
        "kind": "lines",
        "title": title,
        "x_label": x_label,
        "y_label": y_label,
        "series": points,
        "is_log_x": is_log_x,
    }


def bars(title: str, x_label: str, rows: Sequence[tuple[str, Figure]]) -> dict[str, Any]:
    """Return a chart of one bar a row, to the left of zero or to the right of it, with its
    interval.
    """
    return {
        "kind": "bars",
        "title": title,
        "x_label": x_label,
        "rows": [{"name": name, **figure} for name, figure in rows],
    }
