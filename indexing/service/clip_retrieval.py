"""clip-retrieval's protocol: the routes that its clients and its front end ask, over our
service.
"""

from typing import Any

from fastapi import FastAPI, HTTPException

from indexing.ann.view import NEAR, Hit
from indexing.service.backend import Backend, Query
from indexing.service.requests import KnnQuestion, MetadataQuestion

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
    service, config = backend.service, backend.config

    def check_name(name: str | None) -> None:
        if name and name not in service.names:
            raise HTTPException(
                404, f"there is no index of that name: {service.version.name} is served"
            )

    @app.get("/indices-list")
    async def indices_list() -> list[str]:
        """clip-retrieval's protocol: the names of the indexes."""
        return [service.version.name]

    @app.post("/knn-service")
    async def knn_service(question: KnnQuestion) -> list[dict[str, Any]]:
        """clip-retrieval's protocol: the nearest samples; the first `num_images` with their
        metadata, all with their number.

        An embedding says nothing of the CLIP that made it, so that only its dimensions are checked,
        unless `clip` names it.
        """
        version = await backend.version()
        check_name(question.indice_name)
        backend.check_clip(version, question.clip)
        query = Query(
            question.text or None,
            question.image or None,
            question.image_url or None,
            question.embedding_input,
        )
        if sum(query_part is not None for query_part in query) != 1:
            raise HTTPException(422, "give one of text, image, image_url and embedding_input")
        k = min(max(question.num_images, question.num_result_ids), config.max_results)
        if k == 0:
            return []
        vector, without = await backend.vector(version, query)
        near = NEAR if question.deduplicate else None
        hits = await backend.hits(
            version.view,
            vector,
            k,
            question.modality,
            near=near,
            without=without,
            columns=("origin", *COLUMNS[1:]),
        )
        return [
            {
                **(_metadata(hit) if number_in_page < question.num_images else {}),
                "id": number,
                "similarity": hit.score,
            }
            for number_in_page, (hit, number) in enumerate(
                zip(hits, version.view.numbers(hits), strict=True)
            )
        ]

    @app.post("/metadata")
    async def metadata(question: MetadataQuestion) -> list[dict[str, Any]]:
        """clip-retrieval's protocol: the metadata of samples by number; those that are gone are
        left out.
        """
        view = (await backend.version()).view
        check_name(question.indice_name)
        wanted = question.ids[: config.max_results]
        return [
            {"id": number, "metadata": _metadata(hit)}
            for number in wanted
            for hit in view.find_number(number)[:1]
        ]


def _metadata(hit: Hit) -> dict[str, Any]:
    return {name: hit.facts["origin" if name == "url" else name] for name in COLUMNS}
