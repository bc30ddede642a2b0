"""Fills a trained index of cells from embedding files, piece by piece and in any process, and
writes it.

A piece of the vectors becomes plain files: the number of its vectors in each cell, their rows and
codes by cell, and the re-ranking codes, which are never all in memory. The written index equals,
byte for byte, what FAISS writes after the same rotated vectors were added in order. Legend: N
vectors, n vectors of a piece, D dimensions, C cells.
"""

import os
import shutil
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
"""Maximum number of tasks that encode the files."""
COPIED_BYTES = 1 << 24
"""Bytes that are copied at a time."""

Task = tuple[Path, list[Path], Path]
"""Arguments of `encode`."""
Spread = Callable[
    [Callable[[Path, Sequence[Path], Path], int], Sequence[Task]], Iterable[list[int]]
]
"""Calls a function with the arguments of each task, in any process; yields lists of its results, in
any order."""


def shares(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Divide files of so many rows into at most SHARES pieces of work, in order; return (first
    file, last file + 1, first row) of each.
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
    """Fill a trained, empty index of cells with the vectors of the files ((n, D) each) and write it
    as `out`.

    With `spread`, other processes do pieces of the work; they must see the files and the folder of
    `out`. Returns the highest peak memory of these processes in bytes, 0 without. Raises DataError
    where the vectors hold NaN or infinity. Do not use the index afterwards.
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
    """Encode the vectors of some files with a trained index; return the peak memory of this process
    in bytes.

    Writes `out`.sizes.npy (C,): vectors of each cell; .rows.npy (n,) and .codes.npy (n, bytes): row
    numbers and codes, by cell; and .finer: the re-ranking codes, by row. A repetition after a lost
    process writes the same.
    """
    with PeakMemory() as memory:
        index = faiss.read_index(str(trained))
        cells, codes = _encode_rows(index, files, out.with_suffix(".finer"))
        rows = np.argsort(cells, kind="stable")
        cell_count = layers(index)[-1].nlist
        np.save(out.with_suffix(".sizes.npy"), np.bincount(cells, minlength=cell_count))
        np.save(out.with_suffix(".rows.npy"), rows)
        arranged = _create_codes(out.with_suffix(".codes.npy"), codes.shape)
        step = max(1, COPIED_BYTES // codes.shape[1])
        for start in range(0, len(rows), step):
            arranged[start : start + step] = codes[rows[start : start + step]]
    return memory.bytes


def _create_codes(file: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Create a file of zeros as a mapped array. Raises OSError if the disk has no room for all of
    it: a later write through the map would end the process instead (SIGBUS).
    """
    mapped: NDArray[np.uint8] = np.lib.format.open_memmap(file, "w+", np.uint8, shape)
    with file.open("r+b") as opened:
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return mapped


def _encode_rows(
    index: Any, files: Sequence[Path], finer_file: Path
) -> tuple[Rows, NDArray[np.uint8]]:
    """Return the cell (n,) and the code (n, bytes) of each vector, and write the re-ranking codes;
    the file is empty where the index has none.
    """
    ivf, fine = layers(index)[-1], finer(index)
    vectors = [open_rows(file) for file in files]
    cells = np.empty(sum(len(part) for part in vectors), np.int64)
    codes = np.empty((len(cells), ivf.code_size), np.uint8)
    start = 0
    with finer_file.open("wb") as file:
        for chunk in chunks(vectors):
            rotated = rotate_exactly(index, check_finite(chunk))
            end = start + len(chunk)
            cells[start:end] = nearest_cells(index, rotated)
            arrays = (rotated, cells[start:end], codes[start:end])
            ivf.encode_vectors(len(chunk), *(faiss.swig_ptr(array) for array in arrays))
            if fine:
                refined = rotated if isinstance(index, faiss.IndexPreTransform) else chunk
                file.write(fine.sa_encode(refined).data)
            start = end
    return cells, codes


def _gather(index: Any, encoded: Sequence[Path], firsts: Sequence[int], count: int) -> None:
    """Put the codes of all pieces into the cells, in the order of rows; `firsts` are the pieces'
    first rows.
    """
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
        cell_rows: Rows = np.concatenate(
            [part[at] + first for part, at, first in zip(rows, slices, firsts, strict=True)]
        )
        if len(cell_rows):
            coded = np.concatenate([part[at] for part, at in zip(codes, slices, strict=True)])
            if hasattr(lists, "packer"):
                coded = _packed(lists, coded)
            pointers = faiss.swig_ptr(cell_rows), faiss.swig_ptr(coded)
            lists.add_entries(cell, len(cell_rows), *pointers)
    for layer in (*layers(index), finer(index) or ivf):
        layer.ntotal = count


def _packed(lists: Any, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the codes of a cell (n, bytes) in fast scan's layout: blocks of 32 vectors, the last
    one padded with zeros.

    FAISS packs codes itself in add_entries, but reads and writes beyond the end of a full cell
    (version 1.15).
    """
    blocks = -(-len(codes) // lists.n_per_block)
    padded = np.zeros((blocks, lists.n_per_block, codes.shape[1]), np.uint8)
    padded.reshape(-1, codes.shape[1])[: len(codes)] = codes
    packed = np.zeros((blocks, lists.block_size), np.uint8)
    for flat, block in zip(padded, packed, strict=True):
        lists.packer.pack_all(faiss.swig_ptr(flat), faiss.swig_ptr(block))
    return packed


def _write(index: Any, encoded: Sequence[Path], count: int, out: Path) -> None:
    """Write the index and copy its re-ranking codes from the pieces' files.

    FAISS's format of an index with Refine ends with the number of bytes of these codes, the codes,
    and k_factor (a float).
    """
    faiss.write_index(index, str(out))
    fine = finer(index)
    if not fine:
        return
    with out.open("r+b") as file:
        file.seek(-12, 2)
        tail = file.read()
        assert tail[:8] == bytes(8), "the written index must not hold re-ranking codes yet"
        file.seek(-12, 2)
        file.write(struct.pack("<Q", count * fine.code_size))
        for piece in encoded:
            with piece.with_suffix(".finer").open("rb") as source:
                shutil.copyfileobj(source, file, COPIED_BYTES)
        file.write(tail[8:])
