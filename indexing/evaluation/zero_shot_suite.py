"""The zero-shot suite: labelled sets named by CLIP from words alone, beside linear probes that were
taught (CLIP, fig. 5 and 6).

Models are callables. Legend: N pictures, C classes, D dimensions.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from indexing.data.embedding_store import Floats, take
from indexing.data.held_out import Embedded
from indexing.data.images import INK, PAPER, Pixels, read_picture, write_png
from indexing.data.labelled_sets import ImageSet
from indexing.evaluation.context import Subject
from indexing.evaluation.samples import slug
from indexing.metrics import linear_probe as probe
from indexing.metrics.bootstrap import Figure, mean_figure
from indexing.metrics.clip_score import EncodeImages, encoded
from indexing.metrics.zero_shot import EncodeTexts, class_embeddings, score
from indexing.report import sections
from indexing.report.page import verdict
from infra.settings import Section

SIDE_PX = 96
SHOTS = (1, 2, 4, 8, 16)
DRAWS = 3
MAX_CLASSES_PROBED = 200
LARGEST_CONFUSION, LONGEST_NAME = 40, 36
SAME_COSINE, SAME_RMS = 0.98, 24.0
"""What is nearer than both is one picture: two ways of resizing a flag differ by up to 20 of 255 at
its edges."""
COMPARED_PX = 32
LOOKED_AT = 16
"""So many training pictures, the nearest ones, are looked at for each picture as far as they lie
above that cosine."""


class SuiteConfig(Section):
    """[evaluate.suite]: which sets, and how many of their pictures."""

    sets: tuple[str, ...] = ()
    """Names of packaged sets (flows/demo/packaged_sets.py lists them), or paths: a folder of
    classes, a parquet file, WebDataset shards."""
    pictures: int = Field(default=1000, ge=10)
    """Pictures of a set that are judged, drawn by the seed when there are more."""
    probe: bool = True
    """Whether linear probes are trained beside."""
    features: str = ""
    """Path of a torchvision-format ResNet-50 state dict to probe besides the packaged ImageNet
    network."""


def suite(
    config: SuiteConfig,
    subject: Subject,
    loaded: Sequence[ImageSet],
    templates: Sequence[str],
    side_px: int,
    networks: Mapping[str, EncodeImages],
    missing: Sequence[str] = (),
) -> list[sections.ReportSection]:
    """Judge every set and return the report's sections: zero-shot, and against probes on CLIP's
    features and other `networks`'.

    Pictures that training saw are left out before anything is judged, and others of the set take
    their places where it has more. CLIP sees pictures at its own side, `side_px`, so that they are
    resized once; the other networks at SIDE_PX. `missing` says in sentences which sets could not be
    had.
    """
    resamples, seed = subject.resamples, subject.seed
    rows: list[list[sections.Cell]] = []
    leaks: list[list[sections.Cell]] = []
    pictures, probed = [], []
    for labelled_set in loaded:
        drawn = draw_unseen(
            labelled_set,
            config.pictures,
            seed,
            subject.encode_images,
            side_px,
            subject.embedded,
            subject.shards,
        )
        labelled, vectors = drawn.images, drawn.vectors
        leaks.append(
            [
                labelled.name,
                len(labelled_set),
                drawn.looked_at,
                drawn.same_file,
                drawn.same_picture,
                len(labelled),
            ]
        )
        if not len(labelled):
            continue
        by_words = class_scores(labelled, vectors, subject.encode_texts, templates)
        scored = score(
            by_words, labelled.labels, labelled.names, range(len(labelled)), resamples, seed
        )
        top_1 = scored["top_1"]
        top_5 = (
            scored["top_5"] if len(labelled.names) > 5 else None
        )  # five of five are always right
        rows.append(
            [
                labelled.name,
                top_1["n"],
                scored["classes"],
                top_1,
                top_5,
                scored["mean_per_class"],
                *_bars(top_1),
                verdict(top_1),
            ]
        )
        if 1 < len(labelled.names) <= LARGEST_CONFUSION:
            pictures.append(_confusion(labelled, by_words.argmax(1), subject.out))
        if config.probe and 1 < len(labelled.names) <= MAX_CLASSES_PROBED:
            named = {"our CLIP": vectors}
            if networks:
                larger = labelled.pictures(SIDE_PX)
                named |= {
                    name: encoded(network, larger, is_unit=False)
                    for name, network in networks.items()
                }
            probed.append((labelled, by_words.argmax(1), named))
    head = [
        "Set",
        "Pictures",
        "Classes",
        "Top-1",
        "Top-5",
        "Mean per class",
        "Chance",
        "Majority",
        "Verdict",
    ]
    names = ", ".join(labelled_set.name for labelled_set in loaded)
    result_tables = [
        sections.section(
            "Zero-shot suite",
            [
                f"{names}: each named from class names in prompt templates, averaged in embedding "
                "space; at most "
                f"{config.pictures:,} pictures of a set, drawn by seed {seed} among those that "
                "training did not see. Intervals resample "
                "pictures. A set far from what the run was trained on stands at chance, and says "
                "so.",
                *missing,
            ],
            [
                sections.table("Zero-shot classification", head, rows),
                sections.table(
                    "What was left out because training saw it: the same file by SHA-256, or the "
                    "same picture by index, where one of "
                    f"the {LOOKED_AT} nearest training embeddings lies above a cosine of "
                    f"{SAME_COSINE} and its pixels differ by less than "
                    f"{SAME_RMS:g} of 255",
                    [
                        "Set",
                        "Pictures",
                        "Looked at",
                        "Same file in training",
                        "Same picture in training",
                        "Judged",
                    ],
                    leaks,
                ),
            ],
            pictures,
        )
    ]
    if probed:
        tables, charts = _against_probes(probed, resamples, seed)
        result_tables.append(
            sections.section(
                "Zero-shot against explicit classification",
                [
                    "A linear probe is logistic regression on frozen features, taught with half "
                    "of a set's pictures and judged, like CLIP "
                    "here, on the other half; its penalty is swept on a fifth of its own half. "
                    "Few-shot probes see so many pictures of "
                    f"each class, {DRAWS} draws, with the penalty that all of them chose; “all” "
                    "is the taught half whole. "
                    f"Networks: {', '.join(probed[0][2])}.",
                ],
                tables,
                charts=charts,
            )
        )
    return result_tables


def class_scores(
    labelled: ImageSet, vectors: Floats, encode_texts: EncodeTexts, templates: Sequence[str]
) -> Floats:
    """Return cosines (N, C) of a set's pictures, unit vectors (N, D), with its classes in its own
    templates, or else in these.
    """
    return (
        vectors @ class_embeddings(encode_texts, labelled.names, labelled.templates or templates).T
    )


def _bars(top_1: Figure) -> list[Figure]:
    return [
        {
            "value": top_1[name],
            "low": None,
            "high": None,
            "n": top_1["n"],
            "groups": top_1["groups"],
        }
        for name in ("chance", "majority")
    ]


@dataclass(frozen=True)
class Drawn:
    """Pictures of a set that training did not see, their unit vectors (N, D), and how many were
    looked at and left out.
    """

    images: ImageSet
    vectors: Floats
    looked_at: int
    same_file: int
    same_picture: int


def draw_unseen(
    whole: ImageSet,
    max_images: int,
    seed: int,
    encode_images: EncodeImages,
    side_px: int,
    embedded: Embedded,
    shards: Path,
) -> Drawn:
    """Draw pictures by the seed, leave out those that training saw, and go on until there are
    enough or no more.
    """
    train = embedded.rows("train")
    trained_hashes = set(embedded.table.take(train)["sha256"].to_pylist())
    order = np.random.default_rng(seed).permutation(len(whole))
    remaining_rows: list[NDArray[np.int64]] = []
    vectors: list[Floats] = []
    same_file = same_picture = looked_at = 0
    while looked_at < len(order) and sum(map(len, remaining_rows)) < max_images:
        rows_left = np.sort(
            order[looked_at : looked_at + max_images - sum(map(len, remaining_rows))]
        )
        looked_at += len(rows_left)
        is_new = np.array(
            [
                hashlib.sha256(whole.encoded[number]).hexdigest() not in trained_hashes
                for number in rows_left
            ]
        )
        same_file += int((~is_new).sum())
        rows_left = rows_left[is_new]
        if not len(rows_left):
            continue
        pixels = whole.only(rows_left).pictures(side_px)
        features = encoded(encode_images, pixels)
        is_seen = _is_seen(pixels, features, train, embedded, shards)
        same_picture += int(is_seen.sum())
        remaining_rows.append(rows_left[~is_seen])
        vectors.append(features[~is_seen])
    rows_left = np.concatenate(remaining_rows) if remaining_rows else np.empty(0, np.int64)
    if not len(rows_left):
        return Drawn(
            whole.only(rows_left), np.empty((0, 0), np.float32), looked_at, same_file, same_picture
        )
    in_order = rows_left.argsort()
    return Drawn(
        whole.only(rows_left[in_order]),
        np.concatenate(vectors)[in_order],
        looked_at,
        same_file,
        same_picture,
    )


def _is_seen(
    pixels: Pixels, vectors: Floats, train: NDArray[np.int64], embedded: Embedded, shards: Path
) -> NDArray[np.bool_]:
    """Say which pictures (N,) are equal to the eye to one of the LOOKED_AT training pictures
    nearest to them by embedding.

    The nearest alone is not enough: of near siblings, such as one emoji in two skin tones, the
    other one may come first.
    """
    cosine = np.full((len(vectors), 0), 0, np.float32)
    nearest_rows = np.zeros((len(vectors), 0), np.int64)
    for start in range(0, len(train), 1024):
        cosines = vectors @ take(embedded.image_parts, train[start : start + 1024]).T
        both = np.concatenate([cosine, cosines], 1)
        where = np.concatenate(
            [
                nearest_rows,
                np.broadcast_to(np.arange(start, start + cosines.shape[1]), cosines.shape),
            ],
            1,
        )
        best = np.argpartition(-both, min(LOOKED_AT, both.shape[1]) - 1, axis=1)[:, :LOOKED_AT]
        cosine, nearest_rows = np.take_along_axis(both, best, 1), np.take_along_axis(where, best, 1)
    same = np.zeros(len(pixels), bool)
    for near, rank in np.argwhere(cosine > SAME_COSINE):
        if not same[near]:
            row = embedded.table.slice(int(train[nearest_rows[near, rank]]), 1).to_pylist()[0]
            theirs = read_picture(row, shards, COMPARED_PX).astype(np.float32)
            mine = np.asarray(
                Image.fromarray(pixels[near]).resize(
                    (COMPARED_PX, COMPARED_PX), Image.Resampling.BOX
                ),
                np.float32,
            )
            same[near] = float(np.sqrt(((mine - theirs) ** 2).mean())) < SAME_RMS
    return same


def _confusion(labelled: ImageSet, said: NDArray[np.int64], out: Path) -> dict[str, Any]:
    """Write which class is taken for which, rows true and columns said, each row summing to one."""
    count = len(labelled.names)
    counts = np.zeros((count, count))
    np.add.at(counts, (labelled.labels, said), 1)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    cell = min(48, max(10, 320 // count))
    letters = ImageFont.load_default(min(11, cell))
    margin = 12 + round(max(letters.getlength(name[:LONGEST_NAME]) for name in labelled.names))
    heading = "said to be, in the same order"
    width = margin + max(cell * count, round(letters.getlength(heading))) + 4
    page = Image.new("RGB", (width, 20 + cell * count + 4), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((margin, 4), heading, fill=INK, font=letters)
    for true in range(count):
        pen.text(
            (4, 20 + true * cell + (cell - 11) / 2),
            labelled.names[true][:LONGEST_NAME],
            fill=INK,
            font=letters,
        )
        for other in range(count):
            shade = tuple(
                round(255 - (255 - dark) * float(share[true, other])) for dark in (29, 92, 148)
            )
            pen.rectangle(
                (
                    margin + other * cell,
                    20 + true * cell,
                    margin + (other + 1) * cell - 2,
                    20 + (true + 1) * cell - 2,
                ),
                fill=shade,
            )
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"confusion-{slug(labelled.name)}.png"
    write_png(np.asarray(page), folder / name)
    often = int(np.bincount(said, minlength=count).argmax())
    return sections.picture(
        f"pictures/{name}",
        f"Confusion of {labelled.name}: most often said is {labelled.names[often]}",
        f"{labelled.name}: true rows, said columns",
    )


def _against_probes(
    probed: Sequence[tuple[ImageSet, NDArray[np.int64], dict[str, Floats]]],
    resamples: int,
    seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    head = ["Set", "Zero-shot CLIP", *(f"Probe on {name}" for name in probed[0][2])]
    cells: list[list[sections.Cell]] = []
    shot_charts = []
    differences: dict[str, list[tuple[str, Figure]]] = {name: [] for name in probed[0][2]}
    for labelled, said, named in probed:
        train, judged = probe.halves(labelled.labels, seed)
        classes, groups = len(labelled.names), range(len(judged))
        zero = said[judged] == labelled.labels[judged]
        zero_figure = mean_figure(zero, groups, resamples, seed)
        row: list[sections.Cell] = [labelled.name, zero_figure]
        max_classes = max(
            2 * SHOTS[-1], round(len(train) / classes)
        )  # "all" stands right of the last count, however few a class has
        series = {
            "zero-shot CLIP": [
                (SHOTS[0], zero_figure),
                (max_classes, {**zero_figure, "name": "all"}),
            ]
        }
        for name, features in named.items():
            train_features = probe.standardised(features[train])[0]
            penalty = probe.sweep(train_features, labelled.labels[train], classes, seed)
            taught = probe.right(features, labelled.labels, train, judged, classes, penalty)
            by_all = mean_figure(taught, groups, resamples, seed)
            row.append(by_all)
            differences[name].append(
                (
                    labelled.name,
                    mean_figure(zero.astype(float) - taught.astype(float), groups, resamples, seed),
                )
            )
            points = []
            for shots in SHOTS:
                draws = [
                    train[probe.few(labelled.labels[train], shots, seed + draw)]
                    for draw in range(DRAWS)
                ]
                hits = [
                    probe.right(features, labelled.labels, rows, judged, classes, penalty)
                    for rows in draws
                ]
                points.append((shots, mean_figure(np.mean(hits, 0), groups, resamples, seed)))
            series[name] = [*points, (max_classes, {**by_all, "name": "all"})]
        cells.append(row)
        shot_charts.append(
            sections.lines(
                f"Few-shot probes: {labelled.name}",
                "pictures of each class",
                "top-1",
                series,
                is_log_x=True,
            )
        )
    bar_charts = [
        sections.bars(
            f"Zero-shot CLIP minus a probe on {name}",
            "percentage points",
            sorted(difference, key=lambda item: -(item[1]["value"] or 0)),
        )
        for name, difference in differences.items()
    ]
    return [sections.table("Top-1 on the judged half", head, cells)], [*bar_charts, *shot_charts]
