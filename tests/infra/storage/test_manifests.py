"""A committed folder is whole or absent, the first writer's stays, and what was committed can be
verified.
"""

import errno
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from infra.errors import DataError, StorageError
from infra.storage import commits, manifests, store
from infra.storage.stage_files import pinned_copy
from infra.storage.store import Root
from tests.helpers.manifest_facts import FACTS


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Root]:
    """A local ROOT and an object store."""
    if request.param == "folder":
        yield store.open_root(str(tmp_path / "root"))
        return
    yield store.open_root(f"memory://bucket-{tmp_path.name}", tmp_path / "scratch")
    fsspec.filesystem("memory").store.clear()


def made(root: Root, word: str, name: str = "out") -> Path:
    """Return a folder as a stage leaves it."""
    out = root.scratch / "aside" / name
    (out / "deep").mkdir(parents=True)
    (out / "a.txt").write_text(word)
    (out / "deep" / "b.bin").write_bytes(word.encode() * 1000)
    return out


def damaged(committed: manifests.Committed, name: str, data: bytes) -> None:
    """Overwrite a committed file behind the manifest's back."""
    store.write_bytes(
        committed.root, committed.uri.removeprefix(committed.root.uri + "/") + "/" + name, data
    )


def test_a_key_depends_on_every_part_and_on_nothing_else() -> None:
    key = manifests.content_key("clip", 1, {"clip": {"width": 4, "depth": 2}}, {"curate": "aa"})
    assert key == manifests.content_key(
        "clip", 1, {"clip": {"depth": 2, "width": 4}}, {"curate": "aa"}
    )
    others = {
        manifests.content_key("prior", 1, {"clip": {"width": 4, "depth": 2}}, {"curate": "aa"}),
        manifests.content_key("clip", 2, {"clip": {"width": 4, "depth": 2}}, {"curate": "aa"}),
        manifests.content_key("clip", 1, {"clip": {"width": 5, "depth": 2}}, {"curate": "aa"}),
        manifests.content_key("clip", 1, {"clip": {"width": 4, "depth": 2}}, {"curate": "ab"}),
    }
    assert len(others | {key}) == 5 and len(key) == 16


def test_a_folder_exists_once_committed_with_all_that_lineage_needs(root: Root) -> None:
    assert manifests.find(root, "clip", "k") is None and manifests.newest(root, "clip") is None
    out = made(root, "x")
    committed = commits.commit(root, "clip", "k", out, FACTS)
    found = manifests.find(root, "clip", "k")
    assert found and found.manifest == committed.manifest and not out.exists()
    assert found.manifest.keys() >= {
        "stage",
        "key",
        "counts",
        "inputs",
        "files",
        "finished",
        "packages",
        "digest",
    }
    assert [(file["path"], file["bytes"]) for file in found.manifest["files"]] == [
        ("a.txt", 1),
        ("deep/b.bin", 1000),
    ]
    assert (pinned_copy(found.files) / "a.txt").read_text() == "x" and (
        pinned_copy(found.files) / "deep" / "b.bin"
    ).stat().st_size == 1000
    assert manifests.damage(found) == "" and manifests.verify(found) == []


def test_a_folder_without_a_manifest_does_not_exist(root: Root) -> None:
    store.write_bytes(root, "clip/k/a.txt", b"half")
    assert manifests.find(root, "clip", "k") is None and manifests.newest(root, "clip") is None
    committed = commits.commit(root, "clip", "k", made(root, "x"), FACTS)
    assert (pinned_copy(committed.files) / "a.txt").read_text() == "x" and manifests.verify(
        committed
    ) == []


def test_the_second_writer_finds_the_first_ones_folder_and_leaves_it(root: Root) -> None:
    first = commits.commit(root, "clip", "k", made(root, "x"), FACTS)
    second = commits.commit(root, "clip", "k", made(root, "y", "other"), FACTS)
    assert second.manifest == first.manifest and manifests.verify(second) == []
    files = set(store.file_sizes(root, "clip"))
    assert files == {name for name in files if first.manifest["prefix"] in name} | {
        "k/manifest.json"
    }
    assert list((root.scratch / "aside").iterdir()) == []


def test_only_the_attempt_that_is_named_is_replaced(root: Root) -> None:
    first = commits.commit(root, "clip", "k", made(root, "x"), FACTS)
    kept = commits.commit(root, "clip", "k", made(root, "y"), FACTS, replaces="another")
    assert kept.manifest == first.manifest
    new = commits.commit(
        root, "clip", "k", made(root, "y"), FACTS, replaces=first.manifest["attempt"]
    )
    found = manifests.find(root, "clip", "k")
    assert (
        found and found.manifest == new.manifest != first.manifest and manifests.verify(found) == []
    )
    assert (pinned_copy(found.files) / "a.txt").read_text() == "y"
    assert (
        len(store.file_sizes(root, "clip")) == 3 and list((root.scratch / "aside").iterdir()) == []
    )


@pytest.mark.parametrize(("can_exchange", "kill_at"), [(True, 1), (False, 1), (False, 2)])
def test_a_writer_that_is_killed_while_it_replaces_a_folder_loses_nothing(
    tmp_path: Path, can_exchange: bool, kill_at: int
) -> None:
    """Killed just before it exchanges the folders, or before each of the two renames where the
    system cannot exchange.
    """
    root = store.open_root(str(tmp_path / "root"))
    first = commits.commit(root, "clip", "k", made(root, "x", "clip-k-1"), FACTS)
    new = made(root, "y", "clip-k-2")
    child = os.fork()
    if child == 0:
        calls = itertools.count(1)

        def die(*_: object) -> bool:
            if next(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        rename = Path.rename
        if can_exchange:
            commits._exchange = die
        else:
            commits._exchange = lambda *_: False
            Path.rename = lambda *given: die() or rename(*given)  # type: ignore[method-assign, assignment]
        commits.commit(root, "clip", "k", new, FACTS, replaces=first.manifest["attempt"])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (manifests.find(root, "clip", "k") is None) == (kill_at == 2)
    assert commits.interrupted(root) == ([("clip", "k")] if kill_at == 2 else [])
    commits.recover(root, "clip", "k")
    found = manifests.find(root, "clip", "k")
    assert found and found.manifest == first.manifest and manifests.verify(found) == []
    again = commits.commit(
        root, "clip", "k", made(root, "z", "clip-k-3"), FACTS, replaces=first.manifest["attempt"]
    )
    assert (pinned_copy(again.files) / "a.txt").read_text() == "z"


def test_the_second_of_two_repairs_at_once_leaves_the_first_ones_folder(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw the damaged folder; the other machine's is committed between our look and our own
    commit.
    """
    damaged_one = commits.commit(root, "clip", "k", made(root, "x"), FACTS)
    replaces = damaged_one.manifest["attempt"]
    other: list[manifests.Committed] = []
    find = manifests.find

    def find_and_be_overtaken(*given: Any) -> manifests.Committed | None:
        found = find(*given)
        if not other:
            monkeypatch.setattr(commits, "find", find)
            other.append(
                commits.commit(
                    root, "clip", "k", made(root, "theirs", "other"), FACTS, replaces=replaces
                )
            )
        return found

    monkeypatch.setattr(commits, "find", find_and_be_overtaken)
    ours = commits.commit(root, "clip", "k", made(root, "ours"), FACTS, replaces=replaces)
    assert ours.manifest == other[0].manifest != damaged_one.manifest
    found = find(root, "clip", "k")
    assert (
        found
        and found.manifest == ours.manifest
        and manifests.verify(found) == []
        and (pinned_copy(found.files) / "a.txt").read_text() == "theirs"
    )


def test_the_newest_folder_is_the_one_committed_last(root: Root) -> None:
    for key in ("zz", "aa", "mm"):
        commits.commit(root, "clip", key, made(root, key), FACTS)
    newest = manifests.newest(root, "clip")
    assert newest and newest.key == "mm"


def test_damage_is_seen_by_size_and_by_checksum(root: Root) -> None:
    committed = commits.commit(root, "clip", "k", made(root, "x"), FACTS)
    damaged(committed, "deep/b.bin", b"y" * 1000)
    assert manifests.damage(committed) == "" and manifests.verify(committed) == [
        "deep/b.bin has another checksum"
    ]
    damaged(committed, "deep/b.bin", b"y" * 999)
    assert (
        manifests.damage(committed) == "deep/b.bin has 999 bytes, not 1,000"
        and manifests.verify(committed) != []
    )
    store.remove(root, committed.uri.removeprefix(root.uri + "/") + "/a.txt")
    assert manifests.damage(committed) == "a.txt is missing"


def test_equal_contents_have_equal_digests(root: Root) -> None:
    first = commits.commit(root, "clip", "k", made(root, "x"), FACTS)
    same = commits.commit(root, "clip", "l", made(root, "x"), FACTS)
    other = commits.commit(root, "clip", "m", made(root, "y"), FACTS)
    assert first.digest == same.digest != other.digest


def test_a_download_that_does_not_match_is_refused(tmp_path: Path) -> None:
    root = store.open_root(f"memory://bucket-{tmp_path.name}", tmp_path / "scratch")
    committed = commits.commit(root, "clip", "k", made(root, "x"), FACTS)
    damaged(committed, "a.txt", b"y")
    with pytest.raises(DataError, match=r"a\.txt has another checksum; run again"):
        committed.files.open("a.txt")
    assert not [path for path in (tmp_path / "scratch" / "cache").rglob("*") if path.is_file()]


def test_a_commit_that_fails_leaves_nothing_under_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = store.open_root(str(tmp_path / "root"))
    out = made(root, "x")

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(commits, "_sync_tree", full)
    with pytest.raises(StorageError, match="no space left"):
        commits.commit(root, "clip", "k", out, FACTS)
    assert (
        not (tmp_path / "root" / "clip" / "k").exists()
        and manifests.find(root, "clip", "k") is None
    )


def test_an_attempt_that_was_killed_before_its_manifest_is_cleared_by_the_next(
    tmp_path: Path,
) -> None:
    root = store.open_root(f"memory://bucket-{tmp_path.name}", tmp_path / "scratch")
    store.write_bytes(root, "clip/k/0123456789ab/a.txt", b"half")
    committed = commits.commit(root, "clip", "k", made(root, "x"), FACTS)
    prefix = committed.manifest["prefix"]
    assert set(store.file_sizes(root, "clip/k")) == {
        "manifest.json",
        f"{prefix}/a.txt",
        f"{prefix}/deep/b.bin",
    }
