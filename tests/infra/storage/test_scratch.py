"""A node's scratch folder: one for each ROOT, and a bound that is a size or an error."""

from pathlib import Path

import pytest

from infra.errors import CallerError
from infra.storage.scratch import DEFAULT_BYTES, scratch_bytes, scratch_for


def test_a_store_gets_one_folder_of_its_own_and_a_local_root_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNCLIP_SCRATCH", str(tmp_path))
    one, other = scratch_for("s3://bucket/a"), scratch_for("s3://bucket/b")
    assert one and other and one.parent == other.parent == tmp_path and one != other
    assert scratch_for("s3://bucket/a/") == one
    assert scratch_for("/data") is None and scratch_for("file:///data") is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", DEFAULT_BYTES),
        ("1000", 1000),
        ("20G", 20 << 30),
        ("96MiB", 96 << 20),
        ("20Gi", 20 << 30),
        ("2tb", 2 << 40),
    ],
)
def test_the_bound_is_read_in_usual_units(
    text: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNCLIP_SCRATCH_BYTES", text)
    assert scratch_bytes() == size


@pytest.mark.parametrize("text", ["-1", "0", "much", "1.5G", "5X", "G"])
def test_what_is_no_size_is_refused_with_its_variable(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNCLIP_SCRATCH_BYTES", text)
    with pytest.raises(CallerError, match=f"UNCLIP_SCRATCH_BYTES={text} is not a size"):
        scratch_bytes()
