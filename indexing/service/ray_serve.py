"""The service on Ray Serve: replicas of the same application behind Serve's proxies, for more than
one process or machine.

Every replica opens the index for itself and answers whole requests; what is shared is ROOT, and the
token in the nodes' environment. Rates are per replica, so whoever opens a replica divides them.
`application` is what Serve deploys, `run` deploys it from here.
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
"""Requests that a replica answers at a time: its texts are encoded together, so that few would
waste it."""
QUEUED = 512
"""Requests that wait at a proxy; more are answered 503."""
LOOK_S = 2.0

OpenReplica = Callable[[], tuple[Service, ServeConfig]]


def application(open_replica: OpenReplica, replicas: int, cpus: float) -> Application:
    """Return the application for Serve; `open_replica` is called in each replica, on whatever node,
    and must be importable there.
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
        max_constructor_retry_count=1,  # an index that cannot be opened is no passing fault
        graceful_shutdown_timeout_s=10,
        logging_config={
            "enable_access_log": False,
            "log_level": "WARNING",
        },  # the guard logs requests, without what they ask
    )(wrapped)
    return deployed.bind()


def run(application: Application, host: str, port: int, ready: Callable[[], None]) -> None:
    """Deploy on the Ray that this process has joined, and look after it until interrupted; take it
    down then.

    A Serve that runs on that Ray already keeps its own host and port. Raises UnclipError where the
    replicas do not come up, or go.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it tells the terminal of every replica
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
            raise UnclipError(f"the replicas do not come up: {failure_line(error)}") from error
        ready()
        while True:
            time.sleep(LOOK_S)
            state = serve.status().applications[NAME]
            if state.status in ("DEPLOY_FAILED", "DELETING"):
                raise UnclipError(
                    f"the replicas are gone: {' '.join(state.message.split())[-300:]}"
                )
    finally:
        serve.delete(NAME)


def failure_line(error: BaseException) -> str:
    """Return what the last replica said as it failed, in one line: Serve's own message holds all of
    their tracebacks.
    """
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
