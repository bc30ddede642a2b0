"""The record of a run, `ROOT/runs/<name>.json`: which keys belong together, for those who come after (search, generate, reports).

A record points at committed folders; the manifests stay the truth. Knows nothing of how a run was made.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flows.runs.promotion import CURRENT
from flows.runs.stage import StagePlan, StageResult
from infra.errors import CallerError
from infra.storage import manifests, store
from infra.storage.manifests import Committed
from infra.storage.store import Root

REPORT = "report.html"


def write_run(
    root: Root,
    name: str,
    recipe: str,
    started: str,
    committed: Mapping[str, Committed],
    is_gated: bool = False,
) -> dict[str, Any]:
    """Write the record of a run that is complete as far as it went, and return it; a gated one is followed only once it is promoted."""
    record = {
        "name": name,
        "recipe": recipe,
        "started": started,
        "finished": manifests.now(),
        "stages": {stage: each.key for stage, each in committed.items()},
        "report": report_of(committed),
        "gated": is_gated and "evaluate" in committed,
    }
    store.write_json(root, f"runs/{name}.json", record)
    return record


def report_of(committed: Mapping[str, Committed]) -> str | None:
    """Return where the report is, or None before `evaluate`."""
    return f"{committed['evaluate'].uri}/{REPORT}" if "evaluate" in committed else None


def find_run(root: Root, name: str | None = None) -> dict[str, Any]:
    """Return the record of the named run, by default the promoted one or, where there is none, the last one that no gate judges.

    Raises CallerError where there is none: a run that its gate did not promote can be had by its name alone.
    """
    found: dict[str, Any] | None = store.read_json(root, f"runs/{name}.json" if name else CURRENT)
    if found:
        return found
    records = [] if name else _records(root)
    if latest := _latest(records):
        return latest
    if records:
        raise CallerError(
            f"no run in {root.uri} has passed its gate, [evaluate] promote_if: name one, --run {records[-1]['name']}"
        )
    raise CallerError(no_run(root, name))


def no_run(root: Root, name: str | None = None) -> str:
    """Say that there is no run, or none of that name, and how to make one."""
    return f"{root.uri} has no run{f' {name}' if name else ''}: make one with `unclip run quickstart --root {root.uri}`"


def list_runs(root: Root) -> list[dict[str, Any]]:
    """Return the records of all runs, the last finished first; `followed` is true for the one that `find_run` gives.

    A promoted run whose name another has taken since stands there as it was promoted.
    """
    records = _records(root)
    followed = store.read_json(root, CURRENT) or _latest(records)
    listed = [
        {**each, "followed": followed is not None and _told_apart(each) == _told_apart(followed)}
        for each in records
    ]
    if followed and not any(each["followed"] for each in listed):
        listed.append({**followed, "followed": True})
    return sorted(listed, key=lambda record: record["finished"], reverse=True)


def _records(root: Root) -> list[dict[str, Any]]:
    files = [file for file in store.list_names(root, "runs") if file.endswith(".json")]
    return [
        record for record in (store.read_json(root, f"runs/{file}") for file in files) if record
    ]


def _latest(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the last finished of those that no gate judges, or None."""
    return max(
        (each for each in records if not each.get("gated")),
        key=lambda record: record["finished"],
        default=None,
    )


def _told_apart(record: Mapping[str, Any]) -> tuple[str, str]:
    return record["name"], record["finished"]


def committed_of(root: Root, record: Mapping[str, Any], stage: str) -> Committed:
    """Return the folder of one stage of a run. Raises CallerError where the run did not come that far."""
    key = record["stages"].get(stage)
    committed = manifests.find(root, stage, key) if key else None
    if committed is None:
        raise CallerError(
            f"run {record['name']} in {root.uri} has no {stage}: run `unclip run {record['recipe']} --root {root.uri}`"
        )
    return committed


def summary(
    root: Root,
    name: str,
    results: Sequence[StageResult],
    report: str | None,
    judgement: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what `unclip run --json` prints, with the gate's judgement where there is a gate."""
    stages = [
        {
            "stage": each.stage,
            "key": each.key,
            "state": each.state,
            "seconds": round(each.seconds, 3),
        }
        for each in results
    ]
    return {"run": name, "root": root.uri, "report": report, "stages": stages} | (
        dict(judgement) if judgement else {}
    )


def plan_summary(root: Root, name: str, plans: Sequence[StagePlan]) -> dict[str, Any]:
    """Return what `unclip status --json` prints."""
    stages = [
        {"stage": each.stage.name, "key": each.key, "state": each.state, "why": each.why}
        for each in plans
    ]
    current = {
        each.stage.name: each.committed
        for each in plans
        if each.state == "current" and each.committed
    }
    return {"run": name, "root": root.uri, "report": report_of(current), "stages": stages}
