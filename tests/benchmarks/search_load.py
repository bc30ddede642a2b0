"""Puts a search service under load: mixed queries from many clients, while samples come and go and
another run takes over and back.

    python -m tests.benchmarks.search_load                                     a service of its own
    over 100,000 x 256 drawn vectors
    python -m tests.benchmarks.search_load --drawn 1000000x512 --clients 4 --embedding-only [--keep
    FOLDER]      searching alone
    python -m tests.benchmarks.search_load http://127.0.0.1:8080 [--root ROOT] [--pid PID]     a
    running `unclip serve --rate 0`

Prints one JSON object: requests a second, times by kind, wrong answers, and the service's memory
before, between and after quarters; exit
code 1 where an answer was wrong: out of order, against its filter, a 404 for a sample that is
there, one that shows what had been taken
down before it was asked for, or that mixes versions (tests.helpers.search_changes, which changes
ROOT meanwhile: use a copy).
"""

import argparse
import base64
import io
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image

from tests.helpers.search_changes import Changes, make_root

WORDS = (
    "red",
    "blue",
    "heart",
    "face",
    "flag",
    "cat",
    "house",
    "smiling",
    "sun",
    "tree",
    "food",
    "square",
)
KINDS = ("text", "key", "embedding", "image", "filter", "page", "near")
DRAWN = "100000x256"


class Answer(NamedTuple):
    """What came of a question, and when it was asked and answered."""

    question: dict[str, Any]
    kind: str
    status: int
    body: bytes
    asked: float
    answered: float


class Connection:
    """A connection that is kept, in as few steps as HTTP can do with: what a client takes of the
    cores the service has not.
    """

    def __init__(self, base: str) -> None:
        self.host = httpx.URL(base).netloc.decode()
        host, port = self.host.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def request(self, body: bytes) -> bytes:
        """Return the request that asks POST /search with this body."""
        head = f"POST /search HTTP/1.1\r\nhost: {self.host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"  # noqa: E501
        return head.encode() + body

    def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request; return the status and the body of the answer, whose head tells its
        length.
        """
        self.socket.sendall(request)
        got = b""
        while (end := got.find(b"\r\n\r\n") + 4) < 4:
            got += self._more()
        head = got[:end].lower()
        length = int(head.split(b"\r\ncontent-length:", 1)[1].split(b"\r\n", 1)[0])
        while len(got) < end + length:
            got += self._more()
        return int(head.split(b" ", 2)[1]), got[end:]

    def _more(self) -> bytes:
        got = self.socket.recv(1 << 16)
        if not got:
            raise ConnectionError("the service closed the connection before it had answered")
        return got


class Asker:
    """Makes questions and judges answers; `times` collects (kind, seconds, problem or "")."""

    def __init__(
        self,
        kinds: tuple[str, ...],
        keys: list[str],
        dim: int,
        facets: dict[str, dict[str, int]],
        changes: Changes,
    ) -> None:
        self.kinds, self.keys, self.dim, self.changes = kinds, keys, dim, changes
        self.choices = [
            (name, value)
            for name, values in facets.items()
            if name != "subcategory"
            for value in values
        ]
        self.times: list[tuple[str, float, str]] = []

    def question(self, kind: str, rng: random.Random) -> dict[str, Any]:
        """Return a question of that kind."""
        asked: dict[str, Any] = {"k": rng.choice((5, 10, 24))}
        if kind == "text":
            return asked | {"text": " ".join(rng.choices(WORDS, k=rng.randint(1, 3)))}
        if kind == "key":
            return asked | {"key": rng.choice(self.keys)}
        if kind == "image":
            file = io.BytesIO()
            Image.new("RGB", (64, 64), tuple(rng.randbytes(3))).save(file, "PNG")
            return asked | {"image": base64.b64encode(file.getvalue()).decode()}
        asked["embedding"] = (
            np.random.default_rng(rng.getrandbits(32)).normal(size=self.dim).round(5).tolist()
        )
        if kind == "filter" and self.choices:
            name, value = rng.choice(self.choices)
            return asked | {name: [value]}
        if kind == "page":
            return asked | {"k": 24, "offset": 24 * rng.randint(1, 8)}
        return asked | {"near_copies": kind != "near"}

    def ask(self, base: str, clients: int, count: int, first: int) -> float:
        """Ask so many questions, shared by clients that each ask one after the other; return the
        seconds that all took together.

        Questions are made before and answers judged after.
        """
        connections = [Connection(base) for _ in range(clients)]
        made = []
        for number, connection in enumerate(connections):
            rng = random.Random(first + number)
            kinds = rng.choices(self.kinds, k=max(1, count // clients))
            questions = [(kind, self.question(kind, rng)) for kind in kinds]
            made.append(
                [
                    (kind, asked, connection.request(json.dumps(asked).encode()))
                    for kind, asked in questions
                ]
            )

        def ask_all(
            connection: Connection, questions: list[tuple[str, dict[str, Any], bytes]]
        ) -> list[Answer]:
            answers = []
            for kind, question, request in questions:
                asked = time.monotonic()
                status, body = connection.ask(request)
                answers.append(Answer(question, kind, status, body, asked, time.monotonic()))
            return answers

        with ThreadPoolExecutor(clients) as pool:
            started = time.monotonic()
            answers = list(pool.map(ask_all, connections, made))
            took = time.monotonic() - started
        for each in itertools.chain(*answers):
            self.times.append((each.kind, each.answered - each.asked, self.problem(each)))
        for connection in connections:
            connection.socket.close()
        return took

    def problem(self, answer: Answer) -> str:
        """Return what is wrong with an answer, or ""."""
        question, asked = answer.question, answer.asked
        key = question.get("key")
        if answer.status == 404 and key is not None:
            return (
                ""
                if self.changes.may_be_gone(key, answer.answered)
                else "404 for a sample that is there"
            )
        if answer.status != 200:
            return f"status {answer.status}"
        if key is not None and self.changes.is_gone(key, asked):
            return "knows what was gone"
        told = json.loads(answer.body)
        results = told["results"]
        if any(self.changes.is_gone(each["key"], asked) for each in results):
            return "shows what was gone"
        scores = [each["score"] for each in results]
        if scores != sorted(scores, reverse=True) or not (scores or "offset" in question):
            return "scores out of order, or none"
        for name, value in question.items():
            if (
                isinstance(value, list)
                and name != "embedding"
                and any(each[name] not in value for each in results)
            ):
                return f"{name} against the filter"
        return self.changes.mixed(
            told["version"], told["samples"], [each["key"] for each in results]
        )


@contextmanager
def drawn_service(root: Path) -> Iterator[tuple[str, int]]:
    """Start a service over a drawn ROOT in a process of its own; yields its address and process
    id.
    """
    command = [sys.executable, "-m", "tests.benchmarks.search_load", "--serve", str(root)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        assert process.stdout
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.terminate()
        process.wait()


def serve(folder: Path, log_file: Path) -> None:
    """Serve a drawn ROOT as `unclip serve` does, its CLIP a function, until killed."""
    from flows.cli import serve as serve_command
    from indexing.service.app import run
    from indexing.service.state import Encoders, ServeConfig, Service
    from infra.storage.store import open_root

    def encoders(known: Any) -> Encoders:
        dim = json.loads((known.index.local_folder / "index.json").read_text())["dim"]

        def encode(seeds: list[int]) -> Any:
            return np.stack([np.random.default_rng(seed).normal(size=dim) for seed in seeds])

        return Encoders(
            known.fingerprint,
            lambda texts: encode([len(text) for text in texts]),
            lambda pictures: encode([int(pictures.sum())]),
            32,
        )

    serve_command.load_encoders = encoders
    service = Service(
        serve_command.parts_of(
            open_root(str(folder), for_writing=False),
            None,
            False,
            lambda line: print(line, file=sys.stderr),
        )
    )
    with log_file.open("w") as log:
        run(service, ServeConfig(port=0, rate=0), lambda address: print(address, flush=True), log)


def resident_mbytes(pid: int | None) -> dict[str, float]:
    """Return a process's own memory, and with the files that it has mapped; nothing where it is not
    known.
    """
    if pid is None:
        return {}
    told = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("Rss")
    )
    size = {name: int(text.split()[0]) / 1000 for name, text in told.items()}
    return {"own": round(size["RssAnon"]), "with_files": round(sum(size.values()))}


def load(base: str, pid: int | None, root: str | None, given: argparse.Namespace) -> dict[str, Any]:
    """Put the load on a service and return what came of it."""
    told = httpx.post(f"{base}/search", json={"embedding": [1.0]}).json()["detail"]
    dim = int(str(told).split()[-2])
    facets = httpx.get(f"{base}/facets", timeout=60).json()
    kinds = ("embedding",) if given.embedding_only else KINDS
    with Changes(root, dim, given.compact) as changes:
        keys = changes.keys or [
            each["key"]
            for each in httpx.post(f"{base}/search", json={"text": "a picture", "k": 100}).json()[
                "results"
            ]
        ]
        asker = Asker(kinds, keys, dim, facets, changes)

        asker.ask(
            base, given.clients, given.queries // 10, 1_000_000
        )  # a service that has just started reads its index from disk
        asker.times.clear()
        changes.start()
        memory, took = [resident_mbytes(pid)], 0.0
        for quarter in range(4):
            took += asker.ask(base, given.clients, given.queries // 4, quarter * given.clients)
            memory.append(resident_mbytes(pid))
    still_there = [
        key for key in changes.gone if httpx.get(f"{base}/sample/{key}").status_code != 404
    ]
    times = asker.times
    by_kind = {
        kind: {
            f"p{share}_ms": round(
                float(np.percentile([s for k, s, _ in times if k == kind], share)) * 1000, 2
            )
            for share in (50, 99)
        }
        for kind in kinds
        if any(k == kind for k, *_ in times)
    }
    result: dict[str, Any] = {
        "queries": len(times),
        "clients": given.clients,
        "per_second": round(len(times) / took, 1),
        "times": by_kind,
    }
    result |= {
        "wrong": sum(bool(what) for *_, what in times),
        "problems": sorted({what for *_, what in times if what}),
    }
    result |= {"removed": len(changes.gone), "still_there": still_there, **changes.told()}
    return result | {"memory_mbytes": memory}


def main() -> int:
    """Run the load, print what came of it, and return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", nargs="?")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument(
        "--embedding-only",
        action="store_true",
        help="ask by embedding alone, and change nothing meanwhile",
    )
    parser.add_argument(
        "--root", help="add to, take down from and swap runs of this ROOT meanwhile: use a copy"
    )
    parser.add_argument("--compact", action="store_true", help="compact ROOT meanwhile as well")
    parser.add_argument("--pid", type=int, help="process of the service, whose memory is told")
    parser.add_argument(
        "--drawn",
        metavar="ROWSxDIM",
        default=DRAWN,
        help="size of the drawn vectors of a service of its own",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        help="where the drawn ROOT is kept for another time; give a copy where it is changed",
    )
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.serve / "requests.log")
        return 0
    if given.base:
        result = load(given.base, given.pid, given.root, given)
    else:
        with tempfile.TemporaryDirectory() as folder:
            root = given.keep or Path(folder) / "root"
            make_root(root, *map(int, given.drawn.split("x")))
            with drawn_service(root) as (base, pid):
                result = {"drawn": given.drawn} | load(
                    base, pid, None if given.embedding_only else str(root), given
                )
    print(json.dumps(result))
    return 1 if result["wrong"] or result["still_there"] or result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
