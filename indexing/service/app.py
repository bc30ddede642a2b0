"""The HTTP service: the search page, our own routes and clip-retrieval's protocol.

`make_app` returns the ASGI application of a `Service`; `run` serves it with uvicorn. No path of a
request reaches the file system. The bodies of requests are in `requests`, tokens and limits in
`middleware`, clip-retrieval's routes in `clip_retrieval`, what all routes share in `backend`.
"""

import gc
import logging
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import uvicorn
from anyio import to_thread
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Gauge,
    Histogram,
    generate_latest,
)

from indexing.ann.view import CHOICES, NEAR, Hit, make_filter
from indexing.service.backend import (
    Backend,
    Query,
    SearchOptions,
    find_hit,
    value_errors_as_422,
)
from indexing.service.clip_retrieval import add_protocol
from indexing.service.http_protocol import ConnectionLimits, bounded_protocol
from indexing.service.json_route import QuickRoute
from indexing.service.middleware import COOKIE, Guard, GuardOptions, is_token
from indexing.service.requests import Question, Token, without_surrogates
from indexing.service.state import ServeConfig, Service
from indexing.service.text_batcher import Texts
from infra.console.line_log import LineHandler, LineWriter, write_lines
from infra.errors import CutFileError, DataError

STATIC = Path(__file__).parent / "static"
LIMITS = ConnectionLimits()
IDLE_S = 30
"""Seconds that a connection may stay open between two requests."""
SHUTDOWN_S = 7
"""Maximum seconds that requests in progress may take after a signal; the process ends within 10 s,
because closing the service takes at most 3 s more."""
PAGE = {
    "/": ("search.html", "text/html; charset=utf-8"),
    "/search.js": ("search.js", "text/javascript; charset=utf-8"),
    "/search.css": ("search.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
RESULT_COLUMNS = (
    "key",
    "caption",
    "licence",
    "style",
    "category",
    "split",
    "width_px",
    "height_px",
)
STORAGE_COLUMNS = ("shard", "member", "offset")
"""Columns that say where a picture is stored; clients do not see them."""
FACET_VALUES = 200

Key = Annotated[str, InPath(max_length=200)]


def make_app(service: Service, config: ServeConfig, log: TextIO = sys.stderr) -> FastAPI:
    """Return the ASGI application, which closes the service when it ends."""
    registry = CollectorRegistry()
    texts = Texts(_batch_sizes(registry).observe)
    backend = Backend(service, config, texts)
    _add_gauges(registry, service, texts)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()
        texts.close()
        backend.close()

    app = FastAPI(title="unclip search", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.route_class = QuickRoute
    app.add_middleware(
        Guard,
        options=GuardOptions(
            config.token,
            config.rate,
            config.burst,
            config.body_bytes,
            frozenset(config.allow_origins),
        ),
        registry=registry,
        log=log,
    )
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(CutFileError, _cut_file)
    _add_search(app, backend)  # first, because routes are tried in this order
    _add_samples(app, backend)
    _add_page(app)
    _add_about(app, service, config, registry)
    add_protocol(app, backend)
    return app


def _batch_sizes(registry: CollectorRegistry) -> Histogram:
    return Histogram(
        "unclip_text_batch",
        "Texts encoded at once.",
        registry=registry,
        buckets=(1, 2, 4, 8, 16, 32),
    )


def _add_gauges(registry: CollectorRegistry, service: Service, texts: Texts) -> None:
    """Add the metrics that are read from the service when they are asked for."""
    gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
        ("unclip_index_samples", "Samples that can be found.", lambda: service.version.view.count),
        (
            "unclip_index_segments",
            "Index folders that are searched.",
            lambda: len(service.version.view.segments),
        ),
        (
            "unclip_index_swaps",
            "Times that a new version replaced the served one.",
            lambda: service.swaps,
        ),
        ("unclip_text_cache_hits", "Texts whose vector was cached.", lambda: texts.hits),
        ("unclip_text_cache_misses", "Texts that had to be encoded.", lambda: texts.misses),
    )
    for name, description, value in gauges:
        Gauge(name, description, registry=registry).set_function(value)


def _add_about(
    app: FastAPI, service: Service, config: ServeConfig, registry: CollectorRegistry
) -> None:
    """Add the routes about the service itself, and the session of its page."""

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Return the service's status, and what it serves; never waits. 503 while a file of the
        index is cut.
        """
        name, view = service.version.name, service.version.view
        view.check_whole()
        about = {
            "samples": view.count,
            "segments": len(view.segments),
            "clip": view.clip,
            "version": view.version,
        }
        return {"status": "ok", "run": name, **about}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the metrics in Prometheus's text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/session", status_code=204)
    async def session(token: Token, request: Request) -> Response:
        """Store the token in a cookie that scripts cannot read, for the page and its pictures."""
        if config.token is None:
            return Response(status_code=204)
        if not is_token(token.token, config.token):
            raise HTTPException(401, "the token is wrong")
        answer = Response(status_code=204)
        is_https = request.url.scheme == "https"
        answer.set_cookie(
            COOKIE,
            config.token,
            httponly=True,
            samesite="strict",
            secure=is_https,
            max_age=30 * 86_400,
        )
        return answer


def _add_search(app: FastAPI, backend: Backend) -> None:
    """Add the search, and the values that it can filter by."""

    @app.get("/facets")
    async def facets() -> dict[str, dict[str, int]]:
        """Count the samples of each licence, style, category and split, the values that a query
        can filter by.
        """
        counts = await to_thread.run_sync(
            (await backend.version()).view.facets, limiter=backend.threads.counting
        )
        return {name: dict(list(values.items())[:FACET_VALUES]) for name, values in counts.items()}

    @app.post("/search")
    async def search(question: Question) -> dict[str, Any]:
        """Find the samples nearest to a text, a picture, an embedding or another sample."""
        _check_page(question, backend.config)
        version = await backend.version()
        backend.check_clip(version, question.clip)
        vector, without = await backend.vector(version, _query_of(question))
        hits = await backend.hits(version.view, vector, _options_of(question, without))
        about = {
            "clip": version.view.clip,
            "version": version.view.version,
            "samples": version.view.count,
            "offset": question.offset,
        }
        return {**about, "results": [_result(hit) for hit in hits]}


def _check_page(question: Question, config: ServeConfig) -> None:
    """Refuse a page that is too long or begins too far down."""
    if question.k > config.max_results:
        raise HTTPException(422, f"k: at most {config.max_results}")
    if question.offset + question.k > config.max_depth:
        raise HTTPException(422, f"offset + k: at most {config.max_depth}")


def _query_of(question: Question) -> Query:
    """Return the query of a question; refuse a question that has none or several."""
    query = Query(
        question.text, question.image, question.image_url, question.embedding, question.key
    )
    if sum(query_part is not None for query_part in query) != 1:
        raise HTTPException(422, "give one of text, image, image_url, embedding and key")
    return query


def _options_of(question: Question, without: frozenset[str]) -> SearchOptions:
    any_of = {name: getattr(question, name) for name in CHOICES if getattr(question, name)}
    with value_errors_as_422():
        chosen = make_filter(any_of, question.min_side_px, question.max_side_px)
    return SearchOptions(
        k=question.k,
        modality=question.modality,
        chosen=chosen,
        offset=question.offset,
        near=None if question.near_copies else NEAR,
        without=without,
        columns=("origin", *RESULT_COLUMNS),
    )


def _add_samples(app: FastAPI, backend: Backend) -> None:
    """Add the routes of one sample: its metadata and its picture."""

    @app.get("/sample/{key}")
    async def sample(key: Key) -> dict[str, Any]:
        """Return the metadata of one sample."""
        facts = find_hit((await backend.version()).view, key).facts
        return {name: value for name, value in facts.items() if name not in STORAGE_COLUMNS}

    @app.get("/thumbnail/{key}", response_class=Response)
    async def thumbnail(key: Key) -> Response:
        """Return the stored picture of a sample as a PNG of at most 256 x 256 pixels."""
        view = (await backend.version()).view
        hit = find_hit(view, key)
        try:
            png = await to_thread.run_sync(
                backend.service.thumbnail, view, hit, limiter=backend.threads.drawing
            )
        except DataError as error:
            backend.service.report(str(error))
            raise HTTPException(404, "the picture of that sample cannot be read") from None
        return Response(
            png, media_type="image/png", headers={"cache-control": "private, max-age=60"}
        )


def run(
    service: Service,
    config: ServeConfig,
    ready: Callable[[str], None],
    log: TextIO = sys.stderr,
    listener: socket.socket | None = None,
) -> None:
    """Serve until interrupted; call `ready` with the URL once the service answers.

    Serves on `listener`, by default on a socket of the config's address.
    """

    lines = LineWriter(partial(write_lines, log), lambda count: f"{count} lines were dropped")
    logging.getLogger().addHandler(LineHandler(lines))  # else logging writes, and waits, itself

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            gc.collect()
            # The index and the models stay until the end: scanning them again and again would
            # cause the longest pauses.
            gc.freeze()
            if self.started:
                port = self.servers[0].sockets[0].getsockname()[1]
                host = f"[{config.host}]" if ":" in config.host else config.host
                ready(f"http://{host}:{port}")

    Server(
        uvicorn.Config(
            make_app(service, config, log),
            host=config.host,
            port=config.port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            http=bounded_protocol(LIMITS),
            ws="none",
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=SHUTDOWN_S,
            limit_concurrency=LIMITS.max_connections,
        )
    ).run([listener] if listener else None)


def _add_page(app: FastAPI) -> None:
    for path, (name, kind) in PAGE.items():
        body = (STATIC / name).read_bytes()

        async def answer(body: bytes = body, kind: str = kind) -> Response:
            return Response(body, media_type=kind, headers={"cache-control": "no-cache"})

        app.add_api_route(
            path, answer, methods=["GET"], include_in_schema=False, response_model=None
        )


def _result(hit: Hit) -> dict[str, Any]:
    result = {**hit.facts, "url": hit.facts["origin"], "score": round(hit.score, 4)}
    del result["origin"]
    return result


async def _cut_file(_: Request, __: Exception) -> JSONResponse:
    """Return 503; the service's watcher reports the file, and opens it again once it is whole."""
    detail = "a file of the index was cut, so no results are shown; see the service's log"
    return JSONResponse({"detail": detail}, 503, {"retry-after": "5"})


async def _validation_error(_: Request, error: Exception) -> JSONResponse:
    """Return 422 with the fields and reasons, without the input, which JSON may not be able to
    hold.
    """
    assert isinstance(error, RequestValidationError)
    detail = [
        {
            "loc": [without_surrogates(str(part)[:100]) for part in fault["loc"]],
            "msg": without_surrogates(str(fault["msg"])[:300]),
            "type": fault["type"],
        }
        for fault in error.errors()[:20]
    ]
    return JSONResponse({"detail": detail}, 422)
