"""The promotion gate: `ROOT/current.json` moves to a run only if it passes `[evaluate] promote_if`.

A condition compares a figure of the run's `report.json` with a number, or with the same figure of
the current run, for example `retrieval.held_out_style.image_to_text.recall@10 >= 0.1` or
`generation.own_prompt_first >= current - 0.05`. By default search, generation and the service use
the run that `current.json` names.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

from flows.config.promotion_conditions import parsed
from flows.runs.record_schema import CURRENT, Verdict, read_current
from infra.errors import CallerError, StorageError
from infra.storage import manifests, store
from infra.storage.manifests import Committed
from infra.storage.store import Root

if TYPE_CHECKING:  # its figures import numpy, which `unclip --help` does not need
    from indexing.report.report_types import Report

TESTS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
SHIFTS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}


class Judgement(TypedDict):
    """Whether a run was promoted, and why."""

    promoted: bool
    conditions: list[Verdict]


def promote_if_passed(
    root: Root,
    conditions: Sequence[str],
    record: Mapping[str, object],
    committed: Mapping[str, Committed],
) -> Judgement | None:
    """Judge a run against the conditions and promote it if all hold; return the judgement.

    Returns None if there are no conditions or no report. Raises CallerError for a condition on a
    figure that the report does not have.
    """
    if not conditions or "evaluate" not in committed:
        return None
    current = read_current(root)
    key = current["stages"].get("evaluate") if current else None
    before = manifests.find(root, "evaluate", key) if key else None
    verdicts = judge(
        _report(committed["evaluate"]), conditions, _report(before) if before else None
    )
    promoted = all(verdict["holds"] for verdict in verdicts)
    result: Judgement = {"promoted": promoted, "conditions": verdicts}
    if promoted:
        store.write_json(root, CURRENT, {**record, **result, "promoted_at": manifests.now()})
    return result


def judge(report: "Report", conditions: Sequence[str], current: "Report | None") -> list[Verdict]:
    """Return for each condition its text, the report's value, the limit and whether it holds.

    A condition that refers to the current run holds if there is none or its report lacks the
    figure.
    """
    verdicts: list[Verdict] = []
    for condition in conditions:
        path, test, number, shift, by = parsed(condition)
        value = figure(report, path)
        if value is None:
            raise CallerError(
                f"[evaluate] promote_if {condition!r}: report.json has no figure {path}; "
                f"it has {', '.join(near(report, path))}"
            )
        limit: float | None
        if number is not None:
            limit = float(number)
        else:
            limit = figure(current, path) if current else None
            if limit is not None and shift:
                limit = SHIFTS[shift](limit, float(by or 0))
        holds = limit is None or TESTS[test](value, limit)
        verdicts.append({"condition": condition, "value": value, "limit": limit, "holds": holds})
    return verdicts


def figure(report: "Report", path: str) -> float | None:
    """Return the number at a dotted path of a report, or None.

    For a figure with an interval this is its `value`.
    """
    node: object = report
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    if isinstance(node, Mapping):
        node = node.get("value")
    return float(node) if isinstance(node, int | float) and not isinstance(node, bool) else None


def near(report: "Report", path: str) -> list[str]:
    """Return the names below the longest existing prefix of a dotted path."""
    node: Mapping[str, object] = report
    for part in path.split("."):
        child = node.get(part)
        if not isinstance(child, Mapping):
            break
        node = child
    return sorted(node) or ["nothing there"]


def described(judgement: Judgement) -> str:
    """Format a judgement as one line."""
    failed = [
        f"{condition['condition']} ({condition['value']:.4g})"
        for condition in judgement["conditions"]
        if not condition["holds"]
    ]
    return f"not promoted: {'; '.join(failed)}" if failed else "promoted: current.json points here"


def _report(committed: Committed) -> "Report":
    report: Report | None = store.read_json(committed.root, f"{committed.path}/report.json")
    if not isinstance(report, dict):
        raise StorageError(f"{committed.uri} has no report.json: remove that folder and run again")
    return report
