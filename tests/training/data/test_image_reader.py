"""training/data/image_reader.py reads exactly the bytes that curate saw, and puts every picture on
a white square.
"""

from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from flows.ingest import curate
from infra.errors import DataError
from infra.storage.stage_files import FolderFiles
from tests.flows.ingest.test_curate import NO_HELD_OUT, item, write_shard
from tests.helpers.stage_folders import shards_in
from training.data import image_reader
from training.data.image_reader import Pictures, decode, read_table

COUNT, SIDE = 9, 24


@pytest.fixture
def run(tmp_path: Path) -> Path:
    items = [item(number) for number in range(COUNT)]
    write_shard(tmp_path, 0, items[:4])
    write_shard(tmp_path, 1, items[4:])
    curate.run(NO_HELD_OUT, FolderFiles(tmp_path), tmp_path / "curate")
    return tmp_path


def encoded(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_any_row_is_its_own_picture(
    run: Path, monkeypatch: pytest.MonkeyPatch, cache_bytes: int
) -> None:
    monkeypatch.setattr(image_reader, "CACHE_BYTES", cache_bytes)
    table = read_table(run / "curate" / "keep.parquet")
    found = Pictures(table, shards_in(run), SIDE)
    assert (found.cache is None) == (cache_bytes == 0) and len(found) == COUNT
    by_key = {item(number)["sample"]: item(number)["image"] for number in range(COUNT)}
    rows = [7, 0, 3, 3, 8]
    taken = found[torch.tensor(rows)]
    assert taken.dtype == torch.uint8 and taken.shape == (5, SIDE, SIDE, 3)
    assert taken.equal(found[rows])
    for place, row in enumerate(rows):
        bgr = cv2.imdecode(
            np.frombuffer(by_key[table["key"][row].as_py()], np.uint8), cv2.IMREAD_COLOR
        )
        expected = cv2.resize(bgr, (SIDE, SIDE), interpolation=cv2.INTER_AREA)[..., ::-1]
        assert np.array_equal(taken[place].numpy(), expected)
    assert not taken[0].equal(taken[1])


def test_a_flipped_bit_is_an_error_that_names_shard_and_member(run: Path) -> None:
    table = read_table(run / "curate" / "keep.parquet")
    place = table.slice(5, 1).to_pylist()[0]
    shard = run / "shards" / place["shard"]
    data = bytearray(shard.read_bytes())
    data[place["offset"] + place["size_bytes"] // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=f"{place['shard']}/{place['member']}.*SHA-256"):
        Pictures(table, shards_in(run), SIDE)


def test_a_cut_shard_is_an_error(run: Path) -> None:
    shard = run / "shards" / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(DataError, match=r"00001\.tar"):
        Pictures(read_table(run / "curate" / "keep.parquet"), shards_in(run), SIDE)


def test_a_missing_shard_is_an_error_that_names_it(run: Path) -> None:
    (run / "shards" / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"00001\.tar is missing"):
        Pictures(read_table(run / "curate" / "keep.parquet"), shards_in(run), SIDE)


def test_tables_of_a_folder_come_in_name_order_and_by_split(tmp_path: Path, run: Path) -> None:
    table = read_table(run / "curate" / "keep.parquet")
    split = table.set_column(
        table.column_names.index("split"), "split", [["train"] * 4 + ["held_out_concept"] * 5]
    )
    (tmp_path / "metadata").mkdir()
    pq.write_table(split.slice(3), tmp_path / "metadata" / "metadata_0001.parquet")
    pq.write_table(split.slice(0, 3), tmp_path / "metadata" / "metadata_0000.parquet")
    assert read_table(tmp_path / "metadata").equals(split)
    assert (
        read_table(tmp_path / "metadata", "train")["key"].to_pylist()
        == table["key"].to_pylist()[:4]
    )


def test_transparent_pixels_are_white() -> None:
    image = np.zeros((4, 4, 4), np.uint8)
    image[:2] = (10, 20, 30, 255)  # BGRA
    image[2] = (0, 0, 0, 51)
    found = decode(encoded(image), 4, "x")
    assert found[0, 0].tolist() == [30, 20, 10]
    assert found[2, 0].tolist() == [204] * 3
    assert found[3, 0].tolist() == [255] * 3


@pytest.mark.parametrize("shape", [(4, 8), (8, 4), (8, 5)])
def test_what_is_not_square_is_centred_on_white(shape: tuple[int, int]) -> None:
    found = decode(encoded(np.full((*shape, 3), 7, np.uint8)), 8, "x")
    assert found.shape == (8, 8, 3) and found.flags["C_CONTIGUOUS"]
    top, left = (8 - shape[0]) // 2, (8 - shape[1]) // 2
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[top : top + shape[0], left : left + shape[1]] = 7
    assert np.array_equal(found, expected)


def test_grey_pictures_have_three_channels() -> None:
    assert (decode(encoded(np.full((8, 8), 90, np.uint8)), 8, "x") == 90).all()


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture", encoded(np.zeros((4, 4, 3), np.uint16))],
    ids=["empty", "text", "16 bit"],
)
def test_what_is_no_8_bit_picture_is_an_error_with_its_name(data: bytes) -> None:
    with pytest.raises(DataError, match=r"a/b\.png"):
        decode(data, 8, "a/b.png")
