"""Distances between generated and real pictures as sets, at several strengths of guidance.

Returns a section of the report and writes a contact sheet. Real training pictures are measured
too, as a reference. Counts, seed, picture size and feature networks stand in the section; every
figure has an interval. Models are callables. Legend: N pictures, S side, D dimensions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from indexing.data.contact_sheet import SHEET_SCALE, contact_sheet
from indexing.data.embedding_store import Floats, unit
from indexing.data.held_out import Pairs, read_pairs
from indexing.data.images import Pixels, read_picture, write_png
from indexing.evaluation.context import Subject
from indexing.metrics import frechet
from indexing.metrics.bootstrap import Figure, mean_figure, set_figure
from indexing.metrics.clip_score import SCALE, EncodeImages
from indexing.report import sections
from infra.settings import Section

Draw = Callable[[list[str], int, float], Pixels]
"""(prompts, seed, guidance) -> uint8 (N, S, S, 3), one picture for each prompt."""
TITLE = "How near to real pictures, by guidance"
MIN_PAIRS = 8
MAX_SHEET_COLUMNS = 8
MAX_RESAMPLES = 200
"""Limit for distances between sets: every resample costs a matrix decomposition."""


class FidelityConfig(Section):
    """[evaluate.fidelity]: number of pictures and strengths of guidance."""

    pictures: int = Field(default=64, ge=MIN_PAIRS, le=100_000)
    """Number of held-out captions that are drawn, and of real pictures to compare with."""
    guidance: tuple[float, ...] = Field(default=(1.0, 2.0, 4.0), min_length=1, max_length=16)
    """Strengths of the decoder's guidance."""


@dataclass(frozen=True)
class _Reference:
    """The real pictures of the held-out pairs, as features to measure other pictures against."""

    pairs: Pairs
    clip_features: Floats
    """Unit vectors (N, D) of the run's own CLIP."""
    network_features: dict[str, NDArray[np.float64]]
    """Features (N, D) of each network."""


@dataclass(frozen=True)
class _Candidates:
    """Pictures (N, S, S, 3) that are measured, and the group of each."""

    pictures: Pixels
    groups: list[str]
    is_generated: bool
    """Drawn from the captions of the reference's pairs, in their order."""


def fidelity(
    config: FidelityConfig,
    subject: Subject,
    side_px: int,
    draw: Draw,
    networks: Mapping[str, EncodeImages],
) -> sections.ReportSection:
    """Draw the captions of held-out pairs, compare them with real pictures, return the section.

    Writes `pictures/guidance.png` into the report's folder.
    """
    pairs = read_pairs(subject.embedded, "held_out_concept", config.pictures, subject.seed)
    others = read_pairs(subject.embedded, "train", len(pairs.rows), subject.seed)
    if min(len(pairs.rows), len(others.rows)) < MIN_PAIRS:
        return sections.section(
            TITLE, [f"Not measured: fewer than {MIN_PAIRS} held-out or training pairs."]
        )
    real = _read_pictures(pairs, subject, side_px)
    trained = _read_pictures(others, subject, side_px)
    prompts = [row["caption"] for row in pairs.rows]
    drawn = {f"guidance {w:g}": draw(prompts, subject.seed, w) for w in config.guidance}
    reference = _Reference(
        pairs,
        unit(np.asarray(subject.encode_images(real), np.float32)),
        {name: np.asarray(network(real), np.float64) for name, network in networks.items()},
    )
    candidates = {
        name: _Candidates(pictures, pairs.groups, is_generated=True)
        for name, pictures in drawn.items()
    }
    candidates["training pictures"] = _Candidates(trained, others.groups, is_generated=False)
    rows: list[list[sections.Cell]] = [
        [name, *_figures(reference, candidate, networks, subject)]
        for name, candidate in candidates.items()
    ]
    head = ["Pictures", "CLIP score", "CMMD on our CLIP", "Precision", "Recall"]
    head += [f"{what} on {name}" for name in networks for what in ("Fréchet", "kernel × 1000")]
    # Stands in the table's caption too, so that only runs with equal conditions are compared.
    conditions = (
        f"{len(prompts)} captions of held-out pairs, one picture each, seed {subject.seed}, "
        f"against the {len(real)} real pictures of these pairs at {side_px} px, resized by area"
    )
    return sections.section(
        TITLE,
        _explanation(conditions, min(subject.resamples, MAX_RESAMPLES)),
        [sections.table(f"Generated against real: {conditions}", head, rows)],
        [_guidance_sheet(drawn, prompts, subject.out)],
    )


def _read_pictures(pairs: Pairs, subject: Subject, side_px: int) -> Pixels:
    return np.stack([read_picture(row, subject.shards, side_px) for row in pairs.rows])


def _figures(
    reference: _Reference,
    candidates: _Candidates,
    networks: Mapping[str, EncodeImages],
    subject: Subject,
) -> list[Figure | None]:
    """Return the figures of one row of the table, in the order of its head."""
    pairs, resamples, seed = reference.pairs, subject.resamples, subject.seed
    features = unit(np.asarray(subject.encode_images(candidates.pictures), np.float32))
    inside, covered = frechet.precision_recall(reference.clip_features, features)
    clip_score = None
    if candidates.is_generated:
        score = SCALE * np.maximum(np.einsum("nd,nd->n", features, pairs.texts), 0)
        clip_score = mean_figure(score, pairs.groups, resamples, seed, unit="score")
    # A drawing is resampled together with the real picture of its caption.
    other_groups = None if candidates.is_generated else candidates.groups

    def distance_figure(distance: frechet.Counted, unit_name: str, scale: float = 1) -> Figure:
        return set_figure(
            lambda u, v: scale * distance(u, v),
            pairs.groups,
            other_groups,
            min(resamples, MAX_RESAMPLES),
            seed,
            unit=unit_name,
        )

    figures = [
        clip_score,
        distance_figure(frechet.cmmd_of(reference.clip_features, features), "CMMD"),
        mean_figure(inside, candidates.groups, resamples, seed),
        mean_figure(covered, pairs.groups, resamples, seed),
    ]
    for name, real in reference.network_features.items():
        other = np.asarray(networks[name](candidates.pictures), np.float64)
        kernel = frechet.kernel_distance_of(real, other)
        figures.append(distance_figure(frechet.frechet_of(real, other), "Fréchet distance"))
        figures.append(distance_figure(kernel, "kernel distance × 1000", 1000))
    return figures


def _explanation(conditions: str, distance_resamples: int) -> list[str]:
    """Return the paragraphs before the table."""
    return [
        f"{conditions}. The Fréchet distance is not FID: it uses another network, and with so few "
        "pictures it compares only the rows of this table. The kernel distance is unbiased. "
        "Precision is the share of generated pictures that lie among the real ones. Recall is the "
        "share of real pictures that the generated ones cover, which measures diversity. Both use "
        "3 neighbours in the space of our CLIP. The last row is what the same number of real "
        "training pictures, of other concepts, reaches.",
        "Intervals resample whole concepts, a caption's real picture and its drawing together, "
        f"{distance_resamples} times for distances. The bounds of distances are shifted by the "
        "bias that drawing a picture twice adds. For precision and recall the counted pictures "
        "are resampled and the neighbourhoods stay. CLIP score and CMMD use this run's own CLIP.",
    ]


def _guidance_sheet(
    drawn: Mapping[str, Pixels], prompts: Sequence[str], out: Path
) -> sections.Picture:
    """Write the first pictures of each strength of guidance, one row each."""
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [list(pictures[:MAX_SHEET_COLUMNS]) for pictures in drawn.values()]
    write_png(contact_sheet(rows, list(drawn), scale=SHEET_SCALE), folder / "guidance.png")
    first_prompts = ", ".join(prompts[:MAX_SHEET_COLUMNS])
    return sections.picture(
        "pictures/guidance.png",
        f"Rows of rising guidance: {', '.join(drawn)}; columns: {first_prompts}",
        f"Columns: {first_prompts}",
        is_pixelated=True,
    )
