"""Committed stage folders: content keys, manifests, and what is wrong with a folder's files.

`ROOT/<stage>/<key>/` exists once its `manifest.json` does (`infra/storage/commits.py` writes it).
Readers open files by name through `Committed.files` and never join paths by hand. Knows nothing of
what the stages do.
"""

import hashlib
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from infra.storage import store
from infra.storage.locks import is_being_read, reading_file
from infra.storage.manifest_schema import FileEntry, Manifest, read_manifest
from infra.storage.node_cache import FOLDER as CACHE
from infra.storage.stage_files import (
    DOWNLOAD_TRIES,
    FolderFiles,
    StageFiles,
    StoreFiles,
    file_sha256,
)
from infra.storage.store import Root

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

    @property
    def local_folder(self) -> Path:
        """The folder itself; only a local ROOT has it."""
        assert self.root.folder, f"{self.uri} is in a store: read it through `files`"
        return self.root.folder / self.stage / self.key

    @property
    def files(self) -> StageFiles:
        """The folder's files by name, for any process on any node."""
        if self.root.folder:
            return FolderFiles(self.local_folder)
        return StoreFiles(self.root, self.stage, self.key, self.manifest["prefix"], self.digest)


def forget_downloads(root: Root) -> None:
    """Remove this machine's downloads of folders that were removed or changed.

    Downloads that are being read stay.
    """
    stages = root.scratch / CACHE
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
    """Return the committed folder of a key, or None if there is no manifest.

    Raises StorageError for a manifest that is not one.
    """
    manifest = read_manifest(root, stage, key)
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


def _is_stored(committed: Committed, file: FileEntry) -> bool:
    """Read a file from a store and say whether it is what the manifest says; a byte that only the
    network turned gets another try.
    """
    name = f"{committed.path}/{file['path']}"
    return any(
        store.sha256_of(committed.root, name) == file["sha256"] for _ in range(DOWNLOAD_TRIES)
    )


def _differences(folder: Path, files: list[FileEntry]) -> list[str]:
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
