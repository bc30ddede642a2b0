"""What the trainings read of embeddings and captions is what lies in the files, however it is
held.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from infra.compute.cluster import ClusterConfig
from infra.errors import CallerError
from infra.schemas import KEEP
from infra.storage.stage_files import FolderFiles
from infra.storage.work_folder import local_work
from tests.helpers.stage_folders import embed_folders
from tests.helpers.training_folders import TINY
from training.data import embedding_dataset, shard_check
from training.data.embedding_dataset import Captions, Vectors
from training.data.image_reader import read_table
from training.jobs import embed
from training.models.clip import CLIP
from training.models.tokenizer import PAD, Tokenizer
from training.sections.tokenizer_section import TokenizerConfig

PHRASINGS = [
    ["a red heart", "a heart that is red, drawn by somebody who had a lot of time"],
    ["flag"],
    ["", "house", "a house"],
    ["cat face"],
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.fit(
        (text for each in PHRASINGS for text in each), TokenizerConfig(vocab_size=300, context=16)
    )


def write_parts(folder: Path, lengths: list[int], dim: int = 6) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((sum(lengths), dim)).astype(np.float16)
    folder.mkdir(parents=True)
    for number, part in enumerate(np.split(rows, np.cumsum(lengths)[:-1])):
        np.save(folder / f"img_emb_{number:04}.npy", part)
    return rows


def test_vectors_of_any_rows_come_from_their_parts(tmp_path: Path) -> None:
    rows = write_parts(tmp_path / "img_emb", [3, 1, 4]).astype(np.float32)
    unit = torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    chosen = np.array([0, 2, 3, 4, 7])
    vectors = Vectors(sorted((tmp_path / "img_emb").glob("*.npy")), chosen)
    assert len(vectors) == 5 and vectors.dim == 6
    places = torch.tensor([4, 0, 2, 2, 1, 3])
    torch.testing.assert_close(vectors[places], unit[chosen[places.numpy()]])
    some = vectors.where(np.array([False, True, False, True, True]))
    torch.testing.assert_close(some[torch.arange(3)], unit[[2, 4, 7]])


def test_statistics_are_taken_from_rows_at_equal_distances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parts(tmp_path / "img_emb", [10])
    vectors = Vectors([tmp_path / "img_emb" / "img_emb_0000.npy"], np.arange(10))
    assert vectors.sampled().tolist() == list(range(10))
    monkeypatch.setattr(embedding_dataset, "SAMPLED", 4)
    assert vectors.sampled().tolist() == [0, 2, 5, 7]


def test_a_split_is_read_row_by_row(tmp_path: Path) -> None:
    rows = write_parts(tmp_path / "img_emb", [2, 3]).astype(np.float32)
    splits, keys = ["train", "held_out_style", "held_out_concept", "train", "train"], list("abcde")
    (tmp_path / "metadata").mkdir()
    for number, (start, end) in enumerate(((0, 2), (2, 5))):
        table = pa.table({"key": keys[start:end], "split": splits[start:end]})
        pq.write_table(table, tmp_path / "metadata" / f"metadata_{number:04}.parquet")
    table, z_i = embedding_dataset.read(tmp_path, "train", ["key"])
    assert table.to_pydict() == {"key": ["a", "d", "e"]}
    expected = torch.nn.functional.normalize(torch.from_numpy(rows[[0, 3, 4]]), dim=-1)
    torch.testing.assert_close(z_i[torch.arange(3)], expected)


@pytest.mark.parametrize("texts_at_a_time", [2, 100])
def test_a_drawn_phrasing_has_the_ids_of_its_text(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, texts_at_a_time: int
) -> None:
    monkeypatch.setattr(embedding_dataset, "TOKENISED", texts_at_a_time)
    captions = Captions(
        pa.chunked_array([pa.array(PHRASINGS[:1]), pa.array(PHRASINGS[1:])]), tokenizer
    )
    texts = [text for each in PHRASINGS for text in each]
    rows, chance = (
        torch.tensor([2, 0, 3, 2, 0, 1]),
        torch.tensor([0.0, 0.99, 0.5, 0.7, 0.49, 0.999]),
    )
    ids, phrasing = captions.draw(rows, chance)
    assert phrasing.tolist() == [3, 1, 6, 5, 0, 2]
    expected = tokenizer([texts[number] for number in phrasing.tolist()])
    assert ids.dtype == torch.int64 and ids.equal(expected)
    short, _ = captions.draw(torch.tensor([1]), torch.tensor([0.0]))
    assert short.equal(tokenizer(["flag"])) and (short != PAD).all()


def test_texts_embedded_when_asked_for_are_those_embedded_at_once(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    clip = CLIP(TINY, tokenizer.vocab_size, tokenizer.context).eval()
    captions = Captions(pa.array(PHRASINGS), tokenizer)
    numbers = torch.tensor([6, 1, 1, 3])
    at_once = captions.embedded(clip)(numbers)
    monkeypatch.setattr(embedding_dataset, "HELD_BYTES", 0)
    assert captions.embedded(clip)(numbers).shape == (4, TINY.embed_dim)
    torch.testing.assert_close(captions.embedded(clip)(numbers), at_once)


def test_the_keep_list_is_cut_into_parts_without_what_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "READ_ROWS", 3)
    keys = [f"{number:02}" for number in range(11)]
    columns = {
        field.name: keys if field.name == "key" else pa.nulls(11, field.type) for field in KEEP
    }
    pq.write_table(pa.table(columns, KEEP), tmp_path / "keep.parquet")
    (tmp_path / shard_check.LEFT_OUT).write_text('{"01": "checksum", "09": "shard_missing"}')
    config = embed.EmbedConfig(rows_per_part=4)
    assert embed.cut(config, FolderFiles(tmp_path), local_work(tmp_path)) == (3, 9)
    parts = [read_table(tmp_path / f"rows_{number:04}.parquet") for number in range(3)]
    assert [part["key"].to_pylist() for part in parts] == [
        ["00", "02", "03", "04"],
        ["05", "06", "07", "08"],
        ["10"],
    ]
    assert parts[0].schema.equals(KEEP)


def test_more_parts_than_four_digits_name_are_refused_before_anything_is_embedded(
    tmp_path: Path,
) -> None:
    columns = {field.name: pa.nulls(21, field.type) for field in KEEP}
    (tmp_path / "curate").mkdir()
    pq.write_table(pa.table(columns, KEEP), tmp_path / "curate" / "keep.parquet")
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(CallerError, match=r"rows_per_part = 2 makes over 10 parts: set 3 or more"),
    ):
        patch.setattr(embed, "PARTS", 10)
        embed.run(
            embed.EmbedConfig(rows_per_part=2),
            ClusterConfig(),
            embed_folders(tmp_path, tmp_path / "work"),
            "",
            tmp_path,
        )


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_a_share_of_the_draws_is_the_first_phrasing_and_the_others_fall_on_all_alike(
    share: float,
) -> None:
    count, phrasings = 30_000, 3
    chance = torch.rand(count, generator=torch.Generator().manual_seed(0))
    chance[0] = 1 - 2**-24
    found = embedding_dataset.towards_first(chance, share)
    drawn = torch.bincount((found * phrasings).long(), minlength=phrasings) / count
    other = (1 - share) / phrasings
    torch.testing.assert_close(
        drawn, torch.tensor([share + other, other, other]), atol=0.01, rtol=0
    )
    assert share or found.equal(chance), "a share of nothing must change nothing"
