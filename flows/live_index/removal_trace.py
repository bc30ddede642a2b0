"""Search every file below ROOT and in the scratch folder for samples: shards, tables, images.

Reads the files, not the manifests, so it covers temporary folders, half-removed folders and this
machine's downloads. Knows nothing of stages. A shard holds a sample if a member has its bytes or a
.json member names it. A table holds it if a row names it and the table has a column `sha256`, which
every table beside images or embeddings has. URL lists, lists of dropped rows and the removal log
name samples but do not hold them.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.live_index.leftovers import path_of
from infra.canonical_url import canonical_column, canonical_origin
from infra.storage import store
from infra.storage.removal_log import FOLDER, Removals
from infra.storage.retry import retry
from infra.storage.store import Root

HEAD_BYTES = 512
USTAR_AT = 257
PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")
MAX_JSON_BYTES = 1 << 20
"""Maximum size of a member that describes an image; a larger .json member is compared by digest."""
BATCH_ROWS = 65_536
UNREADABLE = (tarfile.TarError, pa.ArrowInvalid, EOFError)


@dataclass(frozen=True)
class Traces:
    """Sorted paths, relative to ROOT, or absolute if outside of it."""

    holding: list[str]
    """Files that hold one of the samples."""
    unreadable: list[str]
    """Truncated or damaged shards and tables, whose content is unknown."""


def trace(root: Root, sought: Removals) -> Traces:
    """Search every file of ROOT and of the scratch folder for the samples."""
    holding, unreadable = [], []
    for path, opened in _files(root):
        try:
            with store.one_line_errors(root.uri):
                if retry(partial(_opened_holds, opened, sought)):
                    holding.append(path)
        except FileNotFoundError:
            continue  # a writer has moved or removed it since it was listed
        except UNREADABLE:
            unreadable.append(path)
    return Traces(sorted(holding), sorted(unreadable))


def _opened_holds(opened: Callable[[], Any], sought: Removals) -> bool:
    with opened() as file:
        return holds(file, sought)


def holds(file: Any, sought: Removals) -> bool:
    """Return whether an open file holds one of the samples.

    Raises tarfile.TarError or ArrowInvalid for a truncated file.
    """
    head = file.read(HEAD_BYTES)
    file.seek(0)
    if head[USTAR_AT:].startswith(b"ustar"):
        return _shard_holds(file, sought)
    if head.startswith(b"PAR1"):
        return any(
            _table_holds(pa.Table.from_batches([batch]), sought)
            for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS)
        )
    if head.startswith(b"ARROW1"):
        with pa.ipc.open_file(file) as reader:
            return any(
                _table_holds(pa.Table.from_batches([reader.get_batch(number)]), sought)
                for number in range(reader.num_record_batches)
            )
    return head.startswith(PICTURES) and _digest(file) in sought.digests()


def _shard_holds(file: Any, sought: Removals) -> bool:
    names = frozenset(map(canonical_origin, sought.texts()))
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.type == b"R" or not member.isfile():  # R: blanked by a take-down
                continue
            content = tar.extractfile(member)
            assert content, "a regular file has content"
            if member.name.endswith(".json") and member.size <= MAX_JSON_BYTES:
                if _texts_in(content.read()) & names:
                    return True
            elif _digest(content) in sought.digests():
                return True
    return False


def _texts_in(data: bytes) -> set[str]:
    try:
        described = json.loads(data)
    except (ValueError, RecursionError):  # not a description that we wrote
        return set()
    return (
        {canonical_origin(value) for value in described.values() if isinstance(value, str)}
        if isinstance(described, dict)
        else set()
    )


def _table_holds(table: pa.Table, sought: Removals) -> bool:
    if "sha256" not in table.column_names:  # of the image in our tables, the download in a shard's
        return False
    if "status" in table.column_names:  # a shard's table, in which failed rows have no image
        table = table.filter(pc.equal(table["status"], "success"))
    values = pa.array(sorted(map(canonical_origin, sought.texts())), pa.string())
    columns = (
        canonical_column(table[field.name])
        for field in table.schema
        if pa.types.is_string(field.type)
    )
    return any(pc.any(pc.is_in(column, values)).as_py() for column in columns)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while piece := file.read(store.PIECE_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def _files(root: Root) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the display path and an opener of every file except the removal log."""
    folders = [folder for folder in (root.folder, root.scratch) if folder]
    if root.folder and root.scratch.is_relative_to(root.folder):
        folders = [root.folder]
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for path in (Path(parent) / name for name in sorted(names)):
                if path.is_file() and not path.is_symlink() and path.parent != folder / FOLDER:
                    yield path_of(root, path), partial(path.open, "rb")
    for name in store.file_sizes(root, "") if root.folder is None else ():
        if not name.startswith(f"{FOLDER}/"):
            yield name, partial(root.fs.open, store.join(root, name), "rb")
