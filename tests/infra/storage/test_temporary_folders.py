"""A temporary folder is a living writer's while its lock is held; else its host's, or a day without
a change, tells that it is dead.
"""

import json
import os
import socket
import time
from pathlib import Path

import pytest

from infra.storage.temporary_folders import UNTOUCHED_S, dead_folders, remove_dead, writing_folder


def left_behind(scratch: Path, name: str, host: str | None) -> Path:
    """Return a folder whose lock, of a host, nobody holds; with None, there is no lock."""
    folder = scratch / "aside" / name
    folder.mkdir(parents=True)
    (folder / "a").write_text("picture")
    (scratch / "locks").mkdir(exist_ok=True)
    if host is not None:
        (scratch / "locks" / f"writing-{name}.lock").write_text(
            json.dumps({"pid": 1, "host": host, "since": "today"})
        )
    return folder


def test_a_folder_is_its_writers_while_the_block_runs_and_nothing_stays_of_it(
    tmp_path: Path,
) -> None:
    with (
        writing_folder(tmp_path, "clip-k") as folder,
        writing_folder(tmp_path, "clip-k") as another,
    ):
        assert folder != another and list(folder.iterdir()) == []
        remove_dead(tmp_path)
        assert folder.is_dir() and another.is_dir() and dead_folders(tmp_path) == []
        (holder,) = {json.loads(lock.read_text())["pid"] for lock in (tmp_path / "locks").iterdir()}
        assert holder == os.getpid()
    assert [*(tmp_path / "aside").iterdir(), *(tmp_path / "locks").iterdir()] == []


def test_of_this_host_a_folder_is_dead_at_once_and_of_another_or_of_nobody_after_a_day(
    tmp_path: Path,
) -> None:
    ours, theirs, nobodys = (
        left_behind(tmp_path, str(number), host)
        for number, host in enumerate((socket.gethostname(), "other", None))
    )
    assert dead_folders(tmp_path) == [ours]
    remove_dead(tmp_path)
    assert not ours.exists() and theirs.exists() and nobodys.exists()
    old = time.time() - UNTOUCHED_S - 60
    for path in (theirs, nobodys):
        os.utime(path, (old, old))
    assert dead_folders(tmp_path) == [], "a file in it is young"
    for path in (theirs, nobodys):
        os.utime(path / "a", (old, old))
    with writing_folder(tmp_path, "next"):
        assert not theirs.exists() and not nobodys.exists()
    assert list((tmp_path / "locks").iterdir()) == []


def test_a_folder_that_was_moved_away_waits_for_its_recovery_with_its_lock(tmp_path: Path) -> None:
    folder = left_behind(tmp_path, "clip-k-1", socket.gethostname())
    moved = folder.rename(folder.with_name("clip-k-1.replaced"))
    remove_dead(tmp_path)
    assert (
        dead_folders(tmp_path) == [moved]
        and (tmp_path / "locks" / "writing-clip-k-1.lock").exists()
    )


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), writing_folder(tmp_path, "clip-k") as folder:
        (folder / "a").write_text("half")
        raise OSError("full")
    assert [*(tmp_path / "aside").iterdir(), *(tmp_path / "locks").iterdir()] == []
