"""A ROOT on any fsspec store: plain functions over names relative to it (`runs/quickstart.json`).

A local folder is written through the operating system (rename, fsync), everything else through
fsspec (a whole object appears at once, `create` is conditional). Temporary network faults (503, a
cut connection, a body that fails its checksum) are retried. Knows nothing of stages and manifests.
Every failure is one line: `StorageError` or `CallerError`.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pydantic_core import from_json

from infra.errors import CallerError, StorageAwayError, StorageError, UnclipError
from infra.storage.atomic_files import atomic_file
from infra.storage.locks import writer_lock
from infra.storage.retry import is_passing, retry
from infra.storage.scratch import DEFAULT_BYTES, scratch_bytes, scratch_for

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
PIECE_BYTES = 8 << 20
CHANGE_TRIES = 50
MAX_JSON_BYTES = 64 << 20
"""Largest JSON file that is read: the manifest of a stage with 100,000 shards has half of it."""
REMOVE = "remove it and run again"
S3_OPTIONS = {
    "use_listings_cache": False,  # other processes write the same bucket
    # fsspec would hand out a client with the credentials of an earlier environment
    "skip_instance_cache": True,
    "config_kwargs": {"retries": {"mode": "standard", "max_attempts": 4}},  # backs off with jitter
}
IDENTITY = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "UNCLIP_SCRATCH_BYTES")
"""Variables of the environment that make a ROOT of the same URI another one."""
FULL_DISK_TEXT = re.compile(
    r"No space left on device|Disk quota exceeded|\d+ requested and \d+ written"
)
"""In messages without an error number; the last is numpy's."""


@dataclass(frozen=True)
class Root:
    """A store and the path of one ROOT in it."""

    uri: str
    fs: fsspec.AbstractFileSystem
    path: str
    folder: Path | None
    """The folder itself if ROOT is local, else None."""
    scratch: Path
    """A local folder for what is not committed; inside ROOT where ROOT is local."""
    scratch_bytes: int = DEFAULT_BYTES
    """How much of a store's scratch folder this node may use."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as an address: each process opens it anew, with its own node's scratch folder."""
        return (reopen, (self.uri, self.scratch if self.folder else None))


def reopen(uri: str, scratch: Path | None) -> Root:
    """Open a ROOT that another process has opened; a store gets this node's scratch folder."""
    return _reopen(uri, scratch or scratch_for(uri), *(os.environ.get(name) for name in IDENTITY))


@lru_cache(maxsize=16)
def _reopen(uri: str, scratch: Path | None, *identity: str | None) -> Root:
    return open_root(uri, scratch, for_writing=False)


def open_root(uri: str, scratch: Path | None = None, for_writing: bool = True) -> Root:
    """Open a ROOT: a folder, `file://…` or any fsspec URL such as `s3://bucket/prefix`.

    `scratch` is the local folder for unfinished work; a store that is not local needs one.
    Credentials come from the environment only. Raises CallerError for a URL that cannot be a ROOT,
    and StorageError for one that cannot be read or, with `for_writing`, written.
    """
    try:
        fs, path = (
            url_to_fs(uri, **S3_OPTIONS) if uri.startswith(("s3://", "s3a://")) else url_to_fs(uri)
        )
    except (ValueError, ImportError) as error:
        raise CallerError(
            f"--root {uri}: {error}; give a folder or an URL such as s3://bucket/prefix"
        ) from None
    if isinstance(fs, LocalFileSystem):
        folder = Path(path).absolute()
        if folder.exists() and not folder.is_dir():
            raise CallerError(f"--root {uri} is a file: give a folder")
        root = Root(str(folder), fs, str(folder), folder, scratch or folder / "work")
    else:
        if "@" in uri.partition("://")[2]:
            raise CallerError(
                "--root must not hold credentials: give them in the environment "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
        if scratch is None:
            raise CallerError(
                f"--root {uri}: a store that is not a local folder needs a scratch folder"
            )
        root = Root(uri.rstrip("/"), fs, path.rstrip("/"), None, scratch, scratch_bytes())
    if for_writing:
        _probe(root)
    return root


def _probe(root: Root) -> None:
    """Write and remove a small file, so that an unwritable ROOT fails before any work."""
    name = f"work/.probe-{secrets.token_hex(4)}"
    try:
        with one_line_errors(root.uri):
            root.scratch.mkdir(parents=True, exist_ok=True)
            write_bytes(root, name, b"unclip")
            remove(root, name)
    except FileNotFoundError as error:
        raise StorageError(
            f"cannot write {root.uri}: {error.strerror or error}; choose another --root, or make "
            "the bucket first"
        ) from error


@contextmanager
def one_line_errors(where: str | Path) -> Iterator[None]:
    """Turn errors of disks and stores into a StorageError of one line with the location and fix.

    It is a StorageAwayError if the failure is temporary, so that a later try may succeed. A missing
    file stays a FileNotFoundError, because callers handle it.
    """
    try:
        yield
    except (UnclipError, FileNotFoundError):
        raise
    except Exception as error:
        line = complaint(error, where)
        if line is None:
            raise
        raise (StorageAwayError if _may_pass(error) else StorageError)(line) from error


def _may_pass(error: BaseException | None) -> bool:
    while error is not None:
        if is_passing(error):
            return True
        error = error.__cause__
    return False


def complaint(error: BaseException, where: str | Path) -> str | None:
    """Return the message for a storage error, or None for any other error.

    Searches the causes, because Arrow, safetensors and Ray wrap the error of a full disk.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        named = getattr(seen, "filename", None)
        location = str(named) if isinstance(named, str | Path) else str(where)
        if number in FULL_DISK or FULL_DISK_TEXT.search(str(seen)):
            return (
                f"no space left to write {location}: free some space and run the same command "
                "again (what is committed is kept)"
            )
        if number in REFUSED or isinstance(seen, PermissionError):
            reason = os.strerror(number) if number else seen
            if "://" in str(where):
                return (
                    f"cannot write {where}: {reason}; check the credentials in the environment and "
                    "what they may do"
                )
            return f"cannot write {location}: {reason}; choose another --root or change its rights"
        seen = seen.__cause__ or seen.__context__
    module = type(error).__module__.partition(".")[0]
    if module in ("botocore", "aiobotocore", "s3fs", "aiohttp", "fsspec") or (
        isinstance(error, OSError) and "://" in str(where)
    ):
        detail = " ".join(str(error).split()) or type(error).__name__
        return (
            f"cannot use {where}: {detail}; check the URL, the credentials in the environment and "
            "the network"
        )
    return None


def join(root: Root, name: str) -> str:
    """Return the path of `name` in the store."""
    return f"{root.path}/{name}" if name else root.path


def uri_of(root: Root, name: str) -> str:
    """Return the URI of `name`, for people and other tools."""
    return f"{root.uri}/{name}"


def exists(root: Root, name: str) -> bool:
    """Return whether a file or folder of that name exists."""
    if root.folder:
        return (root.folder / name).exists()
    with one_line_errors(uri_of(root, name)):
        return bool(retry(lambda: root.fs.exists(join(root, name))))


def read_bytes(root: Root, name: str) -> bytes:
    """Read a whole file. Raises FileNotFoundError."""
    if root.folder:
        return (root.folder / name).read_bytes()
    with one_line_errors(uri_of(root, name)):
        return bytes(retry(lambda: root.fs.cat_file(join(root, name))))


def read_range(root: Root, name: str, offset: int, size_bytes: int) -> bytes:
    """Read a part of a file; fewer bytes where it ends before. Raises FileNotFoundError."""
    if root.folder:
        with (root.folder / name).open("rb") as file:
            return os.pread(file.fileno(), size_bytes, offset)
    with one_line_errors(uri_of(root, name)):
        path = join(root, name)
        return bytes(retry(lambda: root.fs.cat_file(path, start=offset, end=offset + size_bytes)))


def read_bounded(root: Root, name: str, max_bytes: int, mend: str = REMOVE) -> bytes:
    """Read a whole file of at most `max_bytes`.

    Raises FileNotFoundError, and StorageError with `mend` for a larger file or a FIFO.
    """
    where = uri_of(root, name)
    if root.folder is None:
        data = read_bytes(root, name)
    else:
        # Does not wait for the writer of a FIFO.
        handle = os.open(root.folder / name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            about = os.fstat(handle)
            if not stat.S_ISREG(about.st_mode):
                raise StorageError(f"{where} is not a regular file: {mend}")
            if about.st_size > max_bytes:
                raise StorageError(too_large(where, max_bytes, mend))
            data = os.pread(handle, about.st_size, 0)
        finally:
            os.close(handle)
    if len(data) > max_bytes:
        raise StorageError(too_large(where, max_bytes, mend))
    return data


def too_large(where: str, max_bytes: int, mend: str) -> str:
    """Return the message about a file that is too large to be ours."""
    return f"{where} has more than {max_bytes:,} bytes: {mend}"


def not_json(where: str, reason: object, mend: str = REMOVE) -> str:
    """Return the message about a file that is not JSON."""
    return f"{where} is not JSON ({reason}): {mend}"


def read_json(
    root: Root, name: str, max_bytes: int = MAX_JSON_BYTES, mend: str = REMOVE
) -> Any | None:
    """Read a JSON file; return None if there is none.

    Raises StorageError with `mend` if it is larger than `max_bytes`, not JSON, or nested too
    deeply.
    """
    try:
        return from_json(read_bounded(root, name, max_bytes, mend))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise StorageError(not_json(uri_of(root, name), error, mend)) from None


def sha256_of(root: Root, name: str) -> str:
    """Return the SHA-256 of a file in hexadecimal; reads it in pieces."""

    def read() -> str:
        file: Any = (
            (root.folder / name).open("rb") if root.folder else root.fs.open(join(root, name), "rb")
        )
        digest = hashlib.sha256()
        with file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    with one_line_errors(uri_of(root, name)):
        return retry(read)


def write_bytes(root: Root, name: str, data: bytes) -> None:
    """Write a file; readers see the old file or the new one, never a part."""
    if root.folder is None:
        with one_line_errors(uri_of(root, name)):
            retry(lambda: root.fs.pipe_file(join(root, name), data))
        return
    target = root.folder / name
    with one_line_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as part:
            part.write_bytes(data)


def write_json(root: Root, name: str, value: Any) -> None:
    """Write a JSON file as `write_bytes` does."""
    write_bytes(root, name, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return JSON for people and for hashing: sorted keys, indented, one newline at the end."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def create_bytes(root: Root, name: str, data: bytes) -> None:
    """Write an object if there is none (If-None-Match on S3). Raises FileExistsError otherwise.

    Not for local folders. If the answer to the write was lost, the existing object may be the
    caller's own: the caller must compare.
    """
    assert root.folder is None, "a local folder commits by rename"
    path = join(root, name)

    def create() -> bool:
        try:
            root.fs.pipe_file(path, data, mode="create")
            return True
        except FileExistsError:
            return False
        except OSError:
            # Some servers answer 412 without saying which condition failed: look for the object.
            if root.fs.exists(path):
                return False
            raise

    with one_line_errors(uri_of(root, name)):
        if retry(create):
            return
    raise FileExistsError(uri_of(root, name))


def change_bytes(
    root: Root, name: str, change: Callable[[bytes | None], bytes | None]
) -> bytes | None:
    """Replace a file's content by `change(content)` and return the content after that.

    Never overwrites what another writer puts meanwhile. `change` gets None if there is no file, and
    returns None to leave the file as it is. It may be called again with newer content, which is its
    own if the answer to the write was lost. Uses a lock in a local folder and a conditional write
    (If-Match, If-None-Match) in S3. Raises StorageError if others keep changing the file.
    """
    if root.folder is not None:
        lock = root.scratch / "locks" / f"{name.replace('/', '-')}.lock"
        with one_line_errors(lock), writer_lock(lock, name, lambda _: None):
            old = read_bytes(root, name) if exists(root, name) else None
            new = change(old)
            if new is not None:
                write_bytes(root, name, new)
            return old if new is None else new
    with one_line_errors(uri_of(root, name)):
        for _ in range(CHANGE_TRIES):
            version, old = _read_version(root, name)
            new = change(old)
            if new is None:
                return old
            if _put_over(root, name, new, version):
                return new
    raise StorageError(
        f"{uri_of(root, name)} is changed by others all the time: run the same command again"
    )


def _read_version(root: Root, name: str) -> tuple[str | None, bytes | None]:
    """Return an object's ETag and content, or (None, None) if there is no object.

    The ETag is "" if the store has none, and is never newer than the content.
    """
    path = join(root, name)
    try:
        version = str(retry(lambda: root.fs.info(path)).get("ETag") or "")
        return version, bytes(retry(lambda: root.fs.cat_file(path)))
    except FileNotFoundError:
        return None, None


def _put_over(root: Root, name: str, data: bytes, version: str | None) -> bool:
    """Write an object if it still has the ETag `version`, or for None if there is still none.

    Returns whether it was written.
    """
    path = join(root, name)
    if version is None:
        try:
            create_bytes(root, name, data)
        except FileExistsError:
            return False
        return True

    def put() -> bool:
        try:
            root.fs.pipe_file(path, data, **({"IfMatch": version} if version else {}))
            return True
        except OSError:
            try:
                if root.fs.info(path).get("ETag") == version:
                    raise
            except FileNotFoundError:
                pass
            return False

    return bool(retry(put))


def list_names(root: Root, name: str) -> list[str]:
    """Return the names directly below `name`, sorted, without those that start with a dot.

    The list is empty if `name` does not exist.
    """
    if root.folder:
        folder = root.folder / name
        return (
            sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
            if folder.is_dir()
            else []
        )
    with one_line_errors(uri_of(root, name)):
        try:
            # Another writer may have changed the listing since this process last read it.
            paths = retry(lambda: root.fs.ls(join(root, name), detail=False, refresh=True))
        except FileNotFoundError:
            return []
    names = {str(path).rstrip("/").rpartition("/")[2] for path in paths}
    return sorted(entry for entry in names if entry and not entry.startswith("."))


def file_sizes(root: Root, name: str) -> dict[str, int]:
    """Return the sizes in bytes of all files at any depth below `name`, by relative path."""
    if root.folder:
        base = root.folder / name
        return {
            str(path.relative_to(base)): path.stat().st_size
            for path in base.rglob("*")
            if path.is_file()
        }
    base_path = join(root, name).strip("/")
    with one_line_errors(uri_of(root, name)):
        root.fs.invalidate_cache()
        infos = retry(lambda: root.fs.find(join(root, name), detail=True))
    return {
        str(path).strip("/")[len(base_path) + 1 :]: int(entry["size"])
        for path, entry in infos.items()
    }


def size_of(root: Root, name: str) -> int:
    """Return the bytes of a file. Raises FileNotFoundError."""
    with one_line_errors(uri_of(root, name)):
        return int(retry(lambda: root.fs.info(join(root, name)))["size"])


def etag_of(root: Root, name: str) -> str:
    """Return the version tag that a store gives a file, "" where it gives none."""
    with one_line_errors(uri_of(root, name)):
        return str(retry(lambda: root.fs.info(join(root, name))).get("ETag") or "")


def etags(root: Root, name: str) -> dict[str, str]:
    """Return the version tags of all files below `name` in a store, by their names below it."""
    base_path = join(root, name).strip("/")
    with one_line_errors(uri_of(root, name)):
        root.fs.invalidate_cache()
        infos = retry(lambda: root.fs.find(join(root, name), detail=True))
    return {
        str(path).strip("/")[len(base_path) + 1 :]: str(entry.get("ETag") or "")
        for path, entry in infos.items()
    }


def last_put(root: Root, name: str) -> float:
    """Return the time of the last upload below `name` in a store, in seconds since 1970.

    Returns the current time if the store does not tell.
    """
    assert root.folder is None, "a local folder has modification times"
    with one_line_errors(uri_of(root, name)):
        root.fs.invalidate_cache()
        entries = retry(lambda: root.fs.find(join(root, name), detail=True)).values()
    return max(
        (_seconds(entry.get("LastModified") or entry.get("created")) for entry in entries),
        default=time.time(),
    )


def _seconds(moment: Any) -> float:
    if isinstance(moment, datetime):
        return moment.timestamp()
    return float(moment) if isinstance(moment, int | float) else time.time()


class _Sent(Callback):
    """Reports the transferred bytes of one file, and subtracts them if the transfer fails."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        super().__init__()
        self.tell, self.sent_bytes = tell, 0

    def relative_update(self, inc: int = 1) -> None:
        self.sent_bytes += inc
        self.tell(inc)

    def end(self, size_bytes: int) -> None:
        self.relative_update(size_bytes - self.sent_bytes)


def upload(
    root: Root, source: Path, name: str, tell: Callable[[int], None] = lambda _: None
) -> None:
    """Copy a local file into a store that is not local.

    `tell` gets the number of bytes moved since its last call, negative if the transfer is repeated.
    """

    def put() -> None:
        sent = _Sent(tell)
        try:
            root.fs.put_file(str(source), join(root, name), callback=sent)
        except BaseException:
            sent.end(0)
            raise
        sent.end(source.stat().st_size)

    with one_line_errors(uri_of(root, name)):
        retry(put)


def download(
    root: Root, name: str, target: Path, tell: Callable[[int], None] = lambda _: None
) -> None:
    """Copy a file of a store that is not local to a local file; `tell` as in `upload`."""

    def get() -> None:
        sent = _Sent(tell)
        try:
            root.fs.get_file(join(root, name), str(target), callback=sent)
        except BaseException:
            sent.end(0)
            raise
        sent.end(target.stat().st_size)

    with one_line_errors(uri_of(root, name)):
        target.parent.mkdir(parents=True, exist_ok=True)
        retry(get)


def copy(root: Root, source: str, target: str) -> None:
    """Have a store that is not local copy one of its files; no byte passes through this machine."""
    assert root.folder is None, "a local folder links its files"
    with one_line_errors(uri_of(root, source)):
        retry(lambda: root.fs.cp_file(join(root, source), join(root, target)))


def remove(root: Root, name: str) -> None:
    """Remove a file, or a folder with its content; do nothing if there is none."""
    if root.folder:
        target = root.folder / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)
        return
    with one_line_errors(uri_of(root, name)):
        try:
            retry(lambda: root.fs.rm(join(root, name), recursive=True))
        except FileNotFoundError:
            return


def abort_uploads(root: Root, name: str) -> int:
    """Abort all multipart uploads below `name` and return how many there were.

    Unfinished uploads are invisible, but the store bills them.
    """
    if "s3" not in root.fs.protocol:
        return 0
    bucket, prefix, _ = root.fs.split_path(join(root, name))
    with one_line_errors(uri_of(root, name)):
        try:
            left = [
                upload
                for upload in retry(lambda: root.fs.list_multipart_uploads(bucket))
                if upload["Key"].startswith(f"{prefix}/")
            ]
        except PermissionError:  # listing them needs a right of its own on S3
            return 0  # then the bucket's lifecycle rule must abort them
        for upload_entry in left:
            root.fs.call_s3(
                "abort_multipart_upload",
                Bucket=bucket,
                Key=upload_entry["Key"],
                UploadId=upload_entry["UploadId"],
            )
    return len(left)
