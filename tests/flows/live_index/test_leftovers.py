"""What a killed writer left is named by verify, counted by prune and removed by the next writer;
what a living one uses stays.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from flows.cli.main import main
from flows.live_index import additions, lineage, merge
from flows.live_index.compaction import compact
from flows.live_index.leftovers import leftovers, remove_leftovers, unfinished
from flows.live_index.takedown import by_values, find, take_down, verify
from infra.storage import commits, manifests, store
from infra.storage.locks import lock_file
from infra.storage.stage_output import open_output
from infra.storage.store import Root, open_root
from infra.storage.temporary_folders import writing_folder
from tests.helpers.committed_root import committed, write_root
from tests.helpers.evaluation_run import row, write_run
from tests.helpers.manifest_facts import FACTS

HERE = Path(__file__).parents[3]
NOWHERE: dict[str, list[str]] = {"shards": [], "embeddings": [], "index": []}
WRITER = """
import sys
from pathlib import Path
from flows.live_index import additions
from flows.live_index import compaction
from flows.live_index import lineage
from flows.live_index import merge
from infra.storage import commits
from infra.storage import store

def stop(*_):
    print("stopped", flush=True)
    sys.stdin.readline()

def then_stop(do):
    def stopping(*given):
        answer = do(*given)
        stop()
        return answer
    return stopping

def stop_then(do):
    def stopping(*given):
        stop()
        return do(*given)
    return stopping

action, uri, *rest = sys.argv[1:]
root = store.open_root(uri)
if action == "blank":
    compaction.blank = stop_then(compaction.blank)
elif action == "exchange":
    commits._exchange = then_stop(commits._exchange)
else:
    additions.commit = stop_then(additions.commit)
if action == "add":
    view, lineage = lineage.open_view(root, None)
    additions.add(root, lineage, view, Path(rest[0]), "CC0")
elif action == "merge":
    merge.merge(root, None, print)
else:
    compaction.compact(root, lambda line: None)
"""
"""A writer that says when it has come to a point, and stays there until it reads a line."""


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return write_root(tmp_path)


@contextmanager
def stopped(root: Root, action: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Start a writer and yield it at its point; it is killed when the block ends, if it has not
    ended by then.
    """
    command = [sys.executable, "-c", WRITER, action, root.uri, *more]
    with subprocess.Popen(
        command,
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        stdin=-1,
        stdout=-1,
        text=True,
    ) as writer:
        try:
            assert writer.stdin and writer.stdout and writer.stdout.readline() == "stopped\n"
            yield writer
        finally:
            writer.kill()


def take(root: Root, number: int) -> tuple[dict[str, Any], bytes]:
    """Take a sample down; return its row and its picture's bytes."""
    sample = pq.read_table(committed(root, "curate").local_folder / "keep.parquet").to_pylist()[
        number
    ]
    shard = (committed(root, "ingest").local_folder / "shards" / "00000.tar").read_bytes()
    take_down(root, find(root, by_values("key", [sample["key"]])), {})
    return sample, shard[sample["offset"] : sample["offset"] + sample["size_bytes"]]


def holding(root: Root, content: bytes) -> list[str]:
    """Return the files below ROOT that hold some bytes: read by nothing of ours."""
    folder = Path(root.uri)
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and content in path.read_bytes()
    ]


def prune(root: Root, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["prune", "--root", root.uri, "--json", *arguments])
    assert left.value.code == 0
    return list(json.loads(capsys.readouterr().out)["leftovers"])


@pytest.mark.parametrize("point", ["blank", "exchange"])
def test_verify_names_what_a_killed_compaction_left_and_the_next_removes_it(
    root: Root, point: str
) -> None:
    sample, content = take(root, 7)
    with stopped(root, point):
        pass
    (left,) = [path for path in holding(root, content) if path.startswith("work/")]
    assert left.startswith("work/aside/ingest-ingest0123456789-compact-") and left.endswith(
        "/shards/00000.tar"
    )
    proof = verify(root, [sample])
    assert left in proof["leftovers"] and "embed/embed0123456789" in proof["found_in"]["embeddings"]
    compact(root, print)
    assert holding(root, content) == []
    proof = verify(root, [sample])
    assert (proof["found_in"], proof["leftovers"], proof["unreadable"]) == (NOWHERE, [], [])
    assert (
        list((root.scratch / "aside").iterdir())
        == list((root.scratch / "locks").glob("writing-*"))
        == []
    )


def test_prune_counts_and_removes_what_a_killed_compaction_left(
    root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    _, content = take(root, 7)
    with stopped(root, "blank"):
        pass
    (row,) = prune(root, capsys)
    assert (
        row["path"].startswith("work/aside/ingest-")
        and row["bytes"] > len(content)
        and row["state"] == "left by a dead writer"
    )
    assert (Path(root.uri) / row["path"]).is_dir(), "listing removes nothing"
    with pytest.raises(SystemExit):
        main(["prune", "--root", root.uri])
    assert capsys.readouterr().out.startswith(f"{row['path']}  ")
    (removed,) = prune(root, capsys, "--delete")
    assert (
        removed == row | {"state": "removed"}
        and [path for path in holding(root, content) if "work/" in path] == []
    )
    assert prune(root, capsys) == []


def test_what_a_living_writer_uses_is_removed_by_nobody(
    root: Root, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample, content = take(root, 7)
    write_run(tmp_path / "more", [row(5, "added", "train")])
    own_clip(tmp_path / "more")
    with stopped(root, "blank") as writer:
        in_use = [path for path in holding(root, content) if path.startswith("work/")]
        remove_leftovers(root)
        assert prune(root, capsys, "--delete", "--older-than", "0") == []
        assert add(root, tmp_path / "more" / "embed")["added"] == 1
        assert (
            len(in_use) == 1
            and [path for path in holding(root, content) if path.startswith("work/")] == in_use
        )
        assert writer.stdin
        for _ in range(2):  # blanks of the shard, should there be more than one
            writer.stdin.write("go on\n")
        writer.stdin.close()
        assert writer.wait() == 0
    assert holding(root, content) == [] and verify(root, [sample])["found_in"] == NOWHERE


def test_what_killed_additions_and_merges_left_goes_with_the_next(
    root: Root, tmp_path: Path
) -> None:
    for number in (5, 6):
        write_run(tmp_path / str(number), [row(number, "added", "train")])
        own_clip(tmp_path / str(number))
    first, second = (tmp_path / name / "embed" for name in ("5", "6"))
    with stopped(root, "add", str(first)):
        pass
    samples = pq.read_table(first / "metadata" / "metadata_0000.parquet").to_pylist()
    assert any(
        "/additions-" in path and path.endswith(".parquet")
        for path in verify(root, samples)["leftovers"]
    )
    assert add(root, first)["added"] == add(root, second)["added"] == 1 and leftovers(root) == []
    with stopped(root, "merge"):
        pass
    assert [each.path.rpartition("-")[0] for each in leftovers(root)] == [
        "work/aside/additions-merge"
    ]
    merged, count = merge.merge(root, None, print)
    assert (
        merged
        and count == 2
        and leftovers(root) == []
        and list((root.scratch / "aside").iterdir()) == []
    )


def test_a_folder_whose_remover_was_killed_is_named_and_goes_unless_somebody_makes_it(
    root: Root,
) -> None:
    sample, content = take(root, 7)
    half = Path(root.uri) / "ingest" / "0123456789abcdef"
    (half / "shards").mkdir(parents=True)
    shard = committed(root, "ingest").local_folder / "shards" / "00000.tar"
    (half / "shards" / "00000.tar").write_bytes(shard.read_bytes())
    somebodys = half.with_name("my notes")
    somebodys.mkdir()
    assert verify(root, [sample])["leftovers"] == ["ingest/0123456789abcdef/shards/00000.tar"]
    command = [sys.executable, "-c", HOLDER, str(lock_file(root.scratch, "ingest", half.name))]
    with subprocess.Popen(
        command,
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        stdin=-1,
        stdout=-1,
        text=True,
    ) as maker:
        assert maker.stdout and maker.stdout.readline() == "held\n"
        (left,) = leftovers(root)
        assert (
            left.remove().startswith(f"is being made by another run (process {maker.pid} ")
            and half.is_dir()
        )
        maker.kill()
    compact(root, print)
    assert not half.exists() and somebodys.is_dir() and holding(root, content) == []


HOLDER = """
import sys
from pathlib import Path
from infra.storage.locks import writer_lock
with writer_lock(Path(sys.argv[1]), "it", print):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_verify_names_shards_that_were_cut_short_and_bytes_that_a_table_no_longer_names(
    root: Root,
) -> None:
    sample, content = take(root, 7)
    shard = committed(root, "ingest").local_folder / "shards" / "00000.tar"
    before = shard.read_bytes()
    compact(root, print)
    with writing_folder(root.scratch, "ingest-half") as folder:
        (folder / "00000.tar").write_bytes(before[: sample["offset"] + sample["size_bytes"] // 2])
        (folder / "00000.parquet").write_bytes(b"PAR1" + bytes(100))
        proof = verify(root, [sample])
        assert proof["unreadable"] == [
            f"work/aside/{folder.name}/00000.{each}" for each in ("parquet", "tar")
        ]
    assert shard.read_bytes() != before and content not in shard.read_bytes()
    shard.write_bytes(before)
    proof = verify(root, [sample])
    assert (
        proof["found_in"] == NOWHERE | {"shards": ["ingest/ingest0123456789"]}
        and proof["unreadable"] == []
    )


def test_unfinished_work_of_a_stage_stays_to_be_resumed_until_it_is_old(
    root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    work = root.scratch / "ingest" / "0123456789abcdef"
    work.mkdir(parents=True)
    (work / "00000.tar").write_bytes(bytes(500))
    remove_leftovers(root)
    assert prune(root, capsys, "--delete") == [] and work.is_dir(), (
        "its next run goes on from there"
    )
    old = time.time() - 8 * 86_400
    for path in (work / "00000.tar", work):
        os.utime(path, (old, old))
    week = datetime.now(UTC) - timedelta(days=7)
    assert unfinished(root, week, {("ingest", work.name)}) == [], "a submitted job makes it"
    (found,) = prune(root, capsys)
    assert (found["path"], found["bytes"]) == (f"work/ingest/{work.name}", 500)
    assert [each["state"] for each in prune(root, capsys, "--delete")] == [
        "removed"
    ] and not work.exists()


def test_on_a_store_what_was_replaced_goes_at_once_and_what_nobody_named_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = open_root(f"memory://bucket-{tmp_path.name}", tmp_path / "scratch")
    key = "0123456789abcdef"

    def commit(word: str, replaces: str | None = None) -> manifests.Committed:
        with writing_folder(root.scratch, "out") as out:
            (out / "a.txt").write_text(word)
            return commits.commit(root, "ingest", key, out, FACTS, replaces)

    first = commit("picture")
    remove = store.remove

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(store, "remove", killed)
        commit("blank", first.manifest["attempt"])
    assert remove is store.remove and [each.path for each in leftovers(root)] == [first.path]
    store.write_bytes(root, f"ingest/{key}/0123456789ab/a.txt", b"on its way")
    remove_leftovers(root)
    now = manifests.find(root, "ingest", key)
    assert now and set(store.list_names(root, f"ingest/{key}")) == {
        "0123456789ab",
        now.manifest["prefix"],
        "manifest.json",
    }
    for path, file in fsspec.filesystem("memory").store.items():
        if "0123456789ab/" in path or now.manifest["prefix"] in path:
            file.created -= timedelta(days=2)
    remove_leftovers(root)
    assert set(store.list_names(root, f"ingest/{key}")) == {now.manifest["prefix"], "manifest.json"}
    fsspec.filesystem("memory").store.clear()


def own_clip(folder: Path) -> None:
    """Let an embed folder say that the run's own CLIP made it."""
    facts = folder / "embed" / "facts.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"clip_key": "clip0123456789"}))


def add(root: Root, folder: Path) -> dict[str, int]:
    view, opened = lineage.open_view(root, None)
    return additions.add(root, opened, view, folder, "CC0")[1]


def test_what_a_killed_stage_left_in_a_store_is_unfinished_by_age_unless_a_job_claims_it(
    tmp_path: Path,
) -> None:
    root = store.open_root(f"memory://unfinished-{tmp_path.name}", tmp_path / "scratch")
    key, now = "0123456789abcdef", datetime.now(UTC)
    open_output(root, "embed", key).record("0000", [], {})
    assert unfinished(root, now - timedelta(hours=1), set()) == []
    assert unfinished(root, now + timedelta(hours=1), {("embed", key)}) == []
    (left,) = unfinished(root, now + timedelta(hours=1), set())
    assert left.path == f"work/embed/{key}" and left.size_bytes > 0
    assert left.remove() == "" and store.file_sizes(root, "work") == {}
