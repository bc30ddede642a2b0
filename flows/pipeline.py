"""The Prefect flow: one task per stage, in dependency order, and one per other step on the store.

All tasks have retries. Prefect displays and schedules; only the manifests decide which stages run.
`run_pipeline` is the entrypoint of deployments.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import UUID

from prefect import Flow, flow, runtime, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.blocks.webhook import Webhook
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.tasks import Task

from flows.orchestration.ray_submit import submit_stage
from flows.orchestration.run_stage import run_stage
from flows.recipe_run import RecipeRun, begin, finish
from flows.runs.records import RunSummary
from flows.runs.stage import Stage, StageResult
from infra.compute.cluster import Cluster
from infra.console.log_redirect import INTERRUPTED
from infra.console.progress import duration
from infra.errors import PERMANENT, StorageAwayError, UnclipError
from infra.storage.manifests import Committed
from infra.storage.store import open_root

Result = TypeVar("Result")
RETRIES, STORE_RETRIES = 2, 4
RETRY_AFTER_S = [5.0, 30.0, 120.0, 300.0]


def is_worth_retrying(_task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Return whether to retry a failed task.

    An unavailable store is retried for about eight minutes. Not retried are errors in `PERMANENT`,
    other errors of ours (on this machine a full disk stays full) and, after Ctrl-C, all errors. Any
    other error is retried `RETRIES` times.
    """
    error = state.data if isinstance(state.data, BaseException) else None
    if INTERRUPTED.is_set():
        return False
    if isinstance(error, StorageAwayError):
        return True
    return not isinstance(error, (UnclipError, *PERMANENT)) and run.run_count <= RETRIES


@task(
    retries=STORE_RETRIES,
    retry_delay_seconds=RETRY_AFTER_S,
    retry_condition_fn=is_worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def step(action: Callable[[], Any]) -> Any:
    """Call a function that can safely be called again."""
    return action()


def do(name: str, action: Callable[[], Result]) -> Result:
    """Do a step of a run as a named task, with retries as `is_worth_retrying` decides."""
    return cast(Result, step.with_options(name=name, task_run_name=name)(action))


def notify_block(deployment: UUID) -> str:
    """Return the name of the Prefect block that holds a deployment's webhook URL."""
    return f"unclip-{deployment}"


def check_resumption(vanished: UUID) -> None:
    """Raise UnclipError if a run that vanished had itself been started for one that vanished.

    What takes a machine down twice would do so again; a person must look.
    """
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(vanished)
    earlier = run.parameters.get("resumes")
    if earlier:
        message = run.state.message if run.state else ""
        raise UnclipError(
            f"run {run.name} ({vanished}) vanished as {earlier} had before it ({message}): it is "
            "not taken up a third time; see what ends its machine, such as too little memory, and "
            "start the deployment again"
        )


async def tell_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """POST one line to the deployment's webhook.

    Runs in the flow run's process or, if that was killed, in the worker. A server automation would
    be 15 minutes late: Prefect's scheduler emits no event for the runs that it creates, and a run's
    later events wait that long for the event that they follow.
    """
    if flow_run.deployment_id is None:
        return
    name = notify_block(flow_run.deployment_id)
    async with get_client() as client:
        try:
            await client.read_block_document_by_name(name, "webhook")
        except ObjectNotFound:
            return
    webhook: Any = await Webhook.aload(name)
    answer = await webhook.call(
        {
            "text": f"unclip {runtime.deployment.name}: "
            f"run {runtime.flow_run.name} {state.name}: {state.message}"
        }
    )
    answer.raise_for_status()


@flow(
    name="unclip",
    flow_run_name="{name}",
    persist_result=False,
    retries=0,
    on_failure=[tell_failure],
    on_crashed=[tell_failure],
)
def run_pipeline(
    recipe: str,
    root: str,
    name: str,
    overrides: list[str] | None = None,
    targets: list[str] | None = None,
    scratch: str | None = None,
    jobs: str | None = None,
    resumes: str | None = None,
) -> RunSummary:
    """Run a recipe into a ROOT and return the object that `unclip run --json` prints.

    `targets` are the stages to run, by default all. `jobs` is the address of a Ray job server that
    runs each stage as a job; by default they run here. `resumes` is the id of a run that vanished
    with its machine, if Prefect's server started this one in its place.
    """
    if resumes:
        check_resumption(UUID(resumes))
    # Imports torch and faiss, which tests of the flow do not need.
    from flows.config.run_config import load_recipe

    config = load_recipe(recipe, overrides or [])
    opened = do("open", lambda: open_root(root, Path(scratch) if scratch else None))
    return run_stages(begin(opened, name, recipe, config, targets or (), _say, do), jobs)


def run_stages(run: RecipeRun, jobs: str | None = None) -> RunSummary:
    """Run the stages as tasks of the current flow, finish the run, and create artifacts."""
    committed: dict[str, Committed] = {}
    results = []
    with Cluster(run.config.cluster) as cluster:
        for stage in run.stages:
            result = do(stage.name, partial(_run_one, run, stage, committed, cluster, jobs))
            committed[stage.name] = result.committed
            results.append(result)
    finished = finish(run, results, _say, do)
    description = f"{run.name} in {run.root.uri}"
    create_table_artifact(
        table=cast(list[dict[str, Any]], finished["stages"]), key="stages", description=description
    )
    if finished["report"]:
        create_link_artifact(
            link=finished["report"], link_text="report", key="report", description=description
        )
    return finished


def _run_one(
    run: RecipeRun,
    stage: Stage,
    committed: Mapping[str, Committed],
    cluster: Cluster,
    jobs: str | None,
) -> StageResult:
    """Run one stage here or as a Ray job and print its result; `committed` holds those before."""
    try:
        if jobs:
            result = submit_stage(stage, run.root, run.config, committed, jobs, _say)
        else:
            result = run_stage(stage, run.root, run.config, committed, cluster, _say)
    except Exception as error:
        cluster.stop()  # a retry starts with a fresh Ray
        error.add_note(stage.name)
        if not isinstance(error, UnclipError):
            # Prefect itself logs the traceback of the last attempt only.
            get_run_logger().error("this attempt failed", exc_info=True)
        raise
    counts = result.committed.manifest["counts"]
    dropped = sum(counts["dropped"].values())
    took = (
        f"current  {result.key}"
        if result.state == "current"
        else f"ran      {result.key}  in {duration(result.seconds)}"
    )
    _say(
        f"{stage.name:<10}{took}  out {counts['out']:,}"
        + (f", dropped {dropped:,}" if dropped else "")
    )
    return result


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
    get_run_logger().info(line)
