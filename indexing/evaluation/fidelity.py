"""How near generated pictures come to real ones as sets, at several strengths of guidance, beside
what other real pictures reach.

Counts, seed, resize and feature network are written beside the figures; every figure has its
interval. Models are callables.
"""

from collections.abc import Callable, Mapping

import numpy as np
from pydantic import Field

from indexing.data.embedding_store import unit
from indexing.data.held_out import read_pairs
from indexing.data.images import Pixels, read_picture, sheet, write_png
from indexing.evaluation.context import Subject
from indexing.metrics import frechet
from indexing.metrics.bootstrap import Figure, mean_figure, set_figure
from indexing.metrics.clip_score import SCALE, EncodeImages
from indexing.report import sections
from infra.settings import Section

Draw = Callable[[list[str], int, float], Pixels]
"""(prompts, seed, guidance) -> uint8 (P, S, S, 3), one picture each."""
LEAST = 8
MAX_SHEET_COLUMNS = 8
MAX_RESAMPLES = 200
"""Of a distance between sets, which costs a decomposition each."""


class FidelityConfig(Section):
    """[evaluate.fidelity]: how many pictures, and which guidance."""

    pictures: int = Field(default=64, ge=LEAST, le=100_000)
    """Held-out captions that are drawn, and as many real pictures they are compared with."""
    guidance: tuple[float, ...] = Field(default=(1.0, 2.0, 4.0), min_length=1, max_length=16)
    """Strengths of the decoder's guidance."""


def fidelity(
    config: FidelityConfig,
    subject: Subject,
    side_px: int,
    draw: Draw,
    networks: Mapping[str, EncodeImages],
) -> sections.ReportSection:
    """Draw the captions of held-out pairs and return the report's section; writes its picture into
    the report's folder.
    """
    embedded, shards, encode, resamples, seed = (
        subject.embedded,
        subject.shards,
        subject.encode_images,
        subject.resamples,
        subject.seed,
    )
    title = "How near to real pictures, by guidance"
    pairs = read_pairs(embedded, "held_out_concept", config.pictures, seed)
    others = read_pairs(embedded, "train", len(pairs.rows), seed)
    if min(len(pairs.rows), len(others.rows)) < LEAST:
        return sections.section(
            title, [f"Not measured: fewer than {LEAST} held-out or training pairs."]
        )
    real = np.stack([read_picture(row, shards, side_px) for row in pairs.rows])
    trained = np.stack([read_picture(row, shards, side_px) for row in others.rows])
    prompts = [row["caption"] for row in pairs.rows]
    drawn = {f"guidance {w:g}": draw(prompts, seed, w) for w in config.guidance}
    head = ["Pictures", "CLIP score", "CMMD on our CLIP", "Precision", "Recall"]
    head += [f"{what} on {name}" for name in networks for what in ("Fréchet", "kernel × 1000")]
    features = {name: np.asarray(network(real), np.float64) for name, network in networks.items()}
    of_real = unit(np.asarray(encode(real), np.float32))
    rows: list[list[sections.Cell]] = []
    for name, pictures in {**drawn, "training pictures": trained}.items():
        drawn_features = unit(np.asarray(encode(pictures), np.float32))
        inside, covered = frechet.precision_recall(of_real, drawn_features)
        score = SCALE * np.maximum(np.einsum("nd,nd->n", drawn_features, pairs.texts), 0)
        drawn_groups = pairs.groups if name in drawn else others.groups

        def apart(
            distance: frechet.Counted,
            unit_name: str,
            scale: float = 1,
            is_drawn: bool = name in drawn,
        ) -> Figure:
            other = (
                None if is_drawn else others.groups
            )  # a caption's drawing hangs together with its real picture
            times = min(resamples, MAX_RESAMPLES)
            return set_figure(
                lambda u, v: scale * distance(u, v),
                pairs.groups,
                other,
                times,
                seed,
                unit=unit_name,
            )

        row: list[sections.Cell] = [
            name,
            mean_figure(score, pairs.groups, resamples, seed, unit="score")
            if name in drawn
            else None,
            apart(frechet.cmmd_of(of_real, drawn_features), "CMMD"),
            mean_figure(inside, drawn_groups, resamples, seed),
            mean_figure(covered, pairs.groups, resamples, seed),
        ]
        for network, of_network in features.items():
            other = np.asarray(networks[network](pictures), np.float64)
            row.append(apart(frechet.frechet_of(of_network, other), "Fréchet distance"))
            row.append(
                apart(frechet.kernel_distance_of(of_network, other), "kernel distance × 1000", 1000)
            )
        rows.append(row)
    folder = subject.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    write_png(
        sheet([list(images[:MAX_SHEET_COLUMNS]) for images in drawn.values()], list(drawn)),
        folder / "guidance.png",
    )
    first_prompts = ", ".join(prompts[:MAX_SHEET_COLUMNS])
    conditions = (  # in the table's name too, so that only runs measured alike are compared
        f"{len(prompts)} captions of held-out pairs, one picture each, seed {seed}, against the "
        f"{len(real)} real pictures of these "
        f"pairs at {side_px} px, resized by area"
    )
    return sections.section(
        title,
        [
            f"{conditions}. The Fréchet distance is not FID: its network is another, and with so "
            "few pictures it "
            "compares rows of this table only; the kernel distance is unbiased. Precision: "
            "generated pictures that lie among the real "
            "ones; recall: real ones that the generated cover, which is diversity; both by 3 "
            "neighbours in our CLIP's space. The last row "
            "is what as many real training pictures, of other things, reach.",
            "Intervals resample whole concepts, a caption's real picture and its drawing "
            f"together, {min(resamples, MAX_RESAMPLES)} "
            "times for distances, whose bounds are moved by what drawing pictures twice adds. For "
            "precision and recall the counted "
            "pictures are resampled and the neighbourhoods stay. CLIP score and CMMD are by this "
            "run's own CLIP.",
        ],
        [sections.table(f"Generated against real: {conditions}", head, rows)],
        [
            sections.picture(
                "pictures/guidance.png",
                f"Rows of rising guidance: {', '.join(drawn)}; columns: {first_prompts}",
                f"Columns: {first_prompts}",
                True,
            )
        ],
    )
