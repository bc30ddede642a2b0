"""The report's section on deduplication: removed pairs by reason, threshold, largest groups.

Reads the output of the stage `dedup` (indexing.dedup.deduplicate), the embed folder and the shards;
writes a PNG of the groups. Computes no similarities.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from indexing.data.embedding_store import read_facts, read_metadata
from indexing.dedup.deduplicate import MAX_LISTED_COPIES, MAX_LISTED_GROUPS, Copy, Threshold, show
from indexing.metrics.bootstrap import Figure, wilson
from indexing.report.sections import Cell, Picture, ReportSection, Table, picture, section, table
from infra.schemas import EMBEDDED
from infra.storage.manifest_schema import StageCounts
from infra.storage.shard_reader import ShardReader

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
    folder: Path, embed: Path, shards: ShardReader, counts: StageCounts, out: Path
) -> ReportSection:
    """Return the section for a dedup folder and write `out`/pictures/copies.png.

    `counts` are those of the stage's manifest.
    """
    measured = json.loads((folder / "threshold.json").read_text())
    dropped = pq.read_table(folder / "groups.parquet").to_pylist()
    text = [
        f"{counts['in'] - counts['out']:,} of {counts['in']:,} pairs are left out of training: "
        "copies of another training picture (the larger one stays; of equal sizes, the one with "
        "the lower key), and near copies of evaluation pictures. A pair is only left out for a "
        "copy that stays."
    ]
    rows: list[list[Cell]] = [
        [REASONS[why], int(count), f"{100 * count / counts['in']:.2f} %"]
        for why, count in counts["dropped"].items()
    ]
    tables = [table("Left out", ["Reason", "Pairs", "Share of all"], rows)] if rows else []
    if measured:
        chosen = Threshold(**measured)
        text.append(_threshold_words(chosen))
        copies_per_change = chosen.copies // len(chosen.recall_of)
        recall_rows: list[list[Cell]] = [
            [name, _share(share, copies_per_change)] for name, share in chosen.recall_of.items()
        ]
        tables.append(
            table(
                "The labelled sample: copies found by their embeddings",
                ["Transformation", "Found"],
                recall_rows,
            )
        )
    listed, pictures = _groups(dropped, embed, shards, out)
    return section("Copies left out of training", text, tables + listed, pictures)


def _threshold_words(chosen: Threshold) -> str:
    sample = (
        f"The threshold was tested on {chosen.copies:,} copies of sampled pictures, made by "
        f"known transformations, and the {chosen.others:,} nearest pictures of other concepts. "
        "It was chosen before on as many others"
    )
    if chosen.threshold is None:
        return (
            f"{sample}. At no threshold are enough of the near pairs copies (at best "
            f"{100 * chosen.precision:.1f} %): this CLIP cannot tell them from the rest, so no "
            "pair is left out because of its embedding."
        )
    return (
        f"{sample}. At a cosine of {chosen.threshold:.4f} or more, "
        f"{100 * chosen.precision:.1f} % of the sample's near pairs are copies, and "
        f"{100 * chosen.recall:.1f} % of its copies are found by their embeddings alone."
    )


def _groups(
    dropped: Sequence[Copy], embed: Path, shards: ShardReader, out: Path
) -> tuple[list[Table], list[Picture]]:
    """Return a table of the largest groups and their picture; two empty lists without groups."""
    groups: dict[str, list[Copy]] = {}
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
        f"{number}. group of {1 + len(copies)}" for number, (_, copies) in enumerate(drawn, 1)
    ]
    show(drawn, locations, shards, titles, out / "pictures" / "copies.png")
    rows: list[list[Cell]] = []
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
    head = ["Kept picture", "Key", "Copies", "Reason", "Lowest cosine"]
    name = f"The largest groups of {len(groups):,}" if len(groups) > len(largest) else "All groups"
    alt = "Groups of copies in rows: the picture that stays, then its copies"
    words = (
        "Numbers as in the table. The first picture of a row stays; at most "
        f"{MAX_LISTED_COPIES - 1} of its copies are shown."
    )
    return [table(name, head, rows)], [picture("pictures/copies.png", alt, words)]


def _share(share: float, of: int) -> Figure:
    low, high = wilson(share, of)
    return {"value": share, "low": low, "high": high, "n": of, "groups": of}
