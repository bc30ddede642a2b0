"""The keep list points at whole images, splits without leaking, and accounts for every image it
read.
"""

import contextlib
import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.ingest import curate
from flows.ingest.curate import RANK, CurateConfig, first_of_equals, split_of
from infra.errors import DataError
from infra.schemas import DROPPED, KEEP
from infra.storage.stage_files import FolderFiles
from tests.helpers.hostile_server import encoded, picture
from training.data.image_reader import decode

Row = dict[str, Any]
NO_HELD_OUT = CurateConfig(held_out_concept_fraction=0)


def item(number: int, **changes: Any) -> Row:
    """Return one sample: its image and what img2dataset records of it."""
    return {
        "image": encoded(picture(number)),
        "sample": f"{number:016x}",
        "origin": f"http://h/{number}.png",
        "caption": f"thing {number}",
        "captions": [f"thing {number}", f"a thing {number}"],
        "licence": "CC0",
        "concept": f"c{number}",
        "style": "plain",
        "category": "Objects",
        "subcategory": "tool",
        "status": "success",
        "original_width": 48,
        "original_height": 48,
        **changes,
    }


def write_shard(ingest: Path, number: int, items: list[Row]) -> Path:
    """Write a shard as img2dataset does: image, .txt and .json of each success in the tar, a row of
    each attempt in the parquet.
    """
    (ingest / "shards").mkdir(parents=True, exist_ok=True)
    path = ingest / "shards" / f"{number:05d}.tar"
    rows = []
    with tarfile.open(path, "w") as tar:
        for position, each in enumerate(items):
            key = f"{number:05d}{position:04d}"
            rows.append(
                {name: value for name, value in each.items() if name != "image"} | {"key": key}
            )
            if each["status"] == "success":
                for suffix, data in (
                    ("json", json.dumps({}).encode()),
                    ("png", each["image"]),
                    ("txt", each["caption"].encode()),
                ):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return path


def curated(
    tmp_path: Path, config: CurateConfig = NO_HELD_OUT
) -> tuple[dict[str, Row], Counter[str], Row]:
    """Return the keep list by key, the drop reasons and the counts."""
    out = tmp_path / "out"
    counts = curate.run(config, FolderFiles(tmp_path / "ingest"), out)
    keep, dropped = pq.read_table(out / "keep.parquet"), pq.read_table(out / "dropped.parquet")
    assert keep.schema.equals(KEEP) and dropped.schema.equals(DROPPED)
    assert {path.name for path in out.iterdir()} == {"keep.parquet", "dropped.parquet"}
    reasons = Counter(dropped.column("reason").to_pylist())
    assert counts["dropped"] == reasons
    assert counts["in"] == counts["out"] + sum(reasons.values())
    assert counts["out"] == keep.num_rows
    rows = {row["key"]: row for row in keep.to_pylist()}
    assert len(rows) == keep.num_rows
    return rows, reasons, counts


def test_a_row_leads_to_the_bytes_of_its_image(tmp_path: Path) -> None:
    items = [item(n) for n in range(30)]
    write_shard(tmp_path / "ingest", 0, items[:17])
    write_shard(tmp_path / "ingest", 1, items[17:])
    rows, reasons, _ = curated(tmp_path)
    assert not reasons and len(rows) == 30
    for each in items:
        row = rows[each["sample"]]
        with (tmp_path / "ingest" / "shards" / row["shard"]).open("rb") as shard:
            shard.seek(row["offset"])
            image = shard.read(row["size_bytes"])
        assert image == each["image"]
        assert row["sha256"] == hashlib.sha256(image).hexdigest()
        assert (
            cv2.imdecode(np.frombuffer(image, np.uint8), 1).shape[:2]
            == (row["height_px"], row["width_px"])
            == (48, 48)
        )
        assert {name: row[name] for name in ("origin", "caption", "concept", "licence")} == {
            name: each[name] for name in ("origin", "caption", "concept", "licence")
        }


def test_every_bad_image_is_dropped_for_its_reason(tmp_path: Path) -> None:
    bad = {
        "decode_error": item(1, image=encoded(picture(1))[:30]),
        "blank": item(2, image=encoded(np.full((48, 48, 3), 255, np.uint8))),
        "too_small": item(3, original_height=8),
        "caption_too_short": item(4, captions=["x"]),
    }
    write_shard(
        tmp_path / "ingest", 0, [item(0), *bad.values(), item(5, status="failed_to_download")]
    )
    rows, reasons, _ = curated(tmp_path)
    assert set(rows) == {item(0)["sample"]}
    assert reasons == dict.fromkeys(bad, 1)


def test_what_training_would_refuse_does_not_pass(tmp_path: Path) -> None:
    deep = encoded(np.full((48, 48, 3), (1, 2, 30000), np.uint16))
    refused = [item(1, image=deep), item(2, image=encoded(picture(2))[:-20])]
    write_shard(tmp_path / "ingest", 0, [item(0), *refused])
    rows, reasons, _ = curated(tmp_path)
    assert set(rows) == {item(0)["sample"]} and reasons == {"decode_error": 2}
    for each in (item(0), *refused):
        is_kept = each["sample"] in rows
        with contextlib.nullcontext() if is_kept else pytest.raises(DataError, match="8-bit"):
            decode(each["image"], 32, "a.png")


def test_of_equal_images_the_lowest_key_stays(tmp_path: Path) -> None:
    write_shard(tmp_path / "ingest", 0, [item(7), item(9, image=encoded(picture(7)))])
    write_shard(tmp_path / "ingest", 1, [item(3, image=encoded(picture(7))), item(1)])
    rows, reasons, _ = curated(tmp_path)
    assert set(rows) == {item(3)["sample"], item(1)["sample"]}
    assert reasons == {"duplicate": 2}
    assert (
        len(curated(tmp_path, CurateConfig(held_out_concept_fraction=0, drop_duplicates=False))[0])
        == 4
    )


def test_a_duplicate_across_splits_leaves_the_training_split(tmp_path: Path) -> None:
    same = encoded(picture(5))
    write_shard(
        tmp_path / "ingest", 0, [item(1, image=same), item(2, image=same, style="strange"), item(3)]
    )
    rows, _, counts = curated(
        tmp_path, CurateConfig(held_out_concept_fraction=0, held_out_styles=("strange",))
    )
    assert {row["key"]: row["split"] for row in rows.values()} == {
        item(2)["sample"]: "held_out_style",
        item(3)["sample"]: "train",
    }
    assert counts["splits"] == {"held_out_style": 1, "train": 1}


def test_first_of_equals_agrees_with_brute_force() -> None:
    generator = np.random.default_rng(0)
    ranks = np.array(
        [
            (bytes([65 + i]) * 16, t, f"{k:016x}")
            for i, t, k in generator.integers(0, (5, 2, 9999), (60, 3))
        ],
        RANK,
    )
    best: dict[bytes, Any] = {}
    for rank in ranks.tolist():
        best[rank[0]] = min(rank, best.get(rank[0], rank))
    assert first_of_equals(ranks).tolist() == [best[rank[0]] == rank for rank in ranks.tolist()]
    assert first_of_equals(ranks[:0]).tolist() == []


def test_one_concept_never_stands_in_two_splits_and_the_fraction_holds() -> None:
    config = CurateConfig(held_out_concept_fraction=0.1, held_out_styles=("openmoji",))
    splits = {
        concept: {split_of(concept, style, config) for style in ("google", "twitter", "flags")}
        for concept in map(str, range(4000))
    }
    assert all(len(found) == 1 for found in splits.values())
    assert 0.08 < sum(found == {"held_out_concept"} for found in splits.values()) / 4000 < 0.12
    assert {split_of(str(n), "openmoji", config) for n in range(100)} == {"held_out_style"}
    other = config.model_copy(update={"seed": 1})
    assert any(
        split_of(str(n), "google", config) != split_of(str(n), "google", other) for n in range(100)
    )


def test_the_list_does_not_depend_on_the_order_of_download(tmp_path: Path) -> None:
    items = [item(n) for n in range(20)]
    for name, order in (("a", items), ("b", items[::-1])):
        write_shard(tmp_path / name / "ingest", 0, order)
    a, b = (list(curated(tmp_path / name)[0]) for name in ("a", "b"))
    assert a == b == sorted(a)


def test_equal_phrasings_are_kept_once_and_in_order(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "ingest",
        0,
        [item(1, captions=["a  cat", "cat", "a cat", "\x00", *map(str, range(30))])],
    )
    rows, _, _ = curated(tmp_path)
    [row] = rows.values()
    assert (row["caption"], row["captions"][:3], len(row["captions"])) == (
        "a cat",
        ["a cat", "cat", "0"],
        curate.MAX_PHRASINGS,
    )


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "ingest", 0, [item(n) for n in range(9)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"00000\.tar .*run the ingest stage again"):
        curate.run(NO_HELD_OUT, FolderFiles(tmp_path / "ingest"), tmp_path / "out")


def test_a_tar_and_a_parquet_that_disagree_are_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "ingest", 0, [item(n) for n in range(3)])
    rows = pq.read_table(path.with_suffix(".parquet"))
    pq.write_table(rows.slice(1), path.with_suffix(".parquet"))
    with pytest.raises(DataError, match="not in its parquet file"):
        curate.run(NO_HELD_OUT, FolderFiles(tmp_path / "ingest"), tmp_path / "out")
    pq.write_table(
        pa.concat_tables(
            [
                rows,
                rows.slice(0, 1).set_column(
                    rows.schema.get_field_index("key"), "key", pa.array(["x"])
                ),
            ]
        ),
        path.with_suffix(".parquet"),
    )
    with pytest.raises(DataError, match="lacks 1 images"):
        curate.run(NO_HELD_OUT, FolderFiles(tmp_path / "ingest"), tmp_path / "out")


def test_nothing_to_train_on_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ingest").mkdir()
    with pytest.raises(DataError, match="holds no shard"):
        curate.run(NO_HELD_OUT, FolderFiles(tmp_path / "ingest"), tmp_path / "out")
    write_shard(tmp_path / "ingest", 0, [item(1), item(2)])
    with pytest.raises(DataError, match=r"no pair is left to train on of 2 .*too_small.: 2"):
        curate.run(CurateConfig(min_side_px=64), FolderFiles(tmp_path / "ingest"), tmp_path / "out")


def test_training_images_that_look_like_a_held_out_one_leave_where_asked(tmp_path: Path) -> None:
    def photo(seed: int, quality: int = 100) -> bytes:
        made = cv2.resize(
            np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8),
            (48, 48),
            interpolation=cv2.INTER_CUBIC,
        )
        return cv2.imencode(".jpg", made, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()

    items = [item(n, image=photo(n)) for n in range(8)]
    items += [
        item(100 + n, image=photo(n, 60), style="strange") for n in (2, 5)
    ]  # other bytes, the same picture
    items += [item(200, image=photo(3, 60))]  # of a training image
    write_shard(tmp_path / "ingest", 0, items[3:])
    write_shard(tmp_path / "ingest", 1, items[:3])
    plain = CurateConfig(held_out_concept_fraction=0, held_out_styles=("strange",))
    assert len(curated(tmp_path, plain)[0]) == 11
    rows, reasons, _ = curated(tmp_path, plain.model_copy(update={"decontaminate": True}))
    assert reasons == {"evaluation_alike": 2} and len(rows) == 9
    assert {f"{n:016x}" for n in (2, 5)}.isdisjoint(rows) and {
        f"{n:016x}" for n in (102, 105, 3, 200)
    } <= rows.keys()
    dropped = pq.read_table(tmp_path / "out" / "dropped.parquet").to_pylist()
    assert {(each["key"], each["detail"]) for each in dropped} == {
        (f"{n:016x}", f"looks like {100 + n:016x}") for n in (2, 5)
    }


def test_a_list_that_asks_for_nothing_new_keeps_its_key() -> None:
    assert "decontaminate" not in NO_HELD_OUT.keyed()
    assert CurateConfig(decontaminate=True).keyed()["decontaminate"] is True
