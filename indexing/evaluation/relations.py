"""Relations, counting and writing in generated pictures, and the gain of search at inference.

Follows unCLIP, fig. 14 to 16; the rows are GenEval's (Ghosh et al. 2023). Prompts are the run's
own scenes and puzzles, trained and held-out ones separately; judges are exact. The section shows
success against the number of decoder calls for a returned picture. Models are callables.
Legend: P prompts, M samples of each, D dimensions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, field_validator, model_validator

from indexing.data.contact_sheet import SHEET_SCALE, contact_sheet
from indexing.data.embedding_store import unit
from indexing.data.held_out import Embedded
from indexing.data.images import write_png
from indexing.evaluation.context import Subject
from indexing.metrics.bootstrap import Figure, mean_figure
from indexing.report import sections
from indexing.scenes import puzzles, scenes
from indexing.scenes.judges import Judge, ReadText, best_of, judge_of
from indexing.scenes.scenes import Scene
from infra.settings import Section

Score = Callable[[NDArray[np.uint8], NDArray[np.int64]], NDArray[Any]]
"""(pictures (B, S, S, 3), the number of the prompt of each (B,)) -> scores (B,)."""
Draw = Callable[[list[str], int, int, int, Score | None, int, tuple[float, ...]], NDArray[np.uint8]]
"""(prompts, M, seed, steps, score, keep, checks) -> uint8 (P, M, S, S, 3); without a score the
samples are independent."""

TITLE = "Relations, counts and writing, and what search adds"
SPLIT_NAMES = {"train": "trained", "held_out_concept": "held out"}
OPEN_SCENES = tuple(Scene((scenes.Thing(shape),)) for shape in scenes.SHAPES) + tuple(
    Scene((scenes.Thing(a), scenes.Thing(b)))
    for a, b in (("circle", "square"), ("circle", "triangle"), ("square", "triangle"))
)
"""Scenes without colours, for GenEval's rows "single object" and "two objects"."""
IN_PARTS = ("writing", "24-puzzle", "cube")
"""Rows that are rarely right as a whole, so the report also says how much of them is right."""
MAX_SHEET_ROWS = 8


class RelationsConfig(Section):
    """[evaluate.relations]: number of scenes, and limits of the search."""

    prompts_per_row: int = Field(default=8, ge=1, le=500)
    """Maximum number of trained scenes of each row, and of held-out ones."""
    samples: int = Field(default=8, ge=2, le=256)
    """Samples of each scene; also the largest n of best of n and of beams."""
    steps: int = Field(default=20, ge=2, le=1000)
    """Steps of a sample, by DDIM with eta = 1."""
    searched: tuple[str, ...] = ("position", "attribution", "counting", "24-puzzle", "cube")
    """Rows on which beams are tried."""
    keep: int = Field(default=2, ge=1, le=64)
    """Members of a beam that survive a check; must divide `samples`."""
    checks: tuple[float, ...] = (0.3, 0.45, 0.6, 0.75)
    """Times at which a beam is checked, as shares of the steps."""

    @field_validator("checks")
    @classmethod
    def _checks_are_shares(cls, checks: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < check < 1 for check in checks):
            raise ValueError(
                f"checks = {checks}: each must be a share of the steps, between 0 and 1"
            )
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
    """One prompt with its row, the name of its split (SPLIT_NAMES) and its judge."""

    prompt: str
    row: str
    split_name: str
    judge: Judge


@dataclass(frozen=True)
class Measured:
    """Judged samples (P, M): the share of the request that holds, and CLIP's cosine."""

    pictures: NDArray[np.uint8]
    share: NDArray[np.float64]
    cosine: NDArray[np.float64]

    @property
    def is_right(self) -> NDArray[np.float64]:
        """1 where a sample shows exactly what was asked for, else 0, (P, M)."""
        return (self.share >= 1).astype(np.float64)


@dataclass(frozen=True)
class Searched:
    """Search on one row.

    `chart` is success against decoder calls. `gains` are figures at the most calls, by name: the
    success of plain sampling, and what each search adds to it in percentage points.
    """

    chart: sections.Chart
    gains: dict[str, Figure]


@dataclass(frozen=True)
class _Harness:
    """Draws and judges samples of prompts."""

    config: RelationsConfig
    subject: Subject
    draw: Draw

    def measure(self, prompts: Sequence[Prompt], samples: int, steps: int, by: str) -> Measured:
        """Draw `samples` of each prompt and judge them.

        `by` is the judge that steers the beam: "CLIP", "checker", or "" for plain sampling.
        """
        texts = [prompt.prompt for prompt in prompts]
        vectors = unit(np.asarray(self.subject.encode_texts(texts), np.float32))  # (P, D)

        def cosines(pictures: NDArray[np.uint8], numbers: NDArray[np.int64]) -> NDArray[Any]:
            images = unit(np.asarray(self.subject.encode_images(pictures), np.float32))
            return np.einsum("bd,bd->b", images, vectors[numbers])

        def shares(pictures: NDArray[np.uint8], numbers: NDArray[np.int64]) -> NDArray[Any]:
            return np.array(
                [
                    prompts[number].judge(picture)
                    for picture, number in zip(pictures, numbers, strict=True)
                ]
            )

        score = {"": None, "CLIP": cosines, "checker": shares}[by]
        keep = self.config.keep if by else samples
        pictures = self.draw(
            texts, samples, self.subject.seed, steps, score, keep, self.config.checks
        )
        flat = pictures.reshape(-1, *pictures.shape[2:])
        numbers = np.repeat(np.arange(len(prompts)), samples)
        by_prompt = (len(prompts), samples)
        return Measured(
            pictures,
            shares(flat, numbers).reshape(by_prompt),
            cosines(flat, numbers).reshape(by_prompt),
        )

    def figure(self, values: ArrayLike) -> Figure:
        """Return the mean over prompts (P,) with its interval."""
        values = np.asarray(values)
        groups = np.arange(len(values))
        return mean_figure(values, groups, self.subject.resamples, self.subject.seed)

    def gain(self, values: ArrayLike, plain: NDArray[np.float64]) -> Figure:
        """Return the mean difference (P,) in percentage points, paired by prompt."""
        points = 100 * (np.asarray(values) - plain)
        groups = np.arange(len(plain))
        return mean_figure(points, groups, self.subject.resamples, self.subject.seed, unit="points")


def build_prompts(
    config: RelationsConfig, embedded: Embedded, read_text: ReadText | None, seed: int
) -> list[Prompt]:
    """Draw prompts of each row from the trained and the held-out concepts of the run.

    Prompts that no judge can judge are left out, such as signs without a reader of text.
    """
    prompts: list[Prompt] = []
    rng = np.random.default_rng(seed)
    for split, split_name in SPLIT_NAMES.items():
        for row, concepts in sorted(_concepts_by_row(embedded, split).items()):
            for concept in rng.permutation(sorted(concepts))[: config.prompts_per_row].tolist():
                judge = judge_of(concept, read_text)
                if judge:
                    prompts.append(Prompt(concept, row, split_name, judge))
    return prompts


def _concepts_by_row(embedded: Embedded, split: str) -> dict[str, set[str]]:
    """Return the concepts of a split by row; OPEN_SCENES join trained scenes."""
    pairs = embedded.table.take(embedded.rows(split)).select(["concept", "category"]).to_pylist()
    by_row: dict[str, set[str]] = {}
    for pair in pairs:
        by_row.setdefault(pair["category"], set()).add(pair["concept"])
    if split == "train" and any(scenes.parse(pair["concept"]) for pair in pairs):
        for scene in OPEN_SCENES:
            by_row.setdefault(scene.row, set()).add(scene.caption)
    return by_row


def relations(
    config: RelationsConfig, subject: Subject, draw: Draw, read_text: ReadText | None
) -> sections.ReportSection:
    """Measure plain sampling, best of n and beams; return the section, write its pictures."""
    resamples, seed = subject.resamples, subject.seed
    prompts = build_prompts(config, subject.embedded, read_text, seed)
    if not prompts:
        return sections.section(
            TITLE, ["Not measured: the run has no scenes that a judge here can judge."]
        )
    harness = _Harness(config, subject, draw)
    plain = harness.measure(prompts, config.samples, config.steps, "")
    rows_present = {prompt.row for prompt in prompts}
    other_rows = sorted(rows_present - set(scenes.ROWS))
    rows = [row for row in (*scenes.ROWS, *other_rows) if row in rows_present]
    searched = {
        row: _search_row(harness, prompts, plain, row) for row in rows if row in config.searched
    }
    tables = _tables_of_rows(prompts, plain, rows, resamples, seed)
    if searched:
        tables.append(_table_of_gains(config, searched))
    if (partial := _table_of_parts(prompts, plain, resamples, seed)) is not None:
        tables.append(partial)
    side_px = plain.pictures.shape[2]
    if (discrimination := _discrimination(prompts, subject, side_px)) is not None:
        tables.append(discrimination)
    text = _introduction(config, seed) + _remarks(searched, read_text)
    pictures = [_sample_sheet(prompts, plain, row, subject.out) for row in rows]
    charts = [searched_row.chart for searched_row in searched.values()]
    return sections.section(TITLE, text, tables, pictures, charts)


def _introduction(config: RelationsConfig, seed: int) -> list[str]:
    """Return the paragraphs before the tables."""
    return [
        f"The prompts are scenes. Each is drawn {config.samples} times in {config.steps} steps. A "
        "checker that sees only pixels says whether a picture shows exactly the requested things, "
        "in number, colour and relation, and nothing else; OCR reads the word of a sign. Training "
        "saw the trained scenes as a whole, but of the held-out scenes only the parts.",
        "“A sample” is the chance that a plain sample is right. Best of n takes the sample with "
        "the best score of a judge; it is exact over all subsets of the samples. A beam scores "
        "the predicted final pictures of half-denoised samples and copies the best. The checker "
        "as a judge is the test itself, so it is an upper bound of what search can reach; CLIP is "
        "the judge where there is no checker. The last column: of two samples of a prompt, one "
        "right and one wrong, how often CLIP scores the right one higher; 50 % is chance.",
        "The cost is the number of decoder calls for one returned picture; a guided call counts "
        f"once. Seed {seed}; guidance is the decoder's default.",
    ]


def _remarks(searched: Mapping[str, Searched], read_text: ReadText | None) -> list[str]:
    """Return what the section adds: searches without a significant gain, writing not measured."""
    remarks = []
    not_significant = [
        f"{name} for {row}"
        for row, searched_row in searched.items()
        for name, gain in searched_row.gains.items()
        if _holds_zero(gain)
    ]
    if not_significant:
        remarks.append(
            "Not significantly different from plain sampling at equal calls (the interval holds "
            f"zero): {', '.join(not_significant)}."
        )
    if read_text is None:
        remarks.append(
            "Writing is not measured: no reader of text is installed (evaluation-packages.txt "
            "names one)."
        )
    return remarks


def _tables_of_rows(
    prompts: Sequence[Prompt], plain: Measured, rows: Sequence[str], resamples: int, seed: int
) -> list[sections.Table]:
    """Return how often plain samples and the best of all are right: trained and held-out scenes."""
    M = plain.share.shape[1]
    head = ["Row", "Prompts", *_sampling_head(M), "CLIP prefers the right one"]
    tables = []
    for split_name in SPLIT_NAMES.values():
        cells: list[list[sections.Cell]] = []
        for row in rows:
            numbers = _numbers_of(prompts, row, split_name)
            if numbers:
                figures = _row_figures(plain, numbers, resamples, seed)
                cells.append([row, len(numbers), *figures])
        if cells:
            caption = f"Pictures that show exactly what was asked for: scenes {split_name}"
            tables.append(sections.table(caption, head, cells))
    return tables


def _sampling_head(M: int) -> list[str]:
    return ["A sample", f"Best of {M} by CLIP", f"Best of {M} by the checker"]


def _numbers_of(prompts: Sequence[Prompt], row: str, split_name: str) -> list[int]:
    """Return the positions of the prompts of a row and split."""
    return [
        number
        for number, prompt in enumerate(prompts)
        if prompt.row == row and prompt.split_name == split_name
    ]


def _sampling_figures(
    values: NDArray[np.float64], cosine: NDArray[np.float64], resamples: int, seed: int
) -> list[Figure]:
    """Return the mean of values (P, M), and of the best of M by cosine and by value."""
    M, groups = values.shape[1], np.arange(len(values))
    best_by_clip = [best_of(c, v, M) for c, v in zip(cosine, values, strict=True)]
    return [
        mean_figure(values.ravel(), np.repeat(groups, M), resamples, seed),
        mean_figure(best_by_clip, groups, resamples, seed),
        mean_figure(values.max(1), groups, resamples, seed),
    ]


def _row_figures(plain: Measured, numbers: list[int], resamples: int, seed: int) -> list[Figure]:
    """Return the sampling figures of prompts, and how often CLIP prefers a right sample."""
    right, cosine = plain.is_right[numbers], plain.cosine[numbers]
    preferred = [
        (c[r == 1][:, None] > c[r == 0]).mean()
        for c, r in zip(cosine, right, strict=True)
        if 0 < r.mean() < 1
    ]
    preference = mean_figure(preferred, np.arange(len(preferred)), resamples, seed, chance=0.5)
    return [*_sampling_figures(right, cosine, resamples, seed), preference]


def _table_of_gains(config: RelationsConfig, searched: Mapping[str, Searched]) -> sections.Table:
    max_samples = budgets_of(config.samples)[-1]
    caption = (
        f"Search against plain sampling at equal calls, {max_samples} times {config.steps} = "
        f"{max_samples * config.steps} for a returned picture. Plain sampling uses more steps, or "
        "draws several samples and returns one of them unjudged. The gain of a search over the "
        "better of these two is in percentage points, paired by prompt"
    )
    cells: list[list[sections.Cell]] = [
        [row, *searched_row.gains.values()] for row, searched_row in searched.items()
    ]
    return sections.table(caption, ["Row", *next(iter(searched.values())).gains], cells)


def _holds_zero(gain: Figure) -> bool:
    """Return whether a gain in points has an interval that holds zero."""
    low, high = gain["low"], gain["high"]
    return (
        gain.get("unit") == "points" and low is not None and high is not None and low <= 0 <= high
    )


def budgets_of(samples: int) -> list[int]:
    """Return the numbers of samples to search with: the powers of two up to `samples`."""
    return [2**power for power in range(samples.bit_length())]


def _search_row(
    harness: _Harness, prompts: Sequence[Prompt], plain: Measured, row: str
) -> Searched:
    """Return success against calls for one row, and the gains over plain sampling at most calls."""
    config = harness.config
    numbers = [number for number, prompt in enumerate(prompts) if prompt.row == row]
    row_prompts = [prompts[number] for number in numbers]
    right = plain.is_right[numbers]
    budgets = budgets_of(config.samples)
    max_samples = budgets[-1]
    one_sample = (config.steps, harness.figure(right.mean(1)))
    longer = harness.measure(row_prompts, 1, config.steps * max_samples, "").is_right[:, 0]
    plain_values = {"more steps": longer, f"one of {max_samples}, unjudged": right.mean(1)}
    better = max(plain_values.values(), key=lambda values: float(values.mean()))
    gains = {name: harness.figure(values) for name, values in plain_values.items()}
    series: dict[str, list[tuple[float, Figure]]] = {
        "one sample, more steps": [
            one_sample,
            (config.steps * max_samples, harness.figure(longer)),
        ],
    }
    for by, scores in (("CLIP", plain.cosine[numbers]), ("checker", plain.share[numbers])):
        best = {n: [best_of(s, r, n) for s, r in zip(scores, right, strict=True)] for n in budgets}
        series[f"best of n by {by}"] = [
            (n * config.steps, harness.figure(best[n])) for n in budgets
        ]
        gains[f"best of {max_samples} by {by}"] = harness.gain(best[max_samples], better)
        beams = {
            n: _beam_values(harness, row_prompts, n, by)
            for n in budgets
            if n > config.keep and n % config.keep == 0
        }
        series[f"beam by {by}"] = [
            one_sample,
            *((n * config.steps, harness.figure(values)) for n, values in beams.items()),
        ]
        if max_samples in beams:
            gains[f"beam of {max_samples} by {by}"] = harness.gain(beams[max_samples], better)
    title = f"Success against compute: {row}"
    chart = sections.lines(
        title, "decoder calls for one returned picture", "right", series, is_log_x=True
    )
    return Searched(chart, gains)


def _beam_values(harness: _Harness, prompts: Sequence[Prompt], n: int, by: str) -> list[float]:
    """Return for each prompt whether the best-scored member of a beam of n is right."""
    beam = harness.measure(prompts, n, harness.config.steps, by)
    scores = beam.cosine if by == "CLIP" else beam.share
    return [best_of(s, r, n) for s, r in zip(scores, beam.is_right, strict=True)]


def _table_of_parts(
    prompts: Sequence[Prompt], plain: Measured, resamples: int, seed: int
) -> sections.Table | None:
    """Return how much of signs and puzzles is right, also of ones drawn as for training.

    Return None where no prompt is of IN_PARTS.
    """
    M, side_px = plain.share.shape[1], plain.pictures.shape[2]
    cells: list[list[sections.Cell]] = []
    for row in IN_PARTS:
        for split_name in SPLIT_NAMES.values():
            numbers = _numbers_of(prompts, row, split_name)
            if not numbers:
                continue
            figures = _sampling_figures(
                plain.share[numbers], plain.cosine[numbers], resamples, seed
            )
            trained = [_training_share(prompts, number, side_px, seed) for number in numbers]
            figures.append(mean_figure(trained, np.arange(len(numbers)), resamples, seed))
            cells.append([f"{row}, {split_name}", len(numbers), *figures])
    if not cells:
        return None
    caption = (
        "How much of it is right: of a sign's word, the characters that OCR reads (1 minus the "
        "edit distance over the length); of a grid, the numbers that are present and the rows "
        "with even sums; of a cube, the stickers"
    )
    head = ["Row", "Prompts", *_sampling_head(M), "As drawn for training"]
    return sections.table(caption, head, cells)


def _training_share(prompts: Sequence[Prompt], number: int, side_px: int, seed: int) -> float:
    """Return the judge's share for a prompt's picture drawn as for training."""
    prompt = prompts[number]
    rng = np.random.default_rng([seed, number])
    return prompt.judge(_draw_for_training(prompt.prompt, side_px, rng))


def _draw_for_training(prompt: str, side_px: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw the picture of a prompt in the way in which training pictures are drawn."""
    if puzzle := puzzles.parse(prompt):
        return puzzles.draw(puzzle, side_px, rng)
    scene = scenes.parse(prompt)
    assert scene is not None, "every prompt is a scene or a puzzle"
    return scenes.draw(scene, side_px, rng)


def _sample_sheet(
    prompts: Sequence[Prompt], plain: Measured, row: str, out: Path
) -> sections.Picture:
    """Write all samples of a row's first prompts, right ones in a green frame."""
    numbers = [number for number, prompt in enumerate(prompts) if prompt.row == row]
    numbers = numbers[:MAX_SHEET_ROWS]
    framed = [
        [
            _framed(picture, bool(is_right))
            for picture, is_right in zip(plain.pictures[p], plain.is_right[p], strict=True)
        ]
        for p in numbers
    ]
    samples = plain.pictures.shape[1]
    titles = [
        f"{prompts[p].prompt} ({prompts[p].split_name}): {int(plain.is_right[p].sum())} of "
        f"{samples}"
        for p in numbers
    ]
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"relations-{row.replace(' ', '-')}.png"
    write_png(contact_sheet(framed, titles, scale=SHEET_SCALE), folder / name)
    return sections.picture(
        f"pictures/{name}",
        f"Samples for {row}: {'; '.join(titles)}",
        f"{row}: right samples have a green frame",
        is_pixelated=True,
    )


def _framed(picture: NDArray[np.uint8], is_right: bool) -> NDArray[np.uint8]:
    framed = np.pad(picture, ((1, 1), (1, 1), (0, 0)), constant_values=225)
    if is_right:
        framed[[0, -1]] = framed[:, [0, -1]] = (40, 160, 70)
    return framed


def _discrimination(
    prompts: Sequence[Prompt], subject: Subject, side_px: int
) -> sections.Table | None:
    """Return how often CLIP prefers a scene's own caption to the exchanged one (see `exchanged`).

    Return None without prompts of two things.
    """
    cells: list[list[sections.Cell]] = []
    for row in ("position", "attribution"):
        pairs = [
            (scene, exchanged(scene))
            for prompt in prompts
            if prompt.row == row and (scene := scenes.parse(prompt.prompt))
        ]
        if not pairs:
            continue
        drawn = np.stack(
            [
                scenes.draw(scene, side_px, np.random.default_rng([subject.seed, number]))
                for number, (scene, _) in enumerate(pairs)
            ]
        )
        images = unit(np.asarray(subject.encode_images(drawn), np.float32))
        captions = ([pair[side].caption for pair in pairs] for side in (0, 1))
        texts = (unit(np.asarray(subject.encode_texts(c), np.float32)) for c in captions)
        true, false = (np.einsum("bd,bd->b", images, text) for text in texts)
        groups = np.arange(len(pairs))
        preferred = mean_figure(true > false, groups, subject.resamples, subject.seed, chance=0.5)
        cells.append([row, len(pairs), preferred])
    if not cells:
        return None
    caption = "Does CLIP see relations? A drawn scene's caption against the exchanged one"
    return sections.table(caption, ["Row", "Scenes", "Own caption preferred"], cells)


def exchanged(scene: Scene) -> Scene:
    """Return the scene with its two things exchanged, or only their colours without a relation."""
    first, second = scene.things
    if scene.relation:
        return Scene((second, first), scene.relation)
    return Scene(
        (scenes.Thing(first.shape, second.colour), scenes.Thing(second.shape, first.colour))
    )
