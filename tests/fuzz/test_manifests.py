"""Whatever stands in a manifest, a run's record, `current.json` or the removal log: it is read, or
one line names the file.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flows.runs import records
from flows.runs.promotion import CURRENT
from infra.errors import UnclipError
from infra.storage import commits, manifests, removal_log
from infra.storage.store import Root, open_root
from tests.helpers.bounds import bounded

KEY = "0123456789abcdef"
MANIFEST = f"clip/{KEY}/manifest.json"
RUN, REMOVAL = "runs/fuzzed.json", "removals/20260101T000000-00000000.json"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3)
    ),
    max_leaves=6,
)
RIGHT: dict[str, dict[str, Any]] = {
    RUN: {
        "name": "fuzzed", "recipe": "quickstart", "stages": {"clip": KEY}, "report": None,
        "started": manifests.now(), "finished": manifests.now(), "gated": False,
    },
    REMOVAL: {
        "keys": ["a"], "origins": [], "sha256": [], "downloads": [], "time": manifests.now(),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    opened = open_root(str(tmp_path_factory.mktemp("fuzzed")))
    assert opened.folder
    out = opened.folder / "out"
    out.mkdir()
    (out / "weights.bin").write_bytes(b"weights")
    counts = {"in": 1, "out": 1, "dropped": {}}
    facts: Any = {
        "stage_version": 1, "sections": {}, "inputs": {}, "input_digests": {}, "counts": counts,
        "started": manifests.now(),
    }  # fmt: skip
    manifest = commits.commit(opened, "clip", KEY, out, facts).manifest
    RIGHT[MANIFEST], RIGHT[CURRENT] = dict(manifest), RIGHT[RUN]
    return opened


def read_manifest(root: Root) -> None:
    for committed in (manifests.find(root, "clip", KEY), manifests.newest(root, "clip")):
        if committed:
            assert isinstance(manifests.damage(committed), str)
            assert isinstance(manifests.verify(committed), list)


def read_run(root: Root) -> None:
    records.find_run(root, "fuzzed")
    records.list_runs(root)


READERS: dict[str, Callable[[Root], Any]] = {
    MANIFEST: read_manifest,
    RUN: read_run,
    CURRENT: records.find_run,
    REMOVAL: removal_log.read_removals,
}


def hostile(right: dict[str, Any], field: str, value: Any) -> bytes:
    """Return a right file with another value of one field, or without it where that is None."""
    changed = {name: old for name, old in right.items() if name != field}
    return json.dumps(changed | ({field: value} if value is not None else {})).encode()


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@example(data=None)
def test_any_file_of_ours_is_read_or_refused_by_name(
    root: Root, name: str, data: st.DataObject | None
) -> None:
    right = RIGHT[name]
    contents = [b"[" * 1_000_000, b"NaN", b'"text"', b"[1]", b"{}", b"", b"\xff"]
    if data is not None:
        changed = st.builds(hostile, st.just(right), st.sampled_from(sorted(right)), VALUES)
        whole = VALUES.map(lambda value: json.dumps(value).encode())
        contents = [data.draw(st.one_of(changed, whole, st.binary(max_size=50)))]
    assert root.folder
    path = root.folder / name
    path.parent.mkdir(exist_ok=True)
    for content in contents:
        path.write_bytes(content)
        try:
            with bounded():
                READERS[name](root)
        except UnclipError as error:
            lines = str(error).splitlines()
            assert len(lines) == 1 and (Path(name).name in lines[0] or "has no run" in lines[0])
        finally:
            path.write_text(json.dumps(right))
    with bounded():
        READERS[name](root)
    path.unlink() if name != MANIFEST else None
