"""The HTML page of the report: renders report.html from the content of report.json.

The page is self-contained: pictures are data URIs, charts are inline SVG, and there is no script
and no network access. Text from data (captions, prompts, URLs) is untrusted, so jinja escapes all
of it.
"""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from indexing.metrics.bootstrap import Figure
from indexing.report import curve_svg, interval_svg
from indexing.report.report_types import (
    MetricsRow,
    Report,
    RunDescription,
    RunHistory,
    StageEntry,
)
from indexing.report.sections import Chart
from infra.console.progress import duration
from infra.storage.manifest_schema import Manifest
from infra.toml_text import toml_value

TEMPLATES = Path(__file__).parent / "templates"
CURVE_POINTS = 240
STANDARD_COUNTS = ("in", "out", "dropped")


def run_facts(facts: RunDescription, manifests: Sequence[Manifest]) -> RunHistory:
    """Return what the report's `run` says of the stages: times and package versions."""
    packages = [manifest.get("packages", {}) for manifest in manifests]
    names = sorted({name for versions in packages for name in versions})
    return {
        **facts,
        "started": min((manifest["started"] for manifest in manifests), default=None),
        "finished": max((manifest["finished"] for manifest in manifests), default=None),
        "seconds": round(sum(_seconds(manifest) for manifest in manifests), 1),
        "packages": {
            name: sorted({versions[name] for versions in packages if name in versions})
            for name in names
        },
    }


def stage_facts(manifest: Manifest, metrics: Sequence[MetricsRow]) -> StageEntry:
    """Return one entry of the report's `stages` from a manifest.

    `metrics` are the rows of metrics.jsonl of a trained stage. Losses that are not finite are
    skipped; `loss` is the mean of the last 5 % of the others.
    """
    counts = manifest["counts"]
    points = [
        (row["images_seen"], loss)
        for row in metrics
        if isinstance(loss := row.get("loss"), int | float)
        and math.isfinite(loss)
        and "images_seen" in row
    ]
    entry: StageEntry = {
        "stage": manifest["stage"],
        "key": manifest["key"],
        "inputs": dict(manifest.get("inputs", {})),
        "started": manifest["started"],
        "finished": manifest["finished"],
        "seconds": round(_seconds(manifest), 1),
        "bytes": sum(file["bytes"] for file in manifest.get("files", ())),
        "in": counts["in"],
        "out": counts["out"],
        "dropped": counts["dropped"],
        "more": {name: value for name, value in counts.items() if name not in STANDARD_COUNTS},
    }
    if points:
        last = points[-max(1, len(points) // 20) :]
        entry["loss"] = {
            "value": sum(loss for _, loss in last) / len(last),
            "n": len(last),
            "images_seen": points[-1][0],
        }
        entry["curve"] = thinned(points, CURVE_POINTS)
    return entry


def thinned(points: Sequence[tuple[float, float]], max_points: int) -> list[tuple[float, float]]:
    """Return at most `max_points` points: the mean y of neighbours, at the last x of each group."""
    size = math.ceil(len(points) / max_points)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(run[-1][0], round(sum(y for _, y in run) / len(run), 6)) for run in runs]


def render(facts: Report, folder: Path) -> str:
    """Return the HTML of the page for the content of report.json; its pictures lie in `folder`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "number": number,
        "duration": duration,
        "megabytes": megabytes,
    }
    environment.globals |= {
        "strip": lambda figure: Markup(
            curve_svg.strip(figure["value"], figure["low"], figure["high"], figure.get("chance"))
        ),
        "curve": lambda stage: Markup(
            curve_svg.curve(stage["curve"], "images seen", "loss", f"Loss of {stage['stage']}")
        ),
        "picture": partial(picture_uri, folder),
        "verdict": verdict,
        "fact": fact,
        "interval": interval,
        "plot": plot,
        "figure_text": figure_text,
        "figure_bounds": figure_bounds,
    }
    return environment.get_template("report.html").render(
        **facts, recipe=toml_text(facts["run"].get("config", {}))
    )


def plot(chart: Chart) -> Markup:
    """Return the SVG of a section's chart, marked as safe."""
    return Markup(interval_svg.plot(chart))


def picture_uri(folder: Path, name: str) -> str:
    """Return a PNG file of the report's folder as a data URI."""
    return "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode()


def percent(share: float | None, digits: int = 1) -> str:
    """Format a share as "41.2 %"; with two digits where it would round to zero, "–" for None."""
    if share is None:
        return "–"
    rounds_to_zero = 0 < 100 * share < 10.0**-digits
    return f"{100 * share:.{2 if rounds_to_zero else digits}f} %"


def interval(figure: Figure, as_percent: bool = True) -> str:
    """Format the interval of a figure: "35.6 to 47.0", or "–" where it has none."""
    low, high = figure["low"], figure["high"]
    if low is None or high is None:
        return "–"
    scale = 100 if as_percent else 1
    return f"{scale * low:.1f} to {scale * high:.1f}"


def figure_text(figure: Figure) -> str:
    """Format a figure's value: a share (the default unit) in percent, others to 3 or 4 digits."""
    value = figure["value"]
    if figure.get("unit", "share") == "share":
        return percent(value)
    if value is None:
        return "–"
    return f"{value:,.1f}" if abs(value) >= 99.95 else f"{value:.3g}"


def figure_bounds(figure: Figure) -> str:
    """Format the 95 % interval of a figure in its unit."""
    return " to ".join(
        figure_text({**figure, "value": bound}).removesuffix(" %")
        for bound in (figure["low"], figure["high"])
    )


def number(value: float | None, digits: int | None = None) -> str:
    """Format a count with thousands separators, or a number with `digits` decimals."""
    if value is None:
        return "–"
    return f"{value:,}" if digits is None else f"{value:,.{digits}f}"


def fact(value: Any) -> str:
    """Format a stage's count: integers with separators, floats to four digits, others as text."""
    if type(value) is int:  # not a bool
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def megabytes(size: int) -> str:
    """Format a size in bytes as kB or MB."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def verdict(figure: Figure) -> str:
    """Compare a figure's interval with chance and with always naming the most frequent class.

    Return a few words, or "" where the figure has no interval or no chance level.
    """
    low, high, chance = figure["low"], figure["high"], figure.get("chance")
    if low is None or high is None or chance is None:
        return ""
    if low > max(chance, figure.get("majority") or 0):
        return "above chance and majority" if figure.get("majority") else "above chance"
    if low > chance:
        return "above chance, not majority"
    return "below chance" if high < chance else "not different from chance"


def toml_text(config: Mapping[str, Any]) -> str:
    """Return a resolved config as TOML; a key whose value is None becomes a comment."""
    return "\n\n".join(
        "\n".join(_section(name, section))
        for name, section in config.items()
        if isinstance(section, Mapping)
    )


def _section(name: str, section: Mapping[str, Any]) -> Iterator[str]:
    yield f"[{name}]"
    tables = {key: value for key, value in section.items() if _is_tables(value)}
    for key, value in section.items():
        if key not in tables:
            yield f"# {key} is not set" if value is None else f"{key} = {toml_value(value)}"
    for key, rows in tables.items():
        for row in rows:
            yield ""
            yield f"[[{name}.{key}]]"
            filled = {inner: value for inner, value in row.items() if value is not None}
            yield from (f"{inner} = {toml_value(value)}" for inner, value in filled.items())


def _is_tables(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(element, Mapping) for element in value)
    )


def _seconds(manifest: Manifest) -> float:
    return (
        datetime.fromisoformat(manifest["finished"]) - datetime.fromisoformat(manifest["started"])
    ).total_seconds()
