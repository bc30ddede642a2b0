"""Makes one addition of many: every addition has an index of its own, and a query looks into each.

The vectors are those that were embedded, only the index over them is built anew; pictures stay in the shards that they came in, under
other names. The merged addition counts from the moment of its commit, and names what it takes the place of (`merged_from`), so that
nothing is found twice or missing while the old folders go, nor where a kill leaves them: the next merge clears them.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import flows.live_index.additions as additions
from flows.live_index.leftovers import remove_leftovers
from flows.live_index.lineage import ADDITIONS, lineage, merged_away
from infra.storage import manifests, store
from infra.storage.atomic_files import place
from infra.storage.locks import lock_file, reading_file, unread_lock, writer_lock
from infra.storage.manifests import MANIFEST, Committed
from infra.storage.store import Root
from infra.storage.temporary_folders import writing_folder

VECTORS = ("img_emb", "text_emb")


def merge(root: Root, run: str | None, say: Callable[[str], None]) -> tuple[Committed | None, int]:
    """Make one addition of those that a run's index is searched with; return it and of how many it was made.

    Where there are fewer than two, nothing is made: (None, how many there are). What was taken down stays unseen, and is compacted from
    there. Waits, and says so, for whoever compacts or reads an addition on this machine. Raises CallerError where the run has no index.
    """
    remove_leftovers(root)
    with ExitStack() as held:
        for key in sorted(store.list_names(root, ADDITIONS)):
            name = f"{ADDITIONS}/{key}"
            held.enter_context(store.one_line_errors(root.scratch))
            held.enter_context(writer_lock(lock_file(root.scratch, ADDITIONS, key), name, say))
            held.enter_context(unread_lock(reading_file(root.scratch, ADDITIONS, key), name, say))
        clear(root)
        known = lineage(root, run)
        old = known.additions
        if len(old) < 2:
            return None, len(old)
        with writing_folder(root.scratch, f"{ADDITIONS}-merge") as out:
            keys = gather([each.local() for each in old], out, known.fingerprint, known.clip.key)
            whole = known.index.manifest["sections"]["index"]["memory_bytes"]
            memory_bytes = min(
                whole, sum(each.manifest["sections"]["index"]["memory_bytes"] for each in old)
            )
            merged = additions.commit(
                root,
                known,
                out,
                keys,
                memory_bytes,
                {},
                {"merged_from": [each.digest for each in old]},
            )
        clear(root)
    manifests.forget_downloads(root)
    return merged, len(old)


def gather(folders: Sequence[Path], out: Path, fingerprint: str, clip_key: str) -> list[str]:
    """Put the embed folders and shards of additions into one, files linked where they can be; return the keys of its samples, in order."""
    for name in (*VECTORS, "metadata", "shards"):
        (out / name).mkdir(parents=True)
    keys: list[str] = []
    parts = shards = dim = 0
    for folder in folders:
        dim = json.loads((folder / "facts.json").read_text())["dim"]
        renamed = {"": ""}  # a sample that came as an embedding has no picture
        for shard in sorted((folder / "shards").glob("*.tar")):
            renamed[shard.name] = f"{shards:05d}.tar"
            place(shard, out / "shards" / renamed[shard.name])
            shards += 1
        for metadata, *vectors in zip(
            *(sorted((folder / name).iterdir()) for name in ("metadata", *VECTORS)), strict=True
        ):
            table = pq.read_table(metadata)
            column = pa.array([renamed[shard] for shard in table["shard"].to_pylist()], pa.string())
            table = table.set_column(table.column_names.index("shard"), "shard", column)
            pq.write_table(table, out / "metadata" / f"metadata_{parts:04d}.parquet")
            for name, file in zip(VECTORS, vectors, strict=True):
                place(file, out / name / f"{name}_{parts:04d}.npy")
            keys += table["key"].to_pylist()
            parts += 1
    facts = {"clip_key": clip_key, "clip_digest": fingerprint, "dim": dim, "count": len(keys)}
    (out / "facts.json").write_text(json.dumps(facts, indent=1))
    return keys


def clear(root: Root) -> None:
    """Remove the additions that a merged one has taken the place of, their manifests first."""
    for each in merged_away(root):
        store.remove(root, f"{ADDITIONS}/{each.key}/{MANIFEST}")
        store.remove(root, f"{ADDITIONS}/{each.key}")
