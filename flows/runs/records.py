"""The record of a run, `ROOT/runs/<name>.json`: the key of each of its stages.

Search, generation and reports find a run's committed folders through its record; the manifests hold
the facts. Knows nothing of how a run is executed.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NotRequired, TypedDict

from flows.runs.promotion import Judgement
from flows.runs.record_schema import RunRecord, Verdict, read_current, read_record
from flows.runs.stage import StagePlan, StageResult
from infra.errors import CallerError
from infra.storage import manifests, store
from infra.storage.manifests import Committed
from infra.storage.store import Root

if TYPE_CHECKING:  # torch, which the list of runs does not need
    from flows.orchestration.capacity_plan import StorageNeed
    from training.jobs.cost_model import TrainingNeed

REPORT = "report.html"


class ListedRun(RunRecord):
    """A run in the list of `unclip runs`."""

    followed: bool
    """Whether `find_run` returns it by default."""


class StageRow(TypedDict):
    """A stage in the output of `unclip run` and `unclip status`."""

    stage: str
    key: str
    state: str
    seconds: NotRequired[float]
    """Of a run."""
    why: NotRequired[str]
    """Of a plan: why the stage is stale."""
    parameters: NotRequired[int]
    """This and the next two: of `--dry-run`."""
    paper_parameters: NotRequired[int]
    need: NotRequired["TrainingNeed | StorageNeed"]
    """The stage's row of `capacity_plan.capacity`."""


class RunSummary(TypedDict):
    """The object that `unclip run --json` and `unclip status --json` print."""

    run: str
    root: str
    report: str | None
    stages: list[StageRow]
    promoted: NotRequired[bool]
    """This and the next: of a run with a gate."""
    conditions: NotRequired[list[Verdict]]


def write_run(
    root: Root,
    name: str,
    recipe: str,
    started: str,
    committed: Mapping[str, Committed],
    is_gated: bool = False,
) -> RunRecord:
    """Write the record of a finished run, and return it.

    A gated run is used by default only after its promotion.
    """
    record: RunRecord = {
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


def find_run(root: Root, name: str | None = None) -> RunRecord:
    """Return the record of a run: the named one, else the promoted one, else the last ungated one.

    A gated run that was not promoted must be named. Raises CallerError if there is none, and
    StorageError if the file that is read is not the record of a run.
    """
    record = read_record(root, name) if name else read_current(root)
    if record:
        return record
    records = [] if name else all_records(root)
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


def list_runs(root: Root) -> list[ListedRun]:
    """Return the records of all runs, the last finished first.

    `followed` is true for the run that `find_run` returns by default. A promoted run is listed as
    it was promoted, even if a later run has taken its name.
    """
    records = all_records(root)
    followed = read_current(root) or _latest(records)
    listed: list[ListedRun] = [
        {**record, "followed": followed is not None and _sort_key(record) == _sort_key(followed)}
        for record in records
    ]
    if followed and not any(row["followed"] for row in listed):
        listed.append({**followed, "followed": True})
    return sorted(listed, key=lambda record: record["finished"], reverse=True)


def all_records(root: Root) -> list[RunRecord]:
    """Return the records of all runs, by name. Raises StorageError if a file is not one."""
    files = [file for file in store.list_names(root, "runs") if file.endswith(".json")]
    records = (read_record(root, file.removesuffix(".json")) for file in files)
    return [record for record in records if record]


def _latest(records: Sequence[RunRecord]) -> RunRecord | None:
    """Return the last finished ungated run, or None."""
    return max(
        (record for record in records if not record.get("gated")),
        key=lambda record: record["finished"],
        default=None,
    )


def _sort_key(record: RunRecord) -> tuple[str, str]:
    return record["name"], record["finished"]


def committed_of(root: Root, record: RunRecord, stage: str) -> Committed:
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
    judgement: Judgement | None = None,
) -> RunSummary:
    """Return the object that `unclip run --json` prints, with the judgement if there is a gate."""
    stages: list[StageRow] = [
        {
            "stage": result.stage,
            "key": result.key,
            "state": result.state,
            "seconds": round(result.seconds, 3),
        }
        for result in results
    ]
    printed: RunSummary = {"run": name, "root": root.uri, "report": report, "stages": stages}
    if judgement:
        printed["promoted"] = judgement["promoted"]
        printed["conditions"] = judgement["conditions"]
    return printed


def plan_summary(root: Root, name: str, plans: Sequence[StagePlan]) -> RunSummary:
    """Return the object that `unclip status --json` prints."""
    stages: list[StageRow] = [
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
