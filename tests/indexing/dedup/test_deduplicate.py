"""The stage drops copies, keeps evaluation pictures, and chooses its threshold by precision."""

import json
from pathlib import Path

import cv2
import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from indexing.data import embedding_store
from indexing.data.embedding_store import unit
from indexing.dedup import deduplicate
from indexing.dedup.deduplicate import DedupConfig, run
from infra.errors import DataError
from tests.helpers.evaluation_run import DIM, direction, encode_images, row, usual_rows, write_run
from tests.helpers.stage_folders import shards_in


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def stage(
    folder: Path, rows: list, config: DedupConfig, vectors: np.ndarray | None = None
) -> tuple[dict, Path]:
    write_run(folder, rows, vectors)
    out = folder / "out"
    out.mkdir()
    return run(config, shards_in(folder), folder / "embed", encode_images, 20, out), out


def test_evaluation_pictures_stay_and_their_copies_leave_training(tmp_path: Path) -> None:
    rows = [
        *usual_rows(),
        row(13, "plain", "train", caption="leaked"),
        row(2, "plain", "train", caption="again"),
    ]
    counts, out = stage(tmp_path, rows, DedupConfig(semantic=False))
    table = pq.read_table(out / "keep.parquet")
    remaining_keys = set(table["key"].to_pylist())
    assert {pair["key"] for pair in rows if pair["split"] != "train"} <= remaining_keys
    assert rows[-2]["key"] not in remaining_keys, "a copy of a held-out picture"
    dropped = pq.read_table(out / "groups.parquet").to_pylist()
    reasons = {pair["key"]: pair["reason"] for pair in dropped}
    assert reasons[rows[-2]["key"]] == "evaluation_alike"
    twins = {
        rows[-1]["key"],
        next(pair["key"] for pair in rows if pair["number"] == 2 and pair["style"] == "plain"),
    }
    assert len(twins & remaining_keys) == 1 or twins & {
        key for key, why in reasons.items() if why == "evaluation_alike"
    }
    assert (
        counts["in"] == counts["out"] + sum(counts["dropped"].values())
        and counts["out"] == table.num_rows
    )
    for name in ("img_emb", "text_emb"):
        assert len(np.load(out / name / f"{name}_0000.npy")) == table.num_rows
    assert json.loads((out / "facts.json").read_text())["count"] == table.num_rows
    picture = cv2.imread(str(out / "groups.png"))
    assert picture is not None and picture.std() > 0


def test_embeddings_belong_to_the_rows_that_stay(tmp_path: Path) -> None:
    rows = usual_rows()
    _, out = stage(tmp_path, rows, DedupConfig(semantic=False, max_rms=0.0, max_hash_bits=0))
    numbers = {pair["key"]: pair["number"] for pair in rows}
    vectors = np.load(out / "img_emb" / "img_emb_0000.npy").astype(np.float32)
    for key, vector in zip(
        pq.read_table(out / "keep.parquet")["key"].to_pylist(), vectors, strict=True
    ):
        assert vector @ direction(numbers[key]) > 0.99


def test_the_threshold_has_the_precision_or_near_embeddings_are_ignored(tmp_path: Path) -> None:
    rows = [pair for pair in usual_rows() if pair["split"] != "held_out_style"]
    config = DedupConfig(sample=16, max_rms=0.0, max_hash_bits=0)
    counts, out = stage(tmp_path / "sighted", rows, config)
    measured = json.loads((out / "threshold.json").read_text())
    assert measured["threshold"] is not None and measured["copies"] == 8 * 6
    assert counts["precision"] >= 0.995
    assert set(measured["recall_of"]) == {
        "resized",
        "jpeg",
        "shifted",
        "brighter",
        "cropped",
        "noise",
    }
    assert counts["dropped"], "framed drawings have the embeddings of plain ones here"
    same = np.tile(direction(0), (len(rows), 1))  # a CLIP with equal embeddings for all pictures
    write_run(tmp_path / "blind", rows, same)
    (tmp_path / "blind" / "out").mkdir()
    folders = (shards_in(tmp_path / "blind"), tmp_path / "blind" / "embed")
    blind = run(
        DedupConfig(sample=16),
        *folders,
        lambda pictures: np.tile(direction(0), (len(pictures), 1)),
        20,
        tmp_path / "blind" / "out",
    )
    assert blind["threshold"] is None and not any("near" in why for why in blind["dropped"])


def test_pictures_that_choose_the_threshold_do_not_judge_it(tmp_path: Path) -> None:
    def half_blind(pictures: np.ndarray) -> np.ndarray:
        vectors = encode_images(pictures)
        # Other random vectors in every call.
        noise = np.random.default_rng().normal(size=vectors[1::2].shape)
        vectors[1::2] = unit(noise.astype(np.float32))
        return vectors

    rows = [pair for pair in usual_rows() if pair["split"] != "held_out_style"]
    write_run(tmp_path, rows)
    (tmp_path / "out").mkdir()
    counts = run(
        DedupConfig(sample=32),
        shards_in(tmp_path),
        tmp_path / "embed",
        half_blind,
        20,
        tmp_path / "out",
    )
    measured = json.loads((tmp_path / "out" / "threshold.json").read_text())
    assert counts["threshold"] is not None and counts["recall"] == measured["recall"] < 0.5
    assert max(measured["recall_of"].values()) < 0.5


def test_pieces_and_parts_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        *(pair for pair in usual_rows() if pair["split"] != "held_out_style"),
        row(13, "plain", "train", caption="leaked"),
        row(2, "plain", "train", caption="again"),
    ]
    whole, out = stage(tmp_path / "whole", rows, DedupConfig(sample=16))
    write_run(tmp_path / "parts", rows)
    embed = tmp_path / "parts" / "embed"
    table = pq.read_table(embed / "metadata" / "metadata_0000.parquet")
    for number, (start, end) in enumerate(((0, 5), (5, 6), (6, len(rows)))):
        for name in ("img_emb", "text_emb"):
            np.save(
                embed / name / f"{name}_{number:04}.npy",
                np.load(tmp_path / "whole" / "embed" / name / f"{name}_0000.npy")[start:end],
            )
        pq.write_table(
            table.slice(start, end - start), embed / "metadata" / f"metadata_{number:04}.parquet"
        )
    for module in (embedding_store, deduplicate):
        monkeypatch.setattr(module, "CHUNK_ROWS", 4)
    out_of_parts = tmp_path / "parts" / "out"
    out_of_parts.mkdir()
    counts = run(
        DedupConfig(sample=16),
        shards_in(tmp_path / "parts"),
        embed,
        encode_images,
        20,
        out_of_parts,
    )
    assert counts | {"peak_bytes": 0} == whole | {"peak_bytes": 0}
    for name in ("keep.parquet", "groups.parquet"):
        assert pq.read_table(out_of_parts / name) == pq.read_table(out / name)
    assert (out_of_parts / "groups.png").read_bytes() == (out / "groups.png").read_bytes()
    assert (out_of_parts / "threshold.json").read_text() == (out / "threshold.json").read_text()
    remaining_keys = pq.read_table(out / "keep.parquet")["key"].to_pylist()
    files = sorted((out_of_parts / "metadata").glob("*.parquet"))
    assert [
        key for file in files for key in pq.read_table(file)["key"].to_pylist()
    ] == remaining_keys
    for file in files:
        assert (
            len(np.load(out_of_parts / "img_emb" / f"img_emb_{file.stem[-4:]}.npy"))
            == pq.read_table(file).num_rows
        )
    assert {path.name for path in out_of_parts.iterdir()} == {
        path.name for path in out.iterdir()
    }, "temporary files are removed"


def test_a_threshold_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    rows = [row(1, "plain", "held_out_style"), row(1, "framed", "train")]
    with pytest.raises(DataError, match="no training picture is left"):
        stage(
            tmp_path,
            rows,
            DedupConfig(threshold=0.9, sample=16),
            np.tile(direction(1), (2, 1)).reshape(2, DIM),
        )
