"""Sections of the report as plain data: text, tables, pictures and charts. Writes nothing.

A new measurement returns `section(...)` from a callable that `evaluate` receives. The page, the
JSON schema (report.schema.json) and the comparison of runs then handle it. A cell of a table is a
text, a number, None or a figure of indexing.metrics.bootstrap, which is written with its interval.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NotRequired, TypedDict

from indexing.metrics.bootstrap import Figure

Cell = str | int | float | None | Figure


class Table(TypedDict):
    """A table as `table` returns it."""

    caption: str
    head: list[str]
    rows: list[list[Cell]]


class Picture(TypedDict):
    """A picture as `picture` returns it."""

    picture: str
    """File name in the report's folder."""
    alt: str
    caption: str
    is_pixelated: bool


class NamedFigure(Figure):
    """The figure of the bar `name`, or of a point on a line whose name replaces its x."""

    name: str


class LinePoint(Figure):
    """A figure at x on a line."""

    x: float
    name: NotRequired[str]


class LineChart(TypedDict):
    """A chart as `lines` returns it."""

    kind: Literal["lines"]
    title: str
    x_label: str
    y_label: str
    series: dict[str, list[LinePoint]]
    is_log_x: bool


class BarChart(TypedDict):
    """A chart as `bars` returns it."""

    kind: Literal["bars"]
    title: str
    x_label: str
    rows: list[NamedFigure]


Chart = LineChart | BarChart


class ReportSection(TypedDict):
    """A section as `section` returns it and report.schema.json defines it."""

    title: str
    text: list[str]
    tables: list[Table]
    charts: list[Chart]
    pictures: list[Picture]


MakeSection = Callable[[], ReportSection | list[ReportSection]]
"""Measures and returns one or more sections; may write PNG files into the report's `pictures/`."""


def section(
    title: str,
    text: Sequence[str] = (),
    tables: Sequence[Table] = (),
    pictures: Sequence[Picture] = (),
    charts: Sequence[Chart] = (),
) -> ReportSection:
    """Return a section: paragraphs, then tables, charts and pictures. Titles must be unique."""
    return {
        "title": title,
        "text": list(text),
        "tables": list(tables),
        "charts": list(charts),
        "pictures": list(pictures),
    }


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    """Return a table; the first cell of a row is its name.

    Raises ValueError where a row and the head differ in length.
    """
    for row in rows:
        if len(row) != len(head):
            raise ValueError(
                f"table {caption!r}: the row {row[0]!r} has {len(row)} cells and the head "
                f"{len(head)}: give every row one cell for each column"
            )
    return {"caption": caption, "head": list(head), "rows": [list(row) for row in rows]}


def picture(name: str, alt: str, caption: str = "", is_pixelated: bool = False) -> Picture:
    """Return a picture: its file name in the report's folder, its alt text, the text below it."""
    return {"picture": name, "alt": alt, "caption": caption, "is_pixelated": is_pixelated}


def lines(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[tuple[float, Figure]]],
    is_log_x: bool = False,
) -> LineChart:
    """Return a chart of figures over x: one line with intervals for each series."""
    points: dict[str, list[LinePoint]] = {
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


def bars(title: str, x_label: str, rows: Sequence[tuple[str, Figure]]) -> BarChart:
    """Return a bar chart: one bar with its interval a row, from zero to the left or right."""
    return {
        "kind": "bars",
        "title": title,
        "x_label": x_label,
        "rows": [{"name": name, **figure} for name, figure in rows],
    }
