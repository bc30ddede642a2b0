"""Files of a stage by name: in a folder, and in a store through the node's bounded cache."""

import hashlib
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from infra.errors import DataError
from infra.storage import stage_files, store
from infra.storage.manifest_schema import FileEntry
from infra.storage.node_cache import used_bytes
from infra.storage.shard_reader import ShardReader
from infra.storage.stage_files import FolderFiles, StageFiles, StoreFiles
from infra.storage.stage_output import StageOutput
from infra.storage.store import Root
from tests.helpers.manifest_facts import FACTS
from tests.helpers.s3_server import BUCKET, S3Server

CONTENTS = {f"shards/{number:05}.tar": bytes([number]) * 400 for number in range(5)} | {
    "keep.parquet": b"keep" * 50
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as running:
        yield running


def in_store(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreFiles:
    """Put CONTENTS into a bucket, with a scratch folder of 1,000 bytes."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("UNCLIP_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("UNCLIP_SCRATCH_BYTES", "1000")
    root = store.reopen(f"s3://{BUCKET}/{tmp_path.name}", None)
    output, files = StageOutput(root, "curate", "k", "attempt"), []
    for name, content in CONTENTS.items():
        file = tmp_path / "file"
        file.write_bytes(content)
        files.append(output.put(file, name))
    digest = tmp_path.name
    write_manifest(root, files, digest)
    return StoreFiles(root, "curate", "k", "attempt", digest)


def write_manifest(root: Root, files: Sequence[FileEntry], digest: str) -> None:
    manifest = FACTS | {
        "stage": "curate",
        "key": "k",
        "files": files,
        "digest": digest,
        "packages": {},
        "attempt": "attempt",
        "prefix": "attempt",
        "finished": FACTS["started"],
    }
    store.write_json(root, "curate/k/manifest.json", manifest)


@pytest.fixture(params=["folder", pytest.param("store", marks=pytest.mark.slow)])
def files(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> StageFiles:
    if request.param == "store":
        return in_store(request.getfixturevalue("server"), tmp_path, monkeypatch)
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return FolderFiles(tmp_path)


def test_names_are_matched_by_globs(files: StageFiles) -> None:
    assert files.names() == sorted(CONTENTS)
    assert files.names("shards/*.tar") == sorted(CONTENTS)[1:]
    assert files.names("*.parquet") == ["keep.parquet"]


def test_a_file_is_read_whole_and_in_ranges(files: StageFiles) -> None:
    for name, content in CONTENTS.items():
        with files.open(name) as file:
            assert file.read() == content
            file.seek(10)
            assert file.read(5) == content[10:15]
        assert files.read(name, 3, 20) == content[3:23]
        assert files.read(name, 100, 1000) == content[100:]
        assert files.size_bytes(name) == len(content)


def test_a_missing_file_is_named(files: StageFiles) -> None:
    for read in (files.open, files.size_bytes, lambda name: files.read(name, 0, 1)):
        with pytest.raises(FileNotFoundError, match=r"9\.tar"):
            read("shards/9.tar")


def test_a_local_copy_holds_what_matches_while_the_block_runs(files: StageFiles) -> None:
    with files.local_copy("keep.parquet", "shards/00001.tar") as folder:
        for name in ("keep.parquet", "shards/00001.tar"):
            assert (folder / name).read_bytes() == CONTENTS[name]
            with files.open("shards/00002.tar") as file:
                assert file.read(1) == b"\x02"


@pytest.mark.slow
def test_a_store_is_read_within_the_bound_of_the_node_by_any_process(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = in_store(server, tmp_path, monkeypatch)
    data = pickle.dumps(files)
    assert len(data) < 1000
    elsewhere: StageFiles = pickle.loads(data)
    for _ in range(2):
        for name, content in CONTENTS.items():
            with elsewhere.open(name) as file:
                assert file.read() == content
            assert used_bytes(tmp_path / "scratch") <= 1000


@pytest.mark.slow
def test_a_file_that_is_not_what_the_manifest_says_is_never_read(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = in_store(server, tmp_path, monkeypatch)
    store.write_bytes(files.root, "curate/k/attempt/keep.parquet", b"evil" * 50)
    with pytest.raises(DataError, match=r"keep\.parquet has another checksum"):
        files.open("keep.parquet")
    with pytest.raises(DataError), files.local_copy("keep.parquet"):
        pass
    assert not list((tmp_path / "scratch").rglob("keep.parquet*"))


class FlippedFiles(FolderFiles):
    """Files of which the first read of a range arrives otherwise, as from a bad network."""

    reads = 0
    is_local = False  # type: ignore[assignment]

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        FlippedFiles.reads += 1
        data = super().read(name, offset, size_bytes)
        return data if FlippedFiles.reads > 1 else data[:-1] + b"?"


def test_a_range_that_arrives_otherwise_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").write_bytes(b"0123456789")
    reader = ShardReader(FlippedFiles(tmp_path))
    sha256 = hashlib.sha256(b"2345").hexdigest()
    assert reader.read("0.tar", 2, 4, sha256) == b"2345" and FlippedFiles.reads == 2


@pytest.mark.slow
def test_a_folder_that_was_replaced_meanwhile_is_not_mixed_with_the_old_one(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = in_store(server, tmp_path, monkeypatch)
    write_manifest(files.root, [], "other")
    stage_files._read_entries.cache_clear()
    with pytest.raises(DataError, match="was removed or replaced while it was being read"):
        files.names()
