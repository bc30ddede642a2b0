"""Commits: make all files of a stage visible to readers in one atomic step.

In a local ROOT, the folder is synced and renamed to its final name; to replace a damaged folder,
the two are exchanged atomically. In a store, the files are already below the attempt's prefix; the
manifest, which names that prefix, is put last, and only if there is none. If several writers commit
the same key, one wins, and the others return its result.
"""

import ctypes
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from infra.errors import DataError, StorageError
from infra.storage import store
from infra.storage.atomic_files import sync
from infra.storage.manifest_schema import MANIFEST, MANIFESTS, FileEntry, Manifest, StageFacts
from infra.storage.manifests import Committed, damage, find, now, package_versions
from infra.storage.stage_files import file_sha256
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

    `facts`: the stage's fields of the manifest (config, input keys, counts, times). If a folder of
    that key is already committed, it is kept and returned, unless its attempt is `replaces` (a
    damaged folder). `out` is removed. Raises StorageError.
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
            # If this fails too, the next commit of this key removes the files.
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
    """Commit the files that were put into `output`, like `commit`.

    Other files and the records of the output are removed. Raises StorageError, and DataError if a
    file has changed since it was put; then nothing is committed and the output stays open.
    """
    root, stage, key = output.root, output.stage, output.key
    names = {entry["path"] for entry in files}
    if root.folder:
        for path in [path for path in output.folder.rglob("*") if path.is_file()]:
            if str(path.relative_to(output.folder)) not in names:
                path.unlink()
        manifest = _manifest(root, stage, key, secrets.token_hex(6), files, facts)
        committed = _commit_by_rename(
            root, root.folder, stage, key, output.folder, manifest, replaces
        )
    else:
        for name in store.file_sizes(root, output.path).keys() - names:
            store.remove(root, f"{output.path}/{name}")
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
                # Another machine has already replaced the damaged folder: its folder is kept.
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
            return existing  # a writer on another machine, without our lock, was first
        sync(target.parent)
    shutil.rmtree(out.with_name(f"{out.name}{REPLACED}"), ignore_errors=True)
    return Committed(root, stage, key, manifest)


def _exchange(left: Path, right: Path) -> bool:
    """Exchange two folders atomically (renameat2 of Linux).

    Returns False if the system or the file system does not support it. Raises OSError.
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
    """Return (stage, key) of folders that a killed writer moved away but did not replace.

    This happens only on systems that cannot exchange folders atomically.
    """
    left = [
        _manifest_in(folder)
        for folder in (root.scratch / FOLDER).glob(f"*{REPLACED}")
        if (folder / MANIFEST).is_file()
    ]
    return sorted({(entry["stage"], entry["key"]) for entry in left})


def recover(root: Root, stage: str, key: str) -> None:
    """Restore a folder that a killed writer moved away; remove it if it was replaced.

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
            elif is_dead(left):  # a running writer on another machine removes its own
                shutil.rmtree(left)


def _manifest_in(folder: Path) -> Manifest:
    file = folder / MANIFEST
    return MANIFESTS.parse(file.read_bytes(), str(file))


def _attempt_in(folder: Path) -> str | None:
    return str(_manifest_in(folder)["attempt"]) if (folder / MANIFEST).is_file() else None


def _commit_by_put(
    output: StageOutput, files: Sequence[PutEntry], facts: StageFacts, replaces: str | None
) -> Committed:
    root, stage, key, attempt = output.root, output.stage, output.key, output.attempt
    folder = f"{stage}/{key}"
    sent = Committed(root, stage, key, _manifest(root, stage, key, attempt, files, facts))
    _check_put(sent, files, replaces)
    # List the other attempts before the manifest is put. They were killed or will lose against this
    # commit. A list made later could contain the files of a later commit.
    others = [other for other in store.list_names(root, folder) if other not in (attempt, MANIFEST)]
    sent.manifest["supersedes"] = others  # if we are killed, the clean-up removes them
    committed = _put_manifest(sent, replaces)
    if committed.manifest["attempt"] != attempt:
        store.remove(root, f"{folder}/{attempt}")
        return committed
    for other in others:
        store.remove(root, f"{folder}/{other}")
    store.abort_uploads(root, folder)
    return sent


def _check_put(sent: Committed, files: Sequence[PutEntry], replaces: str | None) -> None:
    """Raise DataError if a file is missing, truncated or not the version that was put.

    Does not raise if another attempt was committed in the meantime, which may have removed these
    files as superseded.
    """
    wrong = damage(sent) or _replaced_file(sent, files)
    existing = find(sent.root, sent.stage, sent.key)
    if wrong and (existing is None or existing.manifest["attempt"] == replaces):
        raise DataError(f"{sent.uri}: {wrong} after the upload; run the same command again")


def _replaced_file(sent: Committed, files: Sequence[PutEntry]) -> str:
    """Return a message about the first file that another process has replaced, or ""."""
    versions = store.etags(sent.root, sent.path)
    changed = [f["path"] for f in files if f.get("etag", "") not in ("", versions.get(f["path"]))]
    return f"{changed[0]} was replaced by another process" if changed else ""


def _put_manifest(sent: Committed, replaces: str | None) -> Committed:
    """Put the manifest if there is none or its attempt is `replaces`; return the committed folder.

    The manifest is read back, so the result is right even if the response to the write was lost.
    """

    name = f"{sent.stage}/{sent.key}/{MANIFEST}"

    def put(old: bytes | None) -> bytes | None:
        is_free = (
            old is None
            or MANIFESTS.parse(old, store.uri_of(sent.root, name))["attempt"] == replaces
        )
        return store.json_bytes(sent.manifest) if is_free else None

    store.change_bytes(sent.root, name, put)
    committed = find(sent.root, sent.stage, sent.key)
    assert committed, "change_bytes put our manifest, or there was one already"
    return committed


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent) / name)
        sync(Path(parent))
