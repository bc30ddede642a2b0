"""The index agrees with brute force whatever its kind, its rows stay with their metadata, and bad
queries are refused.
"""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
from pydantic import ValidationError

from flows.live_index import compaction
from indexing.ann import index, inverted_lists
from indexing.ann.factory import building_bytes, hot_bytes, train
from indexing.ann.index import INDEX_FILES, MODALITIES, Index, IndexConfig, build
from indexing.ann.tuning import Effort, brute_force, effort_for, recalls, search
from indexing.data.embedding_store import part_files
from infra.compute.cluster import Cluster, ClusterConfig, spread
from infra.errors import CallerError, CutFileError, DataError
from infra.storage import manifests
from infra.storage.removal_log import Removals
from infra.storage.stage_files import FolderFiles
from tests.helpers.embed_folders import KINDS, cut, exact, made, uneven, vectors, write_embed

COUNT, DIM = 1500, 32
RECALLS = ("recall@1", "recall@10", "recall@100")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed")
    write_embed(folder, COUNT, DIM)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(
    request: pytest.FixtureRequest, embed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    faiss.omp_set_num_threads(1)
    out = tmp_path_factory.mktemp("index")
    build(IndexConfig(factory=request.param, queries=64), embed, out)
    return out


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_kind_finds_what_brute_force_finds(folder: Path, embed: Path, modality: str) -> None:
    queries = vectors(50, DIM, seed=7).astype(np.float32)
    scores, rows = Index.open(folder).search(queries, 10, modality)
    truth = queries @ exact(embed, modality).T
    best = np.argsort(-truth, axis=1)[:, :10]
    shared = [
        len(set(result) & set(right)) / 10
        for result, right in zip(rows.tolist(), best.tolist(), strict=True)
    ]
    assert np.mean(shared) >= 0.9
    assert (np.diff(scores, axis=1) <= 1e-6).all()
    assert np.allclose(scores, np.take_along_axis(truth, rows, axis=1), atol=0.03)


def test_flat_is_exact(embed: Path, tmp_path: Path) -> None:
    counts = build(IndexConfig(), embed, tmp_path)
    queries = vectors(50, DIM, seed=7).astype(np.float32)
    scores, _ = Index.open(tmp_path).search(queries, 10)
    assert np.allclose(
        scores, -np.sort(-(queries @ exact(embed, "image").T), axis=1)[:, :10], atol=1e-5
    )
    facts = json.loads((tmp_path / "index.json").read_text())
    figures = {
        name: facts[name]
        for name in (*RECALLS, "latency_p50_ms", "latency_p99_ms", "bytes", "build_peak_bytes")
    }
    assert counts.items() >= figures.items(), "the manifest holds the figures"
    assert [figures[name] for name in RECALLS] == [1, 1, 1] and 0 < figures[
        "latency_p50_ms"
    ] <= figures["latency_p99_ms"]
    assert (
        figures["bytes"] == facts["image"]["bytes"] + facts["text"]["bytes"] > 2 * COUNT * DIM * 4
    )
    assert (
        counts.items()
        >= {"in": COUNT, "out": COUNT, "dropped": {}, "factory": "Flat", "added_to": 0}.items()
    )


def test_the_reported_recall_is_that_of_the_opened_index(folder: Path, embed: Path) -> None:
    facts = json.loads((folder / "index.json").read_text())
    judges = np.sort(np.random.default_rng(0).choice(COUNT, 64, replace=False))[
        1::2
    ]  # the other half chose the effort
    truth = exact(embed, "image")
    recalls = []
    for modality in MODALITIES:  # queries of both kinds on the image index
        queries = exact(embed, modality)[judges]
        is_own = (judges[:, None] == np.arange(COUNT)) & (
            modality == "image"
        )  # a query that finds itself does not count
        best = np.argsort(-np.where(is_own, -np.inf, queries @ truth.T), axis=1)[:, :10]
        _, rows = Index.open(folder).search(queries, 11)
        shares = []
        for query_row, result, right in zip(
            judges.tolist(), rows.tolist(), best.tolist(), strict=True
        ):
            others = [row for row in result if row != query_row or modality == "text"][:10]
            shares.append(len(set(others) & set(right)) / 10)
        recalls.append(np.mean(shares))
    assert facts["image"]["recall@10"] == pytest.approx(min(recalls), abs=0.015)
    assert facts["recall@10"] == min(facts[modality]["recall@10"] for modality in MODALITIES)
    assert facts["target_met"] and facts["recall@10"] >= 0.95
    assert facts["bytes"] == sum(
        (folder / f"{modality}.index").stat().st_size for modality in MODALITIES
    )


def test_a_higher_target_probes_more_cells(embed: Path, tmp_path: Path) -> None:
    nprobes = []
    for target in (0.3, 0.999):
        out = tmp_path / str(target)
        out.mkdir()
        build(IndexConfig(factory="IVF38,Flat", recall_target=target, queries=64), embed, out)
        nprobes.append(json.loads((out / "index.json").read_text())["nprobe"])
    assert nprobes[0] < nprobes[1] <= 38


def test_every_row_has_its_own_metadata(folder: Path, embed: Path) -> None:
    index = Index.open(folder)
    rows = np.array(
        [COUNT - 1, 0, COUNT // 2 - 1, COUNT // 2, 3]
    )  # out of order and across both files
    _, result = index.search(exact(embed, "image")[rows], 1)
    assert result[:, 0].tolist() == rows.tolist()
    assert [row["key"] for row in index.metadata(result[:, 0])] == [f"k{row:06d}" for row in rows]
    assert index.clip_key == "abc"


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_sample_is_found_by_its_key_with_its_vector(
    folder: Path, embed: Path, modality: str
) -> None:
    index = Index.open(folder)
    rows = [COUNT - 1, 0, COUNT // 2, 3]
    assert [index.row_of(f"k{row:06d}") for row in rows] == rows
    assert np.allclose(index.vectors(rows, modality), exact(embed, modality)[rows], atol=0.02)
    assert index.vectors([]).shape == (0, DIM)
    with pytest.raises(KeyError, match="k9"):
        index.row_of("k9")
    for wrong in (-1, COUNT):
        with pytest.raises(IndexError, match=str(wrong)):
            index.vectors([0, wrong])
    _, result = index.search(index.vectors(rows), 1)
    assert result[:, 0].tolist() == rows


@pytest.mark.parametrize("row", [-1, COUNT])
def test_metadata_refuses_a_row_that_is_not_there(folder: Path, row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row}"):
        Index.open(folder).metadata([0, row])


@pytest.mark.parametrize("k", [500, COUNT, COUNT + 1, 10**9])
def test_a_large_k_gives_every_row_at_most_once(folder: Path, k: int) -> None:
    scores, rows = Index.open(folder).search(vectors(3, DIM, seed=5), k)
    wanted = min(k, COUNT)
    assert scores.shape == rows.shape == (3, wanted)
    assert rows.min() >= 0
    assert all(len(set(query_rows)) == wanted for query_rows in rows.tolist())


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (np.full((1, DIM), np.nan), "NaN"),
        (np.full((1, DIM), np.inf), "infinity"),
        (np.ones((1, DIM + 1)), r"\(1, 33\)"),
        (np.ones(DIM), r"shape \(32,\)"),
        (np.ones((1, 1, DIM)), r"\(1, 1, 32\)"),
        ([["a"] * DIM], "numbers"),
        ([[1.0], [1.0, 2.0]], "numbers"),
        (None, "shape"),
    ],
)
def test_a_bad_query_is_refused_in_one_line(folder: Path, query: object, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        Index.open(folder).search(query, 5)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_bad_k_or_modality_is_refused(folder: Path) -> None:
    index = Index.open(folder)
    with pytest.raises(ValueError, match="k = 0"):
        index.search(np.ones((1, DIM)), 0)
    with pytest.raises(ValueError, match="sound"):
        index.search(np.ones((1, DIM)), 1, "sound")  # type: ignore[arg-type]


def test_no_queries_give_no_rows(folder: Path) -> None:
    scores, rows = Index.open(folder).search(np.empty((0, DIM)), 5)
    assert scores.shape == rows.shape == (0, 5)


def test_threads_share_an_index(folder: Path) -> None:
    index = Index.open(folder)
    queries = vectors(40, DIM, seed=3).astype(np.float32)
    alone = [index.search(query[None], k)[1].tolist() for query in queries for k in (3, 800)]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(
            lambda query_k: index.search(query_k[0][None], query_k[1])[1].tolist(),
            [(q, k) for q in queries for k in (3, 800)],
        )
        assert list(together) == alone


@pytest.mark.parametrize("name", INDEX_FILES)
def test_a_file_that_is_cut_while_it_is_open_is_an_error(
    embed: Path, tmp_path: Path, name: str
) -> None:
    build(IndexConfig(), embed, tmp_path)
    opened = Index.open(tmp_path)
    os.truncate(tmp_path / name, 0)  # to read a lost page would end this process
    for call in (
        lambda: opened.search(vectors(1, DIM, seed=7), 10),
        lambda: opened.vectors([0]),
        lambda: opened.metadata([0]),
        lambda: opened.column("key"),
    ):
        with pytest.raises(CutFileError, match=rf"{name} was cut from .* to 0 bytes.*restore"):
            call()


@pytest.mark.parametrize("count", [1, 2, 38, 39, 100])
def test_few_vectors_build_whatever_the_memory(tmp_path: Path, count: int) -> None:
    write_embed(tmp_path / "embed", count, 16, parts=1)
    for memory in {
        2 * hot_bytes(kind, count, 16) for kind in ("Flat", f"IVF{max(1, count // 39)},SQ8")
    }:
        out = tmp_path / str(memory)
        out.mkdir()
        build(IndexConfig(memory_bytes=memory), tmp_path / "embed", out)
        assert Index.open(out).search(np.ones((1, 16)), 10)[1].shape == (1, min(10, count))


@pytest.mark.parametrize("factory", ["HNSW32", "IVF0,Flat", "IVF16", "IVF16,PQ8", "flat", "Flat\n"])
def test_an_unknown_factory_is_refused(factory: str) -> None:
    with pytest.raises(ValidationError):
        IndexConfig(factory=factory)


def test_more_cells_than_vectors_are_refused(embed: Path, tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="factory = IVF2000,Flat"):
        build(IndexConfig(factory="IVF2000,Flat"), embed, tmp_path)


@pytest.mark.parametrize(
    "factory",
    [
        "RR16,IVF4,PQ8x4fs,Refine(SQ8)",
        "IVF4,PQ7x4fs,Refine(SQ8)",
        "RR32,IVF38(PQ5x4fs),PQ8x4fs,Refine(SQ8)",
    ],
)
def test_a_kind_for_other_dimensions_is_refused(embed: Path, tmp_path: Path, factory: str) -> None:
    with pytest.raises(
        CallerError, match=rf"factory = {re.escape(factory)} does not suit vectors of 32 dimensions"
    ):
        build(IndexConfig(factory=factory), embed, tmp_path)


def test_embeddings_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    write_embed(tmp_path, 100, 16)
    facts = {"clip_key": "abc", "dim": 16, "count": 100}
    for wrong, says in (
        ({"count": 0}, "nothing to index"),
        ({"count": 99}, "99 vectors"),
        ({"dim": 8}, "of 8"),
    ):
        (tmp_path / "facts.json").write_text(json.dumps(facts | wrong))
        with pytest.raises(DataError, match=says):
            build(IndexConfig(), tmp_path, tmp_path)
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    np.save(tmp_path / "text_emb" / "text_emb_0001.npy", np.full((50, 16), np.nan, np.float16))
    for factory in ("auto", "IVF2,SQ8"):
        with pytest.raises(DataError, match="NaN"):
            build(IndexConfig(factory=factory), tmp_path, tmp_path)
    (tmp_path / "metadata" / "metadata_0001.parquet").unlink()
    with pytest.raises(DataError, match="50 rows of metadata for 100"):
        build(IndexConfig(), tmp_path, tmp_path)


def test_more_than_ten_results_probe_more_cells_up_to_those_for_a_hundred(
    tmp_path: Path,
) -> None:
    write_embed(tmp_path / "embed", COUNT, DIM)
    build(
        IndexConfig(factory="RR32,IVF38,PQ8x4fs,Refine(SQ8)", queries=256),
        tmp_path / "embed",
        made(tmp_path / "index"),
    )
    opened = Index.open(tmp_path / "index")
    facts = opened.facts["image"]
    assert facts["recall@100"] >= 0.95 and facts["deep"]["nprobe"] > facts["nprobe"]
    queries, truth = vectors(50, DIM, seed=7).astype(np.float32), exact(tmp_path / "embed", "image")
    few, many = Effort(facts["nprobe"], facts["k_factor"], facts["margin"]), Effort(**facts["deep"])
    efforts = [effort_for(k, few, many) for k in (1, 10, 11, 24, 40, 99, 100, 1000)]
    assert [effort.nprobe for effort in efforts] == sorted(
        effort.nprobe for effort in efforts
    ) and efforts[0].k_factor == 10 * few.k_factor
    assert (
        efforts[1] == few
        and efforts[-2] == efforts[-1]._replace(k_factor=efforts[-2].k_factor) == many
    )
    assert few.nprobe < effort_for(32, few, many).nprobe < many.nprobe
    whole = faiss.read_index(str(tmp_path / "index" / "image.index"))
    for k in (1, 10, 11, 24, 100):
        rows = opened.search(queries, k)[1]
        assert np.array_equal(rows, search(whole, queries, k, effort_for(k, few, many))[1])
        assert recalls([truth], queries, rows, brute_force([truth], queries, 100)).mean() >= 0.93, k
    for modality in MODALITIES:  # an index.json of an older version
        del opened.facts[modality]["deep"], opened.facts[modality]["margin"]
    (tmp_path / "index" / "index.json").write_text(json.dumps(opened.facts))
    assert Index.open(tmp_path / "index").search(queries, 10)[1].shape == (50, 10)


@pytest.mark.parametrize("file", ["index.json", "image.index", "metadata.arrow"])
def test_a_damaged_folder_is_not_opened(embed: Path, tmp_path: Path, file: str) -> None:
    build(IndexConfig(), embed, tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="build it again"):
        Index.open(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match="build it again"):
        Index.open(tmp_path)


@pytest.mark.parametrize("factory", KINDS)
def test_an_index_grows_by_appended_vectors_and_is_built_again_for_other_changes(
    factory: str, embed: Path, tmp_path: Path
) -> None:
    section = IndexConfig(factory=factory, queries=32)
    shorter = {"fits": COUNT - 100, "few": COUNT // 2}
    for name, count in shorter.items():
        cut(embed, tmp_path / name, count)
        (tmp_path / f"{name}-index").mkdir()
        build(section, tmp_path / name, tmp_path / f"{name}-index")
    before = (tmp_path / "fits-index", tmp_path / "fits")
    counts = build(section, embed, made(tmp_path / "grown"), before)
    assert counts["added_to"] == COUNT - 100 and counts["recall@10"] >= 0.9
    grown = Index.open(tmp_path / "grown")
    queries = vectors(50, DIM, seed=7).astype(np.float32)
    _, rows = grown.search(queries, 10)
    best = np.argsort(-(queries @ exact(embed, "image").T), axis=1)[:, :10]
    assert (
        np.mean(
            [len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), best.tolist(), strict=True)]
        )
        >= 0.9
    )
    assert grown.facts["built_count"] == COUNT - 100 and (best >= COUNT - 100).any()
    assert (
        build(section, embed, made(tmp_path / "much"), (tmp_path / "few-index", tmp_path / "few"))[
            "added_to"
        ]
        == 0
    )  # grown by half
    first = np.load(tmp_path / "fits" / "text_emb" / "text_emb_0000.npy")
    np.save(tmp_path / "fits" / "text_emb" / "text_emb_0000.npy", np.roll(first, 1, axis=0))
    assert (
        build(section, embed, made(tmp_path / "other"), before)["added_to"] == 0
    )  # other vectors than these


@pytest.mark.slow
def test_two_workers_of_ray_build_what_one_process_builds(embed: Path, tmp_path: Path) -> None:
    config, cluster = (
        IndexConfig(factory=KINDS[-1], queries=32),
        ClusterConfig(num_cpus=2, object_store_memory_bytes=100 << 20),
    )
    folder = uneven(embed, tmp_path / "embed", [700, 3, 500, 297])
    build(config, folder, made(tmp_path / "alone"))
    with Cluster(cluster) as ray:
        ray.start()
        counts = build(config, folder, made(tmp_path / "spread"), spread=partial(spread, cluster))
        rows = np.load(folder / "text_emb" / "text_emb_0002.npy")
        rows[-1] = np.nan
        np.save(folder / "text_emb" / "text_emb_0002.npy", rows)
        with pytest.raises(DataError, match=r"^the embeddings hold NaN or infinity: embed again$"):
            trained = train("IVF8,SQ8", [exact(embed, "text")], 0)
            inverted_lists.fill(
                trained, part_files(folder / "text_emb"), tmp_path / "bad", partial(spread, cluster)
            )
    assert counts["task_peak_bytes"] > 0
    for name in ("image.index", "text.index", "metadata.arrow"):
        assert (tmp_path / "spread" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("factory", KINDS)
def test_the_memory_of_a_build_is_estimated_before_it_starts(
    factory: str, embed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        CallerError,
        match=rf"\[index\] build_memory_bytes = 1000 but building {re.escape(factory)} .* raise it",
    ) as error:
        build(
            IndexConfig(factory=factory, build_memory_bytes=1000), embed, made(tmp_path / "refused")
        )
    assert not list((tmp_path / "refused").iterdir()) and "\n" not in str(error.value)
    needed = int(str(error.value).split("takes about ")[1].split(":")[0])
    counts = build(
        IndexConfig(factory=factory, build_memory_bytes=needed), embed, made(tmp_path / "built")
    )
    assert 0 < counts["build_peak_bytes"] <= needed


def test_an_index_does_not_grow_beyond_the_memory(embed: Path, tmp_path: Path) -> None:
    cut(embed, tmp_path / "before", COUNT - 100)
    sections = [
        IndexConfig(factory=KINDS[-1], queries=32, build_memory_bytes=limit)
        for limit in (1 << 33, 1)
    ]
    build(sections[0], tmp_path / "before", made(tmp_path / "index"))
    before = (tmp_path / "index", tmp_path / "before")
    parts = [np.load(file, mmap_mode="r") for file in part_files(embed / "img_emb")]
    assert index._base(before, {"image": parts, "text": parts}, sections[1]) is None
    once = building_bytes("RR512,IVF632,PQ128x4fs,Refine(SQ8)", 10**7, 512, 10**5, 32)
    grown = building_bytes(
        "RR512,IVF632,PQ128x4fs,Refine(SQ8)", 10**7, 512, 10**5, 32, is_grown=True
    )
    assert grown - once > 10**7 * 512, "a growing index reads the codes of Refine"


def test_an_index_is_compacted_within_the_memory_of_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, configs = IndexConfig(build_memory_bytes=12_345, queries=99), []
    manifest = {
        "config": {"index": section.model_dump()},
        "sections": {"index": section.keyed()},
        "inputs": {"embed": "e"},
    }
    (tmp_path / "index.json").write_text('{"count": 3}')
    monkeypatch.setattr(manifests, "find", lambda *_: SimpleNamespace(files=FolderFiles(tmp_path)))
    monkeypatch.setattr(index, "build", lambda config, *_: configs.append(config) or {"out": 2})
    assert (
        compaction._index(
            tmp_path, tmp_path, Removals(), SimpleNamespace(root=None, manifest=manifest)
        )
        == 1
    )  # type: ignore[arg-type]
    assert configs == [section]
