"""The README's table of relations and search at inference, from the report of a finished run of the
recipe `scenes`.

    unclip run scenes --root ROOT && python -m tests.benchmarks.search_at_inference --root ROOT
    [--run scenes]

Prints each row with its 95 % interval over prompts and the number of prompts. Ends with 1 where
search by the checker, by best of n or by a
beam, does not beat plain sampling at equal calls of the decoder, by an interval above zero, for
position and for attribution.
"""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from flows.cli.compare import read_report
from indexing.evaluation.relations import TITLE
from indexing.report.page import figure_bounds, figure_text

MUST_GAIN = ("position", "attribution")
JUDGE = "by checker"


def section_of(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the report's section on relations; raises SystemExit where the run had no scenes."""
    for section in report["sections"]:
        if section["title"] == TITLE and section["tables"]:
            return dict(section)
    raise SystemExit(
        "the run's report has no relations: give a ROOT in which `unclip run scenes` has ended"
    )


def written(cell: Any) -> str:
    """Write a cell: a figure with its interval, or what else stands there."""
    if not isinstance(cell, Mapping):
        return "" if cell is None else str(cell)
    return figure_text(cell) + (f" ({figure_bounds(cell)})" if cell["low"] is not None else "")


def missing_gains(section: Mapping[str, Any]) -> list[str]:
    """Return the rows for which no search by the checker is told from plain sampling, each with
    what was found.
    """
    (table,) = [
        each
        for each in section["tables"]
        if each["caption"].startswith("Search against plain sampling")
    ]
    gains = {
        row[0]: {
            name: cell
            for name, cell in zip(table["head"][1:], row[1:], strict=True)
            if JUDGE in name
        }
        for row in table["rows"]
    }
    return [
        f"{row}: {'; '.join(f'{name} {written(cell)}' for name, cell in gains[row].items()) if row in gains else 'not searched'}"  # noqa: E501
        for row in MUST_GAIN
        if not any(
            cell["low"] is not None and cell["low"] > 0 for cell in gains.get(row, {}).values()
        )
    ]


def main() -> int:
    """Print the tables as Markdown and say whether search pays."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="", help="where the run lies, a folder or s3://…")
    parser.add_argument("--run", default="scenes", help="its name")
    given = parser.parse_args()
    if not given.root:
        print("skipped: give --root ROOT, in which `unclip run scenes` has ended")
        return 0
    section = section_of(read_report(given.run, given.root))
    for table in section["tables"]:
        print(
            f"\n{table['caption']}\n\n| {' | '.join(table['head'])} "
            f"|\n|{'---|' * len(table['head'])}"
        )
        for row in table["rows"]:
            print(f"| {' | '.join(map(written, row))} |")
    missing = missing_gains(section)
    print(
        f"\nsearch by the checker beats plain sampling at equal calls for "
        f"{' and '.join(MUST_GAIN)}: {'no' if missing else 'yes'}"
    )
    for each in missing:
        print(f"  not told from plain sampling: {each}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
