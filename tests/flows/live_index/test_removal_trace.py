"""A sample is found in whatever file holds it, by its bytes or by what stands beside them, and
lists that only name it are none.
"""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.live_index.removal_trace import Traces, trace
from infra.schemas import DROPPED, URLS
from infra.storage import store
from infra.storage.removal_log import Removals
from infra.storage.store import Root, open_root

PICTURE = b"\x89PNG\r\n\x1a\n and so on"
URL = "https://example.org/1.png"
BY_BYTES = Removals(stored_sha256=frozenset({hashlib.sha256(PICTURE).hexdigest()}))
BY_URL = Removals(origins=frozenset({URL}))


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return open_root(str(tmp_path / "root"), for_writing=False)


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_a_shard_is_found_by_a_members_bytes_or_by_what_its_description_names(
    root: Root, tmp_path: Path
) -> None:
    write_tar(tmp_path / "root" / "anywhere" / "bytes.tar", {"0.txt": b"caption", "0.png": PICTURE})
    write_tar(
        tmp_path / "root" / "work" / "deep" / "described.tar",
        {"0.jpg": b"other bytes", "0.json": json.dumps({"url": URL}).encode()},
    )
    write_tar(
        tmp_path / "root" / "work" / "none.tar", {"0.jpg": b"other bytes", "0.json": b"[not json"}
    )
    assert trace(root, BY_BYTES) == Traces(["anywhere/bytes.tar"], [])
    assert trace(root, BY_URL) == Traces(["work/deep/described.tar"], [])


def test_tables_count_where_they_say_where_a_picture_is(root: Root, tmp_path: Path) -> None:
    folder = tmp_path / "root" / "work" / "tables"
    folder.mkdir(parents=True)
    (digest,) = BY_BYTES.stored_sha256
    pq.write_table(pa.table({"origin": [URL], "sha256": [digest]}), folder / "rows.tmp")
    pq.write_table(
        pa.table({"url": [URL], "sha256": [""], "status": ["failed_to_download"]}),
        folder / "failed.parquet",
    )
    pq.write_table(
        pa.Table.from_pylist([{"key": "k", "url": URL, "origin": URL}], URLS),
        folder / "urls.parquet",
    )
    pq.write_table(
        pa.Table.from_pylist([{"key": "k", "origin": URL, "reason": "removed"}], DROPPED),
        folder / "dropped.parquet",
    )
    with (
        pa.OSFile(str(folder / "metadata.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, pa.schema([("sha256", pa.string())])) as writer,
    ):
        writer.write_table(pa.table({"sha256": [digest]}))
    assert trace(root, BY_URL).holding == ["work/tables/rows.tmp"]
    assert trace(root, BY_BYTES).holding == ["work/tables/metadata.arrow", "work/tables/rows.tmp"]


def test_a_store_and_its_scratch_folder_are_both_looked_through(tmp_path: Path) -> None:
    root = open_root(f"memory://bucket-{tmp_path.name}", tmp_path / "scratch", for_writing=False)
    store.write_bytes(root, "evaluate/k/0123456789ab/worst.png", PICTURE)
    store.write_bytes(root, "evaluate/k/0123456789ab/best.png", PICTURE + b"another")
    write_tar(tmp_path / "scratch" / "cache" / "00000.tar", {"0.png": PICTURE})
    assert trace(root, BY_BYTES).holding == [
        str(tmp_path / "scratch" / "cache" / "00000.tar"),
        "evaluate/k/0123456789ab/worst.png",
    ]
    root.fs.rm(root.path, recursive=True)
