"""The HTTP service: the search page, our own routes and clip-retrieval's protocol over one `Service`.

Reads nothing but what the service holds: no path of a request reaches the file system. `make_app` returns the ASGI application, `run`
serves it with uvicorn. What clients may send is in indexing.asked, who may send it in indexing.guard.
"""

import gc
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import numpy as np
import uvicorn
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, Histogram, generate_latest
from pydantic_core import from_json

from indexing import uploads
from indexing.asked import KnnQuestion, MetadataQuestion, Question, Token, speakable
from indexing.embeddings import Floats, unit
from indexing.freshness import Freshness
from indexing.guard import COOKIE, Guard, is_token
from indexing.service import ServeConfig, Service, Version
from indexing.texts import Texts
from indexing.view import CHOICES, NEAR, Hit, View, make_filter
from infra.errors import DataError, UnclipError

HERE = Path(__file__).parent
PAGE = {
    "/": ("search.html", "text/html; charset=utf-8"),
    "/search.js": ("search.js", "text/javascript; charset=utf-8"),
    "/search.css": ("search.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
PROTOCOL_COLUMNS = ("url", "caption", "key", "licence", "style", "category", "split", "width_px", "height_px")
RESULT_COLUMNS = ("origin", *PROTOCOL_COLUMNS[1:])
FACET_VALUES = 200
DECODED_AT_ONCE = 2
"""Query pictures in work at a time: one of 32 million pixels takes a third of a gigabyte while it is made smaller."""
FETCHED_AT_ONCE = 8
DRAWN_AT_ONCE = 4

Key = Annotated[str, InPath(max_length=200)]


def make_app(service: Service, config: ServeConfig, log: TextIO = sys.stderr) -> FastAPI:
    """Return the application; it closes the service when it ends."""
    registry = CollectorRegistry()
    batches = Histogram("unclip_text_batch", "Texts encoded at once.", registry=registry, buckets=(1, 2, 4, 8, 16, 32))
    texts = Texts(batches.observe)
    for name, what, value in (
        ("unclip_index_samples", "Samples that can be found.", lambda: service.version.view.count),
        ("unclip_index_segments", "Index folders that are searched.", lambda: len(service.version.view.segments)),
        ("unclip_index_swaps", "How often another version took over.", lambda: service.swaps),
        ("unclip_text_cache_hits", "Texts whose vector was remembered.", lambda: texts.hits),
        ("unclip_text_cache_misses", "Texts that had to be encoded.", lambda: texts.misses),
    ):
        Gauge(name, what, registry=registry).set_function(value)
    freshness = Freshness(service, config.removal_lag_s)
    threads = Threads()

    async def current() -> Version:
        try:
            return await freshness.version()
        except UnclipError as error:
            service.parts.report(str(error))
            raise HTTPException(503, "the removal log cannot be read, so nothing is shown; the service's log says why") from None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()
        texts.close()

    app = FastAPI(title="unclip search", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.route_class = QuickRoute
    app.add_middleware(
        Guard,
        token=config.token,
        rate=config.rate,
        burst=config.burst,
        body_bytes=config.body_bytes,
        origins=config.allow_origins,
        registry=registry,
        log=log,
    )
    app.add_exception_handler(RequestValidationError, _say_what_is_wrong)
    _add_page(app)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Say that the service answers, and from what; waits for nothing."""
        name, view = service.version.name, service.version.view
        about = {"samples": view.count, "segments": len(view.segments), "clip": view.clip, "version": view.version}
        return {"status": "ok", "run": name, **about}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return counters and times in Prometheus's text form."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/session", status_code=204)
    async def session(given: Token, request: Request) -> Response:
        """Keep the token in a cookie that no script can read, for the page and its pictures."""
        if config.token is None:
            return Response(status_code=204)
        if not is_token(given.token, config.token):
            raise HTTPException(401, "that is not the token")
        answer = Response(status_code=204)
        is_https = request.url.scheme == "https"
        answer.set_cookie(COOKIE, config.token, httponly=True, samesite="strict", secure=is_https, max_age=30 * 86_400)
        return answer

    @app.get("/facets")
    async def facets() -> dict[str, dict[str, int]]:
        """Count the samples of each licence, style, category and split: what a query can be filtered by. Counted once a version."""
        counted = await to_thread.run_sync((await current()).view.facets, limiter=threads.counting)
        return {name: dict(list(values.items())[:FACET_VALUES]) for name, values in counted.items()}

    @app.post("/search")
    async def search(asked: Question) -> dict[str, Any]:
        """Find the samples nearest to a text, a picture, an embedding or another sample."""
        if asked.k > config.max_results:
            raise HTTPException(422, f"k: at most {config.max_results}")
        if asked.offset + asked.k > config.max_depth:
            raise HTTPException(422, f"offset + k: at most {config.max_depth}")
        version = await current()
        view = version.view
        if asked.clip is not None and asked.clip != view.clip:
            raise HTTPException(409, f"the index was made by CLIP {view.clip}, the query by {asked.clip}: embed it with the index's own")
        given = [name for name in ("text", "image", "image_url", "embedding", "key") if getattr(asked, name) is not None]
        if len(given) != 1:
            raise HTTPException(422, "give one of text, image, image_url, embedding and key")
        query, without = await _query(
            service, texts, threads, version, asked.text, asked.image, asked.image_url, asked.embedding, asked.key
        )
        chosen = _refused(
            make_filter, {name: getattr(asked, name) for name in CHOICES if getattr(asked, name)}, asked.min_side_px, asked.max_side_px
        )
        near = None if asked.near_copies else NEAR
        hits = await _searched(threads, view, query, asked.k, asked.modality, chosen, asked.offset, near, without, RESULT_COLUMNS)
        about = {"clip": view.clip, "version": view.version, "samples": view.count, "offset": asked.offset}
        return {**about, "results": [_result(hit) for hit in hits]}

    @app.get("/sample/{key}")
    async def sample(key: Key) -> dict[str, Any]:
        """Return what is known of one sample."""
        facts = _found((await current()).view, key).facts
        return {name: value for name, value in facts.items() if name not in ("shard", "member", "offset")}

    @app.get("/thumbnail/{key}", response_class=Response)
    async def thumbnail(key: Key) -> Response:
        """Return a sample's picture, as it is stored, at most 256 pixels wide."""
        view = (await current()).view
        hit = _found(view, key)
        try:
            drawn = await to_thread.run_sync(service.thumbnail, view, hit, limiter=threads.drawing)
        except DataError as error:
            service.parts.report(str(error))
            raise HTTPException(404, "its picture cannot be read") from None
        return Response(drawn, media_type="image/png", headers={"cache-control": "private, max-age=60"})

    @app.get("/indices-list")
    async def indices_list() -> list[str]:
        """clip-retrieval's protocol: the names of the indexes."""
        return [service.version.name]

    @app.post("/knn-service")
    async def knn_service(asked: KnnQuestion) -> list[dict[str, Any]]:
        """clip-retrieval's protocol: the nearest samples; the first `num_images` with their metadata, all with their number.

        An embedding says nothing of the CLIP that made it, so that only its dimensions are checked, unless `clip` names it.
        """
        version = await current()
        _check_name(asked.indice_name, service)
        if asked.clip is not None and asked.clip != version.view.clip:
            raise HTTPException(409, f"the index was made by CLIP {version.view.clip}, the query by {asked.clip}")
        view = version.view
        given = [asked.text, asked.image, asked.image_url, asked.embedding_input]
        if sum(each is not None and each != "" for each in given) != 1:
            raise HTTPException(422, "give one of text, image, image_url and embedding_input")
        k = min(max(asked.num_images, asked.num_result_ids), config.max_results)
        if k == 0:
            return []
        query, without = await _query(
            service, texts, threads, version, asked.text or None, asked.image or None, asked.image_url or None, asked.embedding_input, None
        )
        near = NEAR if asked.deduplicate else None
        hits = await _searched(threads, view, query, k, asked.modality, make_filter({}), 0, near, without, RESULT_COLUMNS)
        return [
            {**(_metadata(hit) if place < asked.num_images else {}), "id": number, "similarity": hit.score}
            for place, (hit, number) in enumerate(zip(hits, view.numbers(hits), strict=True))
        ]

    @app.post("/metadata")
    async def metadata(asked: MetadataQuestion) -> list[dict[str, Any]]:
        """clip-retrieval's protocol: the metadata of samples by number; those that are gone are left out."""
        view = (await current()).view
        _check_name(asked.indice_name, service)
        wanted = asked.ids[: config.max_results]
        return [{"id": number, "metadata": _metadata(hit)} for number in wanted for hit in view.find_number(number)[:1]]

    return app


class Threads:
    """How many threads each kind of work may take, so that none keeps another, or a look at the service's health, waiting."""

    def __init__(self) -> None:
        self.searching = CapacityLimiter(os.cpu_count() or 1)
        self.counting = CapacityLimiter(1)
        self.decoding = CapacityLimiter(DECODED_AT_ONCE)
        self.fetching = CapacityLimiter(FETCHED_AT_ONCE)
        self.drawing = CapacityLimiter(DRAWN_AT_ONCE)


class QuickRequest(Request):
    """A request whose body is parsed by pydantic's own parser: a third of the time for the hundreds of numbers of an embedding."""

    async def json(self) -> Any:
        """Return what the body holds. Raises JSONDecodeError, which becomes an answer 422."""
        body = await self.body()
        try:
            return from_json(body)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class QuickRoute(APIRoute):
    """A route that takes its requests so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler."""
        handle = super().get_route_handler()

        async def handle_quickly(request: Request) -> Response:
            return await handle(QuickRequest(request.scope, request.receive))

        return handle_quickly


def run(service: Service, config: ServeConfig, ready: Callable[[str], None], log: TextIO = sys.stderr) -> None:
    """Serve until interrupted; `ready` is told the address once it answers."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            gc.collect()
            gc.freeze()  # what is there by now stays: to go through it again and again would be the longest pauses
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
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=64 << 10,
            limit_concurrency=512,
        )
    ).run()


def _add_page(app: FastAPI) -> None:
    for path, (name, kind) in PAGE.items():
        body = (HERE / name).read_bytes()

        async def answer(body: bytes = body, kind: str = kind) -> Response:
            return Response(body, media_type=kind, headers={"cache-control": "no-cache"})

        app.add_api_route(path, answer, methods=["GET"], include_in_schema=False, response_model=None)


async def _query(
    service: Service,
    texts: Texts,
    threads: Threads,
    version: Version,
    text: str | None,
    image: str | None,
    image_url: str | None,
    embedding: Sequence[float] | None,
    key: str | None,
) -> tuple[Floats, frozenset[str]]:
    """Return the query's unit vector (D,) and the pictures (SHA-256) that are no answer to it."""
    view, encoders = version.view, version.encoders
    if text is not None:
        if not text.strip():
            raise HTTPException(422, "text: it is empty")
        return await texts.vector(encoders.texts, encoders.clip, text.strip()), frozenset()
    if embedding is not None:
        vector = unit(_refused(_as_vector, embedding, view.dim)[None])[0]
        if not vector.any():
            raise HTTPException(422, "embedding: it has no direction")
        return vector, frozenset()
    if key is not None:
        hit = _found(view, key)
        vector = await to_thread.run_sync(view.vector, hit, limiter=threads.searching)
        return unit(vector[None])[0], frozenset({hit.facts["sha256"]})
    try:
        if image is not None:
            data = uploads.from_base64(image)
        elif service.parts.fetch is None:
            raise HTTPException(403, "image_url: this service fetches no pictures; send the picture itself")
        else:
            data = await to_thread.run_sync(service.parts.fetch, image_url or "", limiter=threads.fetching)
        return await to_thread.run_sync(service.encode_picture, encoders, data, limiter=threads.decoding), frozenset()
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


def _as_vector(embedding: Sequence[float], dim: int) -> Floats:
    if len(embedding) != dim:
        raise ValueError(f"embedding: it has {len(embedding)} numbers but the index has {dim} dimensions")
    return np.asarray(embedding, np.float32)


def _refused(ask: Callable[..., Any], *arguments: Any) -> Any:
    """Call, and answer 422 with its words where the question was wrong."""
    try:
        return ask(*arguments)
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


async def _searched(threads: Threads, view: View, *arguments: Any) -> list[Hit]:
    """Search in a thread, so that requests are read and answered meanwhile, on no more threads than there are cores."""
    found: list[Hit] = await to_thread.run_sync(partial(_refused, view.search, *arguments), limiter=threads.searching)
    return found


def _found(view: View, key: str) -> Hit:
    hit = view.find_key(key)
    if hit is None:
        raise HTTPException(404, "there is no sample with that key")
    return hit


def _check_name(name: str | None, service: Service) -> None:
    if name and name not in service.names:
        raise HTTPException(404, f"there is no index of that name: {service.version.name} is served")


def _result(hit: Hit) -> dict[str, Any]:
    facts = hit.facts
    names = ("key", "caption", "licence", "style", "category", "split", "width_px", "height_px")
    return {**{name: facts[name] for name in names}, "url": facts["origin"], "score": round(hit.score, 4)}


def _metadata(hit: Hit) -> dict[str, Any]:
    return {name: hit.facts["origin" if name == "url" else name] for name in PROTOCOL_COLUMNS}


async def _say_what_is_wrong(_: Request, error: Exception) -> JSONResponse:
    """Answer 422 with places and reasons, without the input: it may hold what JSON cannot."""
    assert isinstance(error, RequestValidationError)
    detail = [
        {"loc": [speakable(str(part)[:100]) for part in each["loc"]], "msg": speakable(str(each["msg"])[:300]), "type": each["type"]}
        for each in error.errors()[:20]
    ]
    return JSONResponse({"detail": detail}, 422)
