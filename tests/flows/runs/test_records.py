"""Records of runs that are not ours are one line with the file and the mend, for every reader."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli.prune import unused
from flows.runs.promotion import promote_if_passed
from flows.runs.record_schema import CURRENT
from flows.runs.records import find_run, list_runs, write_run
from infra.errors import StorageError
from infra.storage import manifests, store
from infra.storage.store import Root
from tests.flows.cli.test_prune import LATER
from tests.flows.runs.test_promotion import finished
from tests.helpers.manifest_facts import RECORD

HOSTILE = (
    b'"a string"',
    b"[]",
    b"{}",
    b"NaN",
    b"null",
    b"",
    b"[" * 1_000_000,
    b'{"stages": ' + b"[" * 1_000_000,
    json.dumps(RECORD | {"stages": {"clip": 7}}).encode(),
    json.dumps(RECORD | {"stages": {"clip": ["a"]}}).encode(),
    json.dumps(RECORD | {"finished": None}).encode(),
    json.dumps(RECORD | {"gated": "no"}).encode(),
    json.dumps(RECORD | {"conditions": [1] * 100_000}).encode(),
    b" " * (1 << 20) + b"{}",
)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    opened = store.open_root(str(tmp_path / "root"))
    write_run(opened, "good", "tiny", manifests.now(), {})
    return opened


@pytest.mark.parametrize("content", HOSTILE)
def test_a_record_that_is_not_ours_is_one_line(root: Root, content: bytes) -> None:
    store.write_bytes(root, "runs/bad.json", content)
    assert find_run(root, "good")["name"] == "good"
    readers: list[Callable[[], object]] = [
        lambda: find_run(root, "bad"),
        lambda: find_run(root),
        lambda: list_runs(root),
        lambda: unused(root, LATER),
    ]
    for read in readers:
        with pytest.raises(StorageError) as caught:
            read()
        line = str(caught.value)
        assert line.startswith(f"{root.uri}/runs/bad.json ") and "\n" not in line
        assert line.endswith(": remove it and run again")


@pytest.mark.parametrize("content", HOSTILE)
def test_a_pointer_that_is_not_ours_is_one_line(root: Root, content: bytes) -> None:
    record, committed = finished(root, "better", 0.9, 0.9)
    store.write_bytes(root, CURRENT, content)
    readers: list[Callable[[], object]] = [
        lambda: find_run(root),
        lambda: list_runs(root),
        lambda: unused(root, LATER),
        lambda: promote_if_passed(root, ("generation.own >= 0.5",), record, committed),
    ]
    for read in readers:
        with pytest.raises(StorageError) as caught:
            read()
        line = str(caught.value)
        assert line.startswith(f"{root.uri}/{CURRENT} ") and "\n" not in line
        assert line.endswith(": remove it; the next run that passes its gate writes it again")


def test_what_a_newer_version_added_to_a_record_stays(root: Root) -> None:
    record = RECORD | {"new": {"deep": [1]}}
    store.write_json(root, "runs/nightly.json", record)
    assert find_run(root, "nightly") == record


def test_a_promoted_run_without_a_report_is_replaced(root: Root) -> None:
    """Its record names no folder of `evaluate`, so that there is nothing to compare with."""
    record, committed = finished(root, "better", 0.9, 0.9)
    store.write_json(root, CURRENT, RECORD)
    judged = promote_if_passed(root, ("retrieval.recall@1 >= current - 0.05",), record, committed)
    assert judged and judged["promoted"] and find_run(root)["name"] == "better"
