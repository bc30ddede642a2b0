"""clip-retrieval's protocol over our service: /indices-list, /knn-service and /metadata, as its
clients and its front end use them.
"""

from typing import Any

from fastapi import FastAPI, HTTPException

from indexing.ann.view import NEAR, Hit
from indexing.service.backend import Backend, Query, SearchOptions
from indexing.service.requests import KnnQuestion, MetadataQuestion
from indexing.service.state import Service

COLUMNS = (
    "url",
    "caption",
    "key",
    "licence",
    "style",
    "category",
    "split",
    "width_px",
    "height_px",
)


def add_protocol(app: FastAPI, backend: Backend) -> None:
    """Add /indices-list, /knn-service and /metadata."""

    @app.get("/indices-list")
    async def indices_list() -> list[str]:
        """clip-retrieval's protocol: the names of the indexes."""
        return [backend.service.version.name]

    @app.post("/knn-service")
    async def knn_service(question: KnnQuestion) -> list[dict[str, Any]]:
        """clip-retrieval's protocol: the nearest samples with their numbers, the first `num_images`
        of them with metadata.

        An embedding does not say which CLIP made it: without `clip`, only its length is checked.
        """
        return await _nearest(backend, question)

    @app.post("/metadata")
    async def metadata(question: MetadataQuestion) -> list[dict[str, Any]]:
        """clip-retrieval's protocol: the metadata of samples by number, without removed samples."""
        view = (await backend.version()).view
        _check_name(backend.service, question.indice_name)
        return [
            {"id": number, "metadata": _metadata(hit)}
            for number in question.ids[: backend.config.max_results]
            for hit in view.find_number(number)[:1]
        ]


async def _nearest(backend: Backend, question: KnnQuestion) -> list[dict[str, Any]]:
    """Return the answer to /knn-service."""
    version = await backend.version()
    _check_name(backend.service, question.indice_name)
    backend.check_clip(version, question.clip)
    query = _query_of(question)
    k = min(max(question.num_images, question.num_result_ids), backend.config.max_results)
    if k == 0:
        return []
    vector, without = await backend.vector(version, query)
    options = SearchOptions(
        k=k,
        columns=("origin", *COLUMNS[1:]),
        modality=question.modality,
        near=NEAR if question.deduplicate else None,
        without=without,
    )
    hits = await backend.hits(version.view, vector, options)
    return [
        {
            **(_metadata(hit) if position < question.num_images else {}),
            "id": number,
            "similarity": hit.score,
        }
        for position, (hit, number) in enumerate(zip(hits, version.view.numbers(hits), strict=True))
    ]


def _query_of(question: KnnQuestion) -> Query:
    """Return the query of a question; refuse a question that has none or several."""
    query = Query(
        question.text or None,
        question.image or None,
        question.image_url or None,
        question.embedding_input,
    )
    if sum(query_part is not None for query_part in query) != 1:
        raise HTTPException(422, "give one of text, image, image_url and embedding_input")
    return query


def _check_name(service: Service, name: str | None) -> None:
    """Refuse an index name that the served run never had."""
    if name and name not in service.names:
        raise HTTPException(404, f"there is no index of that name: use {service.version.name}")


def _metadata(hit: Hit) -> dict[str, Any]:
    return {name: hit.facts["origin" if name == "url" else name] for name in COLUMNS}
