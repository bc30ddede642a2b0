"""A ROOT with a committed run of the drawn pictures: ingest, curate, clip, embed and index as the
stages write them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import faiss
import pyarrow as pa
import pyarrow.parquet as pq

from infra.schemas import DROPPED, KEEP, URLS
from infra.storage import commits, manifests, store
from infra.storage.manifests import Committed
from infra.storage.stage_files import pinned_copy
from infra.storage.store import Root, open_root
from tests.helpers.evaluation_run import usual_rows, write_run


def write_root(folder: Path, rows: list[dict[str, Any]] | None = None, uri: str = "") -> Root:
    """Write and commit the run `drawn` of these rows, into `folder`/root or the store at `uri`."""
    from indexing.ann.index import IndexConfig, build

    faiss.omp_set_num_threads(1)
    drawn = folder / "drawn"
    write_run(drawn, rows or usual_rows())
    root = open_root(uri or str(folder / "root"), folder / "scratch" if uri else None)
    table = pq.read_table(drawn / "embed" / "metadata" / "metadata_0000.parquet")
    urls = [f"https://cdn.example.org/{number}" for number in range(len(table))]
    ingest = folder / "out"
    (ingest / "shards").mkdir(parents=True)
    (drawn / "shards" / "00000.tar").rename(ingest / "shards" / "00000.tar")
    items = table.select(
        ["origin", "caption", "captions", "licence", "concept", "style", "category", "subcategory"]
    )
    keys = pa.array([member.partition(".")[0] for member in table["member"].to_pylist()])
    shard = (
        items.append_column("sample", table["key"])
        .append_column("url", pa.array(urls))
        .append_column("key", keys)
    )
    for name in ("original_width", "original_height"):
        shard = shard.append_column(name, table["width_px"])
    shard = shard.append_column(
        "sha256",
        pa.array(
            [
                hashlib.sha256(f"got {each}".encode()).hexdigest()
                for each in table["sha256"].to_pylist()
            ]
        ),
    )
    pq.write_table(
        shard.append_column("status", pa.array(["success"] * len(table))),
        ingest / "shards" / "00000.parquet",
    )
    pq.write_table(
        items.append_column("key", table["key"])
        .append_column("url", pa.array(urls))
        .select(URLS.names)
        .cast(URLS),
        ingest / "urls.parquet",
    )
    pq.write_table(pa.Table.from_pylist([], DROPPED), ingest / "dropped.parquet")
    made: dict[str, Committed] = {}

    def commit(stage: str, out: Path, inputs: tuple[str, ...], sections: dict[str, Any]) -> None:
        facts = {
            "stage_version": 1,
            "config": {},
            "sections": sections,
            "inputs": {name: made[name].key for name in inputs},
            "input_digests": {name: made[name].digest for name in inputs},
            "counts": {"in": 1, "out": 1, "dropped": {}},
            "started": manifests.now(),
        }
        made[stage] = commits.commit(root, stage, f"{stage}0123456789", out, facts)

    commit("ingest", ingest, (), {})
    curate = _made(folder / "out")
    pq.write_table(table.cast(KEEP), curate / "keep.parquet")
    pq.write_table(pa.Table.from_pylist([], DROPPED), curate / "dropped.parquet")
    commit("curate", curate, ("ingest",), {})
    clip = _made(folder / "out")
    (clip / "weights.safetensors").write_bytes(b"weights")
    commit("clip", clip, ("ingest", "curate"), {})
    commit("embed", drawn / "embed", ("ingest", "curate", "clip"), {})
    section = IndexConfig(factory="Flat", queries=4)
    index = _made(folder / "out")
    build(section, pinned_copy(made["embed"].files), index)
    commit("index", index, ("embed",), {"index": section.model_dump(mode="json")})
    record = {
        "name": "drawn",
        "recipe": "drawn",
        "started": manifests.now(),
        "finished": manifests.now(),
        "gated": False,
    }
    store.write_json(
        root,
        "runs/drawn.json",
        record | {"stages": {stage: each.key for stage, each in made.items()}, "report": None},
    )
    return root


def committed(root: Root, stage: str) -> Committed:
    """Return the folder of a stage as it is now."""
    found = manifests.find(root, stage, f"{stage}0123456789")
    assert found
    return found


def index_facts(root: Root) -> dict[str, Any]:
    """Return index.json."""
    return dict(
        json.loads((pinned_copy(committed(root, "index").files) / "index.json").read_text())
    )


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
