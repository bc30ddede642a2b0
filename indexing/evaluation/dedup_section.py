"""The report's section on deduplication: what went and why, how the threshold was chosen, and the
largest groups with their pictures.

Reads what the stage `dedup` wrote (indexing.dedup.deduplicate) beside the embeddings that it
judged; computes no likeness of its own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from indexing.data.embedding_store import read_facts, read_metadata
from indexing.dedup.deduplicate import MAX_LISTED_COPIES, MAX_LISTED_GROUPS, show
from indexing.metrics.bootstrap import Figure, wilson
from indexing.report.sections import ReportSection, picture, section, table
from infra.schemas import EMBEDDED

REASONS = {
    "equal": "equal bytes",
    "alike": "equal to the eye (pHash and colours)",
    "near": "near embeddings",
    "evaluation_equal": "equal bytes with an evaluation picture",
    "evaluation_alike": "equal to the eye with an evaluation picture",
    "evaluation_near": "near embedding to an evaluation picture",
}
CAPTION_CHARS = 60


def copies_section(
    folder: Path, embed: Path, shards: Path, counts: Mapping[str, Any], out: Path
) -> ReportSection:
    """Return the section of a dedup folder; `counts` are its manifest's. Draws the groups into
    `out`/pictures.
    """
    chosen = json.loads((folder / "threshold.json").read_text())
    dropped = pq.read_table(folder / "groups.parquet").to_pylist()
    text = [
        f"{counts['in'] - counts['out']:,} of {counts['in']:,} pairs are left out of training: "
        "copies of another training picture (the "
        "larger one stays, then the lower key), and whatever comes near to an evaluation picture. "
        "A pair goes only for one that stays."
    ]
    rows: list[list[Any]] = [
        [REASONS[why], int(count), f"{100 * count / counts['in']:.2f} %"]
        for why, count in counts["dropped"].items()
    ]
    tables = [table("Left out", ["Because of", "Pairs", "Of all"], rows)] if rows else []
    if chosen:
        text.append(_threshold_words(chosen))
        copies_per_change = chosen["copies"] // len(chosen["recall_of"])
        recall_rows = [
            [name, _share(share, copies_per_change)] for name, share in chosen["recall_of"].items()
        ]
        tables.append(
            table(
                "The labelled sample: copies found by their embeddings",
                ["Made by", "Found"],
                recall_rows,
            )
        )
    listed, pictures = _groups(dropped, embed, shards, out)
    return section("Copies left out of training", text, tables + listed, pictures)


def _threshold_words(chosen: Mapping[str, Any]) -> str:
    counted = (
        f"A sample of pictures and {chosen['copies']:,} copies of them by known transformations "
        f"was set against the {chosen['others']:,} "
        "nearest pictures of other concepts; as many others had chosen the threshold before"
    )
    if chosen["threshold"] is None:
        return (
            f"{counted}. At no threshold do enough of the near pairs turn out to be copies (at "
            f"best {100 * chosen['precision']:.1f} %): "
            "this CLIP cannot tell them from the rest, and nothing goes on its word."
        )
    return (
        f"{counted}. From a cosine of {chosen['threshold']:.4f} on, "
        f"{100 * chosen['precision']:.1f} % of the sample's near pairs are copies, "
        f"and {100 * chosen['recall']:.1f} % of its copies are found by their embeddings alone."
    )


def _groups(
    dropped: list[dict[str, Any]], embed: Path, shards: Path, out: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the table of the largest groups and their pictures."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for dropped_row in dropped:
        groups.setdefault(dropped_row["keeper"], []).append(dropped_row)
    largest = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:MAX_LISTED_GROUPS]
    if not largest:
        return [], []
    _, count, _ = read_facts(embed)
    facts = read_metadata(embed / "metadata", EMBEDDED.names, count)
    row_of = {key: row for row, key in enumerate(facts["key"].to_pylist())}
    locations = {
        row: facts.slice(row, 1).to_pylist()[0]
        for keeper, copies in largest
        for row in (row_of[keeper], *(row_of[dropped_row["key"]] for dropped_row in copies))
    }
    drawn = [
        (row_of[keeper], [row_of[dropped_row["key"]] for dropped_row in copies])
        for keeper, copies in largest
    ]
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    titles = [
        f"{number}. {1 + len(copies)} of a kind" for number, (_, copies) in enumerate(drawn, 1)
    ]
    show(drawn, locations, shards, titles, out / "pictures" / "copies.png")
    rows: list[list[Any]] = []
    for number, (keeper, copies) in enumerate(largest, 1):
        caption = locations[row_of[keeper]]["caption"]
        shortened = caption if len(caption) <= CAPTION_CHARS else f"{caption[: CAPTION_CHARS - 1]}…"
        why = sorted({dropped_row["reason"].removeprefix("evaluation_") for dropped_row in copies})
        rows.append(
            [
                f"{number}. {shortened}",
                keeper,
                len(copies),
                ", ".join(why),
                round(min(dropped_row["score"] for dropped_row in copies), 3),
            ]
        )
    head = ["What stays", "Key", "Copies", "By", "Least cosine"]
    name = f"The largest groups of {len(groups):,}" if len(groups) > len(largest) else "All groups"
    alt = "Groups of copies in rows: the picture that stays, then those that go for it"
    words = (
        "Numbered as in the table. The first picture of a row stays; of those that go, at most "
        f"{MAX_LISTED_COPIES - 1} are shown."
    )
    return [table(name, head, rows)], [picture("pictures/copies.png", alt, words)]


def _share(share: float, of: int) -> Figure:
    low, high = wilson(share, of)
    return {"value": share, "low": low, "high": high, "n": of, "groups": of}
