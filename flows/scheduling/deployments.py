"""Prefect deployments of a recipe: schedule, work queue and failure webhook.

A deployment runs `flows/pipeline.py:run_pipeline` from this installation in a process work pool.
Runs into one ROOT share a work queue with a concurrency limit of 1; a run whose heartbeats stop is
marked as crashed, so that it does not block the queue, and is taken up again once. The pool accepts
no job variables, so a run created through Prefect's API cannot change its command, environment or
working directory. Secrets stay in the worker's environment; the webhook's URL, often a secret
itself, is stored in a secret block of the deployment.
`python -m flows.scheduling.deployments ROOT` only creates the queue and prints its name, for
deployments from `infra/deploy/prefect.yaml`.
"""

import hashlib
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.scheduling.prefect_server import TOKEN_FILE, loopback_without_proxy
from infra.errors import CallerError, UnclipError

if TYPE_CHECKING:  # Prefect reads its settings when it is imported, and takes seconds
    from prefect.client.orchestration import SyncPrefectClient

POOL = TAG = "unclip"
ENTRYPOINT = "flows.pipeline.run_pipeline"
WORKER_SETTINGS = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
"""Environment of a worker: its runs send the heartbeats that `_watch_vanished` watches."""
JOB_TEMPLATE = {
    # No key `env`: a worker would merge a run's job variables into it, whatever the schema says.
    "job_configuration": {"stream_output": True},
    "variables": {"type": "object", "properties": {}, "additionalProperties": False},
}
VANISHED_AFTER_S = 90
VANISHED = "no heartbeat"
"""Start of the state message that the server gives a vanished run."""
ENDED = tuple(
    f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")
)


@dataclass(frozen=True)
class Plan:
    """A flow run and its schedule: exactly one of `cron` (in `timezone`) and `every_s`."""

    name: str
    parameters: dict[str, Any]
    folder: Path
    """Working directory of the runs; relative paths in the recipe are resolved from here."""
    cron: str = ""
    timezone: str = "UTC"
    every_s: int = 0
    paused: bool = False


def queue_of(root_uri: str) -> str:
    """Return the name of the work queue shared by all deployments into a ROOT."""
    return f"root-{hashlib.sha256(root_uri.encode()).hexdigest()[:12]}"


def prepared_queue(root_uri: str) -> str:
    """Create the work queue of a ROOT and the watch for vanished runs; return the queue's name."""
    with _client() as client:
        _prepare_pool(client)
        _one_at_a_time(client, queue_of(root_uri))
        _watch_vanished(client)
    return queue_of(root_uri)


def deploy(plan: Plan, notify_url: str = "") -> dict[str, Any]:
    """Create or replace the deployment of a plan; return what `unclip schedule --json` prints.

    Raises CallerError for an invalid schedule, and UnclipError if Prefect's server does not answer
    or refuses the deployment.
    """
    schedule = _schedule(plan)
    queue = queue_of(plan.parameters["root"])
    with _client() as client:
        _prepare_pool(client)
        _one_at_a_time(client, queue)
        deployment = _create_deployment(client, plan, schedule, queue)
        _watch_vanished(client)
        client.delete_resource_owned_automations(f"prefect.deployment.{deployment}")
        _remove_webhook(client, deployment)
        if notify_url:
            _notify(client, deployment, plan.name, _webhook(deployment, notify_url))
    worker_settings = [f"{name}={value}" for name, value in WORKER_SETTINGS.items()]
    return {
        "deployment": f"unclip/{plan.name}",
        "id": str(deployment),
        "pool": POOL,
        "queue": queue,
        "schedule": plan.cron or f"every {plan.every_s} s",
        "paused": plan.paused,
        "notifies": bool(notify_url),
        "worker": shlex.join(
            ["env", *worker_settings, "prefect", "worker", "start", "--pool", POOL]
        ),
    }


def _create_deployment(client: "SyncPrefectClient", plan: Plan, schedule: Any, queue: str) -> UUID:
    """Create or replace the deployment on the server. Raises UnclipError if it refuses it."""
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.utilities.callables import parameter_schema

    from flows.pipeline import run_pipeline

    recipe, root_uri = plan.parameters["recipe"], plan.parameters["root"]
    working_directory = {"directory": str(plan.folder)}
    try:
        return client.create_deployment(
            flow_id=client.create_flow(run_pipeline),
            name=plan.name,
            schedules=[schedule],
            parameters=plan.parameters,
            parameter_openapi_schema=parameter_schema(run_pipeline).model_dump(),
            tags=[TAG, f"recipe:{Path(recipe).stem}", queue],
            description=f"{recipe} into {root_uri}",
            work_pool_name=POOL,
            work_queue_name=queue,
            entrypoint=ENTRYPOINT,
            pull_steps=[{"prefect.deployments.steps.set_working_directory": working_directory}],
            paused=plan.paused,
            enforce_parameter_schema=True,
        )
    except PrefectHTTPStatusError as error:
        raise UnclipError(
            f"Prefect's server refused the deployment {plan.name}: {error.response.text[:300]}"
        ) from error


def remove(name: str) -> dict[str, Any]:
    """Remove a deployment and its automations. Raises CallerError if there is none of that name."""
    from prefect.exceptions import ObjectNotFound

    with _client() as client:
        try:
            deployment = client.read_deployment_by_name(f"unclip/{name}")
        except ObjectNotFound:
            raise CallerError(
                f"there is no deployment unclip/{name}: `prefect deployment ls` shows what there is"
            ) from None
        client.delete_resource_owned_automations(f"prefect.deployment.{deployment.id}")
        _remove_webhook(client, deployment.id)
        client.delete_deployment(deployment.id)
    return {"deployment": f"unclip/{name}", "id": str(deployment.id), "removed": True}


@contextmanager
def _client() -> Iterator["SyncPrefectClient"]:
    """Yield a client of Prefect's server.

    Raises UnclipError if the server does not answer or refuses our password.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL

    os.environ.update(loopback_without_proxy(os.environ))
    url = PREFECT_API_URL.value()
    try:
        if not url:
            raise UnclipError("no Prefect server is named")
        httpx.get(f"{url}/health", timeout=10).raise_for_status()
    except (httpx.HTTPError, UnclipError) as error:
        raise UnclipError(
            f"{url or 'Prefect'}: {error}; start one with `unclip up` or set PREFECT_API_URL"
        ) from None
    try:
        with get_client(sync_client=True) as client:
            yield client
    except PrefectHTTPStatusError as error:
        if error.response.status_code != httpx.codes.UNAUTHORIZED:
            raise
        raise UnclipError(
            f"{url} wants a password: set PREFECT_API_AUTH_STRING to it; "
            f"`unclip up` keeps its own in ROOT/prefect/{TOKEN_FILE}"
        ) from None


def _prepare_pool(client: "SyncPrefectClient") -> None:
    from prefect.client.schemas.actions import WorkPoolCreate

    client.create_work_pool(
        WorkPoolCreate(name=POOL, type="process", base_job_template=JOB_TEMPLATE), overwrite=True
    )


def check_timing(cron: str, every_s: int) -> None:
    """Raise CallerError unless exactly one of a cron line and an interval is given."""
    if bool(cron) == bool(every_s):
        raise CallerError('a schedule needs --cron "0 3 * * *" or --every SECONDS, one of them')


def _schedule(plan: Plan) -> Any:
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
    from prefect.deployments.schedules import create_deployment_schedule_create

    check_timing(plan.cron, plan.every_s)
    try:
        chosen: CronSchedule | IntervalSchedule
        if plan.cron:
            chosen = CronSchedule(cron=plan.cron, timezone=plan.timezone)
        else:
            chosen = IntervalSchedule(interval=timedelta(seconds=plan.every_s))
        return create_deployment_schedule_create(chosen, active=not plan.paused)
    except ValueError as error:
        reason = (
            str(error).splitlines()[2].strip() if len(str(error).splitlines()) > 2 else str(error)
        )
        raise CallerError(f"--cron {plan.cron!r} --timezone {plan.timezone}: {reason}") from None


def _one_at_a_time(client: "SyncPrefectClient", queue: str) -> None:
    from prefect.exceptions import ObjectNotFound

    try:
        work_queue = client.read_work_queue_by_name(queue, work_pool_name=POOL)
    except ObjectNotFound:
        client.create_work_queue(name=queue, concurrency_limit=1, work_pool_name=POOL)
    else:
        client.update_work_queue(work_queue.id, concurrency_limit=1)


def _watch_vanished(client: "SyncPrefectClient") -> None:
    """Make the server mark a run as crashed if its heartbeats stop before it has ended, and start
    another run of its deployment, which goes on from the last commit.

    The new run gets the old one's id as `resumes`; it ends at once if the old one was such a run
    itself (`flows.pipeline.check_resumption`). The last heartbeat names the deployment.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState, RunDeployment
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    heartbeat = "prefect.flow-run.heartbeat"
    watch = AutomationCore(
        name="unclip: a run that has vanished",
        trigger=EventTrigger(
            after={heartbeat},
            expect={heartbeat, *ENDED},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            # A server of several teams runs other flows too.
            match_related={"prefect.resource.id": f"prefect.tag.{TAG}"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=VANISHED_AFTER_S),
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed",
                state=StateType.CRASHED,
                message=f"{VANISHED} for {VANISHED_AFTER_S} s: its process has gone",
                force=False,
            ),
            RunDeployment(
                source="inferred",
                deployment_id=None,
                job_variables=None,
                parameters={
                    "resumes": {"__prefect_kind": "jinja", "template": "{{ flow_run.id }}"}
                },
            ),
        ],
    )
    existing = client.read_automations_by_name(watch.name)
    if existing:
        client.update_automation(existing[0].id, watch)
    else:
        client.create_automation(watch)


def _webhook(deployment: UUID, url: str) -> UUID:
    """Store the webhook's URL in the secret block that the deployment's runs read."""
    from prefect.blocks.webhook import Webhook
    from pydantic import SecretStr

    from flows.pipeline import notify_block

    webhook = Webhook(method="POST", url=SecretStr(url))
    return UUID(str(webhook.save(notify_block(deployment), overwrite=True)))


def _remove_webhook(client: "SyncPrefectClient", deployment: UUID) -> None:
    from prefect.exceptions import ObjectNotFound

    from flows.pipeline import notify_block

    with suppress(ObjectNotFound):
        client.delete_block_document(
            client.read_block_document_by_name(notify_block(deployment), "webhook").id
        )


def _notify(client: "SyncPrefectClient", deployment: UUID, name: str, block: UUID) -> None:
    """Make the server POST a line when a run of the deployment vanishes together with its worker.

    All other failures are reported by the run or its worker (`tell_failure`).
    """
    from prefect.events.actions import CallWebhook
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    automation = AutomationCore(
        name=f"unclip: {name} vanished",
        trigger=EventTrigger(
            expect={"prefect.flow-run.Crashed"},
            match={
                "prefect.resource.id": "prefect.flow-run.*",
                "prefect.state-message": f"{VANISHED}*",
            },
            match_related={
                "prefect.resource.id": f"prefect.deployment.{deployment}",
                "prefect.resource.role": "deployment",
            },
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            CallWebhook(
                block_document_id=block,
                payload='{"text": {{ ("unclip " ~ deployment.name ~ ": run " ~ flow_run.name '
                '~ " " ~ flow_run.state.name ~ ": "'
                " ~ (flow_run.state.message or '')) | tojson }}}",
            )
        ],
        owner_resource=f"prefect.deployment.{deployment}",
    )
    client.create_automation(automation)


if __name__ == "__main__":
    from flows.config.roots import open_for

    print(prepared_queue(open_for(sys.argv[1], for_writing=False).uri))
