"""Copies are found whole and nothing else is, each goes for one that stays, and evaluation pictures
stay whatever happens.
"""

import json
from pathlib import Path

import cv2
import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from indexing.data import embedding_store
from indexing.data.embedding_store import unit
from indexing.dedup import deduplicate, near_pairs, perceptual_hash
from indexing.dedup.deduplicate import DedupConfig, run
from indexing.dedup.grouping import (
    MAX_BITS,
    MAX_RMS,
    exact,
    groups,
    is_alike,
    keeper_rows,
    look_of,
    perceptual,
    semantic,
)
from indexing.dedup.perceptual_hash import like_evaluation
from infra.errors import DataError
from tests.helpers.evaluation_run import DIM, direction, encode_images, row, usual_rows, write_run

THRESHOLD = 0.95


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def planted(count: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return float16 vectors, where copies stand and what they are copies of: cosines from the
    threshold to 1.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(60, dim))
    vectors = unit(
        (centres[rng.integers(0, 60, count)] + rng.normal(size=(count, dim))).astype(np.float32)
    )
    source, copy = (
        rng.permutation(count // 2)[: count // 20],
        count // 2 + rng.permutation(count // 2)[: count // 20],
    )
    apart = rng.normal(size=(len(copy), dim)).astype(np.float32)
    apart = unit(apart - (apart * vectors[source]).sum(1, keepdims=True) * vectors[source])
    cosine = rng.uniform(THRESHOLD + 0.002, 1, (len(copy), 1)).astype(np.float32)
    vectors[copy] = cosine * vectors[source] + np.sqrt(1 - cosine**2) * apart
    return vectors.astype(np.float16), copy, source


@pytest.mark.parametrize("held_bytes", [1 << 30, 0])
def test_every_planted_copy_is_found_and_nothing_else(
    held_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_pairs, "HELD_BYTES", held_bytes)
    vectors, copy, source = planted(12_000, 96)
    keeper = semantic(np.array_split(vectors, 3), THRESHOLD, np.arange(len(vectors)))
    gone = np.flatnonzero(keeper != np.arange(len(vectors)))
    assert np.isin(copy, gone).mean() >= 0.999 and len(np.setdiff1d(gone, copy)) == 0
    assert (keeper[copy] == source).mean() >= 0.999


def test_the_cells_find_what_brute_force_finds() -> None:
    vectors, *_ = planted(6000, 64, seed=3)
    order = np.random.default_rng(0).permutation(6000)[:5900]
    near = near_pairs.NearVectors([vectors], 0.7, order)
    stays = np.arange(5900) % 7 != 0
    found = near.earlier(3000, 5900, stays)
    exact_vectors = unit(vectors.astype(np.float32))[order]
    right = np.argwhere(exact_vectors @ exact_vectors.T >= 0.7)
    right = {(a, b) for a, b in right.tolist() if a > b and a >= 3000 and stays[b]}
    pairs = set(zip(found.query.tolist(), found.member.tolist(), strict=True))
    assert pairs <= right and len(pairs) / len(right) > 0.999


def test_a_row_goes_only_for_one_that_stays_and_never_over_a_chain() -> None:
    angles = np.deg2rad([0, 15, 30, 45, 60])  # each is near to the next only
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    keeper = semantic([vectors], np.cos(np.deg2rad(16)), np.arange(5))
    assert keeper.tolist() == [0, 0, 2, 2, 4]
    assert semantic([vectors], np.cos(np.deg2rad(16)), np.array([3, 1, 0, 2, 4])).tolist() == [
        1,
        1,
        3,
        3,
        3,
    ]
    assert keeper_rows(keeper).tolist() == [0, 2, 4] and groups(keeper) == [(0, [1]), (2, [3])]
    assert semantic([vectors], 0.999, np.arange(5)).tolist() == [0, 1, 2, 3, 4], (
        "no pair at all is no fault"
    )


def test_equal_bytes_go_for_the_first_in_order() -> None:
    assert exact(np.array([b"a", b"a", b"a"]), np.array([2, 0])).tolist() == [2, 1, 2], (
        "what is not in the order is left alone"
    )
    assert exact(np.array([b"a", b"b", b"a", b"a"]), np.array([2, 0, 1, 3])).tolist() == [
        2,
        1,
        2,
        2,
    ]


def photo(seed: int, side_px: int = 96) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return cv2.resize(
        rng.integers(0, 256, (6, 6, 3)).astype(np.uint8),
        (side_px, side_px),
        interpolation=cv2.INTER_CUBIC,
    )


def test_looks_survive_resizing_and_compression_and_tell_colours() -> None:
    for seed in range(20):
        picture = photo(seed)
        small = cv2.resize(picture, (60, 60), interpolation=cv2.INTER_AREA)
        coded = cv2.imdecode(
            cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR
        )
        assert is_alike(look_of(picture), look_of(small)) and is_alike(
            look_of(picture), look_of(coded)
        )
        assert not is_alike(look_of(picture), look_of(photo(seed + 100)))
        other = np.ascontiguousarray(picture[..., ::-1])
        assert not is_alike(look_of(picture), look_of(other)), (
            "the same drawing in another colour is another picture"
        )


def test_perceptual_groups_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 3000).astype(np.uint64)
    for place in range(0, 1000, 2):  # flips of up to 8 bits, of which 6 are near
        bits = rng.choice(64, rng.integers(0, 9), replace=False)
        hashes[2000 + place // 2] = hashes[place] ^ np.uint64(sum(1 << int(bit) for bit in bits))
    thumbs = np.zeros((3000, 8, 8, 3), np.uint8)
    monkeypatch.setattr(near_pairs, "ALL_PAIRS_UP_TO", 1000)
    by_bands = perceptual(hashes, thumbs, np.arange(3000))
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= 6
    right = np.array(
        [
            next((other for other in range(place) if near[place, other]), place)
            for place in range(3000)
        ]
    )
    assert (by_bands == right).all() and (by_bands != np.arange(3000)).sum() > 300


def stage(
    folder: Path, rows: list, config: DedupConfig, vectors: np.ndarray | None = None
) -> tuple[dict, Path]:
    write_run(folder, rows, vectors)
    out = folder / "out"
    out.mkdir()
    return run(config, folder / "shards", folder / "embed", encode_images, 20, out), out


def test_evaluation_pictures_stay_and_their_copies_leave_training(tmp_path: Path) -> None:
    rows = [
        *usual_rows(),
        row(13, "plain", "train", caption="leaked"),
        row(2, "plain", "train", caption="again"),
    ]
    counts, out = stage(tmp_path, rows, DedupConfig(semantic=False))
    table = pq.read_table(out / "keep.parquet")
    kept_keys = set(table["key"].to_pylist())
    assert {each["key"] for each in rows if each["split"] != "train"} <= kept_keys
    assert rows[-2]["key"] not in kept_keys, "a copy of a held-out picture"
    reasons = {
        each["key"]: each["reason"] for each in pq.read_table(out / "groups.parquet").to_pylist()
    }
    assert reasons[rows[-2]["key"]] == "evaluation_alike"
    twins = {
        rows[-1]["key"],
        next(each["key"] for each in rows if each["number"] == 2 and each["style"] == "plain"),
    }
    assert len(twins & kept_keys) == 1 or twins & {
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
    numbers = {each["key"]: each["number"] for each in rows}
    vectors = np.load(out / "img_emb" / "img_emb_0000.npy").astype(np.float32)
    for key, vector in zip(
        pq.read_table(out / "keep.parquet")["key"].to_pylist(), vectors, strict=True
    ):
        assert vector @ direction(numbers[key]) > 0.99


def test_the_threshold_has_the_precision_or_nothing_goes_on_its_word(tmp_path: Path) -> None:
    rows = [each for each in usual_rows() if each["split"] != "held_out_style"]
    counts, out = stage(
        tmp_path / "told", rows, DedupConfig(sample=16, max_rms=0.0, max_hash_bits=0)
    )
    told = json.loads((out / "threshold.json").read_text())
    assert (
        told["threshold"] is not None and counts["precision"] >= 0.995 and told["copies"] == 8 * 6
    )
    assert set(told["recall_of"]) == {"resized", "jpeg", "shifted", "brighter", "cropped", "noise"}
    assert counts["dropped"], "framed drawings have the embeddings of plain ones here"
    same = np.tile(direction(0), (len(rows), 1))  # a CLIP that tells nothing apart
    write_run(tmp_path / "blind", rows, same)
    (tmp_path / "blind" / "out").mkdir()
    folders = (tmp_path / "blind" / "shards", tmp_path / "blind" / "embed")
    blind = run(
        DedupConfig(sample=16),
        *folders,
        lambda pictures: np.tile(direction(0), (len(pictures), 1)),
        20,
        tmp_path / "blind" / "out",
    )
    assert blind["threshold"] is None and not any("near" in why for why in blind["dropped"])


def test_who_chose_the_threshold_does_not_judge_it(tmp_path: Path) -> None:
    def half_blind(pictures: np.ndarray) -> np.ndarray:
        made = encode_images(pictures)
        made[1::2] = unit(
            np.random.default_rng().normal(size=made[1::2].shape).astype(np.float32)
        )  # another one each time
        return made

    rows = [each for each in usual_rows() if each["split"] != "held_out_style"]
    write_run(tmp_path, rows)
    (tmp_path / "out").mkdir()
    counts = run(
        DedupConfig(sample=32),
        tmp_path / "shards",
        tmp_path / "embed",
        half_blind,
        20,
        tmp_path / "out",
    )
    told = json.loads((tmp_path / "out" / "threshold.json").read_text())
    assert counts["threshold"] is not None and counts["recall"] == told["recall"] < 0.5
    assert max(told["recall_of"].values()) < 0.5


def test_pieces_and_parts_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        *(each for each in usual_rows() if each["split"] != "held_out_style"),
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
    apart = tmp_path / "parts" / "out"
    apart.mkdir()
    counts = run(
        DedupConfig(sample=16), tmp_path / "parts" / "shards", embed, encode_images, 20, apart
    )
    assert counts | {"peak_bytes": 0} == whole | {"peak_bytes": 0}
    for name in ("keep.parquet", "groups.parquet"):
        assert pq.read_table(apart / name) == pq.read_table(out / name)
    assert (apart / "groups.png").read_bytes() == (out / "groups.png").read_bytes()
    assert (apart / "threshold.json").read_text() == (out / "threshold.json").read_text()
    keeper_rows = pq.read_table(out / "keep.parquet")["key"].to_pylist()
    files = sorted((apart / "metadata").glob("*.parquet"))
    assert [key for file in files for key in pq.read_table(file)["key"].to_pylist()] == keeper_rows
    for file in files:
        assert (
            len(np.load(apart / "img_emb" / f"img_emb_{file.stem[-4:]}.npy"))
            == pq.read_table(file).num_rows
        )
    assert {path.name for path in apart.iterdir()} == {path.name for path in out.iterdir()}, (
        "nothing is left of the looks"
    )


def test_training_pictures_go_for_the_evaluation_picture_they_look_most_like(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(perceptual_hash, "BLOCK_ROWS", 64)
    rng = np.random.default_rng(0)
    hashes, is_train = rng.integers(0, 2**63, 500).astype(np.uint64), rng.random(500) < 0.7
    thumbs = rng.integers(0, 256, (500, 8, 8, 3)).astype(np.uint8)
    for row_, other in rng.permutation(500)[:300].reshape(150, 2):
        hashes[row_] = hashes[other] ^ np.uint64(
            sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 9), replace=False))
        )
        thumbs[row_] = np.clip(thumbs[other] + rng.normal(0, 9, (8, 8, 3)), 0, 255)
    found = like_evaluation(perceptual_hash.Looks(hashes, thumbs), is_train)
    flat = thumbs.reshape(500, -1).astype(np.float32)
    rms = np.sqrt(((flat[:, None] - flat[None]) ** 2).mean(2))
    is_alike = (
        (np.bitwise_count(hashes[:, None] ^ hashes[None]) <= MAX_BITS)
        & (rms <= MAX_RMS)
        & ~is_train[None]
    )
    right = np.where(is_alike.any(1) & is_train, np.where(is_alike, rms, np.inf).argmin(1), -1)
    assert (found == right).all() and (found >= 0).sum() > 20


def test_a_threshold_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    rows = [row(1, "plain", "held_out_style"), row(1, "framed", "train")]
    with pytest.raises(DataError, match="no training picture is left"):
        stage(
            tmp_path,
            rows,
            DedupConfig(threshold=0.9, sample=16),
            np.tile(direction(1), (2, 1)).reshape(2, DIM),
        )
