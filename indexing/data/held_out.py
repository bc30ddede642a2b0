"""The pairs that a run is judged by: one split's embeddings and metadata, and what of it training
has seen.

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
    *(
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
    ),
    *("shard", "member", "offset", "size_bytes", "sha256"),
)


@dataclass(frozen=True)
class Embedded:
    """An embed folder, opened: `table` has a row for each vector; vectors stay in their
    memory-mapped files.
    """

    table: pa.Table
    image_parts: list[NDArray[Any]]
    text_parts: list[NDArray[Any]]

    def rows(self, split: str) -> Rows:
        """Return where the pairs of a split stand."""
        return np.flatnonzero(
            pc.equal(self.table["split"], split).to_numpy(zero_copy_only=False)
        ).astype(np.int64)


@dataclass(frozen=True)
class Pairs:
    """Some pairs, in memory: the metadata, the unit vectors of pictures and of first captions (N,
    D).
    """

    rows: list[dict[str, Any]]
    images: Floats
    texts: Floats

    @cached_property
    def groups(self) -> list[str]:
        """What each pair's figures hang together with: its concept, where it has one."""
        return [row["concept"] or row["key"] for row in self.rows]


def open_embedded(embed: Path) -> Embedded:
    """Open an embed folder. Raises DataError where its files disagree."""
    _, count, dim = read_facts(embed)
    parts = [open_parts(embed / name, count, dim) for name in ("img_emb", "text_emb")]
    return Embedded(read_metadata(embed / "metadata", COLUMNS, count), *parts)


def read_pairs(embedded: Embedded, split: str, max_pairs: int, seed: int) -> Pairs:
    """Read the pairs of a split into memory; when there are more than `at_most`, that many drawn by
    the seed, in their order.
    """
    rows = embedded.rows(split)
    if len(rows) > max_pairs:
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_pairs, replace=False))
    vectors = [take(parts, rows) for parts in (embedded.image_parts, embedded.text_parts)]
    return Pairs(embedded.table.take(rows).to_pylist(), *vectors)


def seen_in_training(embedded: Embedded, splits: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Count each split's pairs, and those whose picture (by its bytes) or concept stands in the
    training split too.
    """
    train = embedded.table.take(embedded.rows("train"))
    counts = {"train": {"pairs": train.num_rows}}
    for split in splits:
        held = embedded.table.take(embedded.rows(split))
        same_picture = pc.is_in(held["sha256"], train["sha256"])
        same_concept = pc.and_(
            pc.is_in(held["concept"], train["concept"]), pc.not_equal(held["concept"], "")
        )
        counts[split] = {
            "pairs": held.num_rows,
            "picture_in_training": pc.sum(same_picture).as_py() or 0,
            "concept_in_training": pc.sum(same_concept).as_py() or 0,
        }
    return counts


def licences(embedded: Embedded) -> dict[str, int]:
    """Count the pairs of each licence, the commonest first."""
    counts = {
        value_count["values"] or "not stated": value_count["counts"]
        for value_count in pc.value_counts(embedded.table["licence"]).to_pylist()
    }
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def trained_captions(embedded: Embedded, texts: list[str]) -> list[bool]:
    """Say of each text whether it stands, but for case, among the training captions."""
    train = embedded.table.take(embedded.rows("train"))
    captions = pc.utf8_lower(pc.list_flatten(train["captions"]))
    return [
        bool(flag)
        for flag in pc.is_in(
            pa.array([text.lower() for text in texts], pa.string()), captions.combine_chunks()
        ).to_pylist()
    ]
