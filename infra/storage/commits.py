"""Commits: the step that makes a stage's files exist for readers, all at once.

In a local ROOT the folder is synced and renamed into place; one that replaces another is exchanged
for it in one step. In a store the files were put below an attempt's own prefix; the manifest names
it, is put last, and only where there is none. Of several writers one wins; the others get what it
made.
"""

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from infra.errors import DataError, StorageError
from infra.storage import store
from infra.storage.atomic_files import sync
from infra.storage.manifests import (
    Committed,
    Manifest,
    StageFacts,
    damage,
    find,
    now,
    package_versions,
)
from infra.storage.stage_files import MANIFEST, FileEntry, file_sha256
from infra.storage.stage_output import PutEntry, StageOutput, close_output
from infra.storage.store import Root
from infra.storage.temporary_folders import FOLDER, REPLACED, is_dead

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def commit(
    root: Root,
    stage: str,
    key: str,
    out: Path,
    facts: StageFacts,
    replaces: str | None = None,
) -> Committed:
    """Make the files in the local folder `out` the committed folder of `stage` and `key`.

    `facts` are the manifest's own part (config, input keys, counts, times). Where a folder of that
    key is committed already it stays and is returned, unless its attempt is the one in `replaces`
    (a damaged folder). `out` is gone afterwards. Raises StorageError.
    """
    attempt = secrets.token_hex(6)
    if root.folder:
        with store.one_line_errors(out):
            files = [_entry(path, out) for path in sorted(out.rglob("*")) if path.is_file()]
        manifest = _manifest(root, stage, key, attempt, files, facts)
        committed = _commit_by_rename(root, root.folder, stage, key, out, manifest, replaces)
    else:
        output = StageOutput(root, stage, key, attempt)
        try:
            put_files = output.put_tree(out)
            committed = _commit_by_put(output, put_files, facts, replaces)
        except BaseException:
            # If the store refuses this as well, the next commit of this key removes what is left.
            with suppress(StorageError):
                store.remove(root, output.path)
            raise
    shutil.rmtree(out, ignore_errors=True)
    return committed


def commit_output(
    output: StageOutput,
    files: Sequence[PutEntry],
    facts: StageFacts,
    replaces: str | None = None,
) -> Committed:
    """Make the files that were put into `output` the committed folder, as `commit` does.

    Files that were put but are not in `files` are removed. The output's records go. Raises
    StorageError, and DataError where a file is no longer as it was put; then it stays open.
    """
    root, stage, key = output.root, output.stage, output.key
    if root.folder:
        names = {entry["path"] for entry in files}
        for path in [path for path in output.folder.rglob("*") if path.is_file()]:
            if str(path.relative_to(output.folder)) not in names:
                path.unlink()
        manifest = _manifest(root, stage, key, secrets.token_hex(6), files, facts)
        committed = _commit_by_rename(
            root, root.folder, stage, key, output.folder, manifest, replaces
        )
    else:
        committed = _commit_by_put(output, files, facts, replaces)
    close_output(output)
    return committed


def _entry(path: Path, out: Path) -> FileEntry:
    return {
        "path": str(path.relative_to(out)),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
    }


def _manifest(
    root: Root,
    stage: str,
    key: str,
    attempt: str,
    files: Sequence[FileEntry],
    facts: StageFacts,
) -> Manifest:
    entries: list[FileEntry] = [
        {"path": file["path"], "bytes": file["bytes"], "sha256": file["sha256"]}
        for file in sorted(files, key=lambda file: file["path"])
    ]
    return {
        **facts,
        "stage": stage,
        "key": key,
        "files": entries,
        "digest": hashlib.sha256(store.json_bytes(entries)).hexdigest(),
        "packages": package_versions(),
        "attempt": attempt,
        "prefix": "" if root.folder else attempt,
        "finished": now(),
    }


def _commit_by_rename(
    root: Root,
    folder: Path,
    stage: str,
    key: str,
    out: Path,
    manifest: Manifest,
    replaces: str | None,
) -> Committed:
    target = folder / stage / key
    with store.one_line_errors(target):
        (out / MANIFEST).write_bytes(store.json_bytes(manifest))
        _sync_tree(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            existing = find(root, stage, key)
            if existing and existing.manifest["attempt"] != replaces:
                return existing
            if _exchange(out, target):
                before = _attempt_in(out)
                # Another machine's repair was first: its folder stays.
                if before not in (None, replaces):
                    _exchange(out, target)
                sync(target.parent)
                return Committed(root, stage, key, _manifest_in(target))
            target.rename(out.with_name(f"{out.name}{REPLACED}"))
        try:
            out.rename(target)
        except OSError:
            existing = find(root, stage, key)
            if existing is None:
                raise
            return existing  # a writer without our lock (another machine) was first
        sync(target.parent)
    shutil.rmtree(out.with_name(f"{out.name}{REPLACED}"), ignore_errors=True)
    return Committed(root, stage, key, manifest)


def _exchange(left: Path, right: Path) -> bool:
    """Exchange two folders in one step (Linux: renameat2).

    Returns False if the system or the file system cannot do that.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(left), AT_FDCWD, os.fsencode(right), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(right))


def interrupted(root: Root) -> list[tuple[str, str]]:
    """Return stage and key of the folders that a killed writer moved away without replacing them.

    That happens only on systems that cannot exchange folders.
    """
    left = [
        _manifest_in(folder)
        for folder in (root.scratch / FOLDER).glob(f"*{REPLACED}")
        if (folder / MANIFEST).is_file()
    ]
    return sorted({(entry["stage"], entry["key"]) for entry in left})


def recover(root: Root, stage: str, key: str) -> None:
    """Restore a folder that a killed writer moved away, or remove it if it has been replaced.

    The caller holds the folder's lock.
    """
    for left in sorted((root.scratch / FOLDER).glob(f"{stage}-{key}*{REPLACED}")):
        with store.one_line_errors(left):
            if (
                root.folder
                and (left / MANIFEST).is_file()
                and not (root.folder / stage / key).exists()
            ):
                left.rename(root.folder / stage / key)
            elif is_dead(left):  # a live writer on another machine removes it itself
                shutil.rmtree(left)


def _manifest_in(folder: Path) -> Manifest:
    manifest: Manifest = json.loads((folder / MANIFEST).read_bytes())
    return manifest


def _attempt_in(folder: Path) -> str | None:
    return str(_manifest_in(folder)["attempt"]) if (folder / MANIFEST).is_file() else None


def _commit_by_put(
    output: StageOutput, files: Sequence[PutEntry], facts: StageFacts, replaces: str | None
) -> Committed:
    root, stage, key, attempt = output.root, output.stage, output.key, output.attempt
    folder = f"{stage}/{key}"
    sent = Committed(root, stage, key, _manifest(root, stage, key, attempt, files, facts))
    _check_put(sent, files, replaces)
    # Listed before the manifest is put, so that a later commit is not removed with the attempts
    # that were killed or can only be refused now.
    others = [other for other in store.list_names(root, folder) if other not in (attempt, MANIFEST)]
    sent.manifest["supersedes"] = others  # whoever cleans up removes them if we are killed first
    committed = _put_manifest(sent, replaces)
    if committed.manifest["attempt"] != attempt:
        store.remove(root, f"{folder}/{attempt}")
        return committed
    for other in others:
        store.remove(root, f"{folder}/{other}")
    store.abort_uploads(root, folder)
    return sent


def _check_put(sent: Committed, files: Sequence[PutEntry], replaces: str | None) -> None:
    """Raise DataError if a file is missing, truncated or no longer the version that was put.

    Not if another attempt is committed meanwhile: it may have removed these files as superseded.
    """
    wrong = damage(sent) or _replaced_file(sent, files)
    existing = find(sent.root, sent.stage, sent.key)
    if wrong and (existing is None or existing.manifest["attempt"] == replaces):
        raise DataError(f"{sent.uri}: {wrong} after the upload; run the same command again")


def _replaced_file(sent: Committed, files: Sequence[PutEntry]) -> str:
    """Return the first file that another process has put again, or ""."""
    versions = store.etags(sent.root, sent.path)
    changed = [f["path"] for f in files if f.get("etag", "") not in ("", versions[f["path"]])]
    return f"{changed[0]} was put again by another process" if changed else ""


def _put_manifest(sent: Committed, replaces: str | None) -> Committed:
    """Put the manifest if there is none, or that of the attempt `replaces`; return what is there.

    That is `sent` also if the answer to our write was lost.
    """

    def put(old: bytes | None) -> bytes | None:
        is_free = old is None or json.loads(old)["attempt"] == replaces
        return store.json_bytes(sent.manifest) if is_free else None

    store.change_bytes(sent.root, f"{sent.stage}/{sent.key}/{MANIFEST}", put)
    committed = find(sent.root, sent.stage, sent.key)
    assert committed, "a manifest was put, or there is one that refused it"
    return committed


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent) / name)
        sync(Path(parent))
