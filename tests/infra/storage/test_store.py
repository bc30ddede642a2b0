"""Storage fails in one line that names the place and the mend, and never shows a half-written
file.
"""

import errno
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from infra.errors import CallerError, StorageAwayError, StorageError
from infra.storage import store


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; needs the right to mount."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    ).returncode:
        pytest.skip("may not mount a small file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[store.Root]:
    """A local ROOT and an object store."""
    if request.param == "folder":
        yield store.open_root(str(tmp_path / "root"))
        return
    yield store.open_root(f"memory://bucket-{tmp_path.name}", tmp_path / "scratch")
    fsspec.filesystem("memory").store.clear()


def test_json_comes_back_and_a_missing_file_is_none(root: store.Root) -> None:
    store.write_json(root, "runs/a.json", {"x": 1, "y": "ü"})
    assert store.read_json(root, "runs/a.json") == {"x": 1, "y": "ü"}
    assert store.read_json(root, "runs/b.json") is None
    assert store.list_names(root, "runs") == ["a.json"]
    assert store.list_names(root, "nowhere") == []
    assert store.exists(root, "runs/a.json") and not store.exists(root, "runs/b.json")


def test_opening_leaves_no_probe_behind(root: store.Root) -> None:
    assert store.file_sizes(root, "") == {}


def test_a_file_that_is_not_json_is_named(root: store.Root) -> None:
    store.write_bytes(root, "runs/a.json", b"{half")
    with pytest.raises(StorageError, match=r"runs/a\.json is not JSON"):
        store.read_json(root, "runs/a.json")


def test_sizes_are_found_at_any_depth_and_removed_together(root: store.Root) -> None:
    store.write_bytes(root, "s/k/a.bin", b"123")
    store.write_bytes(root, "s/k/deep/er/b.bin", b"12345")
    assert store.file_sizes(root, "s/k") == {"a.bin": 3, "deep/er/b.bin": 5}
    store.remove(root, "s/k")
    store.remove(root, "s/k")
    assert store.file_sizes(root, "s/k") == {}


def test_readers_see_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    root = store.open_root(str(tmp_path))
    store.write_json(root, "a.json", ["x" * 200_000])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            store.write_json(root, "a.json", ["y" * 200_000])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        limit = time.monotonic() + 0.5
        while time.monotonic() < limit:
            (word,) = store.read_json(root, "a.json") or [""]
            assert len(word) == 200_000
    finally:
        stop.set()
        writer.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.json",
        "work",
    ]  # nothing left aside


def test_an_object_is_created_only_once(tmp_path: Path) -> None:
    root = store.open_root(f"memory://bucket-{tmp_path.name}", tmp_path)
    store.create_bytes(root, "a/manifest.json", b"first")
    with pytest.raises(FileExistsError):
        store.create_bytes(root, "a/manifest.json", b"second")
    assert store.read_bytes(root, "a/manifest.json") == b"first"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftpx://host/x", "give a folder or an URL"),
        ("s3://key:secret@bucket/x", "must not hold credentials"),
        ("memory://bucket", "needs a scratch folder"),
    ],
)
def test_an_url_that_cannot_be_a_root_is_the_callers_mistake(uri: str, message: str) -> None:
    with pytest.raises(CallerError, match=message) as caught:
        store.open_root(uri)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_root_that_is_a_file_is_the_callers_mistake(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(CallerError, match="is a file: give a folder"):
        store.open_root(str(tmp_path / "f"))


def test_a_root_below_a_file_or_where_nobody_may_write_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    for place in (tmp_path / "f" / "root", Path("/proc/unclip")):
        with pytest.raises(
            StorageError, match=f"cannot write {place}.*choose another --root"
        ) as caught:
            store.open_root(str(place))
        assert "\n" not in str(caught.value)


def test_a_read_only_root_is_one_line(full_disk: Path) -> None:
    store.open_root(str(full_disk))
    subprocess.run(["mount", "-o", "remount,ro", str(full_disk)], check=True)
    with pytest.raises(
        StorageError, match=r"cannot write .*Read-only file system; choose another --root"
    ):
        store.open_root(str(full_disk))
    store.open_root(str(full_disk), for_writing=False)


def test_a_full_disk_is_one_line_and_the_old_file_stays(full_disk: Path) -> None:
    root = store.open_root(str(full_disk))
    store.write_json(root, "runs/a.json", "old")
    with pytest.raises(StorageError, match=r"no space left to write .*free some space"):
        store.write_bytes(root, "runs/a.json", b"x" * 2_000_000)
    assert store.read_json(root, "runs/a.json") == "old"
    assert [path.name for path in (full_disk / "runs").iterdir()] == ["a.json"]


def test_a_full_disk_is_recognised_through_the_errors_that_wrap_it() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/data/w.bin")
        except OSError as inner:
            raise RuntimeError("the writer failed") from inner
    except RuntimeError as wrapped:
        assert "no space left to write /data/w.bin" in (store.complaint(wrapped, "/data") or "")
    assert "no space left" in (
        store.complaint(
            RuntimeError("SafetensorError: No space left on device (os error 28)"), "/data"
        )
        or ""
    )
    numpys = OSError("100000 requested and 12160 written")
    assert "no space left to write /data" in (store.complaint(numpys, "/data") or "")
    assert store.complaint(RuntimeError("shapes differ"), "/data") is None
    assert store.complaint(FileNotFoundError(errno.ENOENT, "gone", "/data/x"), "/data") is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EBUSY, "SlowDown"), StorageAwayError),
        (TimeoutError("no answer"), StorageAwayError),
        (OSError(errno.EINVAL, "InvalidArgument"), StorageError),
        (PermissionError(errno.EACCES, "AccessDenied"), StorageError),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError),
    ],
)
def test_a_store_that_may_come_back_is_told_from_one_that_refuses(
    error: OSError, kind: type[StorageError]
) -> None:
    with pytest.raises(StorageError) as caught, store.one_line_errors("s3://bucket/x"):
        raise error
    assert type(caught.value) is kind
