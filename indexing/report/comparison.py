"""Comparison of two or more runs' reports: all figures, and differences from the first run.

Reads the content of report.json files and returns one self-contained HTML page. A figure is
identified by its path in the report; every difference has an interval.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

import jinja2

from indexing.metrics.bootstrap import Figure
from indexing.report import page
from indexing.report.report_types import Report
from indexing.report.sections import ReportSection

TEMPLATES = Path(__file__).parent / "templates"
SKIPPED = ("per_class", "examples", "prompts", "charts", "run", "stages")


class ComparedFigure(TypedDict):
    """A figure of several runs."""

    place: list[str]
    """Its path in the report."""
    runs: dict[str, Figure | None]
    """By run; None where a report lacks it."""
    differences: dict[str, Figure | None]
    """From the first run, by later run; None where one of the two lacks it."""
    differs: bool
    """Whether a difference is significant."""


class NamedRow(ComparedFigure):
    """A row of the page; its table names the first parts of its path."""

    name: str


def figures(facts: Report) -> dict[tuple[str, ...], Figure]:
    """Return the figures of a report that have a value, by their path.

    A path is the keys in report.json; in a section it is title, table caption, row name and column.
    """
    return dict(_walk(facts, ()))


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Figure]]:
    if _is_figure(value):
        if value["value"] is not None:
            yield path, value.copy()
    elif isinstance(value, Mapping):
        for name, child in value.items():
            if name == "sections":
                yield from _walk_sections(child)
            elif name not in SKIPPED:
                yield from _walk(child, (*path, str(name).replace("_", " ")))


def _is_figure(value: Any) -> TypeGuard[Figure]:
    return isinstance(value, dict) and {"value", "low", "high", "n"} <= value.keys()


def _walk_sections(sections: Sequence[ReportSection]) -> Iterator[tuple[tuple[str, ...], Figure]]:
    for section in sections:
        for table in section["tables"]:
            for row in table["rows"]:
                for head, cell in zip(table["head"][1:], row[1:], strict=True):
                    yield from _walk(cell, (section["title"], table["caption"], str(row[0]), head))


def difference(figure: Figure, first: Figure) -> Figure:
    """Return figure - first with its 95 % interval (MOVER, Zou & Donner 2008).

    The interval takes both figures as independent: distances of the bounds from the values are
    added in squares. Runs that are judged on the same pictures vary together; their interval is too
    wide rather than too narrow.
    """
    value, first_value = figure["value"], first["value"]
    assert value is not None and first_value is not None, "`figures` returns those with a value"
    delta: Figure = {
        "value": value - first_value,
        "low": None,
        "high": None,
        "n": figure["n"],
        "groups": figure["groups"],
    }
    if (bounds := _bounds(figure)) and (first_bounds := _bounds(first)):
        (low, high), (first_low, first_high) = bounds, first_bounds
        below = math.hypot(value - low, first_high - first_value)
        above = math.hypot(high - value, first_value - first_low)
        delta["low"] = value - first_value - below
        delta["high"] = value - first_value + above
    if "unit" in figure:
        delta["unit"] = figure["unit"]
    return delta


def _bounds(figure: Figure) -> tuple[float, float] | None:
    low, high = figure["low"], figure["high"]
    return None if low is None or high is None else (low, high)


def compare(reports: Mapping[str, Report]) -> list[ComparedFigure]:
    """Return one row for each figure of any report; `reports` are by run name."""
    figures_of = {run: figures(facts) for run, facts in reports.items()}
    paths = list(dict.fromkeys(path for run_figures in figures_of.values() for path in run_figures))
    first, *others = figures_of
    rows: list[ComparedFigure] = []
    for figure_path in paths:
        by_run = {run: run_figures.get(figure_path) for run, run_figures in figures_of.items()}
        base = by_run[first]
        deltas = {
            run: difference(figure, base) if base and (figure := by_run[run]) else None
            for run in others
        }
        rows.append(
            {
                "place": list(figure_path),
                "runs": by_run,
                "differences": deltas,
                "differs": any(map(is_significant, deltas.values())),
            }
        )
    return rows


def is_significant(delta: Figure | None) -> TypeGuard[Figure]:
    """Return whether a difference has an interval and zero lies outside it."""
    bounds = _bounds(delta) if delta else None
    return bounds is not None and (bounds[0] > 0 or bounds[1] < 0)


def render(reports: Mapping[str, Report], rows: Sequence[ComparedFigure]) -> str:
    """Return the HTML page: changed recipe keys, then all figures and differences."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "figure_text": page.figure_text,
        "figure_bounds": page.figure_bounds,
        "signed": signed,
    }
    groups: dict[str, list[NamedRow]] = {}
    for row in rows:
        groups.setdefault(" · ".join(row["place"][:2]), []).append(
            {**row, "name": " · ".join(row["place"][2:]) or row["place"][-1]}
        )
    return environment.get_template("comparison.html").render(
        runs=list(reports), groups=groups,
        changed=changed({run: facts["run"].get("config", {}) for run, facts in reports.items()}),
        keys={
            run: {stage["stage"]: stage["key"] for stage in facts["stages"]}
            for run, facts in reports.items()
        },
    )  # fmt: skip


def signed(figure: Figure) -> str:
    """Format a difference with its sign; a share in percentage points."""
    text = page.figure_text(figure).replace(" %", " points")
    return text if text.startswith(("-", "–")) else f"+{text}"


def changed(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the recipe keys whose values differ between runs, with the value of every run."""
    flat = [dict(_flat(config, "")) for config in configs.values()]
    names = list(dict.fromkeys(name for flat_config in flat for name in flat_config))
    return [
        (name, [flat_config.get(name, "not there") for flat_config in flat])
        for name in names
        if len({flat_config.get(name) for flat_config in flat}) > 1
    ]


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
