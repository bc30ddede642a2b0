"""Take samples down: find them in every folder of ROOT, write the removal log, and verify it.

A take-down is in force as soon as its log entry exists: no later query or run returns the sample.
It includes images with equal bytes from other origins, also those that curate dropped as copies,
because their bytes are still in the shards. `compact` (compaction.py) then removes the bytes.
Models are not changed; the log entry lists those trained on the samples, and the next run trains
them again because their inputs have changed.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.live_index.removal_trace import trace
from infra.canonical_url import canonical_column, canonical_origin
from infra.schemas import DOWNLOAD_SHA256, SHARD_COLUMNS, STORED_SHA256, shard_rows
from infra.storage import manifests, store
from infra.storage.manifests import Committed
from infra.storage.removal_log import Removals, gather, read_entries, write_removal
from infra.storage.store import Root

Row = dict[str, Any]
"""A sample: a row of schema KEEP, or at least some of the columns in SAMPLE."""


class TrainedModel(TypedDict):
    """A model that was trained on a sample."""

    stage: str
    key: str
    attempt: str


class HeldList(TypedDict):
    """A keep list that held a sample until a time: models started before have read it."""

    key: str
    until: str


class LoggedRemoval(TypedDict):
    """An entry of the removal log, as a take-down or a compaction writes it."""

    keys: list[str]
    origins: list[str]
    sha256: list[str]
    downloads: list[str]
    asked: dict[str, Any]
    """What the person asked for, or why the entry was written."""
    trained_into: list[TrainedModel]
    held: NotRequired[HeldList]


class Verification(TypedDict):
    """Where samples still are; see `verify`."""

    found_in: dict[str, list[str]]
    leftovers: list[str]
    unreadable: list[str]
    trained_into: list[str]


TABLES = {
    "ingest": "shards/*.parquet",
    "curate": "keep.parquet",
    "embed": "metadata/*.parquet",
    "dedup": "metadata/*.parquet",
    "additions": "metadata/*.parquet",
}
"""Files that list the samples of each stage's folder; an index uses an Arrow file instead."""
SAMPLED = ("embed", "curate", "additions", "ingest")
"""Stages that together list every sample, those with the most columns first."""
FOLDER_KINDS = {
    "ingest": "shards",
    "curate": "shards",
    "additions": "shards",
    "embed": "embeddings",
    "dedup": "embeddings",
    "index": "index",
}
SAMPLE = ("key", "origin", STORED_SHA256, DOWNLOAD_SHA256)
"""Columns that identify a sample."""
DIGESTS = (STORED_SHA256, DOWNLOAD_SHA256)
SHARD_READ = [
    "status",
    SHARD_COLUMNS["key"],
    "origin",
    "url",
    SHARD_COLUMNS[DOWNLOAD_SHA256],
]
KEEP_READ = ["key", "origin", STORED_SHA256, "split"]
NO_STAGES = ("removals", "runs", "work", "logs", "jobs", "prefect")
MODEL_FILE = "weights.safetensors"


def committed_folders(root: Root, stages: Sequence[str]) -> Iterator[Committed]:
    """Yield every committed folder of the stages, including those that no run refers to."""
    for stage in stages:
        for key in store.list_names(root, stage):
            committed = manifests.find(root, stage, key)
            if committed:
                yield committed


def find(root: Root, is_meant: Callable[[pa.Table], pa.ChunkedArray]) -> list[Row]:
    """Return the columns in SAMPLE of every matching sample in ROOT, without repeats.

    An unknown digest is "".
    """
    matches: dict[tuple[str, str], Row] = {}
    for committed in committed_folders(root, SAMPLED):
        for table in (*_tables(committed), *_copies(committed)):
            for row in table.filter(is_meant(table)).select(SAMPLE).to_pylist():
                match = matches.setdefault((row["key"], row["origin"]), row)
                match.update({name: match[name] or row[name] for name in DIGESTS})
    return list(matches.values())


def named(rows: Iterable[Row], urls: Sequence[str] = ()) -> Removals:
    """Return the removals that identify these samples and URLs."""
    samples = list(rows)
    keys, origins, stored, downloads = (
        frozenset(row[column] for row in samples if row.get(column)) for column in SAMPLE
    )
    return Removals(keys, origins | frozenset(urls), stored, downloads)


def with_copies(root: Root, meant: Removals) -> Removals:
    """Add every sample in ROOT whose stored or downloaded bytes equal those of a removed one."""
    while True:
        grown = meant | named(find(root, partial(_mask, removals=meant)))
        if grown == meant:
            return meant
        meant = grown


def by_values(
    column: str, values: Iterable[str], matched: set[str] | None = None
) -> Callable[[pa.Table], pa.ChunkedArray]:
    """Return a predicate that selects rows by the values of a column.

    An origin also matches the URL that the image was downloaded from; both are compared in
    canonical form, whatever release wrote the table. The values that match a row are added to
    `matched`.
    """
    is_origin = column == "origin"
    wanted = pa.array(
        sorted({canonical_origin(value) if is_origin else value for value in values}), pa.string()
    )

    def is_meant(table: pa.Table) -> pa.ChunkedArray:
        compared = (
            [
                canonical_column(table[name])
                for name in ("origin", "url")
                if name in table.schema.names
            ]
            if is_origin
            else [table[column]]
        )
        masks = [pc.is_in(values, wanted) for values in compared]
        if matched is not None:
            for values, mask in zip(compared, masks, strict=True):
                matched.update(pc.unique(values.filter(mask)).to_pylist())
        return reduce(pc.or_, masks)

    return is_meant


def take_down(
    root: Root, rows: Sequence[Row], request: Mapping[str, Any], urls: Sequence[str] = ()
) -> LoggedRemoval:
    """Write one removal log entry for these samples and their copies; return the entry.

    `urls` are logged even if no sample in ROOT came from them.
    """
    return log(root, with_copies(root, named(rows, urls)), request)


def log(
    root: Root, removals: Removals, request: Mapping[str, Any], held: HeldList | None = None
) -> LoggedRemoval:
    """Write one removal log entry that includes the models trained on the samples; return it."""
    entry = cast(LoggedRemoval, removals.lists())
    entry["asked"] = dict(request)
    entry["trained_into"] = trained_into(root, removals)
    if held:
        entry["held"] = held
    write_removal(root, entry, manifests.now())
    return entry


def trained_into(root: Root, removals: Removals) -> list[TrainedModel]:
    """Return stage, key and attempt of every model trained on one of these samples."""
    lists = {committed.key: committed for committed in committed_folders(root, ("curate",))}
    has_trained = {
        key: any(_trained(table, removals).num_rows for table in _tables(committed))
        for key, committed in lists.items()
    }
    return [
        {"stage": model.stage, "key": model.key, "attempt": model.manifest["attempt"]}
        for model in models(root)
        if any(has_trained.get(key, False) for key in ancestors(root, model, "curate"))
    ]


def models(root: Root) -> list[Committed]:
    """Return every model in ROOT."""
    stages = [
        stage for stage in store.list_names(root, "") if stage not in (*TABLES, "index", *NO_STAGES)
    ]
    return [
        folder
        for folder in committed_folders(root, stages)
        if any(file["path"] == MODEL_FILE for file in folder.manifest["files"])
    ]


def record_lineage(root: Root, curate: Committed, removals: Removals) -> None:
    """Log the models trained on a keep list's removed rows, before compaction deletes those rows.

    The take-down's own entry lists only the models committed at that time. A model in training then
    is committed later; `held` covers it: every model started from this list until now has read the
    rows.
    """
    removed = [
        row
        for table in _tables(curate)
        for row in _trained(table, removals).select(SAMPLE).to_pylist()
    ]
    if removed:
        held: HeldList = {"key": curate.key, "until": manifests.now()}
        log(root, named(removed), {"compacted": f"{curate.stage}/{curate.key}"}, held=held)


def ancestors(root: Root, committed: Committed, stage: str) -> set[str]:
    """Return the keys of a stage's folders that a folder depends on, directly or indirectly."""
    named: set[tuple[str, str]] = set()
    left = list(committed.manifest["inputs"].items())
    while left:
        folder = left.pop()
        if folder not in named:
            named.add(folder)
            before = manifests.find(root, *folder)
            left += before.manifest["inputs"].items() if before else ()
    return {key for name, key in named if name == stage}


def verify(root: Root, rows: Sequence[Row], urls: Sequence[str] = ()) -> Verification:
    """Find where in ROOT samples still are and which models were trained on them.

    Returns the object that `unclip index verify --json` prints:

    - `found_in`: folders whose files hold one of the samples, or an image with equal bytes.
    - `leftovers`: files outside those folders that hold a sample: remains of dead writers, work of
      unfinished stages, this machine's downloads, reports.
    - `unreadable`: truncated shards and tables, which may hold a sample.
    - `trained_into`: models trained on a sample that still exist.

    Reads the files themselves. The log only extends the search: it adds the digests of samples that
    are no longer in ROOT, and the samples that were taken down in the same entry.
    """
    sought = with_copies(root, named(rows, urls))
    entries = [entry for entry in read_entries(root) if gather([entry]) & sought]
    sought = with_copies(root, sought | gather(entries))
    locations = _find_folders(root, sought)
    models_left = _find_models(root, sought, entries)
    traces = trace(root, sought)
    return {
        "found_in": locations,
        "leftovers": _split_leftovers(root, traces.holding, locations),
        "unreadable": traces.unreadable,
        "trained_into": models_left,
    }


def _find_folders(root: Root, sought: Removals) -> dict[str, list[str]]:
    """Return the committed folders whose tables name one of the samples, by kind of folder."""
    locations: dict[str, list[str]] = {"shards": [], "embeddings": [], "index": []}
    for committed in committed_folders(root, (*TABLES, "index")):
        if any(pc.any(_mask(table, sought)).as_py() for table in _tables(committed)):
            name = f"{committed.stage}/{committed.key}"
            locations[FOLDER_KINDS[committed.stage]].append(name)
            if committed.stage == "additions":
                locations["embeddings"].append(name)
                locations["index"].append(name)
    return locations


def _find_models(root: Root, sought: Removals, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the existing models that were trained on the samples, by the log's entries and ROOT.

    An entry with `held` stands for every model that was started from a keep list before a time.
    """
    logged = [model for entry in entries for model in entry.get("trained_into", [])]
    trained = {
        (model["stage"], model["key"], model["attempt"])
        for model in (*logged, *trained_into(root, sought))
    }
    held = [entry["held"] for entry in entries if "held" in entry]
    trained |= {
        (model.stage, model.key, model.manifest["attempt"])
        for model in (models(root) if held else ())
        for keep_list in held
        if model.manifest["started"] < keep_list["until"]
        and keep_list["key"] in ancestors(root, model, "curate")
    }
    return sorted(
        {
            f"{stage}/{key}"
            for stage, key, attempt in trained
            if (now := manifests.find(root, stage, key)) is not None
            and now.manifest["attempt"] == attempt
        }
    )


def _split_leftovers(
    root: Root, paths: Iterable[str], locations: dict[str, list[str]]
) -> list[str]:
    """Return the paths outside of committed folders; add the folders of the others to `locations`.

    Such a folder's files hold a sample although its table does not name it.
    """
    leftovers = []
    for path in paths:
        committed = _committed_at(root, path)
        if committed is None or committed.stage not in FOLDER_KINDS:
            leftovers.append(path)
            continue
        folders = locations[FOLDER_KINDS[committed.stage]]
        name = f"{committed.stage}/{committed.key}"
        if name not in folders:
            folders.append(name)
    return leftovers


def _committed_at(root: Root, path: str) -> Committed | None:
    """Return the committed folder that contains a path relative to ROOT, or None."""
    stage, _, rest = path.partition("/")
    key = rest.partition("/")[0]
    committed = (
        manifests.find(root, stage, key) if stage and key and stage not in NO_STAGES else None
    )
    return committed if committed and path.startswith(f"{committed.path}/") else None


def pending(
    root: Root, removals: Removals, among: Iterable[Committed] | None = None
) -> list[Committed]:
    """Return the committed folders that still hold removed samples, in stage order.

    Looks at all folders of ROOT, or only at those in `among`.
    """
    if not removals:
        return []
    held = (
        committed_folders(root, ("ingest", "curate", "embed", "dedup", "index", "additions"))
        if among is None
        else among
    )
    return [
        folder
        for folder in held
        if any(pc.any(_mask(table, removals)).as_py() for table in _tables(folder))
    ]


def blank(tar: Path, members: Sequence[str]) -> None:
    """Overwrite members of a tar with zeros in place; the offsets of all other members stay valid.

    The header gets a type that sample readers skip (POSIX reserves the letters A to Z for vendors)
    and a neutral name.
    """
    meant = frozenset(members)
    with tarfile.open(tar, "r:") as opened:
        ranges = [(member.offset_data, member.size) for member in opened if member.name in meant]
    with tar.open("r+b") as file:
        for offset, size in ranges:
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
    """Yield a folder's rows as tables with the columns in SAMPLE and, where known, url and split.

    For the samples that dedup dropped only the key is known.
    """
    if committed.stage == "index":
        with (
            committed.files.local_copy("metadata.arrow") as folder,
            pa.memory_map(str(folder / "metadata.arrow")) as source,
            pa.ipc.open_file(source) as reader,
        ):
            for number in range(reader.num_record_batches):
                yield samples_of(pa.Table.from_batches([reader.get_batch(number)]), committed.stage)
        return
    if committed.stage == "dedup":
        left_out = _read_columns(committed, "groups.parquet", ["key"])
        yield pa.table(
            {"key": left_out["key"]} | {name: _nothing(left_out) for name in (*SAMPLE[1:], "split")}
        )
    for name in committed.files.names(TABLES[committed.stage]):
        columns = SHARD_READ if committed.stage == "ingest" else KEEP_READ
        yield samples_of(_read_columns(committed, name, columns), committed.stage)


def _read_columns(
    committed: Committed, name: str, columns: Sequence[str] | None = None
) -> pa.Table:
    with committed.files.open(name) as file:
        return pq.read_table(file, columns=columns)


def _copies(committed: Committed) -> Iterator[pa.Table]:
    """Yield the rows that curate dropped because of their image, with the columns in SAMPLE.

    Their bytes equal those of another sample or of a removed one.
    """
    if committed.stage == "curate":
        table = _read_columns(committed, "dropped.parquet")
        digests = pc.struct_field(
            pc.extract_regex(table["detail"], r"^sha256 (?P<digest>[0-9a-f]{64})$"), "digest"
        )
        copies = pa.table(
            {
                "key": table["key"],
                "origin": table["origin"],
                STORED_SHA256: digests,
                DOWNLOAD_SHA256: _nothing(table),
            }
        )
        yield copies.filter(pc.is_valid(digests))


def samples_of(table: pa.Table, stage: str) -> pa.Table:
    """Return a stage's rows that have an image, with the columns in SAMPLE.

    The digest of the download is known only of rows of shards, that of the stored image only of all
    others.
    """
    if stage != "ingest":
        return table.select(KEEP_READ).append_column(DOWNLOAD_SHA256, _nothing(table))
    stored = shard_rows(table.filter(pc.equal(table["status"], "success")))
    stored = stored.select(["key", "origin", "url", DOWNLOAD_SHA256])
    return stored.append_column(STORED_SHA256, _nothing(stored))


def _nothing(table: pa.Table) -> pa.Array:
    return pa.array([""] * table.num_rows, pa.string())


def _trained(table: pa.Table, removals: Removals) -> pa.Table:
    return table.filter(pc.and_(_mask(table, removals), pc.equal(table["split"], "train")))


def _mask(table: pa.Table, removals: Removals) -> pa.ChunkedArray:
    columns = (*SAMPLE, "url") if "url" in table.column_names else SAMPLE
    return removals.mask({name: table[name] for name in columns})
