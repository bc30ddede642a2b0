"""The service answers right, refuses what it must, and no question makes it fail."""

import io
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from starlette.testclient import TestClient

from indexing.ann.keys import number_of
from indexing.service.app import make_app
from indexing.service.state import ServeConfig
from tests.helpers import evaluation_run
from tests.helpers.evaluation_run import DIM, HOSTILE, b64, direction, draw, png, row
from tests.helpers.search_service import CLIP, Fake

TOKEN = "a-token-of-twenty-letters"


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    rows = [
        *evaluation_run.usual_rows(),
        row(
            3, "hostile", "train", caption=HOSTILE, captions=[HOSTILE], origin="javascript:alert(1)"
        ),
    ]
    return Fake(tmp_path_factory.mktemp("served"), rows)


@pytest.fixture(scope="module")
def client(fake: Fake) -> Iterator[TestClient]:
    with TestClient(
        make_app(fake.service(), ServeConfig(rate=0), io.StringIO()), base_url="http://localhost"
    ) as client:
        yield client


def asked(client: TestClient, **question: Any) -> list[dict[str, Any]]:
    answer = client.post("/search", json=question)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["results"])


def test_every_kind_of_query_finds_its_colour(client: TestClient, fake: Fake) -> None:
    key = next(
        each["key"] for each in fake.rows if each["number"] == 5 and each["style"] == "plain"
    )
    questions = (
        {"text": "colour 5"},
        {"image": b64(png(5))},
        {"image": "data:image/png;base64," + b64(png(5, 64))},
        {"embedding": (3 * direction(5)).tolist()},
        {"key": key},
    )
    for question in questions:
        found = asked(client, **question, k=2)
        assert [each["caption"] for each in found] == ["colour 5"] * 2, question
        assert found[0]["score"] == pytest.approx(1, abs=0.01)
    assert key not in {each["key"] for each in asked(client, key=key, k=50)}


@pytest.mark.parametrize("invisible", ["\u200b", "\u00ad", "\u200e", "\ufeff"])
def test_invisible_characters_of_a_text_change_no_answer(
    client: TestClient, fake: Fake, invisible: str
) -> None:
    text = f"{invisible}col{invisible}our 5\u00a0"
    assert asked(client, text=text, k=5) == asked(client, text="colour 5", k=5)
    assert not [each for texts in fake.encoded for each in texts if invisible in each]
    answer = client.post("/search", json={"text": f" {invisible}"})
    assert (answer.status_code, "it is empty" in answer.text) == (422, True)


def test_filters_and_pages(client: TestClient) -> None:
    whole = asked(client, text="colour 2", k=20, style=["framed", "other"], split=["train"])
    assert {(each["style"], each["split"]) for each in whole} == {("framed", "train")} and len(
        whole
    ) == 12
    parts = [
        each
        for offset in (0, 5, 10)
        for each in asked(
            client, text="colour 2", k=5, offset=offset, style=["framed"], split=["train"]
        )
    ]
    assert parts == whole
    assert asked(client, text="colour 2", min_side_px=21) == []
    assert client.get("/facets").json()["style"] == {
        "other": 16,
        "framed": 16,
        "plain": 16,
        "hostile": 1,
    }


def test_near_copies_are_left_out_on_demand(client: TestClient) -> None:
    captions = [each["caption"] for each in asked(client, text="colour 2", k=16, near_copies=False)]
    assert len(captions) == len(set(captions)) == 16


def test_a_thumbnail_is_the_samples_picture(client: TestClient) -> None:
    found = asked(client, text="colour 7", k=1, style=["plain"])[0]
    answer = client.get(f"/thumbnail/{found['key']}")
    picture = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert answer.headers["content-type"] == "image/png" and picture.shape == (20, 20, 3)
    assert (picture[1:] == draw(7, "plain")[1:]).all()
    assert client.get(f"/sample/{found['key']}").json()["origin"] == "https://example.org/7-plain"
    for path in (
        "/thumbnail/nobody",
        "/sample/nobody",
        "/thumbnail/..%2F..%2Fetc%2Fpasswd",
        "/thumbnail/../app.py",
    ):
        assert client.get(path).status_code == 404


def test_what_was_taken_down_is_gone_from_the_next_query_on(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    with TestClient(
        make_app(fake.service(), ServeConfig(rate=0), io.StringIO()), base_url="http://localhost"
    ) as client:
        first = asked(client, text="colour 5", k=1)[0]
        assert client.get(f"/thumbnail/{first['key']}").status_code == 200
        fake.remove(keys={first["key"]})
        assert asked(client, text="colour 5", k=1)[0]["key"] != first["key"]
        assert client.get(f"/thumbnail/{first['key']}").status_code == 404
        assert client.post("/search", json={"key": first["key"]}).status_code == 404
        assert client.post("/metadata", json={"ids": [number_of(first["key"])]}).json() == []


def test_another_version_takes_over_without_a_failed_or_mixed_answer(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    other = fake.make("second", [row(number, "newer", "train") for number in range(16)])
    service = fake.service()
    stop, answers = threading.Event(), []
    with TestClient(
        make_app(service, ServeConfig(rate=0), io.StringIO()), base_url="http://localhost"
    ) as client:

        def keep_asking() -> None:
            while not stop.is_set():
                answers.append(client.post("/search", json={"text": "colour 5", "k": 30}))

        threads = [threading.Thread(target=keep_asking) for _ in range(3)]
        for thread in threads:
            thread.start()
        for clip, segments in (
            ("b" * 64, [other]),
            (CLIP, list(fake.segments)),
            ("b" * 64, [other]),
        ):
            fake.segments, fake.clip = segments, clip
            fake.stamps[1] += 1
            service.refresh()
            time.sleep(0.1)
        stop.set()
        for thread in threads:
            thread.join()
    assert {answer.status_code for answer in answers} == {200}
    seen = {
        (
            answer.json()["clip"],
            frozenset(each["style"] == "newer" for each in answer.json()["results"]),
        )
        for answer in answers
    }
    assert seen == {(CLIP, frozenset({False})), ("b" * 64, frozenset({True}))}


def test_an_index_that_cannot_be_opened_again_leaves_the_old_one_serving(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    service = fake.service()
    fake.segments, fake.stamps[1] = [], 1
    deadline = time.monotonic() + 20
    while not fake.reported and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "could not be opened again" in fake.reported[0]
    assert service.current().view.count == 48
    service.close()


def test_an_embedding_of_another_clip_is_refused(client: TestClient) -> None:
    vector = direction(5).tolist()
    assert client.post("/search", json={"embedding": vector, "clip": CLIP}).status_code == 200
    answer = client.post("/search", json={"embedding": vector, "clip": "0" * 64})
    assert answer.status_code == 409 and "embed it with the index's own" in answer.json()["detail"]


def test_clip_retrievals_protocol(client: TestClient) -> None:
    assert client.get("/indices-list").json() == ["drawn"]
    # what clip_retrieval.clip_client.ClipClient 2.45 posts: JSON without a content type
    body = {
        "text": "colour 5",
        "image": None,
        "image_url": None,
        "embedding_input": None,
        "deduplicate": False,
        "use_safety_model": True,
    }
    body |= {
        "use_violence_detector": True,
        "indice_name": "drawn",
        "use_mclip": False,
        "aesthetic_score": 9,
        "aesthetic_weight": 0.5,
    }
    body |= {"modality": "image", "num_images": 2, "num_result_ids": 3}
    answer = client.post("/knn-service", content=json.dumps(body))
    found = answer.json()
    assert answer.status_code == 200 and len(found) == 3
    assert found[0].keys() >= {"id", "similarity", "url", "caption"} and found[2].keys() == {
        "id",
        "similarity",
    }
    assert found[0]["caption"] == "colour 5" and found[0]["similarity"] == pytest.approx(
        1, abs=0.01
    )
    told = client.post(
        "/metadata",
        content=json.dumps({"ids": [each["id"] for each in found], "indice_name": "drawn"}),
    ).json()
    assert [each["id"] for each in told] == [each["id"] for each in found]
    assert told[0]["metadata"]["caption"] == "colour 5"
    assert (
        len(
            client.post(
                "/knn-service", json=body | {"deduplicate": True, "num_result_ids": 10}
            ).json()
        )
        == 10
    )
    assert client.post("/knn-service", json=body | {"indice_name": "other"}).status_code == 404
    assert (
        client.post("/knn-service", json={"image": b64(png(5)), "num_images": 1}).json()[0][
            "caption"
        ]
        == "colour 5"
    )
    assert (
        client.post(
            "/knn-service", json={"embedding_input": direction(5).tolist(), "num_images": 1}
        ).json()[0]["caption"]
        == "colour 5"
    )


def test_of_an_embedding_in_clip_retrievals_protocol_the_dimensions_are_checked_and_the_clip_where_it_is_named(  # noqa: E501
    client: TestClient,
) -> None:
    answer = client.post("/knn-service", json={"embedding_input": [1.0, 2.0]})
    assert (
        answer.status_code == 422
        and f"2 numbers but the index has {DIM}" in answer.json()["detail"]
    )
    body = {"embedding_input": direction(5).tolist(), "num_images": 1}
    assert client.post("/knn-service", json=body | {"clip": CLIP}).status_code == 200
    assert client.post("/knn-service", json=body | {"clip": "0" * 64}).status_code == 409


def test_texts_are_encoded_once_and_remembered(client: TestClient, fake: Fake) -> None:
    for _ in range(3):
        asked(client, text="colour 11", k=1)
    assert sum(texts.count("colour 11") for texts in fake.encoded) == 1


@pytest.mark.parametrize(
    ("question", "status", "words"),
    [
        ({}, 422, "give one of text"),
        ({"text": "a", "key": "b"}, 422, "give one of text"),
        ({"text": " "}, 422, "it is empty"),
        ({"text": "x" * 2001}, 422, "at most 2000"),
        ({"text": "a", "k": 0}, 422, "greater than or equal to 1"),
        ({"text": "a", "k": 201}, 422, "at most 200"),
        ({"text": "a", "k": 1, "offset": 2000}, 422, "at most 2000"),
        ({"text": "a", "surprise": 1}, 422, "Extra inputs"),
        ({"embedding": [1.0]}, 422, f"1 numbers but the index has {DIM}"),
        ({"embedding": [0.0] * DIM}, 422, "all its numbers are 0"),
        ({"embedding": [1e300] * DIM}, 422, "less than or equal"),
        ({"image": "%%%"}, 422, "not in base64"),
        ({"image": b64(b"GIF89a")}, 422, "cannot be read"),
        ({"image": b64(b"")}, 422, "cannot be read"),
        (
            {
                "image": b64(
                    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
                    + (200_000).to_bytes(4) * 2
                    + b"\x08\x02\0\0\0\0\0\0\0"
                )
            },
            422,
            "picture",
        ),
        ({"image_url": "http://example.org/a.png"}, 403, "fetches no pictures"),
        ({"key": "nobody"}, 404, "no sample"),
    ],
)
def test_a_wrong_question_is_told_what_is_wrong(
    client: TestClient, question: dict[str, Any], status: int, words: str
) -> None:
    answer = client.post("/search", json=question)
    assert (answer.status_code, words in answer.text) == (status, True), answer.text


def test_a_query_url_goes_through_the_guarded_fetcher_only(fake: Fake) -> None:
    service = fake.service(with_fetch=True)
    with TestClient(
        make_app(service, ServeConfig(rate=0), io.StringIO()), base_url="http://localhost"
    ) as client:
        answer = client.post("/search", json={"image_url": "http://169.254.169.254/latest"})
    assert (answer.status_code, fake.fetched) == (422, ["http://169.254.169.254/latest"])
    assert "host_refused" in answer.json()["detail"]


def test_a_look_at_its_health_does_not_wait_for_slow_pictures(fake: Fake) -> None:
    service = fake.service(with_fetch=True)
    go_on, inside, most = threading.Event(), [], []

    def slowly(*_: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        go_on.wait(20)
        inside.pop()
        raise ValueError("image_url: it could not be fetched")

    object.__setattr__(service.parts, "fetch", slowly)
    service.encode_picture = slowly  # type: ignore[method-assign]
    for question, at_once in (
        ({"image_url": "https://example.org/a.png"}, 8),
        ({"image": b64(png(5))}, 2),
    ):
        with TestClient(
            make_app(service, ServeConfig(rate=0), io.StringIO()), base_url="http://localhost"
        ) as client:
            go_on.clear()
            most.clear()
            threads = [
                threading.Thread(target=client.post, args=("/search",), kwargs={"json": question})
                for _ in range(45)
            ]
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + 20
            while len(inside) < at_once and time.monotonic() < deadline:
                time.sleep(0.01)
            started = time.monotonic()
            for path in ("/healthz", "/facets", "/metrics", "/indices-list", "/"):
                assert client.get(path).status_code == 200
            assert client.post("/search", json={"text": "colour 5"}).status_code == 200
            assert time.monotonic() - started < 10 and not go_on.is_set()
            go_on.set()
            for thread in threads:
                thread.join()
            assert max(most) == at_once


def test_thumbnails_are_kept_up_to_a_number_of_bytes(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = fake.service()
    hits = service.version.view.search(direction(5), 40)
    sizes = [len(service.thumbnail(service.version.view, hit)) for hit in hits]
    assert service._thumbnail_bytes == sum(sizes)
    monkeypatch.setattr("indexing.service.state.THUMBNAILS_BYTES", 1000)
    service._thumbnails.clear()
    service._thumbnail_bytes = 0
    for hit in hits:
        service.thumbnail(service.version.view, hit)
        assert service._thumbnail_bytes == sum(map(len, service._thumbnails.values())) <= 1000
    service.close()


def test_an_embedding_of_any_length_is_a_direction(client: TestClient) -> None:
    whole = asked(client, embedding=direction(5).tolist(), k=5)
    for scale in (1e-300, 1e-30, 1e5):
        assert asked(client, embedding=(scale * direction(5).astype(float)).tolist(), k=5) == whole


def test_no_question_makes_the_service_fail(client: TestClient) -> None:
    rng = random.Random(0)
    schema = client.get("/openapi.json").json()
    fields = sorted(
        {
            name
            for each in schema["components"]["schemas"].values()
            for name in each.get("properties", {})
        }
    )
    odd: list[Any] = [
        None,
        True,
        0,
        -1,
        1,
        3.5,
        1e308,
        10**400,
        "",
        "\ud800",
        "\0",
        "image",
        "a" * 5000,
        [],
        [1],
        {},
        {"a": 1},
        [[1]],
    ]
    odd += [
        [float("nan")] * DIM,
        [float("inf")],
        direction(1).tolist(),
        b64(png(1)),
        "data:,",
        HOSTILE,
        ["plain"],
        [10**30],
        [-1],
    ]
    paths = [
        (method.upper(), path) for path, methods in schema["paths"].items() for method in methods
    ]
    for _ in range(500):
        method, path = rng.choice(paths)
        path = path.replace(
            "{key}",
            rng.choice(
                [
                    "x",
                    "%00",
                    "%ff",
                    "a" * 300,
                    "..%2f",
                    "%F0%9F%98%80",
                    "\udfff".encode("utf-8", "replace").decode(),
                ]
            ),
        )
        body: Any = {rng.choice(fields): rng.choice(odd) for _ in range(rng.randint(0, 4))}
        raw = json.dumps(rng.choice([body, body, body, rng.choice(odd)])).encode()
        raw = rng.choice([raw, raw, raw, raw[: len(raw) // 2], b"[" * 100_000, b"\xff\xfe", b""])
        answer = client.request(
            method,
            path,
            content=raw,
            headers={"content-type": rng.choice(["application/json", "text/plain", "x", ""])},
        )
        assert answer.status_code < 500, (method, path, raw[:300], answer.text)
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert client.request(method, "/search").status_code in (404, 405)
