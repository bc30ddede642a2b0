"""What changes a ROOT while `search_load` asks: take-downs, additions and their merging, runs that
are promoted in turn, compaction.

Keeps the times of all of it, so that an answer can be held against what was in force. `make_root`
writes a ROOT of drawn vectors.
"""

import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.live_index import additions, lineage, merge
from flows.live_index.compaction import compact
from flows.runs.record_schema import CURRENT
from flows.runs.records import find_run
from indexing.ann.index import IndexConfig, build
from indexing.data.embedding_store import open_parts, read_metadata
from infra.schemas import EMBEDDED
from infra.storage import commits, manifests, store
from infra.storage.manifests import Committed
from infra.storage.removal_log import write_removal
from infra.storage.stage_files import pinned_copy
from infra.storage.store import Root, open_root

KEYS = 200
ROUND_S = 0.5
RUN = "search-load"
LICENCES = ("CC0", "CC-BY", "MIT")


class Changes:
    """Context manager: changes ROOT from `start` to its end; without a ROOT it changes nothing and
    knows nothing.
    """

    def __init__(self, uri: str | None, dim: int, compacts: bool) -> None:
        """Make the second run, half of the first, and choose the samples that are asked for; every
        other one of them goes.
        """
        self.dim, self.compacts = dim, compacts
        self.root = open_root(uri) if uri else None
        self.keys: list[str] = []
        self.going: dict[str, float] = {}
        self.gone: dict[str, float] = {}
        self.added: set[str] = set()
        self.counts = {"added": 0, "merged": 0, "swapped": 0, "compacted": 0}
        self.failures: list[str] = []
        self.versions: dict[str, int] = {}
        self._half: frozenset[str] = frozenset()
        self._whole: frozenset[str] = frozenset()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        if self.root:
            self._before = store.read_json(self.root, CURRENT)
            self._first = find_run(self.root)
            view, _ = lineage.open_view(self.root, None)
            self._whole = frozenset(
                key for segment in view.segments for key in segment.index.column("key").to_pylist()
            )
            self._second, self._half = second_run(self.root, self._first)
            there = sorted(key for key in self._half if view.find_key(key))
            self.keys = there[:: max(1, len(there) // KEYS)][:KEYS]

    def start(self) -> None:
        """Begin."""
        if self.root:
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join()
        if self.root:
            store.remove(self.root, f"runs/{RUN}.json")
            store.write_json(self.root, CURRENT, self._before) if self._before else store.remove(
                self.root, CURRENT
            )

    def may_be_gone(self, key: str, answered: float) -> bool:
        """Say whether a sample's take-down had begun when an answer came."""
        return self.going.get(key, answered) < answered

    def is_gone(self, key: str, asked: float) -> bool:
        """Say whether a sample had been taken down before a question was asked."""
        return self.gone.get(key, asked) < asked

    def mixed(self, version: str, samples: int, keys: Sequence[str]) -> str:
        """Say how an answer is not of the version that it names, or ""."""
        if self.versions.setdefault(version, samples) != samples:
            return "two counts of samples in one version"
        is_half = samples <= len(self._half) + len(self.added)
        known = self._half if is_half else self._whole
        return (
            ""
            if not self.root or all(key in known or key in self.added for key in keys)
            else "a sample that its version does not know"
        )

    def told(self) -> dict[str, Any]:
        """Return what was done, for people."""
        return {**self.counts, "versions": len(self.versions), "failures": self.failures}

    def _work(self) -> None:
        assert self.root
        leaving = iter(self.keys[1::2])
        number = 0
        while not self._stop.wait(ROUND_S):
            number += 1
            try:
                key = next(leaving, None)
                if key:
                    self.going[key] = time.monotonic()
                    write_removal(
                        self.root,
                        {"keys": [key], "origins": [], "sha256": [], "asked": {"benchmark": True}},
                        manifests.now(),
                    )
                    self.gone[key] = time.monotonic()
                if number % 4 == 2:
                    self._add(number)
                if number % 16 == 15:
                    self.counts["merged"] += merge.merge(self.root, None, lambda _: None)[1]
                if number % 8 == 0:
                    record = self._second if self.counts["swapped"] % 2 == 0 else self._first
                    store.write_json(self.root, CURRENT, {**record, "promoted_at": manifests.now()})
                    self.counts["swapped"] += 1
                if self.compacts and number % 40 == 20:
                    self.counts["compacted"] += len(compact(self.root, lambda _: None))
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                return

    def _add(self, number: int) -> None:
        assert self.root
        view, known = lineage.open_view(self.root, None)
        with tempfile.TemporaryDirectory() as folder:
            keys = write_drawn(
                Path(folder), 20, self.dim, f"added-{time.time_ns()}-", known.fingerprint, number
            )
            self.added.update(keys)
            additions.add(self.root, known, view, Path(folder), "")
        self.counts["added"] += 1


def second_run(root: Root, first: dict[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Commit an index over the first half of a run's embeddings, as another run; return its record
    and the keys in it.
    """
    known = lineage.lineage(root, first["name"])
    embed = manifests.find(root, "embed", first["stages"]["embed"])
    assert embed
    facts = json.loads((pinned_copy(embed.files) / "facts.json").read_text())
    count = facts["count"] // 2
    out = root.scratch / "aside" / f"{RUN}-{time.time_ns()}"
    folder = pinned_copy(embed.files)
    for name in ("img_emb", "text_emb"):
        parts = np.concatenate(open_parts(folder / name, facts["count"], facts["dim"]))
        (out / name).mkdir(parents=True)
        np.save(out / name / f"{name}_0000.npy", parts[:count])
    table = read_metadata(
        pinned_copy(embed.files) / "metadata", EMBEDDED.names, facts["count"]
    ).slice(0, count)
    (out / "metadata").mkdir()
    pq.write_table(table, out / "metadata" / "metadata_0000.parquet")
    (out / "facts.json").write_text(json.dumps(facts | {"count": count}))
    name = f"{RUN}-{time.time_ns():x}"
    section = IndexConfig.model_validate(known.index.manifest["sections"]["index"])
    inputs = {each: embed.manifest[each] for each in ("inputs", "input_digests")}
    half = commits.commit(root, "embed", name, out, facts_of(count, {}) | inputs)
    index = commit_index(root, name, half, section)
    record = {
        **first,
        "name": RUN,
        "stages": {**first["stages"], "embed": half.key, "index": index.key},
        "finished": manifests.now(),
    }
    store.write_json(root, f"runs/{RUN}.json", record | {"gated": True})
    return record, frozenset(table["key"].to_pylist())


def commit_index(root: Root, key: str, embed: Committed, section: IndexConfig) -> Committed:
    """Build and commit the index of an embed folder."""
    out = root.scratch / "aside" / f"index-{time.time_ns()}"
    out.mkdir(parents=True)
    build(section, pinned_copy(embed.files), out)
    made_from = {"inputs": {"embed": embed.key}, "input_digests": {"embed": embed.digest}}
    counts = facts_of(embed.manifest["counts"]["out"], {"index": section.model_dump(mode="json")})
    return commits.commit(root, "index", key, out, counts | made_from)


def facts_of(count: int, sections: dict[str, Any]) -> dict[str, Any]:
    """Return what a manifest says beside its files."""
    counts = {"in": count, "out": count, "dropped": {}}
    return {
        "stage_version": 1,
        "sections": sections,
        "counts": counts,
        "inputs": {},
        "input_digests": {},
        "config": {},
        "started": manifests.now(),
    }


def make_root(folder: Path, rows: int, dim: int) -> None:
    """Write a ROOT whose run is drawn vectors, unless there is one already."""
    if (folder / "runs" / "drawn.json").exists():
        return
    root = open_root(str(folder))
    made: dict[str, Committed] = {}
    for stage in ("ingest", "clip"):
        out = root.scratch / "aside" / stage
        out.mkdir(parents=True)
        (out / "drawn.txt").write_text(f"{rows} x {dim}\n")
        made[stage] = commits.commit(root, stage, f"{stage}-drawn", out, facts_of(0, {}))
    out = root.scratch / "aside" / "embed"
    write_drawn(out, rows, dim, "drawn-", made["clip"].digest, 0)
    inputs = {"inputs": {"clip": made["clip"].key}, "input_digests": {"clip": made["clip"].digest}}
    made["embed"] = commits.commit(root, "embed", "embed-drawn", out, facts_of(rows, {}) | inputs)
    made["index"] = commit_index(root, "index-drawn", made["embed"], IndexConfig())
    stages = {stage: each.key for stage, each in made.items()}
    record = {
        "name": "drawn",
        "recipe": "drawn",
        "started": manifests.now(),
        "finished": manifests.now(),
        "report": None,
        "gated": False,
    }
    store.write_json(root, "runs/drawn.json", record | {"stages": stages})


def write_drawn(folder: Path, rows: int, dim: int, prefix: str, clip: str, seed: int) -> list[str]:
    """Write an embed folder of clustered vectors and return the keys."""
    from tests.benchmarks.index_vs_autofaiss import drawn

    vectors = drawn("clustered", rows, rows, dim, seed).astype(np.float16)
    for name in ("img_emb", "text_emb"):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / f"{name}_0000.npy", vectors)
    texts = {
        "key": "{}",
        "origin": "https://example.org/{}.png",
        "caption": "picture {}",
        "split": "train",
    }
    columns = {
        name: pa.array([text.format(f"{prefix}{row}") for row in range(rows)])
        for name, text in texts.items()
    }
    columns["licence"] = pa.array([LICENCES[row % len(LICENCES)] for row in range(rows)])
    columns["sha256"] = pa.array(
        [hashlib.sha256(f"{prefix}{row}".encode()).hexdigest() for row in range(rows)]
    )
    columns["captions"] = pa.ListArray.from_arrays(
        np.arange(rows + 1, dtype=np.int32), columns["caption"]
    )
    for field in EMBEDDED:
        if field.name not in columns:
            columns[field.name] = pa.array(["" if pa.types.is_string(field.type) else 64] * rows)
    table = pa.table(
        {field.name: pc.cast(columns[field.name], field.type) for field in EMBEDDED},
        schema=EMBEDDED,
    )
    (folder / "metadata").mkdir()
    pq.write_table(table, folder / "metadata" / "metadata_0000.parquet")
    (folder / "facts.json").write_text(
        json.dumps({"clip_key": clip, "clip_digest": clip, "dim": dim, "count": rows})
    )
    keys: list[str] = columns["key"].to_pylist()
    return keys
