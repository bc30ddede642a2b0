"""Shards of equal downloads are equal files, whatever order the downloads ended in."""

import io
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flows.ingest.shard_order import sort_shard

KEYS = [f"{number:09d}" for number in range(30)]
SUFFIXES = ("png", "json", "txt")


def write_shard(stem: Path, keys: list[str]) -> None:
    with tarfile.open(stem.with_suffix(".tar"), "w") as tar:
        for key in keys:
            for suffix in SUFFIXES:
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = 37 * int(key) * len(suffix)
                tar.addfile(info, io.BytesIO(bytes([int(key)]) * info.size))
    pq.write_table(pa.table({"key": keys, "status": ["success"] * len(keys)}), f"{stem}.parquet")


def test_the_order_of_downloads_leaves_no_trace(tmp_path: Path) -> None:
    contents = set()
    for seed in range(4):
        keys = random.Random(seed).sample(KEYS, len(KEYS)) if seed else KEYS
        stem = tmp_path / str(seed)
        write_shard(stem, keys)
        sort_shard(stem)
        contents.add(tuple(stem.with_suffix(end).read_bytes() for end in (".tar", ".parquet")))
    assert len(contents) == 1
    with tarfile.open(tmp_path / "1.tar") as tar:
        assert tar.getnames() == [f"{key}.{suffix}" for key in KEYS for suffix in SUFFIXES]
        for member in tar:
            file = tar.extractfile(member)
            assert file and file.read() == bytes([int(member.name[:9])]) * member.size
    assert pq.read_table(tmp_path / "1.parquet")["key"].to_pylist() == KEYS
    assert {path.suffix for path in tmp_path.iterdir()} == {".tar", ".parquet"}


def test_a_shard_without_images_stays_as_it_is(tmp_path: Path) -> None:
    write_shard(tmp_path / "empty", [])
    before = (tmp_path / "empty.tar").read_bytes()
    sort_shard(tmp_path / "empty")
    assert (tmp_path / "empty.tar").read_bytes() == before
