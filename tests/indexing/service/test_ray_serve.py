"""Two replicas on Ray Serve answer as the application alone does, ask for the same token, and
follow the same removal log.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from flows.cli import serve as serve_command
from flows.cli.main import main
from flows.cli.serve import Replicated, open_replica
from indexing.service.app import make_app
from indexing.service.state import Encoders, ServeConfig, Service
from infra.compute.cluster import Cluster, ClusterConfig
from infra.errors import CallerError, UnclipError
from infra.storage import manifests
from infra.storage.removal_log import write_removal
from infra.storage.store import open_root
from tests.helpers.committed_root import write_root
from tests.helpers.evaluation_run import direction, encode_images, encode_texts, usual_rows

TOKEN = "a-token-of-twenty-letters"
KEYS = [each["key"] for each in usual_rows()]
QUESTIONS: tuple[tuple[str, dict[str, Any] | None], ...] = (
    ("/search", {"text": "colour 5", "k": 10}),
    ("/search", {"embedding": direction(3).tolist(), "k": 5, "offset": 2, "style": ["framed"]}),
    ("/search", {"key": KEYS[7], "k": 4}),
    ("/search", {"embedding": [1.0]}),
    (
        "/knn-service",
        {
            "embedding_input": direction(2).tolist(),
            "num_images": 3,
            "num_result_ids": 6,
            "indice_name": "drawn",
        },
    ),
    ("/facets", None),
    ("/healthz", None),
    (f"/sample/{KEYS[3]}", None),
    (f"/thumbnail/{KEYS[3]}", None),
    ("/sample/nobody", None),
)


class Seen(Exception):  # noqa: N818
    pass


def open_drawn(asked: Replicated) -> tuple[Service, ServeConfig]:
    """Open a replica of the drawn run, whose CLIP is a function."""
    serve_command.load_encoders = lambda known: Encoders(
        known.fingerprint, encode_texts, encode_images, 20
    )
    return open_replica(asked)


def ask(
    client: Any, question: tuple[str, dict[str, Any] | None], token: str = TOKEN
) -> tuple[int, bytes, str]:
    path, body = question
    headers = {"Authorization": f"Bearer {token}"}
    answer = (
        client.get(path, headers=headers)
        if body is None
        else client.post(path, json=body, headers=headers)
    )
    return answer.status_code, answer.content, answer.headers["content-type"]


@pytest.mark.slow
def test_two_replicas_answer_as_the_application_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from indexing.service import ray_serve

    root = write_root(tmp_path)
    asked = Replicated(root=root.uri, replicas=2, rate=0, cpus=1)
    monkeypatch.setenv("UNCLIP_TOKEN", TOKEN)
    monkeypatch.setattr(
        serve_command, "load_encoders", serve_command.load_encoders
    )  # put back what open_drawn puts there
    with TestClient(make_app(*open_drawn(asked)), base_url="http://localhost") as alone:
        right = [ask(alone, question) for question in QUESTIONS]
    assert [status for status, *_ in right] == [200, 200, 200, 422, 200, 200, 200, 200, 200, 404]
    port = serve_command.free_port("127.0.0.1")

    def look() -> None:
        from ray import serve

        assert serve.status().applications["unclip"].deployments["search"].replica_states == {
            "RUNNING": 2
        }
        with (
            httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
            ThreadPoolExecutor(8) as pool,
        ):
            answers = list(pool.map(partial(ask, client), QUESTIONS * 4))
            assert answers == right * 4
            assert (
                ask(client, QUESTIONS[0], "another-token-of-letters")[0]
                == client.get("/facets").status_code
                == 401
            )
            before = {
                each["key"]
                for each in client.post("/search", json=QUESTIONS[0][1], headers=bearer()).json()[
                    "results"
                ]
            }
            write_removal(
                open_root(root.uri),
                {"keys": [KEYS[10]], "origins": [], "sha256": []},
                manifests.now(),
            )
            after = [
                client.post("/search", json=QUESTIONS[0][1], headers=bearer()).json()
                for _ in range(12)
            ]
            assert KEYS[10] in before and {each["samples"] for each in after} == {47}, (
                "gone from the next query on, whoever answers"
            )
            assert not any(KEYS[10] == hit["key"] for each in after for hit in each["results"])
        raise Seen

    with Cluster(ClusterConfig(num_cpus=2, object_store_memory_bytes=80 << 20)) as cluster:
        cluster.start()
        with pytest.raises(Seen):
            ray_serve.run(
                ray_serve.application(partial(open_drawn, asked), 2, 1), "127.0.0.1", port, look
            )
        lost = Replicated(root=str(tmp_path / "nothing"), replicas=1)
        with pytest.raises(UnclipError, match=r"replicas do not start: .*nothing has no run"):
            ray_serve.run(
                ray_serve.application(partial(open_drawn, lost), 1, 1),
                "127.0.0.1",
                port,
                lambda: None,
            )


def bearer() -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKEN}"}


def test_a_replica_has_its_share_of_the_rate_and_no_door_without_its_nodes_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_root(tmp_path)
    monkeypatch.setattr(
        serve_command,
        "load_encoders",
        lambda known: Encoders(known.fingerprint, encode_texts, encode_images, 20),
    )
    monkeypatch.delenv("UNCLIP_TOKEN", raising=False)
    asked = Replicated(
        root=root.uri,
        replicas=4,
        rate=20,
        allow_origins=("https://front.example.org",),
        removal_lag_s=3,
    )
    with pytest.raises(CallerError, match="UNCLIP_TOKEN is not in the environment of the Ray node"):
        open_replica(asked)
    monkeypatch.setenv("UNCLIP_TOKEN", "short")
    with pytest.raises(CallerError, match="at least 16"):
        open_replica(asked)
    monkeypatch.setenv("UNCLIP_TOKEN", TOKEN)
    service, config = open_replica(asked)
    service.close()
    assert (config.token, config.rate, config.burst) == (TOKEN, 5, 20)
    assert (config.allow_origins, config.removal_lag_s) == (("https://front.example.org",), 3)


def test_replicas_are_as_closed_to_others_as_one_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNCLIP_TOKEN", raising=False)
    with pytest.raises(SystemExit) as left:
        main(["serve", "--replicas", "2", "--host", "0.0.0.0"])
    assert left.value.code == 2 and "set UNCLIP_TOKEN" in capsys.readouterr().err
