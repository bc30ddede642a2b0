"""A fuzzer that reads the service's own OpenAPI document finds no question that it answers with a
server error.
"""

import io
from collections.abc import Iterator

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.schemas import APIOperation

from indexing.service.app import make_app
from indexing.service.state import ServeConfig
from tests.helpers.search_service import Fake

TOKEN = "a-token-of-twenty-letters"
ROUTES = {
    "POST /search",
    "POST /knn-service",
    "POST /metadata",
    "POST /session",
    "GET /sample/{key}",
    "GET /thumbnail/{key}",
    "GET /facets",
    "GET /healthz",
    "GET /metrics",
    "GET /indices-list",
}
EXAMPLES = 15


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    service = Fake(tmp_path_factory.mktemp("fuzzed")).service(with_fetch=True)
    yield make_app(service, ServeConfig(token=TOKEN, rate=0, body_bytes=1 << 16), log=io.StringIO())
    service.close()


def fuzz(operation: APIOperation, mode: GenerationMode, headers: dict[str, str]) -> set[int]:
    """Ask a route EXAMPLES times, as its document says or otherwise; return the statuses."""
    answers: set[int] = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Case) -> None:
        answer = case.call(headers=headers)
        answers.add(answer.status_code)
        assert answer.status_code < 500, (
            f"{case.method} {case.path}: {answer.status_code} {answer.text[:200]}"
        )

    ask()
    return answers


@pytest.mark.parametrize(
    "mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["as documented", "otherwise"]
)
def test_no_question_is_answered_by_a_server_error(app: FastAPI, mode: GenerationMode) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=headers)
    operations = {
        f"{each.method.upper()} {each.path}": each
        for each in (found.ok() for found in schema.get_all_operations())
    }
    assert set(operations) == ROUTES
    if mode is GenerationMode.NEGATIVE:
        operations = {name: each for name, each in operations.items() if each.body}
    answers = {name: fuzz(each, mode, headers) for name, each in operations.items()}
    assert len(operations) >= 4
    assert not any(
        each <= {401, 421, 429} for name, each in answers.items() if name != "POST /session"
    ), "the guard let nothing through"
