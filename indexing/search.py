"""Search for the k nearest distinct pictures: what the command line and the service show of an index.

Knows an opened `Index` and a query vector; writes nothing.
"""

from typing import Any

from numpy.typing import ArrayLike

from indexing.index import Index, Modality
from infra.errors import CallerError


def search(index: Index, vectors: ArrayLike, k: int, modality: Modality = "image") -> list[dict[str, Any]]:
    """Return the k nearest distinct pictures as {"key", "score", "caption", "url"}, best first; `url` is the sample's origin.

    `vectors` is one query, (1, D). Rows whose pictures have the same bytes count once, so rows are fetched until k distinct ones are
    found or the index is exhausted. Raises ValueError as `Index.search` does, and for more than one query.
    """
    fetch = k
    while True:
        scores, rows = index.search(vectors, fetch, modality)
        if len(rows) != 1:
            raise ValueError(f"search takes one query, not {len(rows)}")
        distinct: dict[str, dict[str, Any]] = {}
        for score, row in zip(scores[0], index.metadata(rows[0]), strict=True):
            found = {"key": row["key"], "score": float(score), "caption": row["caption"], "url": row["origin"]}
            distinct.setdefault(row["sha256"], found)
        if len(distinct) >= k or fetch >= index.count:
            return list(distinct.values())[:k]
        fetch *= 2


def search_key(index: Index, key: str, k: int) -> list[dict[str, Any]]:
    """Return the k pictures nearest to that of the sample with this key, as `search` does, the picture itself left out.

    Raises CallerError for a key that is not in the index.
    """
    try:
        row = index.row_of(key)
    except KeyError:
        raise CallerError(f"no sample in the index has the key {key!r}: `unclip search --json` prints keys") from None
    own = index.metadata([row])[0]["sha256"]
    found = search(index, index.vectors([row]), k + 1)
    pictures = [index.metadata([index.row_of(each["key"])])[0]["sha256"] for each in found]
    return [each for each, picture in zip(found, pictures, strict=True) if picture != own][:k]
