"""clip-retrieval's own client and its own front end work against the service unchanged (`make
peers`; the front end in a real browser).
"""

import json
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import pytest

from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.evaluation_run import direction, draw
from tests.helpers.peer_environment import PEERS, Peer
from tests.helpers.search_service import Fake, serving

PYTHON = PEERS / "clip_retrieval" / "bin" / "python"
MISSING = "clip-retrieval is not installed beside us: make .peers/clip_retrieval/ready"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON.exists(), reason=MISSING)]


class Asked:
    """The client's process."""

    def __init__(self, address: str) -> None:
        self.client = {"url": f"{address}/knn-service", "indice_name": "drawn", "num_images": 4}
        self.process = Peer(PYTHON, "clip_retrieval_peer.py")

    def __call__(self, client: dict[str, Any] | None = None, **query: Any) -> Any:
        return self.process.ask({"client": {**self.client, **(client or {})}, "query": query})


def test_the_real_client_is_answered(tmp_path: Path) -> None:
    fake = Fake(tmp_path / "run")
    picture = tmp_path / "mine.png"
    cv2.imwrite(str(picture), draw(9, "plain", 64)[..., ::-1])
    with serving(fake.service()) as address:
        ask = Asked(address)
        try:
            for query, right in (
                ({"text": "colour 5"}, "colour 5"),
                ({"image": str(picture)}, "colour 9"),
                ({"embedding_input": direction(3).tolist()}, "colour 3"),
            ):
                for modality in ("image", "text"):
                    found = ask({"modality": modality, "deduplicate": False}, **query)
                    assert len(found) == 4 and found[0]["caption"] == right, (query, modality)
                    assert {"id", "similarity", "url", "caption"} <= found[0].keys() and found[0][
                        "similarity"
                    ] == pytest.approx(1, abs=0.01)
                    assert [each["caption"] for each in found].count(right) == 3
            apart = ask(text="colour 5")
            assert [each["caption"] for each in apart].count("colour 5") == 1, (
                "deduplicated, as the client asks unless told otherwise"
            )
            refused = ask(embedding_input=[1.0, 2.0])
            assert "2 numbers but the index has 16 dimensions" in refused["detail"]
            assert "fetches no pictures" in ask(image="http://example.org/a.png")["detail"]
            assert (
                "no index of that name"
                in ask({"indice_name": "laion5B"}, text="colour 5")["detail"]
            )
        finally:
            ask.process.stop()


class Front(SimpleHTTPRequestHandler):
    """Serves the front end's files and its configuration, as `clip-retrieval front` does."""

    backend = ""

    def do_GET(self) -> None:
        if self.path != "/config.json":
            super().do_GET()
            return
        body = json.dumps(
            {"defaultBackend": self.backend, "defaultIndex": "drawn", "urlColumn": "url"}
        ).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("is_allowed", [True, False])
def test_the_real_front_end_shows_what_is_found_where_its_origin_is_allowed(
    tmp_path: Path, is_allowed: bool
) -> None:
    (built,) = PYTHON.parent.parent.glob("lib/python*/site-packages/front/build")
    front = ThreadingHTTPServer(("127.0.0.1", 0), partial(Front, directory=str(built)))
    origin = f"http://127.0.0.1:{front.server_address[1]}"
    thread = threading.Thread(target=front.serve_forever, daemon=True)
    thread.start()
    try:
        with (
            serving(
                Fake(tmp_path / "run").service(), allow_origins=(origin,) if is_allowed else ()
            ) as address,
            Browser(tmp_path / "browser") as browser,
        ):
            Front.backend = address
            browser.go(f"{origin}/?query=colour+5&useSafetyModel=false&useViolenceDetector=false")
            page = "document.querySelector('clip-front').shadowRoot"
            shows = f"Boolean({page} && {page}.textContent.includes('colour 5'))"
            if is_allowed:
                browser.until(shows)
                browser.look(tmp_path / "front.png")
            else:
                time.sleep(5)
                assert not browser.run(shows)
    finally:
        front.shutdown()
        front.server_close()
        thread.join()
