"""The Arrow schemas of the tables that pass between stages.

`URLS` is what a source yields, `KEEP` what curate writes and every loader reads, `DROPPED` every
sample that was left out with its reason, `EMBEDDED` the metadata beside the embeddings
(clip-retrieval's layout: same row order as the .npy files). `key` is stable: it is made from what
the sample is (`sample_key`), never from its position.
"""

import hashlib
import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

URLS = pa.schema(
    [
        ("key", pa.string()),  # sample_key(origin, caption)
        ("url", pa.string()),  # what is downloaded
        (
            "origin",
            pa.string(),
        ),  # what people and lineage see; equals url unless the source is served on loopback
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
        ("sha256", pa.string()),  # of the image's bytes
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
    """
    return hashlib.sha256(f"{origin}\n{caption}".encode()).hexdigest()[:16]


def open_parquet(source: str | os.PathLike[str] | Any, buffer_size: int = 0) -> pq.ParquetFile:
    """Open a parquet file or stream so that reading it in batches holds a batch: as it comes,
    pyarrow keeps every column chunk it has read.

    `buffer_size`, in bytes, reads column chunks in such pieces; 0 reads those of a row group whole.
    Raises what pyarrow raises.
    """
    return pq.ParquetFile(source, buffer_size=buffer_size, pre_buffer=False)
