"""Whatever heads and bodies reach the service's application: documented statuses, and one line of
the log and one count for each request.

Beside tests/indexing/service/test_fuzzed_app.py, which keeps to the OpenAPI document, this one
sends any bytes.
"""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import example, given
from hypothesis import strategies as st

from indexing.service.app import make_app
from indexing.service.state import ServeConfig
from tests.helpers.bounds import bounded
from tests.helpers.search_service import Fake

STATUSES = {200, 204, 400, 401, 404, 405, 413, 421, 422}
PATHS = ("/search", "/knn-service", "/metadata", "/session", "/sample/x", "/thumbnail/x", "/facets")
METHODS = ("GET", "HEAD", "POST", "PUT", "OPTIONS", "DELETE")
TOKEN = b"a-token-of-twenty-letters"
FIELDS = ("text", "image", "embedding", "embedding_input", "key", "k", "offset", "licence", "ids")
HEADERS = st.lists(
    st.one_of(
        st.sampled_from(
            [
                (b"content-type", b"application/json"),
                (b"content-type", b"application/json; charset=utf-16"),
                (b"content-type", b"multipart/form-data; boundary=x"),
                (b"content-length", b"0x10"),
                (b"origin", b"null"),
                (b"cookie", b"unclip_token=x; unclip_token"),
                (b"authorization", b"Bearer \xff"),
                (b"access-control-request-method", b"POST"),
            ]
        ),
        st.tuples(
            st.sampled_from([b"content-type", b"content-length", b"cookie", b"host", b"origin"]),
            st.binary(max_size=40),
        ),
    ),
    max_size=4,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.binary(max_size=60).map(lambda data: base64.b64encode(data).decode()),
    lambda values: st.lists(values, max_size=6)
    | st.dictionaries(st.text(max_size=6), values, max_size=3),
    max_leaves=12,
)  # fmt: skip
BODIES = st.one_of(
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3).map(
        lambda value: json.dumps(value).encode()
    ),
    st.builds(lambda piece, count: piece * count, st.binary(min_size=1, max_size=8), st.just(9000)),
    st.binary(max_size=200),
)


class Asked:
    """The application in an event loop of a thread of its own, so that its own threads answer."""

    def __init__(self, app: FastAPI, log: io.StringIO) -> None:
        self.app, self.log = app, log
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def ask(self, scope: dict[str, Any], pieces: list[bytes]) -> int:
        """Send a request and return the status of its answer."""
        return asyncio.run_coroutine_threadsafe(self._ask(scope, pieces), self.loop).result(60)

    async def _ask(self, scope: dict[str, Any], pieces: list[bytes]) -> int:
        waiting, sent = list(pieces), []

        async def receive() -> dict[str, Any]:
            body = waiting.pop(0) if waiting else b""
            return {"type": "http.request", "body": body, "more_body": bool(waiting)}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        assert [message["type"] for message in sent].count("http.response.start") == 1
        assert not sent[-1].get("more_body")
        return int(sent[0]["status"])

    def count(self) -> float:
        """Return the number of requests that the metrics have counted."""
        guard = self.app.middleware_stack
        while not hasattr(guard, "requests"):
            guard = guard.app  # type: ignore[union-attr]
        return sum(
            sample.value
            for metric in guard.requests.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
        )

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    service = Fake(tmp_path_factory.mktemp("fuzzed")).service(with_fetch=True)
    log = io.StringIO()
    app = make_app(service, ServeConfig(token=TOKEN.decode(), rate=0, body_bytes=1 << 16), log=log)
    opened = Asked(app, log)
    opened.ask(scope_of("GET", "/healthz", []), [])  # FastAPI builds its layers at the first one
    yield opened
    opened.close()
    service.close()


def scope_of(method: str, path: str, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http",
        "method": method, "path": path, "raw_path": path.encode("utf-8", "replace"),
        "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2), "headers": headers,
    }  # fmt: skip


@example("POST", "/search", [], b'{"embedding": [1e999]}', True, 1)
@example("POST", "/search", [], b"[" * 60_000, True, 7)
@given(
    method=st.sampled_from(METHODS),
    path=st.sampled_from(PATHS) | st.text(max_size=20).map(lambda text: "/" + text),
    headers=HEADERS,
    body=BODIES,
    has_token=st.booleans(),
    pieces=st.integers(1, 9),
)
def test_any_request_gets_one_documented_answer_and_is_counted(
    asked: Asked, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes,
    has_token: bool, pieces: int,
) -> None:  # fmt: skip
    usual = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    token = [(b"authorization", b"Bearer " + TOKEN)] if has_token else []
    step = max(1, len(body) // pieces)
    counted = asked.count()
    with bounded():
        status = asked.ask(
            scope_of(method, path, [*headers, *usual, *token]),
            [body[start : start + step] for start in range(0, len(body), step)],
        )
    assert status in STATUSES, f"{method} {path}: {status}"
    assert asked.count() == counted + 1
