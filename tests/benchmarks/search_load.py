"""Puts a running `unclip serve` under load: mixed queries from many clients, while samples are added and taken down if a ROOT is named.

    python -m tests.benchmarks.search_load http://127.0.0.1:8080 [--queries 10000] [--clients 32] [--embedding-only] [--root ROOT]

Prints one JSON object: requests a second, times by kind, errors, and answers that broke the order of scores. Start the service with
`--rate 0`: the limit is part of what is not measured.
"""

import argparse
import asyncio
import json
import random
import threading
import time
from typing import Any

import httpx
import numpy as np

WORDS = ("red", "blue", "heart", "face", "flag", "cat", "house", "smiling", "sun", "tree", "food", "square")


async def one_client(
    base: str, kinds: tuple[str, ...], keys: list[str], dim: int, count: int, seed: int, times: list[tuple[str, float, str]]
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
            started = time.perf_counter()
            answer = await client.post("/search", json=question)
            times.append((kind, time.perf_counter() - started, problem(kind, answer)))


def problem(kind: str, answer: httpx.Response) -> str:
    """Return what is wrong with an answer, or ""; a key may have been taken down meanwhile."""
    if answer.status_code == 404 and kind == "key":
        return ""
    if answer.status_code != 200:
        return f"status {answer.status_code}"
    scores = [each["score"] for each in answer.json()["results"]]
    return "" if scores == sorted(scores, reverse=True) and scores else "scores out of order, or none"


def take_down_now_and_then(uri: str, keys: list[str], stop: threading.Event, done: list[str]) -> None:
    """Write to the removal log of ROOT twice a second."""
    from infra import manifests
    from infra.removals import write_removal
    from infra.storage import open_root

    root = open_root(uri)
    for key in keys:
        if stop.wait(0.5):
            return
        write_removal(root, {"keys": [key], "origins": [], "sha256": [], "asked": {"benchmark": True}}, manifests.now())
        done.append(key)


def main() -> None:
    """Run the load and print what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", nargs="?")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--embedding-only", action="store_true")
    parser.add_argument("--root", help="take samples of this ROOT down meanwhile: use a copy")
    given = parser.parse_args()
    if given.base is None:
        print("skipped: name the address of a running service")
        return
    found = httpx.post(f"{given.base}/search", json={"text": "a picture", "k": 100}).json()["results"]
    keys = [each["key"] for each in found]
    told = httpx.post(f"{given.base}/search", json={"embedding": [1.0]}).json()["detail"]
    dim = int(str(told).split()[-2])
    stop, removed = threading.Event(), list[str]()
    remover = threading.Thread(target=take_down_now_and_then, args=(given.root, keys[50:], stop, removed))
    if given.root:
        remover.start()
    times: list[tuple[str, float, str]] = []
    kinds = ("embedding",) if given.embedding_only else ("text", "key", "embedding")

    async def everybody() -> None:
        share = given.queries // given.clients
        await asyncio.gather(*(one_client(given.base, kinds, keys, dim, share, seed, times) for seed in range(given.clients)))

    started = time.perf_counter()
    asyncio.run(everybody())
    took = time.perf_counter() - started
    stop.set()
    if given.root:
        remover.join()
    still_there = [key for key in removed if httpx.get(f"{given.base}/sample/{key}").status_code != 404]
    by_kind = {
        kind: {f"p{share}_ms": round(float(np.percentile([s for k, s, _ in times if k == kind], share)) * 1000, 2) for share in (50, 99)}
        for kind in kinds
    }
    problems = sorted({what for _, _, what in times if what})
    result = {"queries": len(times), "clients": given.clients, "per_second": round(len(times) / took, 1), "times": by_kind}
    print(
        json.dumps(
            result | {"wrong": sum(bool(w) for *_, w in times), "problems": problems, "removed": len(removed), "still_there": still_there}
        )
    )


if __name__ == "__main__":
    main()
