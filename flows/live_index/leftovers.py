"""Find and remove what dead writers left behind: temporary folders, half-removed folders, attempts.

`infra.storage.temporary_folders` decides whether a temporary folder is dead. On a local ROOT a
stage folder without a manifest was half removed, since folders are renamed into place when
complete. In a store an attempt is dead once the manifest supersedes it, or after a day without
uploads, because any machine may be writing it. The `work` folder of a killed stage is not a
leftover: the next run resumes from it, and `unclip prune` removes it by age.
"""

import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from flows.live_index.lineage import ADDITIONS
from infra.errors import UnclipError
from infra.storage import manifests, store
from infra.storage.locks import lock_file, reading_file, unread_lock, writer_lock
from infra.storage.manifest_schema import MANIFEST, MANIFESTS
from infra.storage.store import Root
from infra.storage.temporary_folders import (
    REPLACED,
    UNTOUCHED_S,
    dead_folders,
    is_dead,
    last_change,
    remove_dead,
)

KEY, ATTEMPT = re.compile("[0-9a-f]{16}"), re.compile("[0-9a-f]{12}")
"""Names of the folders that we create; folders with other names are never removed."""


class BusyError(UnclipError):
    """Another process writes or reads the folder; the message says which."""


@dataclass(frozen=True)
class Leftover:
    """A file or folder of a dead writer; `path` is relative to ROOT, or absolute if outside."""

    path: str
    size_bytes: int
    """Bytes that removing it frees; files shared with a committed folder count as 0."""
    remove: Callable[[], str]
    """Removes it and returns "", or returns the reason why it cannot be removed."""


def remove_leftovers(root: Root) -> None:
    """Remove all leftovers that no process uses; called before a new write."""
    remove_dead(root.scratch)
    for leftover in leftovers(root):
        leftover.remove()


def leftovers(root: Root) -> list[Leftover]:
    """Return the leftovers of dead writers."""
    temporary = [
        folder for folder in dead_folders(root.scratch) if not _is_recoverable(root, folder)
    ]
    listed = [
        Leftover(
            path_of(root, folder_entry),
            size_of(folder_entry),
            partial(_remove_dead, root, folder_entry),
        )
        for folder_entry in temporary
    ]
    return [*listed, *(_half_removed(root) if root.folder else _attempts(root))]


def unfinished(
    root: Root, before: datetime, claimed: Collection[tuple[str, str]]
) -> list[Leftover]:
    """Return the work folders of killed stages that have not changed since `before`: on this
    machine, and in a store the records and states that any node may go on from.

    Folders of the (stage, key) pairs in `claimed` are left out.
    """
    folders = [
        (stage, folder)
        for stage in _stages()
        for folder in sorted((root.scratch / stage).glob("*"))
        if folder.is_dir()
        and (stage, folder.name) not in claimed
        and last_change(folder) < before.timestamp()
    ]
    here = [
        Leftover(path_of(root, folder), size_of(folder), partial(_remove_work, root, stage, folder))
        for stage, folder in folders
    ]
    return here if root.folder else [*here, *_unfinished_in_store(root, before, claimed)]


def _unfinished_in_store(
    root: Root, before: datetime, claimed: Collection[tuple[str, str]]
) -> Iterator[Leftover]:
    for stage in _stages():
        for key in store.list_names(root, f"work/{stage}"):
            path = f"work/{stage}/{key}"
            is_old = store.last_put(root, path) < before.timestamp()
            if KEY.fullmatch(key) and is_old and (stage, key) not in claimed:
                size = sum(store.file_sizes(root, path).values())
                yield Leftover(path, size, partial(_remove_attempt, root, path))


def path_of(root: Root, path: Path) -> str:
    """Return a local path relative to ROOT, or absolute if it is outside of it."""
    return (
        str(path.relative_to(root.folder))
        if root.folder and path.is_relative_to(root.folder)
        else str(path)
    )


def size_of(folder: Path) -> int:
    """Return the bytes that removing a folder frees."""
    total = 0
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # removed meanwhile
        total += status.st_size if path.is_file() and status.st_nlink == 1 else 0
    return total


@contextmanager
def locked(root: Root, stage: str, key: str) -> Iterator[None]:
    """Hold the locks of a stage's folder while the block runs.

    Raises BusyError at once if another process writes or reads the folder.
    """
    name = f"{stage} {key}"

    def give_up(line: str) -> None:
        raise BusyError(line.removeprefix(f"{name} ").partition(":")[0])

    lock, reading = (
        path_of_lock(root.scratch, stage, key) for path_of_lock in (lock_file, reading_file)
    )
    with (
        store.one_line_errors(root.scratch),
        writer_lock(lock, name, give_up),
        unread_lock(reading, name, give_up),
    ):
        yield


def _stages() -> list[str]:
    # Imported late: it imports pyarrow, which `unclip --help` does not need.
    from flows.orchestration.stages import STAGES

    return [*(stage.name for stage in STAGES), ADDITIONS]


def _is_recoverable(root: Root, folder: Path) -> bool:
    if not folder.name.endswith(REPLACED) or root.folder is None:
        return False
    if not (folder / MANIFEST).is_file():
        return False
    file = folder / MANIFEST
    manifest = MANIFESTS.parse(file.read_bytes(), str(file))
    return not (root.folder / manifest["stage"] / manifest["key"]).exists()


def _remove_dead(root: Root, folder: Path) -> str:
    if not folder.exists():
        return ""
    if not is_dead(folder) or _is_recoverable(root, folder):
        return "another process uses it now"
    shutil.rmtree(folder, ignore_errors=True)
    remove_dead(root.scratch)  # its lock
    return "" if not folder.exists() else "it cannot be removed"


def _half_removed(root: Root) -> list[Leftover]:
    assert root.folder
    return [
        Leftover(
            f"{stage}/{key}",
            size_of(root.folder / stage / key),
            partial(_finish_removal, root, stage, key),
        )
        for stage in _stages()
        for key in store.list_names(root, stage)
        if KEY.fullmatch(key)
        and (root.folder / stage / key).is_dir()
        and not (root.folder / stage / key / MANIFEST).exists()
    ]


def _finish_removal(root: Root, stage: str, key: str) -> str:
    try:
        with locked(root, stage, key):
            if not store.exists(root, f"{stage}/{key}/{MANIFEST}"):
                store.remove(root, f"{stage}/{key}")
            return ""
    except BusyError as busy:
        return str(busy)


def _remove_work(root: Root, stage: str, folder: Path) -> str:
    try:
        with locked(root, stage, folder.name):
            shutil.rmtree(folder, ignore_errors=True)
            return ""
    except BusyError as busy:
        return str(busy)


def _attempts(root: Root) -> list[Leftover]:
    """Return the dead attempts in a store."""
    dead = []
    for stage in _stages():
        for key in store.list_names(root, stage):
            names = [
                name for name in store.list_names(root, f"{stage}/{key}") if ATTEMPT.fullmatch(name)
            ]
            # Read after the listing, so that an attempt committed meanwhile is not a leftover.
            committed = manifests.find(root, stage, key)
            current = committed.manifest["prefix"] if committed else None
            superseded = committed.manifest.get("supersedes", ()) if committed else ()
            for name in names:
                path = f"{stage}/{key}/{name}"
                if name != current and (
                    name in superseded or time.time() - store.last_put(root, path) > UNTOUCHED_S
                ):
                    size = sum(store.file_sizes(root, path).values())
                    dead.append(Leftover(path, size, partial(_remove_attempt, root, path)))
    return dead


def _remove_attempt(root: Root, path: str) -> str:
    store.remove(root, path)
    store.abort_uploads(root, path)
    return ""
