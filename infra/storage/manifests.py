"""Committed stage folders: content keys, manifests, and the commit that makes a folder exist.

`ROOT/<stage>/<key>/` exists once its `manifest.json` does. In a local ROOT the whole folder is
written to a temporary folder, synced and renamed into place. In an object store the files go below
an attempt's own prefix, which the manifest names, and the manifest is put last and only if there is
none. A replacement takes effect in one step in both. Readers use `Committed.local()` and never join
paths by hand. Knows nothing of what the stages do.
"""

import ctypes
import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, NotRequired, TypedDict

from infra.console.progress import transfer
from infra.errors import DataError, StorageError
from infra.storage import store
from infra.storage.atomic_files import sync
from infra.storage.locks import is_being_read, reading_file
from infra.storage.store import Root
from infra.storage.temporary_folders import FOLDER, REPLACED, is_dead, writing_folder

MANIFEST = "manifest.json"
PACKAGES = (
    "unclip",
    "torch",
    "ray",
    "prefect",
    "img2dataset",
    "faiss-cpu",
    "pyarrow",
    "numpy",
    "tokenizers",
    "safetensors",
    "pydantic",
)
UPLOAD_THREADS = 8
DOWNLOAD_TRIES = 3
AT_FDCWD, RENAME_EXCHANGE = -100, 2


StageCounts = TypedDict(
    "StageCounts",
    {
        "in": int,
        "out": int,
        "dropped": dict[str, int],
        "images_seen": NotRequired[int],
        "loss": NotRequired[float],
    },
)
"""How many samples a stage read, wrote and dropped by reason; stages may add figures of their own.

`images_seen` and `loss` (the last one) are those of training.
"""


class ManifestFile(TypedDict):
    """One file of a committed folder; `path` is relative to it."""

    path: str
    bytes: int
    sha256: str


class StageFacts(TypedDict):
    """The fields of a manifest that the stage's caller gives."""

    stage_version: int
    sections: dict[str, Any]
    """The config fields that the key depends on, by section; None for a section that is absent."""
    inputs: dict[str, str]
    """Keys of the input folders by stage."""
    input_digests: dict[str, str]
    counts: StageCounts
    started: str
    config: NotRequired[dict[str, Any]]
    """The whole resolved recipe."""
    compacted_from: NotRequired[list[str]]
    """Digests of this folder before each compaction."""
    compacted: NotRequired[str]
    clip_digest: NotRequired[str]
    """Of an addition: digest of the CLIP that embedded it."""
    embeddings: NotRequired[bool]
    """Of an addition: whether it was added as embeddings, without images."""
    merged_from: NotRequired[list[str]]
    """Of a merged addition: digests of those that it replaces."""


class Manifest(StageFacts):
    """The content of `manifest.json`."""

    stage: str
    key: str
    files: list[ManifestFile]
    digest: str
    """SHA-256 over the list of files."""
    packages: dict[str, str]
    attempt: str
    """Random name of the commit."""
    prefix: str
    """Folder of the files below the manifest's in a store; "" if ROOT is local."""
    finished: str
    supersedes: NotRequired[list[str]]
    """Attempts in the store that this commit replaces, until they are removed."""


@dataclass(frozen=True)
class Committed:
    """A committed folder of a stage; reading it never waits for a writer."""

    root: Root
    stage: str
    key: str
    manifest: Manifest

    @property
    def uri(self) -> str:
        """The folder's location for people and outside tools."""
        return store.uri_of(self.root, self.path)

    @property
    def path(self) -> str:
        """The location of the files, relative to ROOT."""
        return f"{self.stage}/{self.key}/{self.manifest['prefix']}".rstrip("/")

    @property
    def digest(self) -> str:
        """SHA-256 over the names and contents of the files: equal digests mean equal folders."""
        return str(self.manifest["digest"])

    def local(self) -> Path:
        """Return a local folder with the files: the folder itself, or a checked download.

        The download stays in the scratch folder. Raises DataError if it does not match the
        manifest.
        """
        if self.root.folder:
            return self.root.folder / self.stage / self.key
        cache_folder = downloads(self.root, self.stage) / f"{self.key}-{self.digest[:8]}"
        if not cache_folder.is_dir():
            self._cache(cache_folder, self.manifest["files"])
        return cache_folder

    def files(self, pattern: str) -> list[Path]:
        """Return local copies of the files whose path matches a glob, sorted.

        From a store only these files are downloaded. Raises DataError as `local` does.
        """
        whole = downloads(self.root, self.stage) / f"{self.key}-{self.digest[:8]}"
        if self.root.folder or whole.is_dir():
            return sorted(self.local().glob(pattern))
        chosen = [
            file
            for file in self.manifest["files"]
            if PurePosixPath(f"/{file['path']}").match(f"/{pattern}")
        ]
        part_folder = whole.with_name(
            f"{whole.name}-{hashlib.sha256(pattern.encode()).hexdigest()[:8]}"
        )
        if not part_folder.is_dir():
            self._cache(part_folder, chosen)
        return [part_folder / path for path in sorted(file["path"] for file in chosen)]

    def _cache(self, cache_folder: Path, files: list[ManifestFile]) -> None:
        """Download files of this folder into `cache_folder`, which appears when it is complete."""
        with (
            store.one_line_errors(cache_folder),
            writing_folder(
                self.root.scratch, f"download-{self.stage}-{cache_folder.name}"
            ) as folder,
        ):
            self._download(folder, files)
            cache_folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.rename(cache_folder)
            except OSError:
                if (
                    not cache_folder.is_dir()
                ):  # else another process has downloaded the same folder first
                    raise

    def _download(self, folder: Path, files: list[ManifestFile]) -> None:
        total = sum(file["bytes"] for file in files)
        with (
            transfer(f"{self.stage} down", total) as tell,
            ThreadPoolExecutor(UPLOAD_THREADS) as pool,
        ):
            broken = [
                wrong
                for wrong in pool.map(lambda file: self._download_one(file, folder, tell), files)
                if wrong
            ]
        if broken:
            raise DataError(
                f"{self.uri}: {broken[0]}; run again to download it again, or remove the folder "
                "to make it again"
            )
        (folder / MANIFEST).write_bytes(store.json_bytes(self.manifest))

    def _download_one(self, file: ManifestFile, folder: Path, tell: Callable[[int], None]) -> str:
        """Download a file, up to DOWNLOAD_TRIES times while it does not match the manifest.

        Returns what is wrong with the last download, or "".
        """
        wrong: list[str] = []
        for _ in range(DOWNLOAD_TRIES):
            store.download(self.root, f"{self.path}/{file['path']}", folder / file["path"], tell)
            wrong = _differences(folder, [file])
            if not wrong:
                return ""
            tell(-(folder / file["path"]).stat().st_size)
        return wrong[0]


def downloads(root: Root, stage: str) -> Path:
    """Return the folder of this machine's downloads of a stage, for a ROOT that is not local."""
    return root.scratch / "cache" / stage


def forget_downloads(root: Root) -> None:
    """Remove this machine's downloads of folders that were removed or changed.

    Downloads that are being read stay.
    """
    stages = downloads(root, "")
    if root.folder or not stages.is_dir():
        return
    for cached in sorted(stages.glob("*/*-*")):
        key, digest = cached.name.lstrip(".").split("-")[:2]
        if is_being_read(reading_file(root.scratch, cached.parent.name, key)):
            continue
        now = find(root, cached.parent.name, key)
        if now is None or not now.digest.startswith(digest[:8]):
            shutil.rmtree(cached, ignore_errors=True)


def content_key(
    stage: str, version: int, sections: Mapping[str, Any], inputs: Mapping[str, str]
) -> str:
    """Return the content key of a stage's output, 16 hex digits.

    It is a hash of the stage's name, code version, config sections and the keys of its inputs.
    """
    what = {"stage": stage, "version": version, "sections": dict(sections), "inputs": dict(inputs)}
    return hashlib.sha256(store.json_bytes(what)).hexdigest()[:16]


def find(root: Root, stage: str, key: str) -> Committed | None:
    """Return the committed folder of a key, or None if there is no manifest."""
    manifest = store.read_json(root, f"{stage}/{key}/{MANIFEST}")
    return Committed(root, stage, key, manifest) if manifest is not None else None


def newest(root: Root, stage: str) -> Committed | None:
    """Return the folder of a stage that was committed last, under any key, or None."""
    committed = (find(root, stage, key) for key in store.list_names(root, stage))
    return max(
        (entry for entry in committed if entry),
        key=lambda entry: entry.manifest["finished"],
        default=None,
    )


def damage(committed: Committed) -> str:
    """Return what is wrong with the first file that is missing or has the wrong size, or "".

    Reads no contents.
    """
    sizes = store.file_sizes(committed.root, committed.path)
    for file in committed.manifest["files"]:
        if file["path"] not in sizes:
            return f"{file['path']} is missing"
        if sizes[file["path"]] != file["bytes"]:
            return f"{file['path']} has {sizes[file['path']]:,} bytes, not {file['bytes']:,}"
    return ""


def verify(committed: Committed) -> list[str]:
    """Read every file of a folder; return the differences from the manifest's sizes and checksums.

    The list is empty if there are none.
    """
    folder = committed.root.folder
    if folder:
        return _differences(folder / committed.stage / committed.key, committed.manifest["files"])
    wrong = damage(committed)
    if wrong:
        return [wrong]
    files = committed.manifest["files"]
    return [f"{f['path']} has another checksum" for f in files if not _is_stored(committed, f)]


def _is_stored(committed: Committed, file: ManifestFile) -> bool:
    """Read a file from a store and return whether its checksum is the manifest's.

    A difference is read again, because the network may have flipped a byte.
    """
    name = f"{committed.path}/{file['path']}"
    return any(
        store.sha256_of(committed.root, name) == file["sha256"] for _ in range(DOWNLOAD_TRIES)
    )


def _differences(folder: Path, files: list[ManifestFile]) -> list[str]:
    wrong = []
    for file in files:
        path = folder / file["path"]
        if not path.is_file():
            wrong.append(f"{file['path']} is missing")
        elif path.stat().st_size != file["bytes"]:
            wrong.append(f"{file['path']} has {path.stat().st_size:,} bytes, not {file['bytes']:,}")
        elif file_sha256(path) != file["sha256"]:
            wrong.append(f"{file['path']} has another checksum")
    return wrong


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a local file in hexadecimal; reads it in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results may depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def now() -> str:
    """Return the time in UTC to the microsecond, sortable as text."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def commit(
    root: Root,
    stage: str,
    key: str,
    out: Path,
    facts: StageFacts,
    replaces: str | None = None,
) -> Committed:
    """Commit the files in `out` as the folder of `stage` and `key`, and return it.

    A folder that is already committed under that key stays and is returned, unless its attempt is
    `replaces` (a damaged folder). Removes `out`. Raises StorageError.
    """
    with store.one_line_errors(out):
        files: list[ManifestFile] = [
            {
                "path": str(path.relative_to(out)),
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
            }
            for path in sorted(out.rglob("*"))
            if path.is_file()
        ]
    attempt = secrets.token_hex(6)
    manifest: Manifest = {
        **facts,
        "stage": stage,
        "key": key,
        "files": files,
        "digest": hashlib.sha256(store.json_bytes(files)).hexdigest(),
        "packages": package_versions(),
        "attempt": attempt,
        "prefix": "" if root.folder else attempt,
        "finished": now(),
    }
    if root.folder:
        committed = _commit_by_rename(root, root.folder, stage, key, out, manifest, replaces)
    else:
        committed = _commit_by_put(root, stage, key, out, manifest, replaces)
    shutil.rmtree(out, ignore_errors=True)
    return committed


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
    root: Root, stage: str, key: str, out: Path, manifest: Manifest, replaces: str | None
) -> Committed:
    folder, attempt = f"{stage}/{key}", manifest["attempt"]
    sent = Committed(root, stage, key, manifest)
    try:
        _upload(sent, out)
        _check_upload(sent, replaces)
    except BaseException:
        # If the store refuses this as well, the next commit of this key removes what is left.
        with suppress(StorageError):
            store.remove(root, f"{folder}/{attempt}")
        raise
    # Listed before the manifest is put, so that a later commit is not removed with the attempts
    # that were killed or can only be refused now.
    others = [other for other in store.list_names(root, folder) if other not in (attempt, MANIFEST)]
    manifest["supersedes"] = others  # whoever cleans up removes them if we are killed before that
    committed = _put_manifest(sent, replaces)
    if committed.manifest["attempt"] != attempt:
        store.remove(root, f"{folder}/{attempt}")
        return committed
    for other in others:
        store.remove(root, f"{folder}/{other}")
    store.abort_uploads(root, folder)
    return sent


def _upload(sent: Committed, out: Path) -> None:
    """Upload the files in `out` below the attempt's own prefix."""
    files = sent.manifest["files"]
    total = sum(file["bytes"] for file in files)
    with (
        transfer(f"{sent.stage} up", total) as tell,
        ThreadPoolExecutor(UPLOAD_THREADS) as pool,
    ):
        paths = [file["path"] for file in files]
        uploads = pool.map(
            lambda path: store.upload(sent.root, out / path, f"{sent.path}/{path}", tell), paths
        )
        for _ in uploads:  # raises the error of a failed upload
            pass


def _check_upload(sent: Committed, replaces: str | None) -> None:
    """Raise DataError if an uploaded file is missing or truncated.

    Not if another attempt is committed meanwhile: it may have removed these files as superseded.
    """
    wrong = damage(sent)
    existing = find(sent.root, sent.stage, sent.key)
    if wrong and (existing is None or existing.manifest["attempt"] == replaces):
        raise DataError(f"{sent.uri}: {wrong} after the upload; run the same command again")


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
