"""The FAISS index of a run: builds it from the embeddings, tunes it to a recall, opens it and
searches it.

Reads the embed stage's folder (`img_emb/*.npy`, `text_emb/*.npy`, `metadata/*.parquet`,
`facts.json`). Writes image.index, text.index, metadata.arrow (row i belongs to vector i) and
index.json. Works on vectors only; the training floor embeds texts and pictures.

Legend: B queries, N vectors, D dimensions, k results.
"""

import bisect
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NotRequired, get_args

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from indexing.ann import inverted_lists, tuning
from indexing.ann.factory import (
    add,
    building_bytes,
    cells_of,
    check_finite,
    choose_factory,
    hot_bytes,
    train,
)
from indexing.ann.inverted_lists import Spread
from indexing.ann.tuning import Effort, Latencies, Recalls, Sample, Selection, Tuned
from indexing.data.embedding_store import (
    CHUNK_ROWS,
    Floats,
    Rows,
    chunks,
    open_parts,
    part_files,
    read_facts,
    take,
)
from infra.compute.memory import PeakMemory
from infra.errors import CallerError, CutFileError, DataError
from infra.schemas import EMBEDDED, open_parquet
from infra.settings import Section
from infra.storage.manifest_schema import StageCounts

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
GROWTH = 0.25
"""Share by which an index may grow before its cells are trained again."""
SPREAD_FROM = 300_000
"""Fewer vectors are encoded in less time than other processes take to start."""
FOLDERS: dict[Modality, str] = {"image": "img_emb", "text": "text_emb"}
INDEX_FILES = ("image.index", "text.index", "metadata.arrow")
"""Files of an index folder that are memory-mapped."""


class IndexConfig(Section):
    """[index]: the kind of index, the memory that it may take and the recall that it must reach."""

    outside_key: ClassVar[frozenset[str]] = frozenset({"threads", "build_memory_bytes"})

    factory: str = Field(
        default="auto",
        pattern=r"^(auto|Flat|IVF[1-9]\d*,(Flat|SQ8)"
        r"|(RR[1-9]\d*,)?IVF[1-9]\d*(,RaBitQfs|(\(PQ[1-9]\d*x4fs\))?,PQ[1-9]\d*x4fs),Refine\(SQ8\))$",
    )
    """Kind of index: auto (chosen by count, dimensions and memory) or a factory string of FAISS:
    Flat, IVF<cells>,Flat, IVF<cells>,SQ8, IVF<cells>,RaBitQfs,Refine(SQ8) or
    IVF<cells>,PQ<codes>x4fs,Refine(SQ8). The last two may begin with RR<dimensions>, and the last
    may have coded centroids: IVF<cells>(PQ<codes>x4fs)."""
    memory_bytes: int = Field(default=2 * 1024**3, ge=1)
    """Bytes that a searching process may hold in memory for both indexes; only factory = auto uses
    it."""
    build_memory_bytes: int = Field(default=8 * 1024**3, ge=1)
    """Bytes that a building process may hold in memory, without memory-mapped files; an index that
    needs more is refused before anything is built."""
    recall_target: float = Field(default=0.95, gt=0, le=1)
    """Recall against brute force that queries should reach: recall@10, and recall@100 for queries
    with more than ten results. A query probes and re-ranks only as much as that takes."""
    queries: int = Field(default=1024, ge=2)
    """Number of vectors of each modality that are sampled as queries: one half chooses the effort,
    the other measures the recall."""
    threads: int = Field(default=0, ge=0)
    """Threads of a build; 0 lets FAISS choose."""
    seed: int = Field(default=0, ge=0)
    """Seed of the clustering and of the sampled queries."""


@dataclass(frozen=True)
class Embeddings:
    """An embed folder, opened for building: the parts ((n, D) each) of each modality are
    memory-mapped.
    """

    folder: Path
    clip_key: str
    count: int
    dim: int
    parts: dict[Modality, list[NDArray[Any]]]

    def files(self, modality: Modality) -> list[Path]:
        """Return the files of vectors in the order of their rows."""
        return part_files(self.folder / FOLDERS[modality])


class ModalityFigures(Tuned):
    """The figures of one of the two indexes."""

    bytes: int


class WorseFigures(Recalls, Latencies):
    """The lower recalls and the longer times of the two indexes, the sum of their bytes, and the
    peak memory of building them.
    """

    bytes: int
    build_peak_bytes: int
    task_peak_bytes: int
    """Of a process that `spread` calls; 0 without."""


class IndexFacts(WorseFigures):
    """The content of index.json."""

    dim: int
    count: int
    factory: str
    clip_key: str
    nprobe: int
    """This and `k_factor`: the higher of the two indexes."""
    k_factor: float
    built_count: NotRequired[int]
    """Number of vectors when the cells were trained; by default `count`."""
    target_met: bool
    image: ModalityFigures
    text: ModalityFigures


class IndexCounts(StageCounts, WorseFigures):
    """The counts of the stage's manifest."""

    factory: str
    added_to: int
    """Number of vectors of the former index that these were added to; 0 if it was built anew."""


@dataclass(frozen=True)
class Base:
    """A former index to which vectors are added: its folder, and what its index.json says."""

    folder: Path
    facts: IndexFacts


def is_spread(embed: Path) -> bool:
    """Return whether an embed folder has so many embeddings that several processes should encode
    them.
    """
    return read_facts(embed)[1] >= SPREAD_FROM and len(part_files(embed / FOLDERS["image"])) > 1


def build(
    config: IndexConfig,
    embed: Path,
    out: Path,
    grown_from: tuple[Path, Path] | None = None,
    spread: Spread | None = None,
) -> IndexCounts:
    """Build both indexes and the metadata table from an embed folder; return the counts, the
    factory, and the figures of the worse index.

    index.json holds the figures of each index under "image" and "text", and at its top the worse of
    the two and the peak memory of this process and of one that `spread` calls. It is no error that
    an index cannot reach the recall target even with every cell probed: "target_met" is then false.
    `spread` does not change what is written (see inverted_lists.fill). Raises DataError for
    embeddings that are empty, not finite, or do not match their facts or metadata; CallerError for
    a factory that does not suit them or needs too much memory.

    `grown_from` is an index with the same section and the embed folder that it was built from.
    Where the vectors of that folder are the first of these, the other vectors are added to that
    index: its cells stay, and effort and recall are measured again. Once it has grown by more than
    GROWTH since its cells were trained, or where adding takes too much memory, everything is built
    again.
    """
    embeddings = _open_embeddings(embed)
    count, dim = embeddings.count, embeddings.dim
    base = _base(grown_from, embeddings.parts, config) if grown_from else None
    factory = base.facts["factory"] if base else _factory(config, count, dim)
    _check_memory(config, factory, embeddings.parts["image"], base is not None)
    _write_metadata(embed / "metadata", out / "metadata.arrow", count)
    queries = _sample_queries(config, embeddings)
    figures: dict[Modality, ModalityFigures] = {}
    task_peak = 0
    with _threads(config.threads), PeakMemory() as memory:
        for modality in MODALITIES:
            file = out / f"{modality}.index"
            if base:
                _add_to(base, embeddings.parts[modality], file)
            else:
                peak = _build_one(factory, embeddings, modality, config.seed, file, spread)
                task_peak = max(task_peak, peak)
            samples = [
                sample if kind == modality else sample._replace(rows=None)
                for kind, sample in queries.items()
            ]
            parts, target = embeddings.parts[modality], config.recall_target
            figures[modality] = _tuned(file, parts, samples, target)
    worse = _worse(list(figures.values()), memory.bytes, task_peak)
    _write_facts(out / "index.json", embeddings, factory, base, worse, figures)
    old = base.facts["count"] if base else 0
    return {"in": count, "out": count, "dropped": {}, "factory": factory, **worse, "added_to": old}


def _open_embeddings(embed: Path) -> Embeddings:
    clip_key, count, dim = read_facts(embed)
    if count == 0:
        raise DataError(f"{embed}: no embeddings, so there is nothing to index")
    parts: dict[Modality, list[NDArray[Any]]] = {
        modality: open_parts(embed / FOLDERS[modality], count, dim) for modality in MODALITIES
    }
    return Embeddings(embed, clip_key, count, dim, parts)


def _sample_queries(config: IndexConfig, embeddings: Embeddings) -> dict[Modality, Sample]:
    """Return the vectors of the same sampled rows of each modality.

    Raises DataError where they hold NaN or infinity.
    """
    rng, count = np.random.default_rng(config.seed), embeddings.count
    rows = np.sort(rng.choice(count, min(config.queries, count), replace=False))
    return {
        modality: Sample(check_finite(take(parts, rows)), rows)
        for modality, parts in embeddings.parts.items()
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Set FAISS's number of threads, and reset it at the end; 0 changes nothing."""
    before = faiss.omp_get_max_threads()
    if count:
        faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _tuned(
    file: Path, parts: Sequence[NDArray[Any]], samples: Sequence[Sample], target: float
) -> ModalityFigures:
    """Open a written index and return its effort, recalls, latencies and bytes."""
    opened = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    return {**tuning.tune(opened, parts, samples, target), "bytes": file.stat().st_size}


def _write_facts(
    file: Path,
    embeddings: Embeddings,
    factory: str,
    base: Base | None,
    worse: WorseFigures,
    figures: Mapping[Modality, ModalityFigures],
) -> None:
    """Write index.json: what the index is, the worse figures, and those of each modality."""
    count = embeddings.count
    facts: IndexFacts = {
        "dim": embeddings.dim,
        "count": count,
        "factory": factory,
        "clip_key": embeddings.clip_key,
        **worse,
        "nprobe": max(figure["nprobe"] for figure in figures.values()),
        "k_factor": max(figure["k_factor"] for figure in figures.values()),
        "built_count": base.facts.get("built_count", base.facts["count"]) if base else count,
        "target_met": all(figure["target_met"] for figure in figures.values()),
        "image": figures["image"],
        "text": figures["text"],
    }
    file.write_text(json.dumps(facts, indent=1) + "\n")


def _factory(config: IndexConfig, count: int, dim: int) -> str:
    """Return the factory string that the section names or the rule chooses.

    Raises CallerError where it does not suit the vectors.
    """
    factory = (
        choose_factory(count, dim, config.memory_bytes)
        if config.factory == "auto"
        else config.factory
    )
    if cells_of(factory) > count:
        raise CallerError(
            f"[index] factory = {factory} has more cells than there are vectors ({count}): use "
            "fewer cells, or auto"
        )
    rotated, codes = (re.findall(f"{kind}([0-9]+)", factory) for kind in ("RR", "PQ"))
    if any(int(number) != dim for number in rotated) or any(dim % int(number) for number in codes):
        raise CallerError(
            f"[index] factory = {factory} does not suit vectors of {dim} dimensions: the number "
            "after RR must equal them, and each number after PQ must divide them"
        )
    return factory


def _check_memory(
    config: IndexConfig, factory: str, parts: Sequence[NDArray[Any]], is_grown: bool
) -> None:
    """Raise CallerError where building the index over the vectors ((n, D) parts) takes more memory
    than the section allows.
    """
    needed = _needed(config, factory, parts, is_grown)
    if needed > config.build_memory_bytes:
        count, dim = sum(len(part) for part in parts), parts[0].shape[1]
        raise CallerError(
            f"[index] build_memory_bytes = {config.build_memory_bytes} but building {factory} "
            f"over {count} vectors of {dim} dimensions takes about {needed}: raise it to that, or "
            "name a factory with fewer cells or smaller codes"
        )


def _worse(
    both: Sequence[ModalityFigures], build_peak_bytes: int, task_peak_bytes: int
) -> WorseFigures:
    return {
        "recall@1": min(figure["recall@1"] for figure in both),
        "recall@10": min(figure["recall@10"] for figure in both),
        "recall@100": min(figure["recall@100"] for figure in both),
        "latency_p50_ms": max(figure["latency_p50_ms"] for figure in both),
        "latency_p99_ms": max(figure["latency_p99_ms"] for figure in both),
        "bytes": sum(figure["bytes"] for figure in both),
        "build_peak_bytes": build_peak_bytes,
        "task_peak_bytes": task_peak_bytes,
    }


def _build_one(
    factory: str,
    embeddings: Embeddings,
    modality: Modality,
    seed: int,
    file: Path,
    spread: Spread | None,
) -> int:
    """Write an index of all vectors; return the peak memory in bytes of a process that `spread`
    calls, 0 without.
    """
    parts = embeddings.parts[modality]
    index = train(factory, parts, seed)
    if cells_of(factory):
        return inverted_lists.fill(index, embeddings.files(modality), file, spread)
    add(index, chunks(parts))
    faiss.write_index(index, str(file))
    return 0


def _add_to(base: Base, parts: Sequence[NDArray[Any]], file: Path) -> None:
    """Write the former index with the vectors added that it does not hold yet."""
    index = faiss.read_index(str(base.folder / file.name))
    add(index, chunks(parts, base.facts["count"]))
    faiss.write_index(index, str(file))


def _needed(
    config: IndexConfig, factory: str, parts: Sequence[NDArray[Any]], is_grown: bool
) -> int:
    """Return about how many bytes a building process holds at most."""
    lengths = [len(part) for part in parts]
    at_once = max(sum(lengths[first:last]) for first, last, _ in inverted_lists.shares(lengths))
    queries_at_once = -(-min(config.queries, sum(lengths)) // 2)  # half of them at a time
    return building_bytes(
        factory, sum(lengths), parts[0].shape[1], at_once, queries_at_once, is_grown
    )


def _base(
    grown_from: tuple[Path, Path], parts: dict[Modality, list[NDArray[Any]]], config: IndexConfig
) -> Base | None:
    """Return the former index, or None where these vectors cannot be added to it (see build).

    `grown_from` is its folder and the embed folder that it was built from.
    """
    folder, embed = grown_from
    facts: IndexFacts = json.loads((folder / "index.json").read_text())
    count, dim, total = facts["count"], facts["dim"], sum(len(part) for part in parts["image"])
    built = facts.get("built_count", count)
    if dim != parts["image"][0].shape[1] or not count <= total <= built * (1 + GROWTH):
        return None
    if (
        config.factory == "auto"
        and 2 * hot_bytes(facts["factory"], total, dim) > config.memory_bytes
    ):
        return None
    if _needed(config, facts["factory"], parts["image"], is_grown=True) > config.build_memory_bytes:
        return None
    for modality in MODALITIES:
        before = open_parts(embed / FOLDERS[modality], count, dim)
        for start in range(0, count, CHUNK_ROWS):
            rows = np.arange(start, min(start + CHUNK_ROWS, count))
            if not np.array_equal(take(before, rows), take(parts[modality], rows)):
                return None
    return Base(folder, facts)


class Allowed:
    """The rows that a search may return, packed once for many searches."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        """`mask` (N,) is true where a row may be returned."""
        self.count = int(np.count_nonzero(mask))
        self.bits = np.packbits(mask, bitorder="little") if self.count < len(mask) else None
        """One bit a row, in FAISS's order; None where all rows are allowed."""


class Index:
    """An index folder, opened for search: memory-mapped, read-only, safe for use from several
    threads.

    A file that becomes shorter while it is open is an error of every call that would read it. If it
    does so within a call, the system ends the process (SIGBUS).
    """

    def __init__(self, folder: Path, facts: IndexFacts) -> None:
        """Open the files of a folder; use `Index.open`, which checks them."""
        self.facts = facts
        self.clip_key: str = facts["clip_key"]
        """Key of the clip stage that made the vectors; queries must come from the same model."""
        self.dim: int = facts["dim"]
        self.count: int = facts["count"]
        self._files = [_Opened(folder / name) for name in INDEX_FILES]
        self._indexes = {
            modality: faiss.read_index(str(folder / f"{modality}.index"), faiss.IO_FLAG_MMAP_IFC)
            for modality in MODALITIES
        }
        self._efforts = {modality: _efforts(facts[modality]) for modality in MODALITIES}
        self._direct_map = threading.Lock()
        reader = pa.ipc.open_file(pa.memory_map(os.fspath(folder / "metadata.arrow")))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._ends = list(itertools.accumulate(batch.num_rows for batch in self._batches))
        self._values = {
            name: [_reader(batch.column(name)) for batch in self._batches]
            for name in EMBEDDED.names
        }
        rows = {self._ends[-1], *(index.ntotal for index in self._indexes.values())}
        if rows != {self.count}:
            raise DataError(
                f"{folder}: index.json says {self.count} vectors but the files hold "
                f"{sorted(rows)}: build the index again"
            )

    @classmethod
    def open(cls, folder: Path) -> "Index":
        """Open a folder that `build` wrote.

        Raises DataError where files are missing, cannot be read or disagree.
        """
        try:
            return cls(folder, json.loads((folder / "index.json").read_text()))
        # FAISS raises RuntimeError.
        except (OSError, RuntimeError, ValueError, KeyError, pa.ArrowException) as error:
            raise DataError(
                f"{folder}: the index cannot be opened "
                f"({' '.join(str(error).split())[-150:]}): build it again"
            ) from error

    def check_whole(self) -> None:
        """Raise CutFileError where a file has become shorter since it was opened."""
        for file in self._files:
            file.check_whole()

    def search(
        self,
        vectors: ArrayLike,
        k: int,
        modality: Modality = "image",
        allowed: Allowed | None = None,
    ) -> tuple[Floats, Rows]:
        """Return the scores (B, k') and rows (B, k') of the k' nearest vectors by inner product,
        best first.

        `vectors` is (B, D), L2-normalised; scores are approximate where the factory compresses.
        With `allowed` only those rows are returned; k' is the smaller of k and their number. Raises
        ValueError for a query that is not finite or not (B, D), for k below 1 and for an unknown
        modality, and CutFileError as `check_whole` does.
        """
        self.check_whole()
        queries = self._checked_queries(vectors)
        if k < 1:
            raise ValueError(f"k = {k}: it must be 1 or more")
        if modality not in MODALITIES:
            raise ValueError(f"modality = {modality!r}: it must be image or text")
        index, effort = self._indexes[modality], tuning.effort_for(k, *self._efforts[modality])
        if allowed is None or allowed.bits is None:
            return tuning.search(index, queries, min(k, self.count), effort)
        if allowed.count == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        # FAISS's type stub has the C++ signature only. The selector keeps a pointer to the bits.
        selector_class: Any = faiss.IDSelectorBitmap
        selection = Selection(selector_class(allowed.bits), allowed.count / self.count)
        return tuning.search(index, queries, min(k, allowed.count), effort, selection)

    def _checked_queries(self, vectors: ArrayLike) -> Floats:
        try:
            queries = np.ascontiguousarray(vectors, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the query must be numbers of shape (B, {self.dim}), not {type(vectors).__name__}"
            ) from error
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(
                f"the query has shape {queries.shape} but must have shape (B, {self.dim})"
            )
        if not np.isfinite(queries).all():
            raise ValueError("the query holds NaN or infinity")
        return queries

    def metadata(
        self, rows: Sequence[int] | Rows, columns: Sequence[str] = EMBEDDED.names
    ) -> list[dict[str, Any]]:
        """Return the metadata (schema infra.schemas.EMBEDDED) of the rows, in their order. Raises
        IndexError outside 0..count-1, and CutFileError as `check_whole` does.
        """
        self.check_whole()
        return [self.facts_of(int(row), columns) for row in self._checked_rows(rows)]

    def facts_of(self, row: int, columns: Sequence[str]) -> dict[str, Any]:
        """Return the metadata of one row, which must exist.

        Values are read one by one: Arrow's `take` of a few rows from each of many batches takes ten
        times as long.
        """
        batch = bisect.bisect_right(self._ends, row)
        offset = row - (self._ends[batch - 1] if batch else 0)
        return {name: self._values[name][batch](offset) for name in columns}

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one column of the metadata (count,). Raises CutFileError as `check_whole` does."""
        self.check_whole()
        return pa.chunked_array(
            [batch.column(name) for batch in self._batches], EMBEDDED.field(name).type
        )

    def row_of(self, key: str) -> int:
        """Return the first row with that key. Raises KeyError where there is none."""
        start = 0
        for batch in self._batches:
            offset = pc.index(batch["key"], key).as_py()
            if offset >= 0:
                return start + int(offset)
            start += batch.num_rows
        raise KeyError(key)

    def vectors(self, rows: Sequence[int] | Rows, modality: Modality = "image") -> Floats:
        """Return the vectors of the rows (B, D) as the index holds them: exact, or decoded from its
        codes. Raises IndexError outside 0..count-1, and CutFileError as `check_whole` does.
        """
        self.check_whole()
        index = self._indexes[modality]
        checked = self._checked_rows(rows)
        with self._direct_map:
            if isinstance(index, faiss.IndexIVF) and index.direct_map.no():
                index.make_direct_map()  # eight bytes a row, so not before it is needed
            if not len(checked):
                return np.empty((0, self.dim), np.float32)
            return np.stack([index.reconstruct(int(row)) for row in checked])

    def _checked_rows(self, rows: Sequence[int] | Rows) -> Rows:
        checked = np.asarray(rows, np.int64).reshape(-1)
        outside = (checked < 0) | (checked >= self.count)
        if outside.any():
            raise IndexError(f"row {checked[outside][0]} is not in 0..{self.count - 1}")
        return checked


class _Opened:
    """A file that is mapped: the size it had, and the file itself, whatever has its name later."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.open("rb", buffering=0)
        self.size_bytes = os.fstat(self.file.fileno()).st_size

    def check_whole(self) -> None:
        """Raise CutFileError where the file has become shorter."""
        now_bytes = os.fstat(self.file.fileno()).st_size
        if now_bytes < self.size_bytes:
            raise CutFileError(
                f"{self.path} was cut from {self.size_bytes:,} to {now_bytes:,} bytes while it was "
                "open: restore the file, or build the index again"
            )


def _efforts(facts: ModalityFigures) -> tuple[Effort, Effort]:
    """Return the tuned efforts for ten results and for a hundred; an index.json without "deep" has
    the same effort for both.
    """
    few, many = (
        Effort(part["nprobe"], part["k_factor"], part.get("margin"))
        for part in (facts, facts.get("deep", facts))
    )
    return few, many


def _reader(column: pa.Array) -> Callable[[int], Any]:
    """Return a function that reads one value of a column.

    It reads Arrow's buffers where it can, in half of the time that Arrow's scalars take.
    """
    if not (column.null_count or column.offset):
        if pa.types.is_int32(column.type):
            return memoryview(column.buffers()[1]).cast("i").__getitem__
        if pa.types.is_string(column.type):
            _, offsets, data = column.buffers()
            ends, text = memoryview(offsets).cast("i"), memoryview(data or b"")
            return lambda row: str(text[ends[row] : ends[row + 1]], "utf-8")
    return lambda row: column[row].as_py()


def _write_metadata(folder: Path, file: Path, count: int) -> None:
    rows = 0
    with pa.OSFile(os.fspath(file), "wb") as sink, pa.ipc.new_file(sink, EMBEDDED) as writer:
        for metadata_file in sorted(folder.glob("*.parquet")):
            for batch in open_parquet(metadata_file).iter_batches(CHUNK_ROWS):
                writer.write_table(
                    pa.Table.from_batches([batch]).select(EMBEDDED.names).cast(EMBEDDED)
                )
                rows += batch.num_rows
    if rows != count:
        raise DataError(f"{folder}: {rows} rows of metadata for {count} vectors")
