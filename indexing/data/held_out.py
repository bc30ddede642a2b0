"""The pairs of a split for the evaluation: their embeddings and metadata, and how many of them are
also in the training split.

Reads an embed folder. Legend: N pairs, D dimensions.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from indexing.data.embedding_store import Floats, Rows, open_parts, read_facts, read_metadata, take

COLUMNS = (
    "key",
    "origin",
    "caption",
    "captions",
    "licence",
    "concept",
    "style",
    "category",
    "subcategory",
    "split",
    "shard",
    "member",
    "offset",
    "size_bytes",
    "sha256",
)
"""Columns of the metadata that the evaluation reads."""


@dataclass(frozen=True)
class Embedded:
    """An embed folder, opened: `table` has a row for each vector; the vectors are in memory-mapped
    parts ((n, D) each).
    """

    table: pa.Table
    image_parts: list[NDArray[Any]]
    text_parts: list[NDArray[Any]]

    def rows(self, split: str) -> Rows:
        """Return the rows of a split's pairs, ascending."""
        return np.flatnonzero(
            pc.equal(self.table["split"], split).to_numpy(zero_copy_only=False)
        ).astype(np.int64)


@dataclass(frozen=True)
class Pairs:
    """Pairs in memory: their metadata, and the unit vectors (N, D) of their pictures and of their
    first captions.
    """

    rows: list[dict[str, Any]]
    images: Floats
    texts: Floats

    @cached_property
    def groups(self) -> list[str]:
        """Return the label of each pair that bootstrap intervals resample by: its concept, or its
        key where it has none.
        """
        return [row["concept"] or row["key"] for row in self.rows]


def open_embedded(embed: Path) -> Embedded:
    """Open an embed folder. Raises DataError where its files disagree."""
    _, count, dim = read_facts(embed)
    parts = [open_parts(embed / name, count, dim) for name in ("img_emb", "text_emb")]
    return Embedded(read_metadata(embed / "metadata", COLUMNS, count), *parts)


def read_pairs(embedded: Embedded, split: str, max_pairs: int, seed: int) -> Pairs:
    """Read the pairs of a split into memory, or a random sample of `max_pairs` where there are
    more, in the order of rows.
    """
    rows = embedded.rows(split)
    if len(rows) > max_pairs:
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_pairs, replace=False))
    vectors = [take(parts, rows) for parts in (embedded.image_parts, embedded.text_parts)]
    return Pairs(embedded.table.take(rows).to_pylist(), *vectors)


def seen_in_training(embedded: Embedded, splits: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Count the pairs of each split, and those whose picture (by its SHA-256) or concept is also in
    the training split.
    """
    train = embedded.table.take(embedded.rows("train"))
    counts = {"train": {"pairs": train.num_rows}}
    for split in splits:
        held_out = embedded.table.take(embedded.rows(split))
        concepts = held_out["concept"]
        same_picture = pc.is_in(held_out["sha256"], train["sha256"])
        same_concept = pc.and_(pc.is_in(concepts, train["concept"]), pc.not_equal(concepts, ""))
        counts[split] = {
            "pairs": held_out.num_rows,
            "picture_in_training": pc.sum(same_picture).as_py() or 0,
            "concept_in_training": pc.sum(same_concept).as_py() or 0,
        }
    return counts


def licences(embedded: Embedded) -> dict[str, int]:
    """Count the pairs of each licence, the most frequent first."""
    counts = {
        entry["values"] or "not stated": entry["counts"]
        for entry in pc.value_counts(embedded.table["licence"]).to_pylist()
    }
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def trained_captions(embedded: Embedded, texts: list[str]) -> list[bool]:
    """Return for each text whether it is a training caption; case is ignored."""
    train = embedded.table.take(embedded.rows("train"))
    captions = pc.utf8_lower(pc.list_flatten(train["captions"]))
    lowered = pa.array([text.lower() for text in texts], pa.string())
    return [bool(flag) for flag in pc.is_in(lowered, captions.combine_chunks()).to_pylist()]
