"""`unclip prune`: removes the folders of stages that nothing needs any more; nightly runs leave a set of them each night.

Kept are: what a run, the promoted run or a submitted job names and everything that it was made from, the newest folder of every stage
(the next run takes over from it), what was committed lately (a run names its folders when it ends), and what is being made or read.
Additions to an index and the removal log are no such folders, and stay.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from flows.options import DEFAULT_ROOT, Json, RootUri, open_for, print_json
from flows.promotion import CURRENT
from infra import manifests, storage
from infra.locks import lock_file, reading_file, unread_lock, writer_lock
from infra.manifests import Committed
from infra.storage import Root

Folder = tuple[str, str]
"""Stage and key."""


class _BusyError(Exception):
    """Someone makes or reads the folder; the message says who."""


def prune(
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; without it they are only listed.")] = False,
    older_than: Annotated[
        float, typer.Option("--older-than", metavar="DAYS", min=0, help="Only what was committed at least so many days ago.")
    ] = 7,
    root: RootUri = DEFAULT_ROOT,
    as_json: Json = False,
) -> None:
    """List the folders of stages that no run names and nothing needs, or remove them (--delete)."""
    opened = open_for(root, for_writing=delete)
    found = unused(opened, datetime.now(UTC) - timedelta(days=older_than))
    rows: list[dict[str, Any]] = []
    for committed in found:
        why = discard(opened, committed) if delete else ""
        size = sum(file["bytes"] for file in committed.manifest["files"])
        state = ("kept" if why else "removed") if delete else "unused"
        rows.append({"stage": committed.stage, "key": committed.key, "bytes": size, "state": state, "why": why})
    if as_json:
        print_json({"root": opened.uri, "folders": rows})
        return
    for row in rows:
        print(f"{row['stage']}/{row['key']}  {row['bytes'] / 1e6:,.1f} MB  {row['state']}" + (f", {row['why']}" if row["why"] else ""))
    total = sum(row["bytes"] for row in rows if row["state"] != "kept")
    print(f"{total / 1e6:,.1f} MB {'freed' if delete else 'would be freed: --delete removes them'}" if rows else "nothing is unused")


def unused(root: Root, before: datetime) -> list[Committed]:
    """Return the folders that nothing needs and that were committed before a time, those that depend on others first."""
    from flows.stages import STAGES  # with pyarrow, which `unclip --help` does without

    made = [stage.name for stage in STAGES]
    there = {
        (stage, key): found for stage in made for key in storage.list_names(root, stage) if (found := manifests.find(root, stage, key))
    }
    limit = before.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    young = [name for name, each in there.items() if each.manifest["finished"] >= limit]
    newest = [max((each for name, each in there.items() if name[0] == stage), key=_finished, default=None) for stage in made]
    needed = _with_inputs({*_named(root), *young, *((each.stage, each.key) for each in newest if each)}, there)
    return [there[name] for name in reversed(there) if name not in needed]


def discard(root: Root, committed: Committed) -> str:
    """Remove a folder, its manifest first; return "" or who makes or reads it, so that it stays."""
    name = f"{committed.stage} {committed.key}"

    def give_up(line: str) -> None:
        raise _BusyError(line.removeprefix(f"{name} ").partition(":")[0])

    lock, reading = (each(root.scratch, committed.stage, committed.key) for each in (lock_file, reading_file))
    try:
        with storage.one_line_errors(root.scratch), writer_lock(lock, name, give_up), unread_lock(reading, name, give_up):
            if (committed.stage, committed.key) in _named(root):
                return "a run names it by now"
            storage.remove(root, f"{committed.stage}/{committed.key}/{manifests.MANIFEST}")
            storage.remove(root, f"{committed.stage}/{committed.key}")
            return ""
    except _BusyError as busy:
        return str(busy)


def _named(root: Root) -> set[Folder]:
    """Return what runs, the promoted run and submitted jobs name."""
    records = [storage.read_json(root, f"runs/{name}") for name in storage.list_names(root, "runs")]
    named = {item for record in (*records, storage.read_json(root, CURRENT)) if record for item in record["stages"].items()}
    for name in storage.list_names(root, "jobs"):
        claim = storage.read_json(root, f"jobs/{name}")
        stage, _, key = name.removesuffix(".json").rpartition("-")
        named |= {(stage, key), *(claim or {"inputs": {}})["inputs"].items()}
    return named


def _with_inputs(names: Iterable[Folder], there: dict[Folder, Committed]) -> set[Folder]:
    """Return these folders and all that they were made from."""
    found: set[Folder] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += there[name].manifest["inputs"].items() if name in there else ()
    return found


def _finished(committed: Committed) -> str:
    return str(committed.manifest["finished"])
