"""Merge the additions to a run's index into one, because a query searches every addition's index.

Reuses the embeddings and builds only the index again; shards keep their content and get new names.
The merged addition takes effect when it is committed and lists the additions that it replaces
(`merged_from`), so no sample is found twice or missing while the old folders are removed. If a
merge is killed before that, the next one removes them.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import flows.live_index.additions as additions
from flows.live_index.leftovers import remove_leftovers
from flows.live_index.lineage import ADDITIONS, index_config, lineage, merged_away
from infra.storage import manifests, store
from infra.storage.atomic_files import link_or_copy
from infra.storage.locks import lock_file, reading_file, unread_lock, writer_lock
from infra.storage.manifest_schema import MANIFEST
from infra.storage.manifests import Committed
from infra.storage.store import Root
from infra.storage.temporary_folders import writing_folder

VECTORS = ("img_emb", "text_emb")


def merge(root: Root, run: str | None, say: Callable[[str], None]) -> tuple[Committed | None, int]:
    """Merge the additions of a run's index; return the merged addition and how many went into it.

    With fewer than two additions nothing is merged, and the result is (None, count). Removed
    samples stay hidden; compaction removes them from the merged addition. Waits, and reports it
    through `say`, while another process on this machine compacts or reads an addition. Raises
    CallerError if the run has no index.
    """
    remove_leftovers(root)
    with ExitStack() as held:
        for key in sorted(store.list_names(root, ADDITIONS)):
            name = f"{ADDITIONS}/{key}"
            held.enter_context(store.one_line_errors(root.scratch))
            held.enter_context(writer_lock(lock_file(root.scratch, ADDITIONS, key), name, say))
            held.enter_context(unread_lock(reading_file(root.scratch, ADDITIONS, key), name, say))
        clear(root)
        run_lineage = lineage(root, run)
        old = run_lineage.additions
        if len(old) < 2:
            return None, len(old)
        with writing_folder(root.scratch, f"{ADDITIONS}-merge") as out, ExitStack() as copies:
            keys = gather(
                [copies.enter_context(addition.files.local_copy()) for addition in old],
                out,
                run_lineage.fingerprint,
                run_lineage.clip.key,
            )
            memory_bytes = min(
                index_config(run_lineage.index).memory_bytes,
                sum(index_config(addition).memory_bytes for addition in old),
            )
            merged = additions.commit(
                root,
                run_lineage,
                out,
                keys,
                memory_bytes,
                {},
                {"merged_from": [addition.digest for addition in old]},
            )
        clear(root)
    manifests.forget_downloads(root)
    return merged, len(old)


def gather(folders: Sequence[Path], out: Path, fingerprint: str, clip_key: str) -> list[str]:
    """Combine the embed folders and shards of additions in `out`; return the sample keys in order.

    Files are hard-linked where possible, else copied.
    """
    for name in (*VECTORS, "metadata", "shards"):
        (out / name).mkdir(parents=True)
    keys: list[str] = []
    parts = shards = dim = 0
    for folder in folders:
        dim = json.loads((folder / "facts.json").read_text())["dim"]
        renamed = {"": ""}  # a sample that was added as an embedding has no image
        for shard in sorted((folder / "shards").glob("*.tar")):
            renamed[shard.name] = f"{shards:05d}.tar"
            link_or_copy(shard, out / "shards" / renamed[shard.name])
            shards += 1
        for metadata, *vectors in zip(
            *(sorted((folder / name).iterdir()) for name in ("metadata", *VECTORS)), strict=True
        ):
            table = pq.read_table(metadata)
            column = pa.array([renamed[shard] for shard in table["shard"].to_pylist()], pa.string())
            table = table.set_column(table.column_names.index("shard"), "shard", column)
            pq.write_table(table, out / "metadata" / f"metadata_{parts:04d}.parquet")
            for name, file in zip(VECTORS, vectors, strict=True):
                link_or_copy(file, out / name / f"{name}_{parts:04d}.npy")
            keys += table["key"].to_pylist()
            parts += 1
    facts = {"clip_key": clip_key, "clip_digest": fingerprint, "dim": dim, "count": len(keys)}
    (out / "facts.json").write_text(json.dumps(facts, indent=1))
    return keys


def clear(root: Root) -> None:
    """Remove the additions that a merged one has replaced, their manifests first."""
    for addition in merged_away(root):
        store.remove(root, f"{ADDITIONS}/{addition.key}/{MANIFEST}")
        store.remove(root, f"{ADDITIONS}/{addition.key}")
