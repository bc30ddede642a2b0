"""What became of an ingest's rows: compared with a dictionary of every row's last word, over shards
drawn by chance.
"""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.ingest import row_outcomes
from flows.ingest.http_fetch import TEMPORARY_REASONS
from flows.ingest.row_outcomes import (
    ShardFacts,
    count_outcomes,
    read_outcomes,
    rows_to_retry,
    split_problem,
    temporary_share,
    write_dropped,
)
from infra.schemas import DROPPED, URLS
from infra.storage import store
from infra.storage.stage_output import StageOutput, open_output

WORDS = ("http_404: gone", "timeout: 10 s", "http_unavailable: 503", "not_an_image: text/html", "")


@pytest.fixture(params=["folder", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> StageOutput:
    """The output of an ingest in a local ROOT and in a store."""
    if request.param == "folder":
        return open_output(store.open_root(str(tmp_path / "root")), "ingest", "key")
    root = store.open_root(f"memory://outcomes-{tmp_path.name}", tmp_path / "scratch")
    return open_output(root, "ingest", "key")


def put_shard(output: StageOutput, number: int, rows: list[dict[str, Any]]) -> dict[str, int]:
    """Put a shard's table; return its counted outcomes."""
    table = pa.Table.from_pylist(rows)
    with output.temporary_folder() as folder:
        pq.write_table(table, folder / "rows")
        output.put(folder / "rows", f"shards/{number:05d}.parquet")
    return dict(count_outcomes(table))


def write_shards(
    output: StageOutput, seed: int
) -> tuple[dict[int, ShardFacts], dict[str, dict[str, Any]], int]:
    """Write passes over 400 rows, each over those that still fail for a passing reason; return
    shards, last words and successes.
    """
    shards: dict[int, ShardFacts] = {}
    chance = random.Random(seed)
    names = [f"{chance.getrandbits(64):016x}" for _ in range(400)]
    latest: dict[str, dict[str, Any]] = {}
    number, succeeded = 0, 0
    asked = names
    for turn in range(3):
        chance.shuffle(asked)
        for start in range(0, len(asked), 37):
            rows = []
            for name in asked[start : start + 37]:
                word = chance.choice(WORDS)
                status = (
                    "success"
                    if not word
                    else chance.choice(
                        ("failed_to_download", "failed_to_download", "failed_to_resize")
                    )
                )
                url = f"https://h/{name}.jpg"
                rows.append(
                    {
                        "key": f"{number:05d}{len(rows):05d}",
                        "sample": name,
                        "url": url,
                        "origin": url,
                        "caption": f"é {name}",
                        "captions": [f"é {name}", "another"],
                        "licence": "",
                        "concept": name,
                        "style": "",
                        "category": "",
                        "subcategory": "",
                        "status": status,
                        "error_message": word or None,
                    }
                )
                latest[name] = rows[-1]
                succeeded += not word
            shards[number] = {
                "outcomes": put_shard(output, number, rows),
                "is_first": turn == 0,
            }
            number += 1
        asked = [name for name in asked if reason_of(latest[name]) in TEMPORARY_REASONS]
    return shards, latest, succeeded


def reason_of(row: dict[str, Any]) -> str:
    return (
        "" if row["status"] == "success" else split_problem(row["status"], row["error_message"])[0]
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_last_word_on_every_row_counts(
    tmp_path: Path, output: StageOutput, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_outcomes, "GROUP_ROWS", 50)
    shards, latest, succeeded = write_shards(output, seed)
    expected = {name: reason_of(row) for name, row in latest.items() if reason_of(row)}
    assert {"http_404", "timeout", "decode_error"} <= set(expected.values()) and succeeded > 50
    again = pq.read_table(rows_to_retry(output, shards, tmp_path / "again.parquet"))
    assert again.schema.equals(URLS)
    assert sorted(again["key"].to_pylist()) == sorted(
        name for name, reason in expected.items() if reason in TEMPORARY_REASONS
    )
    for row in again.to_pylist():
        assert row == {name: latest[row["key"]][name] for name in URLS.names if name != "key"} | {
            "key": row["key"]
        }
    early = [
        {"key": "1" * 16, "origin": "https://h/twice.jpg", "reason": "duplicate_url", "detail": ""}
    ] * 120
    pq.write_table(pa.Table.from_pylist(early, DROPPED), tmp_path / "early.parquet")
    found = read_outcomes(output, shards)
    before, reasons, examples = write_dropped(
        tmp_path / "early.parquet", found, tmp_path / "dropped.parquet"
    )
    assert (
        found.succeeded == succeeded
        and before == {"duplicate_url": 120}
        and reasons == Counter(expected.values())
    )
    dropped = pq.read_table(tmp_path / "dropped.parquet")
    assert dropped.schema.equals(DROPPED)
    told = dropped.to_pylist()[120:]
    assert len(told) == len(expected) and {row["key"]: row["reason"] for row in told} == expected
    assert set(examples) == set(expected.values()) and all(
        text.startswith("https://h/") for text in examples.values()
    )


def test_without_a_failure_nothing_is_asked_again(tmp_path: Path, output: StageOutput) -> None:
    row = dict.fromkeys(URLS.names, "") | {
        "captions": [""],
        "sample": "0" * 16,
        "status": "success",
        "error_message": None,
    }
    shards: dict[int, ShardFacts] = {0: {"outcomes": put_shard(output, 0, [row]), "is_first": True}}
    file = tmp_path / "again.parquet"
    assert pq.read_table(rows_to_retry(output, shards, file)).num_rows == 0
    assert pq.read_table(rows_to_retry(output, {}, file)).num_rows == 0


def test_the_share_of_rows_that_may_pass_is_of_all_rows() -> None:
    assert temporary_share({"success": 5, "timeout": 2, "cut_short": 1, "http_404": 2}) == 0.3
    assert temporary_share({}) == 0
