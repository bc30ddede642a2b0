"""What stands before every route lets in whom it should, bounds what is asked, and counts and logs
it without telling what it was.
"""

import io
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from starlette.testclient import TestClient

from indexing.service.app import make_app
from indexing.service.rate_limit import Buckets, network_of
from indexing.service.state import ServeConfig
from tests.helpers import evaluation_run
from tests.helpers.evaluation_run import b64, png
from tests.helpers.search_service import Fake

TOKEN = "a-token-of-twenty-letters"
ORIGIN = "https://front.example.org"


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    return Fake(tmp_path_factory.mktemp("served"), evaluation_run.usual_rows())


@pytest.fixture(scope="module")
def client(fake: Fake) -> Iterator[TestClient]:
    with TestClient(
        make_app(fake.service(), ServeConfig(rate=0), io.StringIO()), base_url="http://localhost"
    ) as client:
        yield client


def test_without_the_token_nothing_of_the_index_is_told(fake: Fake) -> None:
    log = io.StringIO()
    with TestClient(
        make_app(fake.service(), ServeConfig(rate=0, token=TOKEN), log),
        base_url="http://example.org",
    ) as client:
        for path in (
            "/metrics",
            "/facets",
            "/indices-list",
            "/openapi.json",
            "/thumbnail/x",
            "/nowhere",
        ):
            assert client.get(path).status_code == 401, path
        assert client.post("/search", json={"text": "colour 5"}).status_code == 401
        assert (
            client.get("/indices-list", headers={"authorization": f"Bearer {TOKEN}x"}).status_code
            == 401
        )
        assert (
            client.get("/indices-list", headers={"authorization": f"Bearer {TOKEN}"}).status_code
            == 200
        )
        assert client.get("/healthz").status_code == client.get("/").status_code == 200
        assert client.post("/session", json={"token": "wrong"}).status_code == 401
        given = client.post("/session", json={"token": TOKEN})
        assert given.status_code == 204 and "httponly" in given.headers["set-cookie"].lower()
        assert "samesite=strict" in given.headers["set-cookie"].lower()
        assert client.get("/indices-list").status_code == 200, "the cookie is enough"
    assert TOKEN not in log.getvalue()


def test_without_a_token_only_loopback_names_are_answered(client: TestClient) -> None:
    for host, status in (
        ("localhost:8080", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
    ):
        assert client.get("/indices-list", headers={"host": host}).status_code == status, host


def test_head_is_answered_as_get_without_the_body(fake: Fake) -> None:
    log = io.StringIO()
    with TestClient(
        make_app(fake.service(), ServeConfig(rate=0), log), base_url="http://localhost"
    ) as client:
        for path in ("/", "/search.js", "/healthz", "/metrics", "/facets", "/nowhere"):
            answer, usual = client.head(path), client.get(path)
            assert answer.status_code == usual.status_code and answer.content == b"", path
            if path != "/metrics":
                assert answer.headers["content-length"] == usual.headers["content-length"], path
        assert client.head("/search").status_code == 405
    assert '"method": "HEAD", "path": "/healthz", "status": 200' in log.getvalue()


def test_the_rate_is_limited_and_recovers(fake: Fake) -> None:
    with TestClient(
        make_app(fake.service(), ServeConfig(rate=0.001, burst=3), io.StringIO()),
        base_url="http://localhost",
    ) as client:
        answers = [client.get("/healthz") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert int(answers[3].headers["retry-after"]) > 100
    buckets = Buckets(rate=10, burst=3)
    assert [buckets.take("a", 1, 5.0) == 0 for _ in range(4)] == [True, True, True, False]
    assert buckets.take("b", 1, 5.0) == 0, "another client has tokens of its own"
    assert buckets.take("a", 1, 5.0) == pytest.approx(0.1) and buckets.take("a", 1, 5.11) == 0


def test_a_body_is_bounded_whatever_length_it_declares(fake: Fake) -> None:
    with TestClient(
        make_app(fake.service(), ServeConfig(rate=0, body_bytes=2000), io.StringIO()),
        base_url="http://localhost",
    ) as client:
        whole = json.dumps({"image": "A" * 3000})
        assert client.post("/search", content=whole).status_code == 413
        assert (
            client.post(
                "/search", content=iter([whole[:1500].encode(), whole[1500:].encode()])
            ).status_code
            == 413
        )
        assert client.post("/search", json={"text": "colour 5"}).status_code == 200


def test_a_body_without_a_picture_is_at_most_64_kib(client: TestClient) -> None:
    keys = ", ".join(f'"{number}": 1' for number in range(10_000))
    for path in ("/session", "/metadata", "/healthz", "/nowhere"):
        contents = [f"{{{keys}}}", iter([f"{{{keys}".encode(), b"}"])]
        for content in contents if path in ("/session", "/metadata") else contents[:1]:
            answer = client.request("POST", path, content=content)
            assert (answer.status_code, answer.json()) == (
                413,
                {"detail": "the body has more than 65536 bytes"},
            )
    for path in ("/search", "/knn-service"):
        answer = client.post(
            path, content=f"{{{keys}}}", headers={"content-type": "application/json"}
        )
        assert (answer.status_code, "outside of image" in answer.text) == (413, True)


def test_addresses_of_one_ipv6_network_are_one_client() -> None:
    buckets = Buckets(rate=1, burst=2)
    first, second, other = "2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8:0:2::1"
    assert [buckets.take(each, 1, 5.0) == 0 for each in (first, second, first, other)] == [
        True,
        True,
        False,
        True,
    ]
    assert (
        network_of("::ffff:192.0.2.7") == network_of("192.0.2.7") == "192.0.2.7"
        and network_of("local") == "local"
    )
    assert network_of("fe80::1%eth0") == "fe80::/64"


def test_bodies_of_all_requests_together_are_bounded(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexing.service.middleware.HELD_BYTES", 3000)
    encoding, go_on = threading.Event(), threading.Event()
    service = fake.service()
    encode = service.encode_picture
    service.encode_picture = lambda *given: encoding.set() or (go_on.wait(20) and encode(*given))  # type: ignore[method-assign]
    with TestClient(
        make_app(service, ServeConfig(rate=0), io.StringIO()), base_url="http://localhost"
    ) as client:
        answers = []
        body = {"image": b64(png(5)), "licence": ["x" * 100] * 20}
        slow = threading.Thread(target=lambda: answers.append(client.post("/search", json=body)))
        slow.start()
        assert encoding.wait(20)
        refused = client.post("/search", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (
            503,
            "1",
        ) and "too many large requests" in refused.text
        assert client.post("/search", json={"text": "colour 5"}).status_code == 200
        go_on.set()
        slow.join()
        assert answers[0].status_code == client.post("/search", json=body).status_code == 200, (
            "what was held is free again"
        )


def test_pages_of_an_allowed_origin_may_ask_and_no_others(fake: Fake) -> None:
    config = ServeConfig(
        rate=0, token=TOKEN, allow_origins=(ORIGIN, "http://localhost:1235"), body_bytes=2000
    )
    bearer = {"authorization": f"Bearer {TOKEN}"}
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    with TestClient(
        make_app(fake.service(), config, io.StringIO()), base_url="http://localhost"
    ) as client:
        asked = client.options("/search", headers={"origin": ORIGIN, **preflight})
        assert (
            asked.status_code == 204
            and asked.content == b""
            and asked.headers["access-control-allow-origin"] == ORIGIN
        )
        assert (
            "POST" in asked.headers["access-control-allow-methods"]
            and "access-control-allow-private-network" not in asked.headers
        )
        assert {"authorization", "content-type"} <= set(
            asked.headers["access-control-allow-headers"].split(", ")
        )
        private = {"origin": ORIGIN, **preflight, "access-control-request-private-network": "true"}
        assert (
            client.options("/search", headers=private).headers[
                "access-control-allow-private-network"
            ]
            == "true"
        )
        assert (
            client.options(
                "/search", headers=preflight | {"origin": "https://evil.example"}
            ).status_code
            == 401
        )
        for origin, is_allowed in (
            (ORIGIN, True),
            ("http://localhost:1235", True),
            ("https://evil.example", False),
            ("null", False),
        ):
            for answer in (
                client.post(
                    "/knn-service", json={"text": "colour 5"}, headers={"origin": origin, **bearer}
                ),
                client.get("/indices-list", headers={"origin": origin}),
                client.post("/search", content=b"x" * 3000, headers={"origin": origin, **bearer}),
            ):
                assert (answer.headers.get("access-control-allow-origin") == origin) == is_allowed
                assert "access-control-allow-credentials" not in answer.headers, (
                    "the cookie is for our own page"
                )
                assert not is_allowed or answer.headers["vary"] == "origin"
        assert (
            "access-control-allow-origin" not in client.get("/indices-list", headers=bearer).headers
        )


def test_without_allowed_origins_nothing_is_said_to_other_pages(client: TestClient) -> None:
    asked = client.options(
        "/search", headers={"origin": ORIGIN, "access-control-request-method": "POST"}
    )
    assert asked.status_code == 405 and "access-control-allow-origin" not in asked.headers
    assert (
        "access-control-allow-origin"
        not in client.get("/indices-list", headers={"origin": ORIGIN}).headers
    )


def test_requests_are_counted_and_logged_without_what_was_asked(fake: Fake) -> None:
    log = io.StringIO()
    with TestClient(
        make_app(fake.service(), ServeConfig(rate=0), log), base_url="http://localhost"
    ) as client:
        client.post("/search?secret=1", json={"text": "colour 5"})
        client.get("/nowhere")
        metrics = client.get("/metrics").text
    assert 'unclip_requests_total{route="/search",status="200"} 1.0' in metrics
    assert 'unclip_requests_total{route="none",status="404"} 1.0' in metrics, (
        "paths that are no routes do not become labels"
    )
    assert (
        "unclip_index_samples 48.0" in metrics
        and 'unclip_request_seconds_bucket{le="0.005",route="/search"}' in metrics
    )
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/search", 200),
        ("/nowhere", 404),
        ("/metrics", 200),
    ]
    assert "colour" not in log.getvalue() and "secret" not in log.getvalue()


def test_log_lines_do_not_wait_for_the_end(fake: Fake) -> None:
    log = io.StringIO()
    with TestClient(
        make_app(fake.service(), ServeConfig(rate=0), log), base_url="http://localhost"
    ) as client:
        client.get("/healthz")
        limit = time.monotonic() + 10
        while "/healthz" not in log.getvalue():
            assert time.monotonic() < limit
            time.sleep(0.02)


def test_a_log_that_nobody_reads_stops_no_request(fake: Fake) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    statuses: list[int] = []

    def ask(client: TestClient) -> None:
        for _ in range(3):
            statuses.append(client.get("/healthz").status_code)
            time.sleep(0.2)  # longer than lines are collected

    with (
        os.fdopen(writing, "w") as log,
        TestClient(
            make_app(fake.service(), ServeConfig(rate=0), log), base_url="http://localhost"
        ) as client,
    ):
        thread = threading.Thread(target=ask, args=(client,), daemon=True)
        thread.start()
        thread.join(60)
        has_answered = not thread.is_alive()
        os.close(reading)  # what waits for a reader fails now
    assert has_answered and statuses == [200] * 3


def test_every_answer_carries_the_policy_that_keeps_foreign_scripts_out(client: TestClient) -> None:
    for path in ("/", "/search.js", "/healthz", "/nowhere"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
    page = client.get("/").text
    assert "<script>" not in page and " onclick" not in page and " style=" not in page
