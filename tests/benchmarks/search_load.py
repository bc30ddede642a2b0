"""Puts a running `unclip serve` under load: mixed queries from many clients, while samples come and go if a ROOT is named.

    python -m tests.benchmarks.search_load http://127.0.0.1:8080 [--queries 10000] [--clients 32] [--root ROOT] [--pid PID]
    python -m tests.benchmarks.search_load --drawn 1000000x512 --clients 4 --embedding-only

Prints one JSON object: requests a second, times by kind, wrong answers, and the service's memory where its process is known. An answer is
wrong whose scores are out of order or that shows what had been taken down before it was asked for. With --root (use a copy) a sample is
taken down twice a second and others are added every second, so that the service swaps versions all the while. --drawn starts a service of
its own over drawn vectors, in a folder that --keep names for the next time. Start others with `--rate 0`: the limit is not measured.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.tables import EMBEDDED

WORDS = ("red", "blue", "heart", "face", "flag", "cat", "house", "smiling", "sun", "tree", "food", "square")
Times = list[tuple[str, float, str]]


async def one_client(
    base: str, kinds: tuple[str, ...], keys: list[str], dim: int, count: int, seed: int, times: Times, gone: dict[str, float]
) -> None:
    """Ask `count` questions one after the other; append (kind, seconds, problem or "") of each."""
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=base, timeout=60) as client:
        for _ in range(count):
            kind = rng.choice(kinds)
            question: dict[str, Any] = {"k": rng.choice((5, 10, 24))}
            if kind == "text":
                question["text"] = " ".join(rng.choices(WORDS, k=rng.randint(1, 3)))
            elif kind == "key":
                question["key"] = rng.choice(keys)
            else:
                question["embedding"] = np.random.default_rng(rng.getrandbits(32)).normal(size=dim).round(5).tolist()
            body = json.dumps(question).encode()
            started = time.perf_counter()
            answer = await client.post("/search", content=body, headers={"content-type": "application/json"})
            times.append((kind, time.perf_counter() - started, problem(kind, answer, started, gone)))


def problem(kind: str, answer: httpx.Response, asked: float, gone: dict[str, float]) -> str:
    """Return what is wrong with an answer, or ""; a key may have been taken down meanwhile."""
    if answer.status_code == 404 and kind == "key":
        return ""
    if answer.status_code != 200:
        return f"status {answer.status_code}"
    results = answer.json()["results"]
    if any(gone.get(each["key"], asked) < asked for each in results):
        return "shows what was gone"
    scores = [each["score"] for each in results]
    return "" if scores == sorted(scores, reverse=True) and scores else "scores out of order, or none"


def change(uri: str, keys: list[str], dim: int, stop: threading.Event, gone: dict[str, float], added: list[str]) -> None:
    """Take samples of ROOT down, twice a second, and add others by their embeddings, every second."""
    from flows import adding, living
    from infra import manifests
    from infra.removals import write_removal
    from infra.storage import open_root

    root = open_root(uri)
    view, known = living.open_view(root, None)
    for number, key in enumerate(keys):
        if stop.wait(0.5):
            return
        write_removal(root, {"keys": [key], "origins": [], "sha256": [], "asked": {"benchmark": True}}, manifests.now())
        gone[key] = time.perf_counter()
        if number % 2:
            with tempfile.TemporaryDirectory() as folder:
                write_drawn(Path(folder), 20, dim, f"added{time.time_ns()}-", known.fingerprint)
                committed, _ = adding.add(root, known, view, Path(folder), "")
                added.append(committed.key if committed else "")


def write_drawn(folder: Path, rows: int, dim: int, prefix: str, clip: str) -> None:
    """Write an embed folder of clustered vectors."""
    from tests.benchmarks.index_vs_autofaiss import drawn

    vectors = drawn("clustered", rows, rows, dim, 0).astype(np.float16)
    for name in ("img_emb", "text_emb"):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / f"{name}_0000.npy", vectors)
    texts = {"key": "{}", "origin": "https://example.org/{}.png", "caption": "picture {}", "licence": "CC0", "split": "train"}
    columns = {name: pa.array([text.format(f"{prefix}{row}") for row in range(rows)]) for name, text in texts.items()}
    columns["sha256"] = pa.array([hashlib.sha256(f"{prefix}{row}".encode()).hexdigest() for row in range(rows)])
    columns["captions"] = pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32), columns["caption"])
    for field in EMBEDDED:
        if field.name not in columns:
            columns[field.name] = pa.array(["" if pa.types.is_string(field.type) else 64] * rows)
    table = pa.table({field.name: columns[field.name].cast(field.type) for field in EMBEDDED}, schema=EMBEDDED)
    (folder / "metadata").mkdir()
    pq.write_table(table, folder / "metadata" / "metadata_0000.parquet")
    (folder / "facts.json").write_text(json.dumps({"clip_key": clip, "clip_digest": clip, "dim": dim, "count": rows}))


def serve_drawn(folder: Path, rows: int, dim: int) -> None:
    """Serve drawn vectors until killed; the index is built where the folder has none."""
    from indexing.app import run
    from indexing.index import Index, IndexConfig, build
    from indexing.service import Encoders, Parts, ServeConfig, Service
    from indexing.view import Segment
    from infra.removals import Removals

    if not (folder / "index" / "index.json").exists():
        if not (folder / "embed").exists():
            write_drawn(folder / "embed", rows, dim, "drawn", "drawn")
        (folder / "index").mkdir(exist_ok=True)
        build(IndexConfig(), folder / "embed", folder / "index")

    def encode(texts: list[str]) -> Any:
        return np.stack([np.random.default_rng(len(text)).normal(size=dim) for text in texts])

    index = Index.open(folder / "index")
    parts = Parts(
        name="drawn",
        removals_stamp=lambda: 0,
        read_removals=Removals,
        segments_stamp=lambda: 0,
        open_segments=lambda: ([Segment(index, folder)], Encoders("drawn", encode, lambda pictures: encode(["a"] * len(pictures)), 8)),
        fetch=None,
        report=print,
    )
    config = ServeConfig(port=0, rate=0)
    with (folder / "requests.log").open("w") as log:
        run(Service(parts), config, lambda address: print(address, flush=True), log)


@contextmanager
def drawn_service(folder: Path, size: str) -> Iterator[tuple[str, int]]:
    """Start a service over drawn vectors in a process of its own; yields its address and process id."""
    command = [sys.executable, "-m", "tests.benchmarks.search_load", "--serve", str(folder), "--drawn", size]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.terminate()
        process.wait()


def resident_mbytes(pid: int) -> dict[str, float]:
    """Return a process's own memory, and with the files that it has mapped."""
    told = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Rss"))
    size = {name: int(text.split()[0]) / 1000 for name, text in told.items()}
    return {"own": round(size["RssAnon"]), "with_files": round(sum(size.values()))}


def main() -> None:
    """Run the load and print what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", nargs="?")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--embedding-only", action="store_true")
    parser.add_argument("--root", help="add to and take down from this ROOT meanwhile: use a copy")
    parser.add_argument("--pid", type=int, help="process of the service, whose memory is told")
    parser.add_argument("--drawn", metavar="ROWSxDIM", help="start a service over drawn vectors")
    parser.add_argument("--keep", type=Path, help="where --drawn keeps its index")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve_drawn(given.serve, *map(int, given.drawn.split("x")))
    elif given.drawn:
        with tempfile.TemporaryDirectory() as folder, drawn_service(given.keep or Path(folder), given.drawn) as (base, pid):
            load(base, pid, given)
    elif given.base:
        load(given.base, given.pid, given)
    else:
        print("skipped: name the address of a running service")


def load(base: str, pid: int | None, given: argparse.Namespace) -> None:
    """Put the load on a service and print what came of it."""
    found = httpx.post(f"{base}/search", json={"text": "a picture", "k": 100}).json()["results"]
    keys = [each["key"] for each in found]
    told = httpx.post(f"{base}/search", json={"embedding": [1.0]}).json()["detail"]
    dim = int(str(told).split()[-2])
    stop, gone, added = threading.Event(), dict[str, float](), list[str]()
    changer = threading.Thread(target=change, args=(given.root, keys[50:], dim, stop, gone, added))
    times: Times = []
    kinds = ("embedding",) if given.embedding_only else ("text", "key", "embedding")
    memory = []

    async def everybody(count: int, first: int) -> None:
        share = count // given.clients
        await asyncio.gather(*(one_client(base, kinds, keys, dim, share, first + n, times, gone) for n in range(given.clients)))

    asyncio.run(everybody(given.queries // 10, 1_000_000))  # a service that has just started reads its index from disk
    times.clear()
    if given.root:
        changer.start()
    took = 0.0
    for quarter in range(4):
        memory.append(resident_mbytes(pid) if pid else {})
        started = time.perf_counter()
        asyncio.run(everybody(given.queries // 4, quarter * given.clients))
        took += time.perf_counter() - started
    memory.append(resident_mbytes(pid) if pid else {})
    stop.set()
    if given.root:
        changer.join()
    still_there = [key for key in gone if httpx.get(f"{base}/sample/{key}").status_code != 404]
    by_kind = {
        kind: {f"p{share}_ms": round(float(np.percentile([s for k, s, _ in times if k == kind], share)) * 1000, 2) for share in (50, 99)}
        for kind in kinds
    }
    result = {"queries": len(times), "clients": given.clients, "per_second": round(len(times) / took, 1), "times": by_kind}
    result |= {"wrong": sum(bool(w) for *_, w in times), "problems": sorted({what for _, _, what in times if what})}
    result |= {"removed": len(gone), "still_there": still_there, "added": len(added), "memory_mbytes": memory}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
