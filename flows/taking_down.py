"""Takes samples down: finds them in every folder of ROOT, writes the removal log, takes them out of what is committed, and proves it.

A take-down is in force with the log's entry: no later query and no later run shows it. `compact` then takes the bytes out of shards, keep
lists, embeddings and indexes; folders keep their keys and offsets, so what is served from them goes on. Models stay as they are, and are
named: the next run trains them again, because what they were made from has changed.
"""

import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra import manifests, storage
from infra.manifests import Committed
from infra.removals import Removals, gather, read_entries, write_removal
from infra.storage import Root

Row = dict[str, Any]

TABLES = {"ingest": "shards/*.parquet", "curate": "keep.parquet", "embed": "metadata/*.parquet", "additions": "metadata/*.parquet"}
"""Where each stage's folder lists its samples; an index has Arrow instead."""
PLACES = {"ingest": "shards", "curate": "shards", "additions": "shards", "embed": "embeddings", "index": "index"}
MODEL_FILE = "weights.safetensors"
STEP_ROWS = 65_536


def committed_folders(root: Root, stages: Sequence[str]) -> Iterator[Committed]:
    """Yield every committed folder of the stages, whether a run still names it or not."""
    for stage in stages:
        for key in storage.list_names(root, stage):
            found = manifests.find(root, stage, key)
            if found:
                yield found


def find(root: Root, is_meant: Callable[[pa.Table], pa.ChunkedArray]) -> list[Row]:
    """Return key, origin and sha256 of all samples in ROOT that are meant, each once; `sha256` is "" where only ingest knows the sample."""
    found: dict[tuple[str, str], Row] = {}
    for committed in committed_folders(root, ("embed", "curate", "additions", "ingest")):
        for table in _tables(committed):
            for row in table.filter(is_meant(table)).select(["key", "origin", "sha256"]).to_pylist():
                known = found.setdefault((row["key"], row["origin"]), row)
                known["sha256"] = known["sha256"] or row["sha256"]
    return list(found.values())


def by_values(column: str, values: Sequence[str]) -> Callable[[pa.Table], pa.ChunkedArray]:
    """Return what is meant by some values of a column; an origin may be given as the URL that was downloaded as well."""
    wanted = pa.array(list(values), pa.string())

    def is_meant(table: pa.Table) -> pa.ChunkedArray:
        mask = pc.is_in(table[column], wanted)
        return pc.or_(mask, pc.is_in(table["url"], wanted)) if column == "origin" and "url" in table.column_names else mask

    return is_meant


def take_down(root: Root, rows: Sequence[Row], asked: Mapping[str, Any], urls: Sequence[str] = ()) -> dict[str, Any]:
    """Write one entry of the removal log for these samples, equal pictures from elsewhere included; return the entry.

    `urls` are logged even where nothing in ROOT came from them yet.
    """
    pictures = sorted({row["sha256"] for row in rows if row["sha256"]})
    twins = find(root, by_values("sha256", pictures)) if pictures else []
    everything = [*rows, *twins]
    removals = Removals(
        frozenset(row["key"] for row in everything), frozenset(row["origin"] for row in everything) | frozenset(urls), frozenset(pictures)
    )
    entry = {
        "keys": sorted(removals.keys),
        "origins": sorted(removals.origins),
        "sha256": pictures,
        "asked": dict(asked),
        "trained_into": trained_into(root, removals),
    }
    write_removal(root, entry, manifests.now())
    return entry


def trained_into(root: Root, removals: Removals) -> list[dict[str, str]]:
    """Return stage, key and attempt of every model whose lineage trained on one of these samples."""
    lists = {committed.key: committed for committed in committed_folders(root, ("curate",))}
    has_trained = {
        key: any(pc.any(pc.and_(_mask(table, removals), pc.equal(table["split"], "train"))).as_py() for table in _tables(committed))
        for key, committed in lists.items()
    }
    stages = [stage for stage in storage.list_names(root, "") if stage not in (*TABLES, "index", "removals", "runs", "work", "logs")]
    models = [each for each in committed_folders(root, stages) if any(file["path"] == MODEL_FILE for file in each.manifest["files"])]
    return [
        {"stage": each.stage, "key": each.key, "attempt": each.manifest["attempt"]}
        for each in models
        if any(has_trained.get(key, False) for key in ancestors(root, each, "curate"))
    ]


def ancestors(root: Root, committed: Committed, stage: str) -> set[str]:
    """Return the keys of a stage's folders that a folder was made from, at any remove."""
    found: set[str] = set()
    for name, key in committed.manifest["inputs"].items():
        if name == stage:
            found.add(key)
        before = manifests.find(root, name, key)
        if before:
            found |= ancestors(root, before, stage)
    return found


def verify(root: Root, rows: Sequence[Row], urls: Sequence[str] = ()) -> dict[str, Any]:
    """Return where in ROOT samples still are and what was trained on them, as `unclip index verify --json` prints it.

    Reads what is there, not the log: a folder is named if its files hold the sample. `trained_into` holds the models that exist still.
    """
    sought = Removals(
        frozenset(row["key"] for row in rows),
        frozenset(row["origin"] for row in rows) | frozenset(urls),
        frozenset(row["sha256"] for row in rows if row["sha256"]),
    )
    found_in: dict[str, list[str]] = {"shards": [], "embeddings": [], "index": []}
    for committed in committed_folders(root, (*TABLES, "index")):
        if any(pc.any(_mask(table, sought)).as_py() for table in _tables(committed)):
            found_in[PLACES[committed.stage]].append(f"{committed.stage}/{committed.key}")
            if committed.stage == "additions":
                found_in["embeddings"].append(f"{committed.stage}/{committed.key}")
                found_in["index"].append(f"{committed.stage}/{committed.key}")
    logged = [model for entry in read_entries(root) if _overlap(gather([entry]), sought) for model in entry.get("trained_into", [])]
    models = {(each["stage"], each["key"], each["attempt"]) for each in (*logged, *trained_into(root, sought))}
    current = {
        f"{stage}/{key}"
        for stage, key, attempt in models
        if (known := manifests.find(root, stage, key)) is not None and known.manifest["attempt"] == attempt
    }
    return {"found_in": found_in, "trained_into": sorted(current)}


def pending(root: Root, removals: Removals) -> list[Committed]:
    """Return the committed folders that still hold something that was taken down, in the order of the stages."""
    if not removals:
        return []
    held = committed_folders(root, ("ingest", "curate", "embed", "index", "additions"))
    return [each for each in held if any(pc.any(_mask(table, removals)).as_py() for table in _tables(each))]


def blank(tar: Path, members: Sequence[str]) -> None:
    """Overwrite members of a tar with nothing, in place: every other member stays where it was.

    The header gets a type that readers of samples skip (POSIX leaves letters to vendors) and a name that tells nothing.
    """
    with tarfile.open(tar, "r:") as opened:
        places = [(member.offset_data, member.size) for member in opened if member.name in set(members)]
    with tar.open("r+b") as file:
        for offset, size in places:
            header_at = offset - tarfile.BLOCKSIZE
            file.seek(header_at)
            header = bytearray(file.read(tarfile.BLOCKSIZE))
            header[0:100] = b"removed.txt".ljust(100, b"\0")
            header[156:157] = b"R"
            header[148:156] = b" " * 8
            header[148:156] = f"{sum(header):06o}\0 ".encode()
            file.seek(header_at)
            file.write(header)
            left = size
            while left:
                left -= file.write(bytes(min(left, 1 << 20)))


def _tables(committed: Committed) -> Iterator[pa.Table]:
    """Yield the rows of a folder with columns key, origin, sha256 and, where known, url and split; a table at a time."""
    if committed.stage == "index":
        (arrow,) = committed.files("metadata.arrow")
        with pa.memory_map(str(arrow)) as source, pa.ipc.open_file(source) as reader:
            for number in range(reader.num_record_batches):
                yield pa.Table.from_batches([reader.get_batch(number)]).select(["key", "origin", "sha256", "split"])
        return
    for file in committed.files(TABLES[committed.stage]):
        yield samples_of(pq.read_table(file), committed.stage)


def samples_of(table: pa.Table, stage: str) -> pa.Table:
    """Return a stage's table with the names that the removal log uses; only rows that hold a picture."""
    if stage != "ingest":
        return table.select(["key", "origin", "sha256", "split"])
    stored = table.filter(pc.equal(table["status"], "success"))
    nothing = pa.array([""] * stored.num_rows, pa.string())  # img2dataset's SHA-256 is of the download, not of what is stored
    return pa.table({"key": stored["sample"], "origin": stored["origin"], "url": stored["url"], "sha256": nothing})


def _mask(table: pa.Table, removals: Removals) -> pa.ChunkedArray:
    mask = removals.mask({name: table[name] for name in ("key", "origin", "sha256")})
    return pc.or_(mask, removals.mask({"origin": table["url"]})) if "url" in table.column_names else mask


def _overlap(left: Removals, right: Removals) -> bool:
    return bool(left.keys & right.keys or left.origins & right.origins or left.sha256 & right.sha256)
