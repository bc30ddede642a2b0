"""Prefect deployments of a recipe: on which schedule, one run per ROOT at a time, and who hears of a failure.

A deployment runs `flows/pipeline.py:run_pipeline` from this installation in a process work pool. Runs of one ROOT share a work queue
that lets one through; a run whose process has vanished (its heartbeats stop) is marked crashed, so that it does not block the queue.
The pool takes no job variables: a run that somebody makes through Prefect's API can change neither the command nor the environment
nor the folder that it runs in. Secrets stay in the worker's environment; the webhook's URL, often a secret itself, comes from the
environment too and is kept in a secret block named after the deployment.
`python -m flows.scheduling.deployments ROOT` makes the queue alone and prints its name, for deployments from `infra/deploy/prefect.yaml`.
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

POOL = "unclip"
ENTRYPOINT = "flows.pipeline.run_pipeline"
WORKER_SETTINGS = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
"""What a worker needs in its environment, for its runs to send the heartbeats that `_watch_vanished` looks for."""
JOB_TEMPLATE = {
    # No key `env`: into one that is there a worker merges a run's job variables, whatever the schema says.
    "job_configuration": {"stream_output": True},
    "variables": {"type": "object", "properties": {}, "additionalProperties": False},
}
VANISHED_AFTER_S = 90
VANISHED = "no heartbeat"
"""So begins the message of the state that the server gives a run that has vanished."""
ENDED = tuple(
    f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")
)


@dataclass(frozen=True)
class Plan:
    """What is to run when; `cron` (in `timezone`) or `every_s`, one of them."""

    name: str
    parameters: dict[str, Any]
    folder: Path
    """Working directory of the runs: relative paths in the recipe count from here."""
    cron: str = ""
    timezone: str = "UTC"
    every_s: int = 0
    paused: bool = False


def queue_of(root_uri: str) -> str:
    """Return the name of the work queue that all deployments into a ROOT share."""
    return f"root-{hashlib.sha256(root_uri.encode()).hexdigest()[:12]}"


def prepared_queue(root_uri: str) -> str:
    """Make the work queue of a ROOT, which lets one run through, and the watch over runs that vanish; return the queue's name."""
    with _client() as client:
        _prepare_pool(client)
        _one_at_a_time(client, queue_of(root_uri))
        _watch_vanished(client)
    return queue_of(root_uri)


def deploy(plan: Plan, notify_url: str = "") -> dict[str, Any]:
    """Make or renew the deployment of a plan on Prefect's server and return what `unclip schedule --json` prints.

    Raises CallerError for a schedule that is none, UnclipError where the server does not answer.
    """
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.utilities.callables import parameter_schema

    from flows.pipeline import run_pipeline

    schedule = _schedule(plan)
    root_uri = plan.parameters["root"]
    with _client() as client:
        _prepare_pool(client)
        _one_at_a_time(client, queue_of(root_uri))
        try:
            deployment = client.create_deployment(
                flow_id=client.create_flow(run_pipeline),
                name=plan.name,
                schedules=[schedule],
                parameters=plan.parameters,
                parameter_openapi_schema=parameter_schema(run_pipeline).model_dump(),
                tags=[
                    "unclip",
                    f"recipe:{Path(plan.parameters['recipe']).stem}",
                    queue_of(root_uri),
                ],
                description=f"{plan.parameters['recipe']} into {root_uri}",
                work_pool_name=POOL,
                work_queue_name=queue_of(root_uri),
                entrypoint=ENTRYPOINT,
                pull_steps=[
                    {
                        "prefect.deployments.steps.set_working_directory": {
                            "directory": str(plan.folder)
                        }
                    }
                ],
                paused=plan.paused,
                enforce_parameter_schema=True,
            )
        except PrefectHTTPStatusError as error:
            raise UnclipError(
                f"Prefect's server refused the deployment {plan.name}: {error.response.text[:300]}"
            ) from error
        _watch_vanished(client)
        client.delete_resource_owned_automations(f"prefect.deployment.{deployment}")
        _remove_webhook(client, deployment)
        if notify_url:
            _notify(client, deployment, plan.name, _webhook(deployment, notify_url))
    return {
        "deployment": f"unclip/{plan.name}",
        "id": str(deployment),
        "pool": POOL,
        "queue": queue_of(root_uri),
        "schedule": plan.cron or f"every {plan.every_s} s",
        "paused": plan.paused,
        "notifies": bool(notify_url),
        "worker": shlex.join(
            [
                "env",
                *(f"{name}={value}" for name, value in WORKER_SETTINGS.items()),
                "prefect",
                "worker",
                "start",
                "--pool",
                POOL,
            ]
        ),
    }


def remove(name: str) -> dict[str, Any]:
    """Remove a deployment with its automations. Raises CallerError where there is none of that name."""
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
    """Give a client of Prefect's server. Raises UnclipError where it does not answer, or not to us."""
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
            f"{url} wants a password: set PREFECT_API_AUTH_STRING to it; `unclip up` keeps its own in ROOT/prefect/{TOKEN_FILE}"
        ) from None


def _prepare_pool(client: "SyncPrefectClient") -> None:
    from prefect.client.schemas.actions import WorkPoolCreate

    client.create_work_pool(
        WorkPoolCreate(name=POOL, type="process", base_job_template=JOB_TEMPLATE), overwrite=True
    )


def _schedule(plan: Plan) -> Any:
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
    from prefect.deployments.schedules import create_deployment_schedule_create

    if bool(plan.cron) == bool(plan.every_s):
        raise CallerError('a schedule needs --cron "0 3 * * *" or --every SECONDS, one of them')
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
        found = client.read_work_queue_by_name(queue, work_pool_name=POOL)
    except ObjectNotFound:
        client.create_work_queue(name=queue, concurrency_limit=1, work_pool_name=POOL)
    else:
        client.update_work_queue(found.id, concurrency_limit=1)


def _watch_vanished(client: "SyncPrefectClient") -> None:
    """Have the server mark a run as crashed whose heartbeats have stopped without an end: its machine is gone."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    heartbeat = "prefect.flow-run.heartbeat"
    watch = AutomationCore(
        name="unclip: a run that has vanished",
        trigger=EventTrigger(
            after={heartbeat},
            expect={heartbeat, *ENDED},
            match={"prefect.resource.id": "prefect.flow-run.*"},
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
            )
        ],
    )
    found = client.read_automations_by_name(watch.name)
    if found:
        client.update_automation(found[0].id, watch)
    else:
        client.create_automation(watch)


def _webhook(deployment: UUID, url: str) -> UUID:
    """Keep the webhook's URL in a secret block, where the deployment's runs look for it; return its document's id."""
    from prefect.blocks.webhook import Webhook
    from pydantic import SecretStr

    from flows.pipeline import notify_block

    return UUID(
        str(
            Webhook(method="POST", url=SecretStr(url)).save(
                notify_block(deployment), overwrite=True
            )
        )
    )


def _remove_webhook(client: "SyncPrefectClient", deployment: UUID) -> None:
    from prefect.exceptions import ObjectNotFound

    from flows.pipeline import notify_block

    with suppress(ObjectNotFound):
        client.delete_block_document(
            client.read_block_document_by_name(notify_block(deployment), "webhook").id
        )


def _notify(client: "SyncPrefectClient", deployment: UUID, name: str, block: UUID) -> None:
    """Have the server POST a line when a run of the deployment has vanished with its worker; of all else these tell (`tell_failure`)."""
    from prefect.events.actions import CallWebhook
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    told = AutomationCore(
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
                payload='{"text": {{ ("unclip " ~ deployment.name ~ ": run " ~ flow_run.name ~ " " ~ flow_run.state.name ~ ": "'
                " ~ (flow_run.state.message or '')) | tojson }}}",
            )
        ],
        owner_resource=f"prefect.deployment.{deployment}",
    )
    client.create_automation(told)


if __name__ == "__main__":
    from flows.config.roots import open_for

    print(prepared_queue(open_for(sys.argv[1], for_writing=False).uri))
