"""Takes samples down: finds them in every folder of ROOT, writes the removal log, takes them out of what is committed, and proves it.

A take-down is in force with the log's entry: no later query and no later run shows it. Equal pictures from elsewhere go along, also those
that curate left out as copies: their bytes are in the shards. `compact` then takes the bytes out of shards, keep lists, embeddings and
indexes; folders keep their keys and offsets, so what is served from them goes on. Models stay as they are, and are named: the next run
trains them again, because what they were made from has changed.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.live_index.removal_trace import trace
from infra.storage import manifests, store
from infra.storage.manifests import Committed
from infra.storage.removal_log import NAMES, Removals, gather, read_entries, write_removal
from infra.storage.store import Root

Row = dict[str, Any]

TABLES = {
    "ingest": "shards/*.parquet",
    "curate": "keep.parquet",
    "embed": "metadata/*.parquet",
    "dedup": "metadata/*.parquet",
    "additions": "metadata/*.parquet",
}
"""Where each stage's folder lists its samples; an index has Arrow instead."""
SAMPLED = ("embed", "curate", "additions", "ingest")
"""Stages that name every sample there is, in the order of how much they know of it."""
PLACES = {
    "ingest": "shards",
    "curate": "shards",
    "additions": "shards",
    "embed": "embeddings",
    "dedup": "embeddings",
    "index": "index",
}
COLUMNS = tuple(NAMES.values())
DIGESTS = ("sha256", "download")
READ = {"ingest": ["status", "sample", "origin", "url", "sha256"]}
NO_STAGES = ("removals", "runs", "work", "logs", "jobs", "prefect")
MODEL_FILE = "weights.safetensors"


def committed_folders(root: Root, stages: Sequence[str]) -> Iterator[Committed]:
    """Yield every committed folder of the stages, whether a run still names it or not."""
    for stage in stages:
        for key in store.list_names(root, stage):
            found = manifests.find(root, stage, key)
            if found:
                yield found


def find(root: Root, is_meant: Callable[[pa.Table], pa.ChunkedArray]) -> list[Row]:
    """Return key, origin, sha256 and download of all samples in ROOT that are meant, each once; a digest is "" where nothing knows it."""
    found: dict[tuple[str, str], Row] = {}
    for committed in committed_folders(root, SAMPLED):
        for table in (*_tables(committed), *_copies(committed)):
            for row in table.filter(is_meant(table)).select(COLUMNS).to_pylist():
                known = found.setdefault((row["key"], row["origin"]), row)
                known.update({name: known[name] or row[name] for name in DIGESTS})
    return list(found.values())


def named(rows: Iterable[Row], urls: Sequence[str] = ()) -> Removals:
    """Return what names these samples, and these URLs."""
    values = {
        column: frozenset(row[column] for row in found if row.get(column))
        for found in [list(rows)]
        for column in COLUMNS
    }
    return Removals(
        values["key"], values["origin"] | frozenset(urls), values["sha256"], values["download"]
    )


def with_copies(root: Root, meant: Removals) -> Removals:
    """Return what is meant along with all of ROOT that holds the same pictures: equal as they are stored, or as they were downloaded."""
    while True:
        grown = meant | named(find(root, partial(_mask, removals=meant)))
        if grown == meant:
            return meant
        meant = grown


def by_values(column: str, values: Sequence[str]) -> Callable[[pa.Table], pa.ChunkedArray]:
    """Return what is meant by some values of a column; an origin may be given as the URL that was downloaded as well."""
    wanted = pa.array(list(values), pa.string())

    def is_meant(table: pa.Table) -> pa.ChunkedArray:
        mask = pc.is_in(table[column], wanted)
        return (
            pc.or_(mask, pc.is_in(table["url"], wanted))
            if column == "origin" and "url" in table.column_names
            else mask
        )

    return is_meant


def take_down(
    root: Root, rows: Sequence[Row], asked: Mapping[str, Any], urls: Sequence[str] = ()
) -> dict[str, Any]:
    """Write one entry of the removal log for these samples, equal pictures from elsewhere included; return the entry.

    `urls` are logged even where nothing in ROOT came from them yet.
    """
    return log(root, with_copies(root, named(rows, urls)), asked)


def log(root: Root, removals: Removals, asked: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Write one entry of the removal log with the models that trained on what it names; return it."""
    entry = {
        **removals.named(),
        "asked": dict(asked),
        "trained_into": trained_into(root, removals),
        **more,
    }
    write_removal(root, entry, manifests.now())
    return entry


def trained_into(root: Root, removals: Removals) -> list[dict[str, str]]:
    """Return stage, key and attempt of every model whose lineage trained on one of these samples."""
    lists = {committed.key: committed for committed in committed_folders(root, ("curate",))}
    has_trained = {
        key: any(_trained(table, removals).num_rows for table in _tables(committed))
        for key, committed in lists.items()
    }
    return [
        {"stage": each.stage, "key": each.key, "attempt": each.manifest["attempt"]}
        for each in models(root)
        if any(has_trained.get(key, False) for key in ancestors(root, each, "curate"))
    ]


def models(root: Root) -> list[Committed]:
    """Return every model in ROOT."""
    stages = [
        stage for stage in store.list_names(root, "") if stage not in (*TABLES, "index", *NO_STAGES)
    ]
    return [
        each
        for each in committed_folders(root, stages)
        if any(file["path"] == MODEL_FILE for file in each.manifest["files"])
    ]


def record_lineage(root: Root, curate: Committed, removals: Removals) -> None:
    """Log which models a keep list's rows were trained into, before compaction takes the rows out of it.

    The entry of the take-down knows the models of its own time only: one that was being trained then has been committed since, or will be
    (`held`): whatever was started from this list until now has read the rows.
    """
    gone = [
        row
        for table in _tables(curate)
        for row in _trained(table, removals).select(COLUMNS).to_pylist()
    ]
    if gone:
        held = {"key": curate.key, "until": manifests.now()}
        log(root, named(gone), {"compacted": f"{curate.stage}/{curate.key}"}, held=held)


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

    Reads what is there: a folder is named if its files hold one of the samples, or an equal picture. The log only says more of what is
    sought (digests of what has left ROOT; what was taken down with it is sought with it). `trained_into` holds the models that exist still.
    `leftovers` are the files outside those folders that hold a sample: what dead writers left, work of stages that are not finished,
    downloads of this machine, reports. `unreadable` are shards and tables that were cut short, which may hold it.
    """
    sought = with_copies(root, named(rows, urls))
    entries = [entry for entry in read_entries(root) if gather([entry]) & sought]
    sought = with_copies(root, sought | gather(entries))
    found_in: dict[str, list[str]] = {"shards": [], "embeddings": [], "index": []}
    for committed in committed_folders(root, (*TABLES, "index")):
        if any(pc.any(_mask(table, sought)).as_py() for table in _tables(committed)):
            found_in[PLACES[committed.stage]].append(f"{committed.stage}/{committed.key}")
            if committed.stage == "additions":
                found_in["embeddings"].append(f"{committed.stage}/{committed.key}")
                found_in["index"].append(f"{committed.stage}/{committed.key}")
    logged = [model for entry in entries for model in entry.get("trained_into", [])]
    trained = {
        (each["stage"], each["key"], each["attempt"])
        for each in (*logged, *trained_into(root, sought))
    }
    held = [entry["held"] for entry in entries if "held" in entry]
    trained |= {
        (model.stage, model.key, model.manifest["attempt"])
        for model in (models(root) if held else ())
        for each in held
        if model.manifest["started"] < each["until"]
        and each["key"] in ancestors(root, model, "curate")
    }
    current = {
        f"{stage}/{key}"
        for stage, key, attempt in trained
        if (known := manifests.find(root, stage, key)) is not None
        and known.manifest["attempt"] == attempt
    }
    traces = trace(root, sought)
    left = []
    for path in traces.holding:
        committed_in = _committed_at(root, path)
        if committed_in is None or committed_in.stage not in PLACES:
            left.append(path)
        elif (name := f"{committed_in.stage}/{committed_in.key}") not in found_in[
            PLACES[committed_in.stage]
        ]:
            found_in[PLACES[committed_in.stage]].append(name)  # though its table does not say so
    return {
        "found_in": found_in,
        "leftovers": left,
        "unreadable": traces.unreadable,
        "trained_into": sorted(current),
    }


def _committed_at(root: Root, path: str) -> Committed | None:
    """Return the committed folder that a file, relative to ROOT, is part of, or None."""
    stage, _, rest = path.partition("/")
    key = rest.partition("/")[0]
    found = manifests.find(root, stage, key) if stage and key and stage not in NO_STAGES else None
    return found if found and path.startswith(f"{found.path}/") else None


def pending(
    root: Root, removals: Removals, among: Iterable[Committed] | None = None
) -> list[Committed]:
    """Return the committed folders, of ROOT or those given, that still hold something that was taken down, in the order of the stages."""
    if not removals:
        return []
    held = (
        committed_folders(root, ("ingest", "curate", "embed", "dedup", "index", "additions"))
        if among is None
        else among
    )
    return [
        each
        for each in held
        if any(pc.any(_mask(table, removals)).as_py() for table in _tables(each))
    ]


def blank(tar: Path, members: Sequence[str]) -> None:
    """Overwrite members of a tar with nothing, in place: every other member stays where it was.

    The header gets a type that readers of samples skip (POSIX leaves letters to vendors) and a name that tells nothing.
    """
    meant = frozenset(members)
    with tarfile.open(tar, "r:") as opened:
        places = [(member.offset_data, member.size) for member in opened if member.name in meant]
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
    """Yield the rows of a folder with COLUMNS and, where known, url and split; a table at a time. Of what dedup left out only the key."""
    if committed.stage == "index":
        (arrow,) = committed.files("metadata.arrow")
        with pa.memory_map(str(arrow)) as source, pa.ipc.open_file(source) as reader:
            for number in range(reader.num_record_batches):
                yield samples_of(pa.Table.from_batches([reader.get_batch(number)]), committed.stage)
        return
    for file in committed.files("groups.parquet") if committed.stage == "dedup" else ():
        left_out = pq.read_table(file, columns=["key"])
        yield pa.table(
            {"key": left_out["key"]}
            | {name: _nothing(left_out) for name in (*COLUMNS[1:], "split")}
        )
    for file in committed.files(TABLES[committed.stage]):
        yield samples_of(
            pq.read_table(
                file, columns=READ.get(committed.stage, ["key", "origin", "sha256", "split"])
            ),
            committed.stage,
        )


def _copies(committed: Committed) -> Iterator[pa.Table]:
    """Yield the rows that curate left out for their picture's bytes, with COLUMNS: equal to another's, or to what was taken down."""
    for file in committed.files("dropped.parquet") if committed.stage == "curate" else ():
        table = pq.read_table(file)
        digests = pc.struct_field(
            pc.extract_regex(table["detail"], r"^sha256 (?P<digest>[0-9a-f]{64})$"), "digest"
        )
        copies = pa.table(
            {
                "key": table["key"],
                "origin": table["origin"],
                "sha256": digests,
                "download": _nothing(table),
            }
        )
        yield copies.filter(pc.is_valid(digests))


def samples_of(table: pa.Table, stage: str) -> pa.Table:
    """Return a stage's table with the names that the removal log uses; only rows that hold a picture."""
    if stage != "ingest":
        return table.select(["key", "origin", "sha256", "split"]).append_column(
            "download", _nothing(table)
        )
    stored = table.filter(pc.equal(table["status"], "success"))
    columns = {
        "key": stored["sample"],
        "origin": stored["origin"],
        "url": stored["url"],
        "sha256": _nothing(stored),
    }
    return pa.table(
        columns | {"download": stored["sha256"]}
    )  # img2dataset's SHA-256 is of the download, not of what is stored


def _nothing(table: pa.Table) -> pa.Array:
    return pa.array([""] * table.num_rows, pa.string())


def _trained(table: pa.Table, removals: Removals) -> pa.Table:
    return table.filter(pc.and_(_mask(table, removals), pc.equal(table["split"], "train")))


def _mask(table: pa.Table, removals: Removals) -> pa.ChunkedArray:
    columns = (*COLUMNS, "url") if "url" in table.column_names else COLUMNS
    return removals.mask({name: table[name] for name in columns})
