"""Relational reasoning, counting and writing of a system, and what search at inference adds
(unCLIP, fig. 14 to 16; GenEval's rows).

Prompts are the run's own scenes, trained and held-out ones apart; judges are exact. Success is
shown against the decoder's calls that a returned picture cost. Models are callables. Legend: P
prompts, M samples of each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from indexing.data.embedding_store import unit
from indexing.data.held_out import Embedded
from indexing.data.images import sheet, write_png
from indexing.evaluation.context import Subject
from indexing.metrics.bootstrap import Figure, mean_figure
from indexing.metrics.clip_score import EncodeImages
from indexing.metrics.zero_shot import EncodeTexts
from indexing.report import sections
from indexing.scenes import puzzles, scenes
from indexing.scenes.judges import Judge, ReadText, best_of, judge_of
from indexing.scenes.scenes import Scene
from infra.settings import Section

Score = Callable[[NDArray[np.uint8], NDArray[np.int64]], NDArray[Any]]
Draw = Callable[[list[str], int, int, int, Score | None, int, tuple[float, ...]], NDArray[np.uint8]]
"""(prompts, M, seed, steps, score, keep, checks) -> uint8 (P, M, S, S, 3); without a score every
sample is on its own."""

TITLE = "Relations, counts and writing, and what search adds"
SPLIT_NAMES = {"train": "trained", "held_out_concept": "held out"}
OPEN_SCENES = tuple(Scene((scenes.Thing(shape),)) for shape in scenes.SHAPES) + tuple(
    Scene((scenes.Thing(a), scenes.Thing(b)))
    for a, b in (("circle", "square"), ("circle", "triangle"), ("square", "triangle"))
)
"""GenEval's first two rows, which no colour binds."""
IN_PARTS = ("writing", "24-puzzle", "cube")
"""Rows that are hardly ever right as a whole: how much of them is right is told as well."""
MAX_SHEET_ROWS = 8


class RelationsConfig(Section):
    """[evaluate.relations]: how many scenes are asked for and how far search goes."""

    prompts_per_row: int = Field(default=8, ge=1, le=500)
    """Scenes of each row, trained ones and held-out ones each."""
    samples: int = Field(default=8, ge=2, le=256)
    """Samples of each; best of n and the beams go up to as many."""
    steps: int = Field(default=20, ge=2, le=1000)
    """Steps of each, by DDIM with eta = 1."""
    searched: tuple[str, ...] = ("position", "attribution", "counting", "24-puzzle", "cube")
    """Rows on which beams are tried."""
    keep: int = Field(default=2, ge=1, le=64)
    """Members of a beam that survive a check."""
    checks: tuple[float, ...] = (0.3, 0.45, 0.6, 0.75)
    """When a beam is checked, as shares of the steps."""

    @field_validator("checks")
    @classmethod
    def _checks_are_shares(cls, checks: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < check < 1 for check in checks):
            raise ValueError("a check is a share of the steps, between 0 and 1")
        return checks

    @model_validator(mode="after")
    def _beams_fill_up(self) -> "RelationsConfig":
        if self.searched and self.samples % self.keep:
            raise ValueError(
                f"keep = {self.keep} must divide samples = {self.samples}: survivors of a check "
                "are copied until there are as many again"
            )
        return self


@dataclass(frozen=True)
class Prompt:
    """One prompt of the harness."""

    prompt: str
    row: str
    split_name: str
    judge: Judge


@dataclass(frozen=True)
class Measured:
    """Samples of all prompts, judged (P, M): `share` of what was asked for, CLIP's cosine."""

    pictures: NDArray[np.uint8]
    share: NDArray[np.float64]
    cosine: NDArray[np.float64]

    @property
    def is_right(self) -> NDArray[np.float64]:
        """1 where a sample is exactly what was asked for, else 0, (P, M)."""
        return (self.share >= 1).astype(np.float64)


@dataclass(frozen=True)
class Searched:
    """One row under search: success against calls; at the most calls, plain sampling's success and
    what each search adds, by name.
    """

    chart: dict[str, Any]
    gains: dict[str, Figure]


def build_prompts(
    config: RelationsConfig, embedded: Embedded, read_text: ReadText | None, seed: int
) -> list[Prompt]:
    """Draw prompts of each row from what the run trained on and from what it held out; what no
    judge can judge is left out.
    """
    prompts: list[Prompt] = []
    rng = np.random.default_rng(seed)
    for split, split_name in SPLIT_NAMES.items():
        rows = embedded.table.take(embedded.rows(split)).select(["concept", "category"]).to_pylist()
        by_row: dict[str, set[str]] = {}
        for scene_row in rows:
            by_row.setdefault(scene_row["category"], set()).add(scene_row["concept"])
        if split == "train" and any(
            scenes.parse(concept) for concepts in by_row.values() for concept in concepts
        ):
            for scene in OPEN_SCENES:
                by_row.setdefault(scene.row, set()).add(scene.caption)
        for row, concepts in sorted(by_row.items()):
            for concept in rng.permutation(sorted(concepts))[: config.prompts_per_row].tolist():
                judge = judge_of(concept, read_text)
                if judge:
                    prompts.append(Prompt(concept, row, split_name, judge))
    return prompts


def relations(
    config: RelationsConfig, subject: Subject, draw: Draw, read_text: ReadText | None
) -> sections.ReportSection:
    """Measure plain sampling, best of n and beams, and return the report's section; writes pictures
    into the report's folder.
    """
    encode_texts, encode_images, resamples, seed = (
        subject.encode_texts,
        subject.encode_images,
        subject.resamples,
        subject.seed,
    )
    prompts = build_prompts(config, subject.embedded, read_text, seed)
    if not prompts:
        return sections.section(
            TITLE, ["Not measured: the run has no scenes that a judge here can judge."]
        )

    def measured(prompts_of_row: Sequence[Prompt], members: int, steps: int, by: str) -> Measured:
        texts = unit(
            np.asarray(
                encode_texts([one_prompt.prompt for one_prompt in prompts_of_row]), np.float32
            )
        )

        def cosines(pictures: NDArray[np.uint8], numbers: NDArray[np.int64]) -> NDArray[Any]:
            return np.einsum(
                "bd,bd->b", unit(np.asarray(encode_images(pictures), np.float32)), texts[numbers]
            )

        def shares(pictures: NDArray[np.uint8], numbers: NDArray[np.int64]) -> NDArray[Any]:
            return np.array(
                [
                    prompts_of_row[number].judge(picture)
                    for picture, number in zip(pictures, numbers, strict=True)
                ]
            )

        score = {"": None, "CLIP": cosines, "checker": shares}[by]
        pictures = draw(
            [one_prompt.prompt for one_prompt in prompts_of_row],
            members,
            seed,
            steps,
            score,
            config.keep if by else members,
            config.checks,
        )
        flat, prompt_rows = (
            pictures.reshape(-1, *pictures.shape[2:]),
            np.repeat(np.arange(len(prompts_of_row)), members),
        )
        by_prompt = (len(prompts_of_row), members)
        return Measured(
            pictures,
            shares(flat, prompt_rows).reshape(by_prompt),
            cosines(flat, prompt_rows).reshape(by_prompt),
        )

    plain = measured(prompts, config.samples, config.steps, "")
    rows_present = {one_prompt.row for one_prompt in prompts}
    rows = [
        row
        for row in (*scenes.ROWS, *sorted(rows_present - set(scenes.ROWS)))
        if row in rows_present
    ]
    searched = {
        row: _searched(config, prompts, plain, measured, row, resamples, seed)
        for row in rows
        if row in config.searched
    }
    tables = _tables_of_rows(prompts, plain, rows, resamples, seed)
    if searched:
        tables.append(_table_of_gains(config, searched))
    if (parts := _shares(prompts, plain, resamples, seed)) is not None:
        tables.append(parts)
    if (
        blind := _discrimination(
            prompts, encode_texts, encode_images, plain.pictures.shape[2], resamples, seed
        )
    ) is not None:
        tables.append(blind)
    text = _words(config, seed)
    untold = [
        f"{name} for {row}"
        for row, searched_row in searched.items()
        for name, gain in searched_row.gains.items()
        if _is_untold(gain)
    ]
    if untold:
        text.append(
            "Not told from plain sampling at equal calls, since the interval holds zero: "
            f"{', '.join(untold)}."
        )
    if read_text is None:
        text.append(
            "Writing is not measured: no reader of text is installed (evaluation-packages.txt "
            "names one)."
        )
    pictures = [_sample_sheet(prompts, plain, row, subject.out) for row in rows]
    return sections.section(
        TITLE, text, tables, pictures, [searched_row.chart for searched_row in searched.values()]
    )


def _words(config: RelationsConfig, seed: int) -> list[str]:
    """Return what the section says before its tables."""
    return [
        f"The prompts are scenes; each is drawn {config.samples} times in {config.steps} steps. A "
        "checker that sees pixels only says "
        "whether a picture shows exactly the things asked for, in number, colour and relation, "
        "and nothing else; the word of a sign is "
        "read by OCR. Trained scenes were seen as such in training; held-out ones only in their "
        "parts.",
        "A sample's share is a plain sample's chance. Best of n takes the sample that a judge "
        "likes best, exact over all subsets of the "
        "samples. A beam scores the pictures that half-denoised samples are heading for and "
        "copies the best. The checker as a judge is "
        "the test itself: it bounds what search can give; CLIP is what one has where there is no "
        "checker. The last column: of two "
        "samples of a prompt, one right and one wrong, how often CLIP scores the right one "
        "higher; 50 % is blind.",
        "Costs are calls of the decoder for one returned picture, a guided call counted once. "
        f"Seed {seed}, guidance the decoder's own.",
    ]


def _tables_of_rows(
    prompts: Sequence[Prompt], plain: Measured, rows: Sequence[str], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Return how often plain samples of each row are right, and the best of all: a table for
    trained scenes, one for held-out ones.
    """
    M = plain.share.shape[1]
    head = [
        "Row",
        "Prompts",
        "A sample",
        f"Best of {M} by CLIP",
        f"Best of {M} by the checker",
        "CLIP prefers the right one",
    ]
    tables = []
    for split_name in SPLIT_NAMES.values():
        cells: list[list[sections.Cell]] = [
            [row, int(chosen.sum()), *_row_figures(plain, chosen, M, resamples, seed)]
            for row in rows
            if (
                chosen := np.array(
                    [
                        one_prompt.row == row and one_prompt.split_name == split_name
                        for one_prompt in prompts
                    ]
                )
            ).any()
        ]
        if cells:
            tables.append(
                sections.table(
                    f"Pictures that show exactly what was asked for: scenes {split_name}",
                    head,
                    cells,
                )
            )
    return tables


def _table_of_gains(config: RelationsConfig, searched: Mapping[str, Searched]) -> dict[str, Any]:
    max_samples = budgets_of(config.samples)[-1]
    caption = (
        f"Search against plain sampling at equal calls, {max_samples} times {config.steps} = "
        f"{max_samples * config.steps} for a returned picture. "
        "Plain sampling has more steps or several samples, of which one is returned unjudged; "
        "what search adds to the better of "
        "these, in percentage points, is paired by prompt"
    )
    cells: list[list[sections.Cell]] = [
        [row, *searched_row.gains.values()] for row, searched_row in searched.items()
    ]
    return sections.table(caption, ["Row", *next(iter(searched.values())).gains], cells)


def _is_untold(gain: Figure) -> bool:
    """Whether a difference's interval holds zero."""
    return (
        gain.get("unit") == "points"
        and gain["low"] is not None
        and gain["low"] <= 0 <= gain["high"]
    )


def budgets_of(samples: int) -> list[int]:
    """Return how many samples searches are tried with: the powers of two up to those that are
    drawn.
    """
    return [2**power for power in range(samples.bit_length())]


def _row_figures(
    plain: Measured, chosen: NDArray[np.bool_], M: int, resamples: int, seed: int
) -> list[Figure]:
    right, cosine = plain.is_right[chosen], plain.cosine[chosen]
    groups = np.arange(len(right))
    row_gains = [
        mean_figure(right.ravel(), np.repeat(groups, M), resamples, seed),
        mean_figure(
            [best_of(c, r, M) for c, r in zip(cosine, right, strict=True)], groups, resamples, seed
        ),
        mean_figure(right.max(1), groups, resamples, seed),
    ]
    pairs = [
        (c[r == 1][:, None] > c[r == 0]).mean()
        for c, r in zip(cosine, right, strict=True)
        if 0 < r.mean() < 1
    ]
    return [*row_gains, mean_figure(pairs, np.arange(len(pairs)), resamples, seed, chance=0.5)]


def _searched(
    config: RelationsConfig,
    prompts: Sequence[Prompt],
    plain: Measured,
    measured: Callable[[Sequence[Prompt], int, int, str], Measured],
    row: str,
    resamples: int,
    seed: int,
) -> Searched:
    """Return success against calls for one row, and what search gains over plain sampling at the
    most calls.
    """
    row_prompts = [one_prompt for one_prompt in prompts if one_prompt.row == row]
    chosen = np.array([one_prompt.row == row for one_prompt in prompts])
    right, share, cosine = plain.is_right[chosen], plain.share[chosen], plain.cosine[chosen]
    groups, budgets = np.arange(len(row_prompts)), budgets_of(config.samples)
    max_samples = budgets[-1]

    def over_prompts(values: Sequence[float] | NDArray[Any]) -> Figure:
        return mean_figure(values, groups, resamples, seed)

    one = over_prompts(right.mean(1))
    longer = measured(row_prompts, 1, config.steps * max_samples, "").is_right[:, 0]
    plainly = {"more steps": longer, f"one of {max_samples}, unjudged": right.mean(1)}
    better = max(plainly.values(), key=lambda values: float(values.mean()))
    gains = {name: over_prompts(values) for name, values in plainly.items()}
    series: dict[str, list[tuple[float, Figure]]] = {
        "one sample, more steps": [
            (config.steps, one),
            (config.steps * max_samples, over_prompts(longer)),
        ],
    }
    for by, scores in (("CLIP", cosine), ("checker", share)):
        best = {n: [best_of(s, r, n) for s, r in zip(scores, right, strict=True)] for n in budgets}
        series[f"best of n by {by}"] = [(n * config.steps, over_prompts(best[n])) for n in budgets]
        gains[f"best of {max_samples} by {by}"] = _gain(best[max_samples], better, resamples, seed)
        points: list[tuple[float, Figure]] = [(config.steps, one)]
        for n in budgets:
            if n > config.keep and n % config.keep == 0:
                measured_now = measured(row_prompts, n, config.steps, by)
                judged = measured_now.cosine if by == "CLIP" else measured_now.share
                values = [
                    best_of(s, r, n) for s, r in zip(judged, measured_now.is_right, strict=True)
                ]
                points.append((n * config.steps, over_prompts(values)))
                if n == max_samples:
                    gains[f"beam of {max_samples} by {by}"] = _gain(values, better, resamples, seed)
        series[f"beam by {by}"] = points
    title = f"Success against compute: {row}"
    return Searched(
        sections.lines(
            title, "decoder calls for one returned picture", "right", series, is_log_x=True
        ),
        gains,
    )


def _gain(values: Sequence[float], plain: NDArray[np.float64], resamples: int, seed: int) -> Figure:
    """Return the mean difference in percentage points, prompts paired."""
    return mean_figure(
        100 * (np.asarray(values) - plain), np.arange(len(plain)), resamples, seed, unit="points"
    )


def _shares(
    prompts: Sequence[Prompt], plain: Measured, resamples: int, seed: int
) -> dict[str, Any] | None:
    """Return the table of how much of a sign or a puzzle is right, beside the same of those drawn
    for training; None without such rows.
    """
    M, side_px = plain.share.shape[1], plain.pictures.shape[2]
    cells: list[list[sections.Cell]] = []
    for row, split_name in (
        (row, split_name) for row in IN_PARTS for split_name in SPLIT_NAMES.values()
    ):
        numbers = [
            number
            for number, one_prompt in enumerate(prompts)
            if one_prompt.row == row and one_prompt.split_name == split_name
        ]
        if not numbers:
            continue
        share, cosine, groups = plain.share[numbers], plain.cosine[numbers], np.arange(len(numbers))
        taught = [
            prompts[number].judge(
                _drawn(prompts[number].prompt, side_px, np.random.default_rng([seed, number]))
            )
            for number in numbers
        ]
        figures = [
            mean_figure(share.ravel(), np.repeat(groups, M), resamples, seed),
            mean_figure(
                [best_of(c, s, M) for c, s in zip(cosine, share, strict=True)],
                groups,
                resamples,
                seed,
            ),
            mean_figure(share.max(1), groups, resamples, seed),
            mean_figure(taught, groups, resamples, seed),
        ]
        cells.append([f"{row}, {split_name}", len(numbers), *figures])
    if not cells:
        return None
    caption = (
        "How much of it is right: of a sign's word the characters that OCR reads (1 minus the "
        "edit distance over the length), of a grid "
        "the numbers that are there and the rows with even sums, of a cube the stickers"
    )
    head = [
        "Row",
        "Prompts",
        "A sample",
        f"Best of {M} by CLIP",
        f"Best of {M} by the checker",
        "As drawn for training",
    ]
    return sections.table(caption, head, cells)


def _drawn(prompt: str, side_px: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw what a prompt asks for, as it was drawn for training."""
    puzzle, scene = puzzles.parse(prompt), scenes.parse(prompt)
    if puzzle:
        return puzzles.draw(puzzle, side_px, rng)
    assert scene is not None, "every prompt is of a scene or of a puzzle"
    return scenes.draw(scene, side_px, rng)


def _sample_sheet(
    prompts: Sequence[Prompt], plain: Measured, row: str, out: Path
) -> dict[str, Any]:
    """Write the first prompts of a row with all their samples, right ones framed, and return the
    picture.
    """
    numbers = [number for number, one_prompt in enumerate(prompts) if one_prompt.row == row][
        :MAX_SHEET_ROWS
    ]
    framed = [
        [
            _framed(plain.pictures[p, m], bool(plain.is_right[p, m]))
            for m in range(plain.pictures.shape[1])
        ]
        for p in numbers
    ]
    titles = [
        f"{prompts[p].prompt} ({prompts[p].split_name}): {int(plain.is_right[p].sum())} of "
        f"{plain.pictures.shape[1]}"
        for p in numbers
    ]
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"relations-{row.replace(' ', '-')}.png"
    write_png(sheet(framed, titles), folder / name)
    return sections.picture(
        f"pictures/{name}",
        f"Samples for {row}: {'; '.join(titles)}",
        f"{row}: right ones are framed green",
        True,
    )


def _framed(picture: NDArray[np.uint8], is_right: bool) -> NDArray[np.uint8]:
    framed = np.pad(picture, ((1, 1), (1, 1), (0, 0)), constant_values=225)
    if is_right:
        framed[[0, -1]] = framed[:, [0, -1]] = (40, 160, 70)
    return framed


def _discrimination(
    prompts: Sequence[Prompt],
    encode_texts: EncodeTexts,
    encode_images: EncodeImages,
    side_px: int,
    resamples: int,
    seed: int,
) -> dict[str, Any] | None:
    """Return how often CLIP prefers a drawn scene's caption to the one with its two things, or
    their colours, exchanged.
    """
    cells: list[list[sections.Cell]] = []
    for row in ("position", "attribution"):
        pairs = [
            (scene, exchanged(scene))
            for one_prompt in prompts
            if one_prompt.row == row and (scene := scenes.parse(one_prompt.prompt))
        ]
        if not pairs:
            continue
        drawn = np.stack(
            [
                scenes.draw(scene, side_px, np.random.default_rng([seed, number]))
                for number, (scene, _) in enumerate(pairs)
            ]
        )
        images = unit(np.asarray(encode_images(drawn), np.float32))
        texts = [
            unit(np.asarray(encode_texts([pair[side].caption for pair in pairs]), np.float32))
            for side in (0, 1)
        ]
        true, false = (np.einsum("bd,bd->b", images, text) for text in texts)
        cells.append(
            [
                row,
                len(pairs),
                mean_figure(true > false, np.arange(len(pairs)), resamples, seed, chance=0.5),
            ]
        )
    if not cells:
        return None
    return sections.table(
        "Does CLIP see relations? A drawn scene's caption against the exchanged one",
        ["Row", "Scenes", "Own caption preferred"],
        cells,
    )


def exchanged(scene: Scene) -> Scene:
    """Return the scene with its two things exchanged in a relation, or with their colours exchanged
    side by side.
    """
    first, second = scene.things
    if scene.relation:
        return Scene((second, first), scene.relation)
    return Scene(
        (scenes.Thing(first.shape, second.colour), scenes.Thing(second.shape, first.colour))
    )
