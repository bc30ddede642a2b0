"""Prefect's server application behind a check of Host and Origin, for uvicorn: `flows.scheduling.prefect_app:create_app` with `--factory`.

Prefect itself answers any page of any site. Here a request must carry the token (Prefect's own basic authentication), be sent to
one of the server's own addresses (a site whose name was made to point at this machine is refused) and come from no page but its own.
"""

import os

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

HOSTS = "UNCLIP_PREFECT_HOSTS"
"""Environment variable: the addresses, as `host:port` with commas between, under which the server is asked."""
TOKEN = "PREFECT_SERVER_API_AUTH_STRING"
CLOSED_BY_POLICY = 1008


class OwnAddresses:
    """ASGI middleware: refuses requests to other hosts and from pages of other origins, WebSockets before they are accepted."""

    def __init__(self, app: ASGIApp, hosts: list[str]) -> None:
        self.app = app
        self.hosts = {host.encode() for host in hosts}
        self.origins = {
            scheme + host for scheme in (b"http://", b"https://") for host in self.hosts
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else ""
        if not refusal:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": CLOSED_BY_POLICY})
        else:
            await PlainTextResponse(f"{refusal}\n", status_code=403)(scope, receive, send)

    def _refusal(self, scope: Scope) -> str:
        hosts = [value.lower() for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            return (
                f"this server is asked at {', '.join(sorted(host.decode() for host in self.hosts))}"
            )
        origins = [value.lower() for name, value in scope["headers"] if name == b"origin"]
        return (
            "" if set(origins) <= self.origins else "pages of other sites may not ask this server"
        )


def create_app() -> ASGIApp:
    """Return the application. Raises ValueError where the environment lacks the token or the addresses."""
    hosts = [host.strip().lower() for host in os.environ.get(HOSTS, "").split(",") if host.strip()]
    if not hosts or not os.environ.get(TOKEN):
        raise ValueError(
            f"Prefect's server needs {HOSTS} (host:port, ...) and {TOKEN} (user:password) in its environment"
        )
    os.environ["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join(f"http://{host}" for host in hosts)
    from prefect.server.api.server import (
        create_app as create_prefect_app,
    )  # reads its settings when it is imported

    return OwnAddresses(create_prefect_app(), hosts)
