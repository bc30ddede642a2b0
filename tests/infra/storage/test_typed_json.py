"""A JSON file of ROOT that is not ours is one line with the file and the mend, and costs little."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.errors import StorageError
from infra.storage import commits, manifests, store
from infra.storage.locks import _holder
from infra.storage.manifest_schema import MANIFESTS
from infra.storage.store import Root
from infra.storage.temporary_folders import _host_in
from tests.helpers.manifest_facts import FACTS

NAME = "clip/k/manifest.json"
DEEP = b"[" * 1_000_000


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """A ROOT with one committed folder."""
    opened = store.open_root(str(tmp_path / "root"))
    out = opened.scratch / "out"
    out.mkdir(parents=True)
    (out / "a.txt").write_text("x")
    commits.commit(opened, "clip", "k", out, FACTS)
    return opened


def change(**fields: Any) -> Callable[[dict[str, Any]], bytes]:
    """Return a function that returns a manifest with other values in these fields."""
    return lambda manifest: json.dumps(manifest | fields).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda _: b'"a string"', "Input should be an object"),
        (lambda _: b"[]", "Input should be an object"),
        (lambda _: b"NaN", "Input should be an object"),
        (lambda _: b"null", "Input should be an object"),
        (lambda _: b"", "is not JSON"),
        (lambda _: b"\0" * 100, "is not JSON"),
        (lambda _: b"\xff\xfe", "is not JSON"),
        (lambda _: DEEP, "is not JSON .*recursion"),
        (lambda _: b'{"config": {"a": ' + DEEP, "is not JSON .*recursion"),
        (lambda _: b"{}", "stage_version: Field required"),
        (change(files=["a.txt"]), r"files\.0: "),
        (change(files=[{"path": 1, "bytes": 1, "sha256": ""}]), r"files\.0\.path: "),
        (change(files=[7] * 100_000), r"files\.0: "),
        (change(inputs={str(number): 7 for number in range(100_000)}), "inputs: '0' is not of"),
        (change(inputs={"clip": None}), "inputs: 'clip' is not of type str"),
        (change(sections={"clip": "text"}), "sections: 'clip' is not of type dict or null"),
        (change(counts={"in": True, "out": 1, "dropped": {}}), r"counts\.in: "),
        (change(counts={"in": 1, "out": 1, "dropped": {"x": "y"}}), r"counts\.dropped: 'x' is"),
        (change(stage_version="1"), "stage_version: "),
        (change(digest=None), "digest: "),
    ],
)
def test_a_manifest_that_is_not_ours_is_one_line(
    root: Root, content: Callable[[dict[str, Any]], bytes], reason: str
) -> None:
    store.write_bytes(root, NAME, content(store.read_json(root, NAME)))
    mend = "restore it, or remove it and run again"
    for read in (lambda: manifests.find(root, "clip", "k"), lambda: manifests.newest(root, "clip")):
        with pytest.raises(StorageError, match=reason) as caught:
            read()
        line = str(caught.value)
        assert line.startswith(f"{root.uri}/{NAME} is not") and line.endswith(mend)
        assert "\n" not in line and len(line) < len(root.uri) + 400


def test_what_a_newer_version_added_to_a_manifest_stays(root: Root) -> None:
    manifest = store.read_json(root, NAME)
    manifest["new"] = {"deep": [1, 2.5, None]}
    manifest["files"][0]["new"] = manifest["counts"]["new"] = "text"
    store.write_json(root, NAME, manifest)
    committed = manifests.find(root, "clip", "k")
    assert committed and committed.manifest == manifest


def test_a_manifest_that_is_too_large_or_a_fifo_is_refused_unread(root: Root) -> None:
    assert root.folder
    file = root.folder / NAME
    file.unlink()
    with file.open("wb") as opened:
        opened.truncate(MANIFESTS.max_bytes + 1)
    with pytest.raises(StorageError, match=r"manifest\.json has more than 67,108,864 bytes: rest"):
        manifests.find(root, "clip", "k")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(StorageError, match=r"manifest\.json is not a regular file: restore it"):
        manifests.find(root, "clip", "k")


def test_json_without_a_type_is_bounded_too(root: Root) -> None:
    store.write_bytes(root, "a.json", DEEP)
    with pytest.raises(StorageError, match=r"a\.json is not JSON .*recursion.*: remove it and run"):
        store.read_json(root, "a.json")
    with pytest.raises(StorageError, match=r"a\.json has more than 999 bytes"):
        store.read_json(root, "a.json", 999)


@pytest.mark.parametrize("content", [b"[]", b"NaN", DEEP, b'{"pid": 1'])
def test_a_lock_file_with_another_content_names_no_holder(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.lock").write_bytes(content)
    assert _holder(tmp_path / "a.lock") == "another run"
    assert _host_in(tmp_path / "a.lock") is None
