"""The command `prune`: remove stage folders that nothing needs; every nightly run leaves some.

Keeps the folders named by a run, the promoted run or a submitted job, with all their inputs; the
newest folder of every stage, because the next run reuses it; recent commits, because a run names
its folders only when it ends; and folders in use. Additions to an index and the removal log always
stay. Also removes leftovers of dead writers (`flows.live_index.leftovers`) and old work folders of
killed stages.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.options import DEFAULT_ROOT, Json, RootUri, print_json
from flows.config.roots import open_for
from flows.runs.record_schema import read_current
from infra.storage import manifests, store
from infra.storage.manifest_schema import MANIFEST
from infra.storage.manifests import Committed
from infra.storage.store import Root

if TYPE_CHECKING:
    from flows.live_index.leftovers import Leftover

Folder = tuple[str, str]
"""Stage and key."""


def prune(
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove the folders; by default only list them.")
    ] = False,
    older_than: Annotated[
        float,
        typer.Option(
            "--older-than",
            metavar="DAYS",
            min=0,
            help="Only folders committed at least this many days ago.",
        ),
    ] = 7,
    root: RootUri = DEFAULT_ROOT,
    as_json: Json = False,
) -> None:
    """List the folders that nothing needs and the leftovers of dead writers, or remove them."""
    opened = open_for(root, for_writing=delete)
    from flows.live_index.leftovers import leftovers, unfinished

    before = datetime.now(UTC) - timedelta(days=older_than)
    folders = [_prune_folder(opened, folder, delete) for folder in unused(opened, before)]
    remains = [
        _prune_leftover(leftover, delete)
        for leftover in (*leftovers(opened), *unfinished(opened, before, _claimed(opened)))
    ]
    if as_json:
        print_json({"root": opened.uri, "folders": folders, "leftovers": remains})
    else:
        _print([*folders, *remains], delete)


def _prune_folder(root: Root, committed: Committed, delete: bool) -> dict[str, Any]:
    """Return the row of an unused folder; remove the folder if `delete` is set."""
    why = discard(root, committed) if delete else ""
    return {
        "stage": committed.stage,
        "key": committed.key,
        "bytes": sum(file["bytes"] for file in committed.manifest["files"]),
        "state": ("kept" if why else "removed") if delete else "unused",
        "why": why,
    }


def _prune_leftover(leftover: "Leftover", delete: bool) -> dict[str, Any]:
    """Return the row of a leftover; remove the leftover if `delete` is set."""
    why = leftover.remove() if delete else ""
    state = ("kept" if why else "removed") if delete else "left by a dead writer"
    return {"path": leftover.path, "bytes": leftover.size_bytes, "state": state, "why": why}


def _print(rows: Sequence[Mapping[str, Any]], delete: bool) -> None:
    for row in rows:
        name = row["path"] if "path" in row else f"{row['stage']}/{row['key']}"
        reason = f", {row['why']}" if row["why"] else ""
        print(f"{name}  {row['bytes'] / 1e6:,.1f} MB  {row['state']}{reason}")
    total = sum(row["bytes"] for row in rows if row["state"] != "kept")
    outcome = "freed" if delete else "would be freed: --delete removes them"
    print(f"{total / 1e6:,.1f} MB {outcome}" if rows else "nothing is unused")


def unused(root: Root, before: datetime) -> list[Committed]:
    """Return the folders committed before a time that nothing needs, dependent ones first."""
    # Imported late: it imports pyarrow, which `unclip --help` does not need.
    from flows.orchestration.stages import STAGES

    stage_names = [stage.name for stage in STAGES]
    there = {
        (stage, key): committed
        for stage in stage_names
        for key in store.list_names(root, stage)
        if (committed := manifests.find(root, stage, key))
    }
    limit = before.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    young = [name for name, folder in there.items() if folder.manifest["finished"] >= limit]
    newest = [
        max(
            (folder for name, folder in there.items() if name[0] == stage),
            key=_finished,
            default=None,
        )
        for stage in stage_names
    ]
    needed = _with_inputs(
        {*_named(root), *young, *((folder.stage, folder.key) for folder in newest if folder)}, there
    )
    return [there[name] for name in reversed(there) if name not in needed]


def discard(root: Root, committed: Committed) -> str:
    """Remove a folder, its manifest first; return "", or the reason why it stays."""
    from flows.live_index.leftovers import BusyError, locked

    try:
        with locked(root, committed.stage, committed.key):
            if (committed.stage, committed.key) in _named(root):
                return "a run names it now"
            store.remove(root, f"{committed.stage}/{committed.key}/{MANIFEST}")
            store.remove(root, f"{committed.stage}/{committed.key}")
            return ""
    except BusyError as busy:
        return str(busy)


def _named(root: Root) -> set[Folder]:
    """Return the folders that runs, the promoted run and submitted jobs name."""
    from flows.orchestration.ray_job import CLAIMS
    from flows.runs.records import all_records

    records = (*all_records(root), read_current(root))
    named = {item for record in records if record for item in record["stages"].items()}
    for name in store.list_names(root, "jobs"):
        claim = CLAIMS.read(root, f"jobs/{name}")
        named |= set(claim["inputs"].items()) if claim else set()
    return named | _claimed(root)


def _claimed(root: Root) -> set[Folder]:
    """Return the folders that submitted jobs are making."""
    names = [name.removesuffix(".json").rpartition("-") for name in store.list_names(root, "jobs")]
    return {(stage, key) for stage, _, key in names}


def _with_inputs(names: Iterable[Folder], there: dict[Folder, Committed]) -> set[Folder]:
    """Return these folders and all their direct and indirect inputs."""
    named: set[Folder] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in named:
            named.add(name)
            left += there[name].manifest["inputs"].items() if name in there else ()
    return named


def _finished(committed: Committed) -> str:
    return str(committed.manifest["finished"])
