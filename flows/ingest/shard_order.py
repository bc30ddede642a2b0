"""Sorts a finished shard by key: images are written in the order in which their downloads end, and
equal downloads must make equal files.
"""

import shutil
import tarfile
from pathlib import Path

import pyarrow.parquet as pq


def sort_shard(stem: Path) -> None:
    """Sort the members of `stem`.tar and the rows of `stem`.parquet by key, in place.

    Members of one key keep their order. Raises OSError.
    """
    parquet = stem.with_suffix(".parquet")
    pq.write_table(pq.read_table(parquet).sort_by("key"), parquet)
    _sort_tar(stem.with_suffix(".tar"))


def _sort_tar(path: Path) -> None:
    """Copy the blocks of each member, header included, in the order of their keys."""
    with tarfile.open(path, "r:") as tar:
        starts = [(member.name.partition(".")[0], member.offset) for member in tar]
        ends = [*(start for _, start in starts), tar.offset][1:]
    blocks = [(key, start, end) for (key, start), end in zip(starts, ends, strict=True)]
    ordered = sorted(blocks, key=lambda block: block[0])
    if ordered == blocks:
        return
    part = path.with_suffix(".sorted")
    with path.open("rb") as source, part.open("wb") as target:
        for _, start, end in ordered:
            source.seek(start)
            target.write(source.read(end - start))
        target.write(bytes(2 * tarfile.BLOCKSIZE))
        target.write(bytes(-target.tell() % tarfile.RECORDSIZE))
    shutil.move(part, path)
