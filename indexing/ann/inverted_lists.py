"""Fills a trained index of cells from embedding files, part by part and in any process, and writes
it.

A part becomes plain files: how many of its vectors go to each cell, their rows and codes arranged
by cell, and the codes that are re-ranked from, which never are in memory together. What is written
is byte for byte what FAISS writes of an index to which the same rotated vectors were added in
order. Legend: N vectors, D dimensions, C cells.
"""

import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.ann.factory import check_finite
from indexing.ann.faiss_layers import finer, layers, nearest_cells, rotate_exactly
from indexing.data.embedding_store import Rows, chunks, open_rows
from infra.compute.memory import PeakMemory

SHARES = 64
"""Maximum number of tasks that encode the files; each has a copy of the trained index on disk."""
COPIED_BYTES = 1 << 24

Task = tuple[Path, list[Path], Path]
Spread = Callable[[Callable[..., int], Sequence[Task]], Iterable[list[int]]]
"""Calls a function with each of the arguments, wherever; yields what it returned, in any order."""


def shares(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Put files of so many rows into at most SHARES pieces of work: (first file, last file + 1,
    first row) of each, in order.
    """
    least = -(-sum(lengths) // SHARES)
    pieces, first, start, end = [], 0, 0, 0
    for number, length in enumerate(lengths, 1):
        end += length
        if end - start >= least or number == len(lengths):
            pieces.append((first, number, start))
            first, start = number, end
    return pieces


def fill(index: Any, files: Sequence[Path], out: Path, spread: Spread | None = None) -> int:
    """Fill a trained index of cells, still empty, with the vectors of the files ((n, D) each) and
    write it as `out`.

    With `spread` pieces of the work are done by other processes, which must see the files and the
    folder of `out`. Returns the most memory in bytes that one of them held, 0 without. Raises
    DataError where the vectors hold NaN or infinity. The index is used up.
    """
    lengths = [len(open_rows(file)) for file in files]
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".lists-") as staging:
        trained = Path(staging) / "trained"
        faiss.write_index(index, str(trained))
        pieces = shares(lengths)
        tasks = [
            (trained, list(files[first:last]), Path(staging) / f"{first:05}")
            for first, last, _ in pieces
        ]
        if spread:
            peak = max(peak_bytes for peaks in spread(encode, tasks) for peak_bytes in peaks)
        else:
            peak = 0
            for task in tasks:
                encode(*task)
        encoded = [task[2] for task in tasks]
        _gather(index, encoded, [start for *_, start in pieces], sum(lengths))
        _write(index, encoded, sum(lengths), out)
    return peak


def encode(trained: Path, files: Sequence[Path], out: Path) -> int:
    """Write what a trained index makes of the vectors of some files: `out`.sizes (C,), .rows (n,),
    .codes (n, bytes), and .finer.

    Returns the most memory in bytes that this process held for it. A repetition, after a lost one,
    writes the same.
    """
    with PeakMemory() as memory:
        index = faiss.read_index(str(trained))
        ivf, fine = layers(index)[-1], finer(index)
        vectors = [open_rows(file) for file in files]
        cells = np.empty(sum(len(part) for part in vectors), np.int64)
        codes = np.empty((len(cells), ivf.code_size), np.uint8)
        start = 0
        with out.with_suffix(".finer").open("wb") as file:
            for chunk in chunks(vectors):
                inside = rotate_exactly(index, check_finite(chunk))
                end = start + len(chunk)
                cells[start:end] = nearest_cells(index, inside)
                ivf.encode_vectors(
                    len(chunk),
                    *(
                        faiss.swig_ptr(array)
                        for array in (inside, cells[start:end], codes[start:end])
                    ),
                )
                if fine:
                    file.write(
                        fine.sa_encode(
                            inside if isinstance(index, faiss.IndexPreTransform) else chunk
                        ).data
                    )
                start = end
        rows = np.argsort(cells, kind="stable")
        np.save(out.with_suffix(".sizes.npy"), np.bincount(cells, minlength=ivf.nlist))
        np.save(out.with_suffix(".rows.npy"), rows)
        arranged = np.lib.format.open_memmap(
            out.with_suffix(".codes.npy"), "w+", np.uint8, codes.shape
        )
        step = max(1, COPIED_BYTES // codes.shape[1])
        for start in range(0, len(rows), step):
            arranged[start : start + step] = codes[rows[start : start + step]]
    return memory.bytes


def _gather(index: Any, encoded: Sequence[Path], firsts: Sequence[int], count: int) -> None:
    """Put what was encoded into the cells, in the order of rows."""
    ivf = layers(index)[-1]
    lists: Any = faiss.downcast_InvertedLists(ivf.invlists)
    ends = [
        np.concatenate([[0], np.cumsum(np.load(piece.with_suffix(".sizes.npy")))])
        for piece in encoded
    ]
    rows, codes = (
        [np.load(piece.with_suffix(f".{name}.npy"), mmap_mode="r") for piece in encoded]
        for name in ("rows", "codes")
    )
    for cell in range(ivf.nlist):
        slices = [slice(piece_ends[cell], piece_ends[cell + 1]) for piece_ends in ends]
        inside: Rows = np.concatenate(
            [
                piece_rows[cell_slice] + first
                for piece_rows, cell_slice, first in zip(rows, slices, firsts, strict=True)
            ]
        )
        if len(inside):
            coded = np.concatenate(
                [
                    piece_codes[cell_slice]
                    for piece_codes, cell_slice in zip(codes, slices, strict=True)
                ]
            )
            coded = _packed(lists, coded) if hasattr(lists, "packer") else coded
            lists.add_entries(cell, len(inside), faiss.swig_ptr(inside), faiss.swig_ptr(coded))
    for layer in (*layers(index), finer(index) or ivf):
        layer.ntotal = count


def _packed(lists: Any, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the codes of a cell (n, bytes) as fast scan wants them: blocks of 32 vectors, the last
    one filled up with zeros.

    FAISS would do so itself where it merges, but reads and writes beyond the end of a cell that is
    full (1.15, add_entries).
    """
    blocks = -(-len(codes) // lists.n_per_block)
    padded = np.zeros((blocks, lists.n_per_block, codes.shape[1]), np.uint8)
    padded.reshape(-1, codes.shape[1])[: len(codes)] = codes
    packed = np.zeros((blocks, lists.block_size), np.uint8)
    for flat, block in zip(padded, packed, strict=True):
        lists.packer.pack_all(faiss.swig_ptr(flat), faiss.swig_ptr(block))
    return packed


def _write(index: Any, encoded: Sequence[Path], count: int, out: Path) -> None:
    """Write the index; the codes that it re-ranks from go from file to file.

    In FAISS's format they are the last but one thing of an index with Refine: their number, the
    bytes, then k_factor (a float).
    """
    faiss.write_index(index, str(out))
    fine = finer(index)
    if not fine:
        return
    with out.open("r+b") as file:
        file.seek(-12, 2)
        tail = file.read()
        assert tail[:8] == bytes(8), "the index that is written holds no finer codes"
        file.seek(-12, 2)
        file.write(struct.pack("<Q", count * fine.code_size))
        for one_part in encoded:
            with one_part.with_suffix(".finer").open("rb") as source:
                while piece := source.read(COPIED_BYTES):
                    file.write(piece)
        file.write(tail[8:])
