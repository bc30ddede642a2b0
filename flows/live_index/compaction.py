"""Compaction: remove the samples named in the removal log from all committed folders.

Rewrites shards, keep lists, embeddings, indexes and additions without the removed rows, and commits
each folder under its old key; readers see either the old folder or the new one. Compaction waits
for stages that read a folder. If ROOT is a store, this machine's downloads are deleted as well.
Manifests from ingest to index are updated to match, so nothing is downloaded again; models see
changed inputs, so the next run trains them again.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.live_index.leftovers import remove_leftovers
from flows.live_index.lineage import index_config
from flows.live_index.takedown import (
    NO_STAGES,
    blank,
    committed_folders,
    log,
    pending,
    record_lineage,
    with_copies,
)
from infra.errors import StorageError
from infra.schemas import DOWNLOAD_SHA256, DROPPED, MEMBER_KEY, STORED_SHA256, shard_rows
from infra.storage import commits, manifests, store
from infra.storage.atomic_files import link_or_copy, make_independent
from infra.storage.locks import lock_file, reading_file, unread_lock, writer_lock
from infra.storage.manifest_schema import MANIFEST, MANIFESTS, Manifest, StageFacts
from infra.storage.manifests import Committed
from infra.storage.removal_log import Removals, read_removals
from infra.storage.store import Root
from infra.storage.temporary_folders import writing_folder

COMMIT_FIELDS = (
    "files",
    "digest",
    "packages",
    "attempt",
    "prefix",
    "supersedes",
    "finished",
    "stage",
    "key",
)


def compact(root: Root, say: Callable[[str], None]) -> dict[str, int]:
    """Remove everything that the log names from ROOT; return the number of removed rows by folder.

    Does nothing if no folder holds a removed sample. Waits, and reports it through `say`, while a
    run on this machine writes or reads a folder that must change.
    """
    for stage, key in commits.interrupted(root):
        with (
            store.one_line_errors(root.scratch),
            writer_lock(lock_file(root.scratch, stage, key), f"{stage} {key}", say),
        ):
            commits.recover(root, stage, key)
    remove_leftovers(root)
    logged = read_removals(root)
    removals = with_copies(root, logged) if logged else logged
    if removals != logged:
        log(root, removals - logged, {"copies": "equal pictures that came after the take-down"})
    removed_counts: dict[str, int] = {}
    for committed in pending(root, removals):
        name = f"{committed.stage}/{committed.key}"
        lock = lock_file(root.scratch, committed.stage, committed.key)
        being_read = reading_file(root.scratch, committed.stage, committed.key)
        with (
            store.one_line_errors(root.scratch),
            writer_lock(lock, name, say),
            unread_lock(being_read, name, say),
        ):
            # Another process may have rewritten the folder while we waited for the lock.
            now = manifests.find(root, committed.stage, committed.key)
            if now is not None and pending(root, removals, [now]):
                removed_counts[name] = _replace(root, now, removals)
    if removals:
        _agree(root)
        manifests.forget_downloads(root)  # copies of the same bytes
    return removed_counts


def _replace(root: Root, committed: Committed, removals: Removals) -> int:
    if committed.stage == "curate":
        record_lineage(root, committed, removals)
    with writing_folder(root.scratch, f"{committed.stage}-{committed.key}-compact") as out:
        with committed.files.local_copy() as folder:
            count = COMPACTORS[committed.stage](folder, out, removals, committed)
        manifest = committed.manifest
        fields = {name: value for name, value in manifest.items() if name not in COMMIT_FIELDS}
        facts = cast(StageFacts, fields)
        facts["compacted_from"] = [*manifest.get("compacted_from", ()), manifest["digest"]]
        facts["compacted"] = manifests.now()
        if any(out.iterdir()):
            commits.commit(root, committed.stage, committed.key, out, facts, manifest["attempt"])
        else:
            store.remove(root, f"{committed.stage}/{committed.key}")
    return count


def _agree(root: Root) -> None:
    """Update the input digests of manifests whose inputs were compacted, where still correct.

    That is the case for folders that were compacted together with their inputs. Other stages read
    shards only through keep lists, so blanked shards are unchanged for them unless the keep list
    has changed as well.
    """
    stages = [stage for stage in store.list_names(root, "") if stage not in NO_STAGES]
    for committed in committed_folders(root, stages):
        digests = dict(committed.manifest.get("input_digests", {}))
        for stage, key in committed.manifest["inputs"].items():
            now = manifests.find(root, stage, key)
            is_same = committed.stage in COMPACTORS or stage == "ingest"
            if (
                now is not None
                and is_same
                and digests.get(stage) in now.manifest.get("compacted_from", ())
            ):
                digests[stage] = now.digest
        if digests != committed.manifest.get("input_digests", {}):
            changed: Manifest = {**committed.manifest, "input_digests": digests}
            store.change_bytes(
                root,
                f"{committed.stage}/{committed.key}/{MANIFEST}",
                partial(_instead, committed, changed),
            )


def _instead(before: Committed, changed: Manifest, old: bytes | None) -> bytes | None:
    """Return the changed manifest, or None if the stored one has been changed meanwhile."""
    is_same = old is not None and MANIFESTS.parse(old, before.uri) == before.manifest
    return store.json_bytes(changed) if is_same else None


def _ingest(folder: Path, out: Path, removals: Removals, _: Committed) -> int:
    count = 0
    keys: list[str] = []
    for file in _files(folder):
        source, target = folder / file, out / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.parts[0] == "shards" or file.suffix != ".parquet":
            link_or_copy(source, target)
    for file in sorted((folder / "shards").glob("*.parquet")):
        table = pq.read_table(file)
        rows = shard_rows(table)
        columns = ("key", "origin", "url", DOWNLOAD_SHA256)
        is_removed_row = removals.mask({name: rows[name] for name in columns})
        if not pc.any(is_removed_row).as_py():
            continue
        removed = rows.filter(is_removed_row)
        names = [name for name in removed[MEMBER_KEY].to_pylist() if name]
        keys += removed["key"].to_pylist()
        tar = out / "shards" / f"{file.stem}.tar"
        make_independent(tar)
        members = [
            f"{name}.{suffix}" for name in names for suffix in ("txt", "json", "png", "jpg", "webp")
        ]
        blank(tar, members)
        (out / "shards" / file.name).unlink()
        pq.write_table(table.filter(pc.invert(is_removed_row)), out / "shards" / file.name)
        count += len(names)
    urls = pq.read_table(folder / "urls.parquet")
    by_log = removals.mask({name: urls[name] for name in ("key", "origin", "url")})
    is_removed_row = pc.or_(by_log, pc.is_in(urls["key"], pa.array(keys, pa.string())))
    pq.write_table(urls.filter(pc.invert(is_removed_row)), out / "urls.parquet")
    _write_dropped(folder, out, urls.filter(is_removed_row), removals)
    return count


def _curate(folder: Path, out: Path, removals: Removals, _: Committed) -> int:
    table = pq.read_table(folder / "keep.parquet")
    is_removed_row = _mask(table, removals)
    pq.write_table(table.filter(pc.invert(is_removed_row)), out / "keep.parquet")
    _write_dropped(folder, out, table.filter(is_removed_row), removals)
    return int(pc.sum(is_removed_row).as_py())


def _embed(folder: Path, out: Path, removals: Removals, _: Committed) -> int:
    count, left = 0, 0
    images, texts = (sorted((folder / name).glob("*.npy")) for name in ("img_emb", "text_emb"))
    for name in ("img_emb", "text_emb", "metadata"):
        (out / name).mkdir()
    for metadata, image, text in zip(
        sorted((folder / "metadata").glob("*.parquet")), images, texts, strict=True
    ):
        table = pq.read_table(metadata)
        is_remaining = np.asarray(pc.invert(_mask(table, removals)).to_numpy(), bool)
        pq.write_table(table.filter(pa.array(is_remaining)), out / "metadata" / metadata.name)
        for file in (image, text):
            np.save(out / file.parent.name / file.name, np.load(file, mmap_mode="r")[is_remaining])
        count += int((~is_remaining).sum())
        left += int(is_remaining.sum())
    facts = json.loads((folder / "facts.json").read_text())
    (out / "facts.json").write_text(json.dumps(facts | {"count": left}, indent=1))
    return count


def _dedup(folder: Path, out: Path, removals: Removals, committed: Committed) -> int:
    count = _embed(folder, out, removals, committed)
    keep = pq.read_table(folder / "keep.parquet")
    pq.write_table(keep.filter(pc.invert(_mask(keep, removals))), out / "keep.parquet")
    copies = pq.read_table(folder / "groups.parquet")
    is_removed_row = removals.mask({"key": copies["key"]})
    is_without = pc.or_(is_removed_row, removals.mask({"key": copies["keeper"]}))
    pq.write_table(copies.filter(pc.invert(is_without)), out / "groups.parquet")
    link_or_copy(folder / "threshold.json", out / "threshold.json")
    # If a group changed, the picture may show removed images; nothing reads it, so it is dropped.
    if (folder / "groups.png").is_file() and not pc.any(is_without).as_py():
        link_or_copy(folder / "groups.png", out / "groups.png")
    return count + int(pc.sum(is_removed_row).as_py() or 0)


def _index(folder: Path, out: Path, removals: Removals, committed: Committed) -> int:
    from indexing.ann.index import build

    key = committed.manifest["inputs"].get("embed", "")
    embed = manifests.find(committed.root, "embed", key)
    if embed is None:
        raise StorageError(
            f"{committed.uri} was made from embed/{key}, which is not in ROOT: run the recipe again"
        )
    before = json.loads((folder / "index.json").read_text())["count"]
    # The recipe also holds the fields that are not part of the key.
    config = index_config(committed, committed.manifest.get("config", {}).get("index") or {})
    with embed.files.local_copy() as embeddings:
        counts = build(config, embeddings, out)
    return int(before - counts["out"])


def _addition(folder: Path, out: Path, removals: Removals, committed: Committed) -> int:
    from indexing.ann.index import build

    tables = {file: pq.read_table(file) for file in sorted((folder / "metadata").glob("*.parquet"))}
    for file in (file for file in _files(folder) if file.parts[0] == "shards"):
        (out / "shards").mkdir(exist_ok=True)
        link_or_copy(folder / file, out / file)
    for table in tables.values():
        removed = table.filter(_mask(table, removals))
        for shard in set(removed["shard"].to_pylist()) - {""}:
            make_independent(out / "shards" / shard)
            blank(
                out / "shards" / shard,
                removed.filter(pc.equal(removed["shard"], shard))["member"].to_pylist(),
            )
    count = _embed(folder, out, removals, committed)
    if json.loads((out / "facts.json").read_text())["count"]:
        build(index_config(committed), out, out)
    else:  # every sample was removed
        shutil.rmtree(out)
        out.mkdir()
    return count


COMPACTORS: dict[str, Callable[[Path, Path, Removals, Committed], int]] = {
    "ingest": _ingest,
    "curate": _curate,
    "embed": _embed,
    "dedup": _dedup,
    "index": _index,
    "additions": _addition,
}


def _mask(table: pa.Table, removals: Removals) -> pa.ChunkedArray:
    return removals.mask({name: table[name] for name in ("key", "origin", STORED_SHA256)})


def _write_dropped(folder: Path, out: Path, removed: pa.Table, removals: Removals) -> None:
    words = [
        pa.array([word] * removed.num_rows, pa.string()) for word in ("removed", "the removal log")
    ]
    more = pa.table([removed["key"], removed["origin"], *words], schema=DROPPED)
    pq.write_table(
        pa.concat_tables([pq.read_table(folder / "dropped.parquet"), more]), out / "dropped.parquet"
    )


def _files(folder: Path) -> list[Path]:
    return [
        path.relative_to(folder)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    ]
