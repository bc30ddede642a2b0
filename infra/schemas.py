"""The Arrow schemas of the tables that pass between stages, and the names of their columns.

`URLS` is what a source yields, `KEEP` what curate writes and every loader reads, `DROPPED` lists
every sample that was left out with its reason, and `EMBEDDED` is the metadata beside the embeddings
(clip-retrieval's layout: same row order as the .npy files). `key` identifies a pair: it is made
from origin and caption (`sample_key`), not from a position. Shards have img2dataset's columns;
`shard_rows` gives them our names.
"""

import hashlib
import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

STORED_SHA256 = "sha256"
"""Column of KEEP and EMBEDDED: SHA-256 of the image's bytes in the shard."""
DOWNLOAD_SHA256 = "download_sha256"
"""SHA-256 of the bytes that the URL returned; in a shard's table this column is `sha256`."""
MEMBER_KEY = "member_key"
"""The number by which img2dataset names a pair's members in the tar."""
SHARD_COLUMNS = {"key": "sample", MEMBER_KEY: "key", DOWNLOAD_SHA256: "sha256"}
"""Our name, and img2dataset's in a shard's table, of every column that the two name differently."""

URLS = pa.schema(
    [
        ("key", pa.string()),  # sample_key(origin, caption)
        ("url", pa.string()),  # what is downloaded
        # What people and lineage see; equals url unless the source is served on loopback.
        ("origin", pa.string()),
        ("caption", pa.string()),  # the first phrasing
        ("captions", pa.list_(pa.string())),  # all phrasings, the first included
        ("licence", pa.string()),
        ("concept", pa.string()),  # splits go by its hash: one concept never stands in two splits
        ("style", pa.string()),  # vendor or drawing style; "" where there is none
        ("category", pa.string()),  # class label for zero-shot; "" where there is none
        ("subcategory", pa.string()),
    ]
)

_SAMPLE = [field for field in URLS if field.name != "url"]

KEEP = pa.schema(
    [
        *_SAMPLE,
        ("split", pa.string()),  # train, held_out_concept or held_out_style
        ("shard", pa.string()),  # the tar's name in the ingest stage's `shards/`
        ("member", pa.string()),  # the image's name in the tar
        ("offset", pa.int64()),  # where the image's bytes start in the tar
        ("size_bytes", pa.int64()),
        (STORED_SHA256, pa.string()),  # of the image's bytes
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
    ]
)

DROPPED = pa.schema(
    [
        ("key", pa.string()),
        ("origin", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

EMBEDDED = KEEP

SPLITS = ("train", "held_out_concept", "held_out_style")


def sample_key(origin: str, caption: str) -> str:
    """Return the stable id of a pair: the first 16 hex digits of SHA-256 over its origin and first
    caption.

    No two pairs are hashed as the same bytes: the first line is the origin; an origin with a line
    break, which no URL in canonical form has, is preceded by a byte that no text has, and its
    length.
    """
    if "\n" not in origin:
        return former_sample_key(origin, caption)
    text = f"{len(origin)}\n{origin}\n{caption}"
    return hashlib.sha256(b"\xff" + text.encode()).hexdigest()[:16]


def former_sample_key(origin: str, caption: str) -> str:
    """Return the key that releases until 0.2.0 made of an origin as its list wrote it."""
    return hashlib.sha256(f"{origin}\n{caption}".encode()).hexdigest()[:16]


def shard_rows(table: pa.Table) -> pa.Table:
    """Return a shard's table, or some of its columns, with our names (`SHARD_COLUMNS`)."""
    ours = {theirs: name for name, theirs in SHARD_COLUMNS.items()}
    return table.rename_columns([ours.get(name, name) for name in table.column_names])


def open_parquet(source: str | os.PathLike[str] | Any, buffer_size: int = 0) -> pq.ParquetFile:
    """Open a parquet file or stream so that reading it in batches holds only one batch in memory.

    By default pyarrow keeps every column chunk that it has read. `buffer_size` is the number of
    bytes of a column chunk that are read at a time; 0 reads the chunks of a row group whole. Raises
    what pyarrow raises.
    """
    return pq.ParquetFile(source, buffer_size=buffer_size, pre_buffer=False)
