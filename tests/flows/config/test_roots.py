"""A ROOT in a store has a local scratch folder of its own; a local ROOT needs none."""

from pathlib import Path

import pytest

from flows.config.roots import open_for, scratch_for


def test_every_store_has_its_own_scratch_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNCLIP_SCRATCH", str(tmp_path))
    first, second = scratch_for("s3://bucket/a"), scratch_for("s3://bucket/b")
    assert first and second and first != second and first == scratch_for("s3://bucket/a")
    assert first.parent == second.parent == tmp_path


def test_the_scratch_folder_is_in_the_users_cache_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNCLIP_SCRATCH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    scratch = scratch_for("s3://bucket/a")
    assert scratch and scratch.parent == tmp_path / ".cache" / "unclip" / "scratch"


def test_a_local_root_keeps_its_work_inside(tmp_path: Path) -> None:
    assert scratch_for(str(tmp_path)) is None
    assert open_for(str(tmp_path), for_writing=False).scratch == tmp_path / "work"
