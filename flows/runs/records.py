"""The record of a run, `ROOT/runs/<name>.json`: the key of each of its stages.

Search, generation and reports find a run's committed folders through its record; the manifests hold
the facts. Knows nothing of how a run is executed.
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
    """Write the record of a finished run, and return it.

    A gated run is used by default only after its promotion.
    """
    record = {
        "name": name,
        "recipe": recipe,
        "started": started,
        "finished": manifests.now(),
        "stages": {stage: folder.key for stage, folder in committed.items()},
        "report": report_of(committed),
        "gated": is_gated and "evaluate" in committed,
    }
    store.write_json(root, f"runs/{name}.json", record)
    return record


def report_of(committed: Mapping[str, Committed]) -> str | None:
    """Return the URI of the report, or None if `evaluate` has not run."""
    return f"{committed['evaluate'].uri}/{REPORT}" if "evaluate" in committed else None


def find_run(root: Root, name: str | None = None) -> dict[str, Any]:
    """Return the record of a run: the named one, else the promoted one, else the last ungated one.

    Raises CallerError if there is none. A gated run that was not promoted must be named.
    """
    record: dict[str, Any] | None = store.read_json(root, f"runs/{name}.json" if name else CURRENT)
    if record:
        return record
    records = [] if name else _records(root)
    if latest := _latest(records):
        return latest
    if records:
        raise CallerError(
            f"no run in {root.uri} has passed its gate, [evaluate] promote_if: "
            f"name one, --run {records[-1]['name']}"
        )
    raise CallerError(no_run(root, name))


def no_run(root: Root, name: str | None = None) -> str:
    """Return the message that there is no run, or none of that name, and how to make one."""
    return (
        f"{root.uri} has no run{f' {name}' if name else ''}: "
        f"make one with `unclip run quickstart --root {root.uri}`"
    )


def list_runs(root: Root) -> list[dict[str, Any]]:
    """Return the records of all runs, the last finished first.

    `followed` is true for the run that `find_run` returns by default. A promoted run is listed as
    it was promoted, even if a later run has taken its name.
    """
    records = _records(root)
    followed = store.read_json(root, CURRENT) or _latest(records)
    listed = [
        {**record, "followed": followed is not None and _sort_key(record) == _sort_key(followed)}
        for record in records
    ]
    if followed and not any(row["followed"] for row in listed):
        listed.append({**followed, "followed": True})
    return sorted(listed, key=lambda record: record["finished"], reverse=True)


def _records(root: Root) -> list[dict[str, Any]]:
    files = [file for file in store.list_names(root, "runs") if file.endswith(".json")]
    return [
        record for record in (store.read_json(root, f"runs/{file}") for file in files) if record
    ]


def _latest(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the last finished ungated run, or None."""
    return max(
        (record for record in records if not record.get("gated")),
        key=lambda record: record["finished"],
        default=None,
    )


def _sort_key(record: Mapping[str, Any]) -> tuple[str, str]:
    return record["name"], record["finished"]


def committed_of(root: Root, record: Mapping[str, Any], stage: str) -> Committed:
    """Return the folder of one stage of a run. Raises CallerError if the run does not have it."""
    key = record["stages"].get(stage)
    committed = manifests.find(root, stage, key) if key else None
    if committed is None:
        raise CallerError(
            f"run {record['name']} in {root.uri} has no {stage}: "
            f"run `unclip run {record['recipe']} --root {root.uri}`"
        )
    return committed


def summary(
    root: Root,
    name: str,
    results: Sequence[StageResult],
    report: str | None,
    judgement: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the object that `unclip run --json` prints, with the judgement if there is a gate."""
    stages = [
        {
            "stage": result.stage,
            "key": result.key,
            "state": result.state,
            "seconds": round(result.seconds, 3),
        }
        for result in results
    ]
    return {"run": name, "root": root.uri, "report": report, "stages": stages} | (
        dict(judgement) if judgement else {}
    )


def plan_summary(root: Root, name: str, plans: Sequence[StagePlan]) -> dict[str, Any]:
    """Return the object that `unclip status --json` prints."""
    stages = [
        {
            "stage": stage_plan.stage.name,
            "key": stage_plan.key,
            "state": stage_plan.state,
            "why": stage_plan.why,
        }
        for stage_plan in plans
    ]
    current = {
        stage_plan.stage.name: stage_plan.committed
        for stage_plan in plans
        if stage_plan.state == "current" and stage_plan.committed
    }
    return {"run": name, "root": root.uri, "report": report_of(current), "stages": stages}
