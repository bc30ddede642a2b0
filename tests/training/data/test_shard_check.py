"""Shards lie: a missing, cut or altered one is named, or its pictures are left out and counted;
nothing else changes.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.errors import DataError
from infra.storage.shard_reader import ShardReader
from infra.storage.work_folder import local_work
from tests.helpers.stage_folders import shards_in
from tests.helpers.training_folders import COUNT, SHARDS, write_kept
from training.data import shard_check
from training.data.image_reader import Pictures, read_table
from training.data.shard_check import LEFT_OUT
from training.sections.loop_section import OnBroken


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kept(tmp_path_factory.mktemp("kept"))


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "root")
    (tmp_path / "root" / "work").mkdir()
    return tmp_path / "root"


def flip_a_bit(root: Path, row: int) -> str:
    """Alter one picture in the middle of its bytes; return its key."""
    place = read_table(root / "curate" / "keep.parquet").to_pylist()[row]
    with (root / "ingest" / "shards" / place["shard"]).open("r+b") as file:
        file.seek(place["offset"] + place["size_bytes"] // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return str(place["key"])


def settle(root: Path, on_broken: OnBroken) -> dict[str, int]:
    return shard_check.settle(
        read_table(root / "curate" / "keep.parquet"),
        shards_in(root / "ingest"),
        on_broken,
        local_work(root / "work"),
    )


def cut(path: Path, size_bytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size_bytes)


def test_a_sound_keep_list_is_kept_whole(root: Path) -> None:
    for on_broken in ("stop", "skip"):
        assert settle(root, on_broken) == {}  # type: ignore[arg-type]
        assert shard_check.is_readable(
            read_table(root / "curate" / "keep.parquet"), local_work(root / "work")
        ).all()
        (root / "work" / LEFT_OUT).unlink()


def test_a_missing_shard_stops_the_job_and_is_named(root: Path) -> None:
    (root / "ingest" / "shards" / "00001.tar").unlink()
    with pytest.raises(
        DataError,
        match=rf"^shard 00001\.tar in .* is missing \({SHARDS[1]} of {COUNT} pictures are lost\): "
        rf".*broken_pictures",
    ):
        settle(root, "stop")
    assert not (root / "work" / LEFT_OUT).exists()


def test_a_truncated_shard_stops_the_job_and_is_named(root: Path) -> None:
    cut(root / "ingest" / "shards" / "00000.tar", 20_000)
    with pytest.raises(DataError, match=r"^shard 00000\.tar in .* is truncated"):
        settle(root, "stop")


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_a_flipped_bit_stops_the_job_when_it_is_read(
    root: Path, cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.data.image_reader.CACHE_BYTES", cache_bytes)
    flip_a_bit(root, 5)
    assert settle(root, "stop") == {}
    with pytest.raises(
        DataError, match=r"^00000\.tar/.*\.png has changed since curate \(SHA-256 differs\)"
    ):
        Pictures(read_table(root / "curate" / "keep.parquet"), shards_in(root / "ingest"), 16)[
            range(COUNT)
        ]


def test_all_that_is_broken_is_left_out_and_counted(root: Path) -> None:
    altered = flip_a_bit(root, 5)
    (root / "ingest" / "shards" / "00002.tar").unlink()
    shard = root / "ingest" / "shards" / "00001.tar"
    cut(shard, shard.stat().st_size // 2)
    table = read_table(root / "curate" / "keep.parquet")
    end = shard.stat().st_size
    lost = sum(
        row["shard"] == shard.name and row["offset"] + row["size_bytes"] > end
        for row in table.to_pylist()
    )
    assert 0 < lost < SHARDS[1]
    assert settle(root, "skip") == {
        "checksum": 1,
        "shard_missing": SHARDS[2],
        "shard_truncated": lost,
    }
    kept = shard_check.is_readable(table, local_work(root / "work"))
    assert kept.sum() == COUNT - 1 - SHARDS[2] - lost
    assert altered in json.loads((root / "work" / LEFT_OUT).read_text())
    assert (
        len(Pictures(table.filter(kept), shards_in(root / "ingest"), 16)) == kept.sum()
    )  # reads and checks every one


def test_what_a_killed_attempt_left_out_stays_out(root: Path) -> None:
    shard = root / "ingest" / "shards" / "00002.tar"
    whole = shard.read_bytes()
    shard.unlink()
    first = settle(root, "skip")
    shard.write_bytes(whole)
    assert settle(root, "skip") == first == {"shard_missing": SHARDS[2]}


def test_nothing_left_is_an_error(root: Path) -> None:
    for shard in (root / "ingest" / "shards").glob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match=f"none of {COUNT} pictures"):
        settle(root, "skip")


def test_pictures_read_ahead_are_the_pictures(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, shards = read_table(root / "curate" / "keep.parquet"), shards_in(root / "ingest")
    cached = Pictures(table, shards, 16)
    monkeypatch.setattr("training.data.image_reader.CACHE_BYTES", 0)
    read = Pictures(table, shards, 16)
    rows = torch.tensor([3, 40, 3, 0])  # one of them twice
    read.read_ahead(rows)
    assert set(read.ahead) == {3, 40, 0}
    assert read[rows].equal(cached[rows]) and not read.ahead
    assert read[range(COUNT)].equal(cached[range(COUNT)])


def test_pictures_are_read_as_they_lie_and_waiting_for_them_is_counted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = read_table(root / "curate" / "keep.parquet")
    places = list(zip(table["shard"].to_pylist(), table["offset"].to_pylist(), strict=True))
    read: list[int] = []
    opened: list[str] = []
    usual, usually = Pictures._read, Path.open

    def note(self: Pictures, row: int, shards: ShardReader) -> np.ndarray:
        read.append(row)
        time.sleep(0.005)
        return usual(self, row, shards)

    def opening(self: Path, *arguments: Any) -> Any:
        opened.append(self.name)
        return usually(self, *arguments)

    monkeypatch.setattr(Pictures, "_read", note)
    monkeypatch.setattr(Path, "open", opening)
    pictures = Pictures(table, shards_in(root / "ingest"), 16, readers=1, cache_bytes=0)
    rows = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    assert pictures.cache is None and pictures.waited_s == 0
    assert pictures[rows].shape == (COUNT, 16, 16, 3)
    assert [places[row] for row in read] == sorted(places) != [places[row] for row in rows.tolist()]
    assert opened == sorted({shard for shard, _ in places}), "each shard is opened once"
    assert pictures.waited_s >= 0.9 * 0.005 * COUNT
    before = pictures.waited_s
    pictures.read_ahead(rows[:5])
    for future in pictures.ahead.values():
        future.result()
    assert pictures[rows[:5]].shape == (5, 16, 16, 3)
    assert pictures.waited_s - before < 0.005
