"""Names of columns, and tables that are read in batches."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.schemas import SHARD_COLUMNS, open_parquet, shard_rows


@pytest.mark.parametrize("buffer_size", [0, 1 << 16])
def test_a_long_table_read_in_batches_never_holds_more_than_some(
    tmp_path: Path, buffer_size: int
) -> None:
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(tmp_path / "long.parquet", pa.schema({"number": pa.float64()})) as writer:
        for _ in range(64):
            writer.write_table(pa.table({"number": rng.random(50_000)}))
    size = (tmp_path / "long.parquet").stat().st_size
    before, most, rows = pa.total_allocated_bytes(), 0, 0
    for batch in open_parquet(tmp_path / "long.parquet", buffer_size).iter_batches(10_000):
        rows += batch.num_rows
        most = max(most, pa.total_allocated_bytes() - before)
    assert rows == 64 * 50_000 and size > 20 << 20
    assert most < size / 8


def test_a_shards_columns_have_our_names_whichever_were_read() -> None:
    shard = pa.table({"key": ["000001"], "sample": ["ab"], "url": ["u"], "sha256": ["cd"]})
    rows = {"member_key": "000001", "key": "ab", "url": "u", "download_sha256": "cd"}
    assert shard_rows(shard).to_pylist() == [rows]
    assert shard_rows(shard.select(["url", SHARD_COLUMNS["key"]])).column_names == ["url", "key"]
