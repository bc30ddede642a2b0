"""The service on Ray Serve: several replicas of the application, on one or more machines.

Every replica opens the index itself and answers whole requests. Replicas share ROOT, and the token
in the nodes' environment. Rate limits are per replica, so the caller divides them. `application`
returns what Serve deploys; `run` deploys it.
"""

import logging
import time
from collections.abc import Callable

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from indexing.service.app import make_app
from indexing.service.state import ServeConfig, Service
from infra.errors import UnclipError

NAME = "unclip"
DEPLOYMENT = "search"
ONGOING = 64
"""Maximum requests that a replica answers at once; many, because their texts are encoded
together."""
QUEUED = 512
"""Maximum requests that wait at a proxy; it answers 503 to more."""
LOOK_S = 2.0

OpenReplica = Callable[[], tuple[Service, ServeConfig]]


def application(open_replica: OpenReplica, replicas: int, cpus: float) -> Application:
    """Return the application for Serve. Each replica calls `open_replica`, which must be importable
    on its node.
    """

    def build() -> FastAPI:
        service, config = open_replica()
        return make_app(service, config)

    wrapped = serve.ingress(build)()
    deployed = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=ONGOING,
        max_queued_requests=QUEUED,
        max_constructor_retry_count=1,  # an index that cannot be opened fails again
        graceful_shutdown_timeout_s=10,
        logging_config={
            "enable_access_log": False,
            "log_level": "WARNING",
        },  # the guard logs requests, without their queries
    )(wrapped)
    return deployed.bind()


def run(application: Application, host: str, port: int, ready: Callable[[], None]) -> None:
    """Deploy on the Ray cluster that this process has joined, and remove it when interrupted.

    A Serve that already runs there keeps its host and port. Raises UnclipError if the replicas do
    not start, or fail later.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it logs every replica to the terminal
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": host, "port": port, "keep_alive_timeout_s": 30},
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
    except (RayError, TimeoutError) as error:
        raise UnclipError(
            f"Ray Serve does not start on {host}:{port}: {' '.join(str(error).split())[-300:]}"
        ) from error
    try:
        try:
            serve.run(application, name=NAME, route_prefix="/")
        except (RuntimeError, RayServeException) as error:
            raise UnclipError(f"the replicas do not start: {failure_line(error)}") from error
        ready()
        while True:
            time.sleep(LOOK_S)
            state = serve.status().applications[NAME]
            if state.status in ("DEPLOY_FAILED", "DELETING"):
                raise UnclipError(
                    f"the replicas have failed: {' '.join(state.message.split())[-300:]}"
                )
    finally:
        serve.delete(NAME)


def failure_line(error: BaseException) -> str:
    """Return the last replica's error as one line; Serve's own message has all tracebacks."""
    application_status = serve.status().applications.get(NAME)
    messages = (
        [deployment.message for deployment in application_status.deployments.values()]
        if application_status
        else []
    )
    lines = [
        line.strip()
        for text in (*messages, str(error))
        for line in text.splitlines()
        if "Error: " in line
    ]
    return lines[-1].partition("Error: ")[2][:300] if lines else " ".join(str(error).split())[:300]
