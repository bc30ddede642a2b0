"""A quick route takes and refuses what FastAPI's own does, and says the same of itself."""

from collections.abc import Iterator
from typing import Any

import pydantic_core
import pytest
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.testclient import TestClient

from indexing.service.json_route import QuickRoute, _faults
from indexing.service.middleware import JSON_BYTES


class Asked(BaseModel):
    numbers: list[float] = Field(max_length=3)
    word: str = ""


def application(route: type[APIRoute]) -> FastAPI:
    app = FastAPI()
    app.router.route_class = route

    @app.post("/sum")
    async def total(asked: Asked) -> dict[str, Any]:
        if asked.word == "no":
            raise HTTPException(409, "no", {"x-why": "asked for"})
        return {"sum": sum(asked.numbers), "word": asked.word}

    @app.post("/made", status_code=201)
    async def made(asked: Asked) -> list[str]:
        return [asked.word]

    @app.post("/with/{name}")
    async def with_name(asked: Asked, name: str, request: Request) -> dict[str, Any]:
        return {"name": name, "word": asked.word, "method": request.method}

    @app.post("/answer", status_code=204)
    async def answer(asked: Asked, request: Request) -> Response:
        return Response(
            status_code=204, headers={"x-word": str(len(asked.word)), "x-url": str(request.url)}
        )

    return app


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[TestClient, TestClient]]:
    with TestClient(application(QuickRoute)) as quick, TestClient(application(APIRoute)) as usual:
        yield quick, usual


GOOD = b'{"numbers": [1, 2.5, "3"], "word": "h\xc3\xbcgel \\u2028"}'


@pytest.mark.parametrize("path", ["/sum", "/made", "/with/x", "/answer"])
@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "application/ld+json"]
)
def test_what_is_right_is_answered_alike(
    both: tuple[TestClient, TestClient], path: str, method: str, kind: str
) -> None:
    quick, usual = (
        each.request(method, path, content=GOOD, headers={"content-type": kind}) for each in both
    )
    assert (quick.status_code, quick.headers, quick.content and quick.json()) == (
        usual.status_code,
        usual.headers,
        usual.content and usual.json(),
    )
    assert quick.status_code == {"GET": 405, "PUT": 405}.get(
        method, {"/made": 201, "/answer": 204}.get(path, 200)
    )


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b'{"numbers": [1], "word": "no"}', "application/json", 409),
        (b"", "application/json", 422),
        (b"null", "application/json", 422),
        (b'{"numbers": [1', "application/json", 422),
        (b'{"numbers": [1, 2, 3, 4]}', "application/json", 422),
        (b'{"numbers": ["x"]}', "application/json", 422),
        (GOOD, "text/plain", 422),
        (GOOD, "application/x-www-form-urlencoded", 422),
        (GOOD, "application/jsonx", 422),
        (GOOD, "", 422),
    ],
)
def test_what_is_wrong_is_refused_alike(
    both: tuple[TestClient, TestClient], body: bytes, kind: str, status: int
) -> None:
    quick, usual = (
        each.post("/sum", content=body, headers={"content-type": kind}) for each in both
    )
    assert quick.status_code == usual.status_code == status
    if status == 409:
        assert (quick.json(), quick.headers) == (usual.json(), usual.headers)
    else:
        assert all(each["loc"][0] == "body" and each["msg"] for each in quick.json()["detail"])


@pytest.mark.parametrize(
    "body",
    [
        b'{"numbers": [1], "word": "\\ud800"}',
        b"[" * 60_000,
        b"\xff\xfe",
        b'{"numbers": [1e999' + b"0" * 9999,
    ],
)
def test_what_python_itself_stumbles_over_is_refused_as_well(
    both: tuple[TestClient, TestClient], body: bytes
) -> None:
    assert (
        both[0].post("/sum", content=body, headers={"content-type": "application/json"}).status_code
        == 422
    )


def test_a_body_with_too_many_faults_is_refused_without_a_list(
    both: tuple[TestClient, TestClient],
) -> None:
    answer = both[0].post("/sum", json={"numbers": [], "word": {}, "numbers2": 1})
    assert [each["type"] for each in answer.json()["detail"]] == ["string_type"]
    errors = pydantic_core.ValidationError.from_exception_data(
        "Asked", [{"type": "missing", "loc": (str(number),)} for number in range(1001)]
    )
    assert [each["type"] for each in _faults(errors)] == ["too_many_faults"]


LONG = b"1, " * 60_000


@pytest.mark.parametrize(
    ("body", "is_refused"),
    [
        (b'{"word": "%s"}' % (b"x" * JSON_BYTES), True),
        (b'{"numbers": [%s1]}' % LONG, True),
        (b'{"image": "%s", "word": 3}' % (b"QUJD\\n\\/" * 200_000), False),
        (b'{"image": "%s", "image": "%s"}' % (b"A" * 70_000, b"A" * 70_000), True),
        (b'{"image": {"x": "%s"}}' % (b"A" * 70_000), True),
        (b'{"image": "%s' % (b"A" * 70_000), True),
        (b'{"embedding": [%s1], "word": 3}' % LONG, False),
        (b'{"embedding_input" : [%s1], "word": 3}' % LONG, False),
        (b'{"embedding": [%s1], "word": 3}' % (LONG * 2), True),
        (b'{"embedding": [%s{}]}' % LONG, True),
        (b'{%s"word": 3}' % (b'"image": "", ' * 10_000), True),
    ],
)
def test_json_is_bounded_outside_of_a_picture_and_an_embedding_before_it_is_parsed(
    both: tuple[TestClient, TestClient],
    monkeypatch: pytest.MonkeyPatch,
    body: bytes,
    is_refused: bool,
) -> None:
    monkeypatch.setattr(Asked, "model_validate_json", lambda _: Asked(numbers=[]))
    answer = both[0].post("/sum", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == (413 if is_refused else 200)


def test_the_place_of_a_fault_is_told(both: tuple[TestClient, TestClient]) -> None:
    quick, usual = (
        each.post("/sum", json={"numbers": [1, "x"], "word": 3}).json()["detail"] for each in both
    )
    assert [(each["loc"], each["msg"], each["type"]) for each in quick] == [
        (each["loc"], each["msg"], each["type"]) for each in usual
    ]


def test_the_document_is_the_same(both: tuple[TestClient, TestClient]) -> None:
    quick, usual = (each.get("/openapi.json").json() for each in both)
    assert quick == usual
