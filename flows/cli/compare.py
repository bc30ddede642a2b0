"""The command `report compare`: compare the reports of two or more runs.

Reads report.json of every run; writes one HTML page, or prints JSON.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import DEFAULT_ROOT, Json, RootUri, print_json
from flows.config.roots import open_for
from infra.errors import CallerError
from infra.storage.stage_files import pinned_copy

if TYPE_CHECKING:  # numpy, which `unclip --help` does not need
    from indexing.report.report_types import Report


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="Names of runs in ROOT, or paths of report.json files or their folders.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the page goes.")] = Path(
        "comparison.html"
    ),
    root: RootUri = DEFAULT_ROOT,
    as_json: Json = False,
) -> None:
    """Write a page that compares the figures of two or more runs, with confidence intervals."""
    if len(runs) < 2 or len(set(runs)) < len(runs):
        raise CallerError(
            "report compare needs two or more different runs: unclip report compare A B"
        )
    from indexing.report import comparison

    reports = {run: read_report(run, root) for run in runs}
    rows = comparison.compare(reports)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(comparison.render(reports, rows))
    differing = [row for row in rows if row["differs"]]
    if as_json:
        print_json({"runs": runs, "page": str(out), "figures": rows})
        return
    print(f"{out}  ({len(rows)} figures, {len(differing)} told apart)")
    for row in differing:
        for run, delta in row["differences"].items():
            if comparison.is_significant(delta):
                print(f"{comparison.signed(delta):>14}  {' · '.join(row['place'])}  ({run})")


def read_report(run: str, root: str) -> "Report":
    """Read the report of a run in ROOT, or at a path. Raises CallerError if it is not a report."""
    path = Path(run)
    if path.is_dir():
        path /= "report.json"
    if not path.is_file():
        from flows.runs.records import committed_of, find_run

        opened = open_for(root, for_writing=False)
        evaluated = committed_of(opened, find_run(opened, run), "evaluate")
        path = pinned_copy(evaluated.files, "report.json") / "report.json"
    try:
        report: Report = json.loads(path.read_text())
        if not {"run", "stages", "zero_shot"} <= report.keys():
            raise ValueError("it holds no run")
    except (ValueError, AttributeError) as error:
        raise CallerError(f"{path} is no report.json of a run ({error})") from error
    return report
