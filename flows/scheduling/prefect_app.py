"""Prefect's server application with a check of the headers Host and Origin.

Runs under uvicorn as `flows.scheduling.prefect_app:create_app` with `--factory`. Prefect itself
answers pages of any site. Here a request must carry the token (Prefect's basic authentication), its
Host must be one of the server's own addresses (this refuses DNS rebinding), and its Origin, if any,
must be the server itself.
"""

import os

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

HOSTS = "UNCLIP_PREFECT_HOSTS"
"""Environment variable: comma-separated `host:port` addresses under which the server is reached."""
TOKEN = "PREFECT_SERVER_API_AUTH_STRING"
CLOSED_BY_POLICY = 1008


class OwnAddresses:
    """ASGI middleware that refuses requests with another Host or Origin.

    WebSockets are refused before they are accepted.
    """

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
    """Return the application. Raises ValueError if the environment lacks the token or addresses."""
    hosts = [host.strip().lower() for host in os.environ.get(HOSTS, "").split(",") if host.strip()]
    if not hosts or not os.environ.get(TOKEN):
        raise ValueError(
            f"Prefect's server needs {HOSTS} (host:port, ...) and {TOKEN} (user:password) "
            "in its environment"
        )
    os.environ["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join(f"http://{host}" for host in hosts)
    # Imported here because Prefect reads its settings at import.
    from prefect.server.api.server import create_app as create_prefect_app

    return OwnAddresses(create_prefect_app(), hosts)
