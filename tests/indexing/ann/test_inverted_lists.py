"""An index filled part by part, anywhere, is the one that FAISS fills in order."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest

from indexing.ann import inverted_lists
from indexing.ann.factory import train
from indexing.data.embedding_store import part_files
from tests.helpers.embed_folders import KINDS, exact, filled, uneven, write_embed
from tests.infra.storage.test_store import full_disk  # noqa: F401

HERE = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss.omp_set_num_threads(1)


def elsewhere(
    function: Callable[..., int], tasks: Sequence[inverted_lists.Task]
) -> Iterator[list[int]]:
    """Call the function in another process, the last task first and one of them twice."""
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), faiss.omp_set_num_threads, (1,)
    ) as pool:
        for task in (*tasks[::-1], tasks[0]):
            yield [pool.submit(function, *task).result()]


@pytest.mark.parametrize("factory", [*KINDS[1:], "IVF1,PQ8x4fs,Refine(SQ8)"])
def test_parts_encoded_elsewhere_make_what_faiss_makes_of_all_in_order(
    factory: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    embed = tmp_path_factory.mktemp("drawn")
    write_embed(embed)
    lengths = [7, 1100, 1, 256, 136]  # of one cell: blocks of 32 that are full, begun and half full
    folder = uneven(embed, tmp_path / "embed", lengths)
    files = part_files(folder / "img_emb")
    vectors = exact(embed, "image")
    faiss.write_index(filled(factory, [vectors], 0), str(tmp_path / "whole"))
    for name, where in (("here", None), ("elsewhere", elsewhere)):
        inverted_lists.fill(train(factory, [vectors], 0), files, tmp_path / name, where)
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole").read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} == {"embed", "whole", "here", "elsewhere"}, (
        "nothing is left of the parts"
    )


def test_codes_for_which_the_disk_has_no_room_are_an_error_not_a_signal(
    full_disk: Path,  # noqa: F811
) -> None:
    inverted_lists._create_codes(full_disk / "a.npy", (500_000, 1))[:] = 1
    with pytest.raises(OSError, match="No space left on device"):
        inverted_lists._create_codes(full_disk / "b.npy", (500_000, 8))


FILL_TWICE = """
import sys
from pathlib import Path
import faiss
from indexing.ann import inverted_lists
from indexing.data.embedding_store import open_rows, part_files
from indexing.ann.factory import train
whole, parts, out = map(Path, sys.argv[1:4])
for factory in sys.argv[4:]:
    written = []
    for folder in (whole, parts):
        files = part_files(folder / "img_emb")
        faiss.omp_set_num_threads(1)
        index = train(factory, [open_rows(file) for file in part_files(whole / "img_emb")], 0)
        for threads in (1, 2, 3):
            faiss.omp_set_num_threads(threads)
            inverted_lists.fill(faiss.clone_index(index), files, out / "filled")
            written.append((out / "filled").read_bytes())
    assert all(content == written[0] for content in written), factory
"""


@pytest.mark.parametrize("kernels", ["", "Haswell", "Sandybridge"])
def test_equal_vectors_get_equal_codes_whatever_stands_beside_them_and_however_many_threads(
    kernels: str, tmp_path: Path
) -> None:
    """In files of 1,500 rows and of a few, by 1 to 3 threads, with the kernels that BLAS chooses
    and with others.
    """
    write_embed(tmp_path / "whole", 1500, parts=1)
    uneven(tmp_path / "whole", tmp_path / "parts", [1, 30, 600, 5, 864])
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS")
    }
    if kernels:
        environment["OPENBLAS_CORETYPE"] = kernels
    command = [
        sys.executable,
        "-c",
        FILL_TWICE,
        *(str(tmp_path / name) for name in ("whole", "parts", "")),
        *KINDS[1:],
    ]
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_are_put_into_pieces_of_work_in_order() -> None:
    assert inverted_lists.shares([5, 0, 3]) == [(0, 1, 0), (1, 3, 5)]
    lengths = np.random.default_rng(0).integers(1, 100, 1000).tolist()
    pieces = inverted_lists.shares(lengths)
    assert len(pieces) <= inverted_lists.SHARES and pieces[0][0] == 0 and pieces[-1][1] == 1000
    assert [last for _, last, _ in pieces[:-1]] == [first for first, *_ in pieces[1:]]
    assert [start for *_, start in pieces] == [sum(lengths[:first]) for first, *_ in pieces]
    assert (
        max(sum(lengths[first:last]) for first, last, _ in pieces)
        <= sum(lengths) / inverted_lists.SHARES + 100
    )
