"""The zero-shot suite: labelled sets classified by CLIP from class names, and by linear probes.

Follows CLIP (Radford et al. 2021), fig. 5 and 6. Returns sections of the report and writes
confusion matrices as PNG. Models are callables. Legend: N pictures, C classes, D dimensions.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from indexing.data.contact_sheet import INK, PAPER
from indexing.data.embedding_store import Floats, take
from indexing.data.held_out import Embedded
from indexing.data.images import Pixels, read_picture, write_png
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
from infra.storage.shard_reader import ShardReader

SIDE_PX = 96
SHOTS = (1, 2, 4, 8, 16)
DRAWS = 3
MAX_CLASSES_PROBED = 200
LARGEST_CONFUSION, LONGEST_NAME = 40, 36
SAME_COSINE, SAME_RMS = 0.98, 24.0
"""Above this cosine and below this RMS difference (0 to 255), two pictures count as the same. Two
ways of resizing a flag differ by up to 20 at its edges."""
COMPARED_PX = 32
LOOKED_AT = 16
"""Nearest training pictures whose pixels are compared with a picture, if above SAME_COSINE."""
ROWS_AT_ONCE = 1024
ZERO_SHOT_HEAD = (
    "Set",
    "Pictures",
    "Classes",
    "Top-1",
    "Top-5",
    "Mean per class",
    "Chance",
    "Majority",
    "Verdict",
)
LEAK_HEAD = (
    "Set",
    "Pictures",
    "Looked at",
    "Same file in training",
    "Same picture in training",
    "Judged",
)


class SuiteConfig(Section):
    """[evaluate.suite]: labelled sets, and how many of their pictures are judged."""

    sets: tuple[str, ...] = ()
    """Names of packaged sets (listed in flows/demo/packaged_sets.py) or paths: a folder of classes,
    a parquet file, WebDataset shards."""
    pictures: int = Field(default=1000, ge=10)
    """Maximum number of pictures of a set; more are sampled by the seed."""
    probe: bool = True
    """Also train linear probes."""
    features: str = ""
    """Path of a ResNet-50 state dict in torchvision's format, to probe in addition to the packaged
    ImageNet network."""


@dataclass(frozen=True)
class Drawn:
    """Pictures of a set that training did not see, their unit vectors (N, D), and counts.

    `looked_at` pictures were examined; `same_file` and `same_picture` of them were left out.
    """

    images: ImageSet
    vectors: Floats
    looked_at: int
    same_file: int
    same_picture: int


@dataclass(frozen=True)
class _Probed:
    """A set for linear probes: CLIP's zero-shot labels (N,) and features (N, D) by network."""

    images: ImageSet
    predicted: NDArray[np.int64]
    features: dict[str, Floats]


def suite(
    config: SuiteConfig,
    subject: Subject,
    loaded: Sequence[ImageSet],
    templates: Sequence[str],
    side_px: int,
    networks: Mapping[str, EncodeImages],
    missing: Sequence[str] = (),
) -> list[sections.ReportSection]:
    """Judge every set; return the section on zero-shot and, with probes, the one that compares.

    Pictures that training saw are left out before judging; other pictures of the set replace them
    where it has more. CLIP gets pictures at its own side, `side_px`, so they are resized once;
    `networks` for probes get them at SIDE_PX. `missing` are sentences on sets that are not
    available.
    """
    resamples, seed = subject.resamples, subject.seed
    rows: list[list[sections.Cell]] = []
    leaks: list[list[sections.Cell]] = []
    pictures: list[sections.Picture] = []
    probed: list[_Probed] = []
    for labelled_set in loaded:
        drawn = draw_unseen(labelled_set, config.pictures, side_px, subject)
        labelled = drawn.images
        leaks.append(_leak_row(labelled_set, drawn))
        if not len(labelled):
            continue
        by_words = class_scores(labelled, drawn.vectors, subject.encode_texts, templates)
        predicted = by_words.argmax(1)
        rows.append(_zero_shot_row(labelled, by_words, resamples, seed))
        if 1 < len(labelled.names) <= LARGEST_CONFUSION:
            pictures.append(_confusion(labelled, predicted, subject.out))
        if config.probe and 1 < len(labelled.names) <= MAX_CLASSES_PROBED:
            features = {"our CLIP": drawn.vectors} | _network_features(labelled, networks)
            probed.append(_Probed(labelled, predicted, features))
    names = ", ".join(labelled_set.name for labelled_set in loaded)
    zero_shot = sections.section(
        "Zero-shot suite",
        [
            f"{names}: CLIP names every picture from the class names in prompt templates, "
            f"averaged in embedding space. At most {config.pictures:,} pictures of a set are "
            f"judged, drawn by seed {seed} from those that training did not see. Intervals "
            "resample pictures. A set that is far from the training data is at chance, and its "
            "verdict says so.",
            *missing,
        ],
        [sections.table("Zero-shot classification", ZERO_SHOT_HEAD, rows), _leak_table(leaks)],
        pictures,
    )
    return [zero_shot, _probe_section(probed, resamples, seed)] if probed else [zero_shot]


def _zero_shot_row(
    labelled: ImageSet, scores: Floats, resamples: int, seed: int
) -> list[sections.Cell]:
    """Return a set's row of the table ZERO_SHOT_HEAD for class scores (N, C)."""
    scored = score(scores, labelled.labels, labelled.names, range(len(labelled)), resamples, seed)
    top_1 = scored["top_1"]
    # Of five classes or fewer, the right one is always among the first five.
    top_5 = scored["top_5"] if len(labelled.names) > 5 else None
    return [
        labelled.name,
        top_1["n"],
        scored["classes"],
        top_1,
        top_5,
        scored["mean_per_class"],
        *_baselines(top_1),
        verdict(top_1),
    ]


def _baselines(top_1: Figure) -> list[Figure]:
    """Return chance and majority of a top-1 figure as figures without an interval."""
    return [
        {"value": value, "low": None, "high": None, "n": top_1["n"], "groups": top_1["groups"]}
        for value in (top_1["chance"], top_1["majority"])
    ]


def _leak_row(whole: ImageSet, drawn: Drawn) -> list[sections.Cell]:
    return [
        drawn.images.name,
        len(whole),
        drawn.looked_at,
        drawn.same_file,
        drawn.same_picture,
        len(drawn.images),
    ]


def _leak_table(rows: list[list[sections.Cell]]) -> sections.Table:
    caption = (
        "Pictures left out because training saw them: the same file by SHA-256, or the same "
        f"picture by index, where one of the {LOOKED_AT} nearest training embeddings lies above a "
        f"cosine of {SAME_COSINE} and its pixels differ by less than {SAME_RMS:g} of 255"
    )
    return sections.table(caption, LEAK_HEAD, rows)


def _network_features(
    labelled: ImageSet, networks: Mapping[str, EncodeImages]
) -> dict[str, Floats]:
    if not networks:
        return {}
    pictures = labelled.pictures(SIDE_PX)
    return {name: encoded(network, pictures, is_unit=False) for name, network in networks.items()}


def class_scores(
    labelled: ImageSet, vectors: Floats, encode_texts: EncodeTexts, templates: Sequence[str]
) -> Floats:
    """Return cosines (N, C) of pictures, unit vectors (N, D), with the classes of their set.

    Uses the set's own templates, or `templates` where it has none.
    """
    classes = class_embeddings(encode_texts, labelled.names, labelled.templates or templates)
    return vectors @ classes.T


def draw_unseen(whole: ImageSet, max_images: int, side_px: int, subject: Subject) -> Drawn:
    """Draw up to `max_images` pictures by the seed, without those that training saw.

    Draw on until there are enough or the set is used up. The pictures keep the order of the set.
    """
    embedded = subject.embedded
    train = embedded.rows("train")
    trained_hashes = set(embedded.table.take(train)["sha256"].to_pylist())
    order = np.random.default_rng(subject.seed).permutation(len(whole))
    unseen: list[NDArray[np.int64]] = []
    vectors: list[Floats] = []
    same_file = same_picture = looked_at = 0
    while looked_at < len(order) and (lacking := max_images - sum(map(len, unseen))) > 0:
        batch = np.sort(order[looked_at : looked_at + lacking])
        looked_at += len(batch)
        is_new = _is_new_file(whole, batch, trained_hashes)
        same_file += int((~is_new).sum())
        batch = batch[is_new]
        if not len(batch):
            continue
        pixels = whole.only(batch).pictures(side_px)
        features = encoded(subject.encode_images, pixels)
        is_seen = _is_seen(pixels, features, train, embedded, subject.shards)
        same_picture += int(is_seen.sum())
        unseen.append(batch[~is_seen])
        vectors.append(features[~is_seen])
    rows = np.concatenate(unseen) if unseen else np.empty(0, np.int64)
    counts = (looked_at, same_file, same_picture)
    if not len(rows):
        return Drawn(whole.only(rows), np.empty((0, 0), np.float32), *counts)
    in_order = rows.argsort()
    return Drawn(whole.only(rows[in_order]), np.concatenate(vectors)[in_order], *counts)


def _is_new_file(
    whole: ImageSet, rows: NDArray[np.int64], trained_hashes: set[str]
) -> NDArray[np.bool_]:
    """Return which of these rows are files whose SHA-256 is not in the training split."""
    hashes = [hashlib.sha256(whole.encoded[row]).hexdigest() for row in rows]
    return np.array([sha256 not in trained_hashes for sha256 in hashes], bool)


def _is_seen(
    pixels: Pixels,
    vectors: Floats,
    train: NDArray[np.int64],
    embedded: Embedded,
    shards: ShardReader,
) -> NDArray[np.bool_]:
    """Return which pictures (N,) look equal to one of their LOOKED_AT nearest training pictures.

    Nearest is by embedding. One neighbour is not enough: of near siblings, such as one emoji in two
    skin tones, the wrong one may come first.
    """
    cosines, neighbours = _nearest_training(vectors, train, embedded)
    is_seen = np.zeros(len(pixels), bool)
    for number, rank in np.argwhere(cosines > SAME_COSINE):
        if not is_seen[number]:
            row = embedded.table.slice(int(train[neighbours[number, rank]]), 1).to_pylist()[0]
            trained = read_picture(row, shards, COMPARED_PX)
            is_seen[number] = _rms(pixels[number], trained) < SAME_RMS
    return is_seen


def _nearest_training(
    vectors: Floats, train: NDArray[np.int64], embedded: Embedded
) -> tuple[Floats, NDArray[np.int64]]:
    """Return cosines and positions in `train` of up to LOOKED_AT neighbours (N, K), unsorted."""
    cosines = np.zeros((len(vectors), 0), np.float32)
    positions = np.zeros((len(vectors), 0), np.int64)
    for start in range(0, len(train), ROWS_AT_ONCE):
        rows = train[start : start + ROWS_AT_ONCE]
        new_cosines = vectors @ take(embedded.image_parts, rows).T
        new_positions = np.broadcast_to(
            np.arange(start, start + new_cosines.shape[1]), new_cosines.shape
        )
        all_cosines = np.concatenate([cosines, new_cosines], 1)
        all_positions = np.concatenate([positions, new_positions], 1)
        last = min(LOOKED_AT, all_cosines.shape[1]) - 1
        best = np.argpartition(-all_cosines, last, axis=1)[:, :LOOKED_AT]
        cosines = np.take_along_axis(all_cosines, best, 1)
        positions = np.take_along_axis(all_positions, best, 1)
    return cosines, positions


def _rms(picture: Pixels, trained: Pixels) -> float:
    """Return the RMS difference (0 to 255) of a picture, resized, to one of COMPARED_PX."""
    resized = Image.fromarray(picture).resize((COMPARED_PX, COMPARED_PX), Image.Resampling.BOX)
    difference = np.asarray(resized, np.float32) - trained.astype(np.float32)
    return float(np.sqrt((difference**2).mean()))


def _confusion(labelled: ImageSet, predicted: NDArray[np.int64], out: Path) -> sections.Picture:
    """Write the confusion matrix, true rows and predicted columns; each row sums to one."""
    count = len(labelled.names)
    counts = np.zeros((count, count))
    np.add.at(counts, (labelled.labels, predicted), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"confusion-{slug(labelled.name)}.png"
    write_png(_draw_confusion(shares, labelled.names), folder / name)
    mode = int(np.bincount(predicted, minlength=count).argmax())
    return sections.picture(
        f"pictures/{name}",
        f"Confusion of {labelled.name}: the most frequent answer is {labelled.names[mode]}",
        f"{labelled.name}: true classes in rows, predicted classes in columns",
    )


def _draw_confusion(shares: NDArray[np.float64], names: Sequence[str]) -> Pixels:
    """Draw shares (C, C) as a grid of shaded cells with the names of the rows."""
    count = len(names)
    cell = min(48, max(10, 320 // count))
    letters = ImageFont.load_default(min(11, cell))
    margin = 12 + round(max(letters.getlength(name[:LONGEST_NAME]) for name in names))
    heading = "said to be, in the same order"
    width = margin + max(cell * count, round(letters.getlength(heading))) + 4
    page = Image.new("RGB", (width, 20 + cell * count + 4), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((margin, 4), heading, fill=INK, font=letters)
    for row, name in enumerate(names):
        top = 20 + row * cell
        pen.text((4, top + (cell - 11) / 2), name[:LONGEST_NAME], fill=INK, font=letters)
        for column in range(count):
            left, share = margin + column * cell, float(shares[row, column])
            shade = tuple(round(255 - (255 - dark) * share) for dark in (29, 92, 148))
            pen.rectangle((left, top, left + cell - 2, top + cell - 2), fill=shade)
    return np.asarray(page)


@dataclass(frozen=True)
class _ProbeResult:
    """One probe on one set, on the judged half: trained on the whole train half, and few-shot."""

    whole: Figure
    deficit: Figure
    """Zero-shot CLIP minus this probe, pictures paired."""
    few_shot: list[tuple[int, Figure]]


def _probe_section(probed: Sequence[_Probed], resamples: int, seed: int) -> sections.ReportSection:
    """Return the section that compares zero-shot CLIP with linear probes."""
    names = list(probed[0].features)
    rows: list[list[sections.Cell]] = []
    shot_charts = []
    deficits: dict[str, list[tuple[str, Figure]]] = {name: [] for name in names}
    for one_set in probed:
        images = one_set.images
        train, judged = probe.halves(images.labels, seed)
        is_right = one_set.predicted[judged] == images.labels[judged]
        zero_shot = mean_figure(is_right, range(len(judged)), resamples, seed)
        results = {
            name: _probe_result(images, features, (train, judged), is_right, resamples, seed)
            for name, features in one_set.features.items()
        }
        rows.append([images.name, zero_shot, *(result.whole for result in results.values())])
        for name, result in results.items():
            deficits[name].append((images.name, result.deficit))
        # "all" stands to the right of the last count, even where a class has few pictures.
        all_x = max(2 * SHOTS[-1], round(len(train) / len(images.names)))
        shot_charts.append(_shot_chart(images.name, zero_shot, results, all_x))
    bar_charts = [
        sections.bars(
            f"Zero-shot CLIP minus a probe on {name}",
            "percentage points",
            sorted(figures, key=lambda item: -(item[1]["value"] or 0)),
        )
        for name, figures in deficits.items()
    ]
    head = ["Set", "Zero-shot CLIP", *(f"Probe on {name}" for name in names)]
    return sections.section(
        "Zero-shot against explicit classification",
        [
            "A linear probe is logistic regression on frozen features. It is trained on half of a "
            "set's pictures and judged, like CLIP here, on the other half; its penalty is chosen "
            "on a fifth of its training half. Few-shot probes see the stated number of pictures "
            f"of each class, in {DRAWS} draws, with the penalty that was chosen on all of them; "
            f"“all” is the whole training half. Networks: {', '.join(names)}.",
        ],
        [sections.table("Top-1 on the judged half", head, rows)],
        charts=[*bar_charts, *shot_charts],
    )


def _probe_result(
    images: ImageSet,
    features: Floats,
    halves: tuple[NDArray[np.int64], NDArray[np.int64]],
    zero_shot_right: NDArray[np.bool_],
    resamples: int,
    seed: int,
) -> _ProbeResult:
    """Train probes on one network's features (N, D), whole and few-shot, and judge them."""
    train, judged = halves
    labels, classes, groups = images.labels, len(images.names), range(len(judged))
    train_features = probe.standardised(features[train])[0]
    penalty = probe.sweep(train_features, labels[train], classes, seed)
    right = probe.right(features, labels, train, judged, classes, penalty)
    few_shot = []
    for shots in SHOTS:
        draws = [train[probe.few(labels[train], shots, seed + draw)] for draw in range(DRAWS)]
        hits = [probe.right(features, labels, rows, judged, classes, penalty) for rows in draws]
        few_shot.append((shots, mean_figure(np.mean(hits, 0), groups, resamples, seed)))
    deficit = zero_shot_right.astype(float) - right.astype(float)
    return _ProbeResult(
        mean_figure(right, groups, resamples, seed),
        mean_figure(deficit, groups, resamples, seed),
        few_shot,
    )


def _shot_chart(
    set_name: str, zero_shot: Figure, results: Mapping[str, _ProbeResult], all_x: int
) -> sections.Chart:
    """Return top-1 over pictures of each class, "all" at `all_x`."""

    def at_all(figure: Figure) -> tuple[int, sections.NamedFigure]:
        return all_x, {**figure, "name": "all"}

    series: dict[str, list[tuple[int, Figure]]] = {
        "zero-shot CLIP": [(SHOTS[0], zero_shot), at_all(zero_shot)],
        **{name: [*result.few_shot, at_all(result.whole)] for name, result in results.items()},
    }
    return sections.lines(
        f"Few-shot probes: {set_name}", "pictures of each class", "top-1", series, is_log_x=True
    )
