"""A file gets its name behind its content: what a power cut leaves is whole or not there."""

import os
from pathlib import Path

import pytest

from infra.storage import atomic_files
from infra.storage.atomic_files import (
    atomic_file,
    link_or_copy,
    make_independent,
    put_folder,
)
from infra.storage.stage_output import open_output
from infra.storage.store import open_root


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written to the disk, and what gets its name, in order."""
    told: list[str] = []
    original = Path.replace

    def replace(path: Path, target: Path) -> Path:
        told.append(f"name {target.name}")
        return original(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: told.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().name}"),
    )
    return told


def test_a_file_is_put_into_an_output_so(tmp_path: Path, events: list[str]) -> None:
    output = open_output(open_root(str(tmp_path / "root")), "ingest", "key")
    events.clear()
    for suffix in (".parquet", ".tar"):
        (tmp_path / f"00007{suffix}").write_text("x")
        output.put(tmp_path / f"00007{suffix}", f"shards/00007{suffix}")
    assert events == [
        event
        for suffix in (".parquet", ".tar")
        for event in (f"sync 00007{suffix}", f"name 00007{suffix}", "sync shards")
    ]


def test_a_folder_is_whole_when_it_has_its_name(tmp_path: Path, events: list[str]) -> None:
    (tmp_path / "a.part").mkdir()
    (tmp_path / "a.part" / "x").write_text("x")
    put_folder(tmp_path / "a.part", tmp_path / "a")
    assert (
        events == ["sync x", "sync a.part", f"sync {tmp_path.name}"]
        and (tmp_path / "a" / "x").read_text() == "x"
    )


def test_a_file_is_linked_or_copied_whole(
    tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("x")
    link_or_copy(tmp_path / "x", tmp_path / "linked")
    assert events == [] and (tmp_path / "linked").stat().st_ino == (tmp_path / "x").stat().st_ino

    def elsewhere(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(atomic_files.Path, "hardlink_to", elsewhere)
    link_or_copy(tmp_path / "x", tmp_path / "copied")
    assert [event.split(".")[:2] for event in events] == [["sync ", "copied"], ["name copied"]]
    assert (tmp_path / "copied").read_text() == "x"


def test_a_file_that_was_linked_can_be_changed_alone(tmp_path: Path) -> None:
    (tmp_path / "committed").write_text("x")
    link_or_copy(tmp_path / "committed", tmp_path / "changed")
    make_independent(tmp_path / "changed")
    (tmp_path / "changed").write_text("y")
    assert (tmp_path / "committed").read_text() == "x"


def test_a_block_that_fails_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(ValueError), atomic_file(tmp_path / "x") as part:
        part.write_text("ne")
        raise ValueError
    assert (tmp_path / "x").read_text() == "old" and list(tmp_path.iterdir()) == [tmp_path / "x"]
