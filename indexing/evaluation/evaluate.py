"""The evaluation of a run: zero-shot classification, retrieval, generated pictures, the report.

Models are callables. Reads manifests, metrics, embeddings and shards of the run. Writes report.json
(schema: indexing/report/report.schema.json), report.html and pictures/*.png.
"""

import json
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from indexing.data.embedding_store import Rows, take
from indexing.data.held_out import Embedded, Pairs, licences, read_pairs, seen_in_training
from indexing.evaluation.context import Subject
from indexing.evaluation.fidelity import FidelityConfig
from indexing.evaluation.relations import RelationsConfig
from indexing.evaluation.samples import generation, write_training_picture
from indexing.evaluation.typographic_attack import TypographicConfig
from indexing.evaluation.zero_shot_suite import SuiteConfig
from indexing.metrics.clip_score import Generate
from indexing.metrics.retrieval import retrieval, retrieval_of_all
from indexing.metrics.zero_shot import Classification, class_embeddings, member_scores, score
from indexing.report import page
from indexing.report.report_types import (
    Example,
    ExampleResult,
    Generation,
    MetricsRow,
    Report,
    Retrieval,
    RunDescription,
    Unmeasured,
)
from indexing.report.sections import MakeSection, ReportSection
from infra.schemas import SPLITS
from infra.settings import Section
from infra.storage.manifest_schema import Manifest

HELD_OUT = tuple(split for split in SPLITS if split != "train")
EXAMPLES, EXAMPLE_RESULTS = 6, 5


class EvaluateConfig(Section):
    """[evaluate]: prompts, templates of class names, and sample sizes of the figures."""

    prompts: tuple[str, ...] = Field(
        default=(
            "a red heart",
            "a yellow smiling face",
            "the flag of Japan",
            "a green apple",
            "a cat face",
            "a blue car",
            "the moon",
            "a slice of pizza",
            "a dog face",
            "a house",
            "the sun",
            "a four leaf clover",
        ),
        min_length=1,
        max_length=256,
    )
    """Prompts to draw; the report marks those that are training captions."""
    count: int = Field(default=6, ge=1, le=64)
    """Number of pictures of each prompt."""
    seed: int = Field(default=0, ge=0)
    """Seed of drawing, of sampling pairs and of the bootstrap."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps of the decoder; default: the decoder's own number."""
    guidance: float | None = Field(default=None, ge=0, le=50)
    """Strength of the decoder's guidance; default: the decoder's own."""
    templates: tuple[str, ...] = Field(
        default=(
            "{}",
            "a {}",
            "a picture of a {}",
            "an icon of a {}",
            "a drawing of a {}",
            "a {} emoji",
        ),
        min_length=1,
    )
    """Prompts around a class name, which replaces {}; averaged in embedding space (CLIP, section
    3.1.4)."""
    resamples: int = Field(default=2000, ge=100, le=100_000)
    """Number of bootstrap resamples for a 95 % interval."""
    pairs_at_most: int = Field(default=10_000, ge=1)
    """Maximum number of judged pairs of a held-out split; more are sampled by the seed."""
    pixel_pool: int = Field(default=20_000, ge=1)
    """Maximum number of training pictures that samples are compared with pixel by pixel; more are
    sampled by the seed."""
    latent_prompts: int = Field(default=3, ge=1, le=64)
    """Number of prompts whose sampling is shown from noise to picture."""
    latent_pictures: int = Field(default=4, ge=0, le=64)
    """Number of held-out pictures from whose x_t new pictures are drawn, and that are blended in
    pairs in x_t space; 0 turns both off."""
    latent_times: tuple[float, ...] = Field(default=(0.25, 0.5, 0.75), min_length=1, max_length=8)
    """The t of these x_t, as shares of the decoder's T."""
    latent_steps: int = Field(default=32, ge=1, le=1000)
    """Sampler steps from T to 0 for these pictures; a start at t takes the same share of them."""
    likelihood_pictures: int = Field(default=64, ge=0, le=100_000)
    """Number of held-out pictures for the decoder's bits per dimension; 0 turns it off."""
    likelihood_draws: int = Field(default=8, ge=1, le=1000)
    """Number of times t at which the terms of the bound are drawn for each picture."""
    inversion_pictures: int = Field(default=4, ge=0, le=1000)
    """Number of held-out pictures for DDIM inversion, to noise and back; 0 turns it off."""
    inversion_steps: tuple[int, ...] = Field(default=(10, 25, 50), min_length=1, max_length=16)
    """DDIM steps of the inversion, one row of the report each; numbers above the decoder's T are
    skipped."""
    swiss_roll_steps: int = Field(default=3000, ge=0, le=1_000_000)
    """Training steps of the Swiss roll, which shows the diffusion process itself and takes some
    seconds; 0 turns it off."""

    fidelity: FidelityConfig | None = FidelityConfig()
    """Distances between generated and real pictures by guidance."""
    suite: SuiteConfig = SuiteConfig()
    """Labelled sets for zero-shot classification and probes."""
    typographic: TypographicConfig | None = TypographicConfig()
    """Typographic attacks: words written on held-out pictures."""
    relations: RelationsConfig | None = None
    """Scenes to draw and judge, for runs that train on scenes; off by default."""

    promote_if: tuple[str, ...] = ()
    """Conditions on `report.json` for a run to become the current one, such as
    "generation.own_prompt_first >= current - 0.05". Without conditions there is no gate: the latest
    run is the current one."""

    outside_key: ClassVar[frozenset[str]] = frozenset({"promote_if"})

    @field_validator("latent_times")
    @classmethod
    def _times_are_shares(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < time <= 1 for time in times):
            raise ValueError(f"latent_times = {times}: each must be above 0 and at most 1")
        return times

    @field_validator("inversion_steps")
    @classmethod
    def _steps_are_counts(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if not all(1 <= step_count <= 1000 for step_count in steps):
            raise ValueError(f"inversion_steps = {steps}: each must be from 1 to 1000")
        return steps

    @field_validator("prompts")
    @classmethod
    def _prompts_are_not_empty(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("prompts: one of them is empty: remove it or give it words")
        return prompts

    @field_validator("templates")
    @classmethod
    def _templates_have_a_slot(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"templates: {template!r} must hold {{}} exactly once")
        return templates


def evaluate(
    config: EvaluateConfig,
    description: RunDescription,
    stage_manifests: Sequence[Manifest],
    metrics: Mapping[str, Sequence[MetricsRow]],
    subject: Subject,
    generate: Generate,
    sections: Sequence[MakeSection] = (),
) -> Report:
    """Evaluate a run, write the report into the subject's folder, return report.json's content.

    `metrics` are the rows of metrics.jsonl by trained stage; `generate(prompts, count, seed)`
    returns uint8 (P, count, H, W, 3). A split without pairs is no error: its figures carry a note.
    `sections` return further sections, in the order of the page (indexing.report.sections).
    """
    embedded, out = subject.embedded, subject.out
    pairs = {
        split: read_pairs(embedded, split, config.pairs_at_most, subject.seed) for split in HELD_OUT
    }
    facts: Report = {
        "run": {
            **page.run_facts(description, stage_manifests),
            "data": seen_in_training(embedded, HELD_OUT),
            "licences": licences(embedded),
        },
        "stages": [
            page.stage_facts(manifest, metrics.get(manifest["stage"], ()))
            for manifest in stage_manifests
        ],
        "zero_shot": {
            split: zero_shot(config.templates, pairs[split], subject) for split in HELD_OUT
        },
        "retrieval": {split: retrieve(pairs[split], subject) for split in HELD_OUT},
        "generation": _generation(config, pairs["held_out_concept"], subject, generate),
        "sections": [section for measure in sections for section in _as_list(measure())],
    }
    (out / "report.json").write_text(
        json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    (out / "report.html").write_text(page.render(facts, out))
    return facts


def _generation(
    config: EvaluateConfig, unseen: Pairs, subject: Subject, generate: Generate
) -> Generation:
    pictures = generation(
        subject, config.prompts, config.count, config.pixel_pool, unseen, generate
    )
    return {**pictures, "steps": config.steps, "guidance": config.guidance}


def _as_list(result: ReportSection | list[ReportSection]) -> list[ReportSection]:
    return result if isinstance(result, list) else [result]


def zero_shot(
    templates: Sequence[str], pairs: Pairs, subject: Subject
) -> dict[str, Classification | Unmeasured]:
    """Return the scores of a split's pictures, by kind of class.

    Kinds are category and subcategory, both by their own words and by their members, and name. The
    classes of the first two are those of any split; their members are first captions of training
    pairs. The classes of a name are the split's own first captions.
    """
    scores: dict[str, Classification | Unmeasured] = {}
    for kind in ("category", "subcategory", "name"):
        phrases, classes = _classes(kind, pairs, subject.embedded)
        labelled = [number for number, phrase in enumerate(phrases) if phrase]
        if not labelled or len(classes) < 2:
            if not pairs.rows:
                note = "no pairs"
            elif not labelled:
                note = f"no pair has a {kind}"
            else:
                note = f"one {kind} only: nothing to tell apart"
            scores[kind] = {"n": len(labelled), "classes": len(classes), "note": note}
            continue
        numbers = {name: number for number, name in enumerate(classes)}
        labels = [numbers[phrases[number]] for number in labelled]
        groups = [pairs.groups[number] for number in labelled]
        images = pairs.images[labelled]
        judged_by = (labels, classes, groups, subject.resamples, subject.seed)
        by_words = images @ class_embeddings(subject.encode_texts, classes, templates).T
        scores[kind] = score(by_words, *judged_by)
        if kind == "name":
            continue
        rows, class_of = class_members(subject.embedded, kind, numbers)
        if len(rows):
            members = take(subject.embedded.text_parts, rows)
            by_members = member_scores(images, members, class_of, len(classes))
            scores[f"{kind}_by_members"] = {**score(by_members, *judged_by), "members": len(rows)}
    return scores


def _classes(kind: str, pairs: Pairs, embedded: Embedded) -> tuple[list[str], list[str]]:
    """Return each pair's class in words, "" where it has none, and all classes, sorted."""
    if kind == "name":
        phrases = [row["caption"] for row in pairs.rows]
        classes = set(phrases)
    else:
        phrases = [class_phrase(row[kind]) for row in pairs.rows]
        classes = {class_phrase(value) for value in embedded.table[kind].unique().to_pylist()}
    return phrases, sorted(classes - {""})


def class_members(
    embedded: Embedded, label: str, numbers: Mapping[str, int]
) -> tuple[Rows, NDArray[np.int64]]:
    """Return the rows of training pairs whose captions are members of classes, and the classes.

    Both have shape (M,). First captions count, each once in a class. `numbers` maps the name of a
    class to its number.
    """
    rows = embedded.rows("train")
    train = embedded.table.take(rows)
    members: dict[tuple[int, str], int] = {}
    for row, name, caption in zip(
        rows.tolist(), train[label].to_pylist(), train["caption"].to_pylist(), strict=True
    ):
        if phrase := class_phrase(name):
            members.setdefault((numbers[phrase], caption), row)
    classes = [number for number, _ in members]
    return np.array(list(members.values()), np.int64), np.array(classes, np.int64)


def class_phrase(label: str) -> str:
    """Return a class label as words: "Food & Drink" as "food and drink", "animal-bird" likewise."""
    return " ".join(label.lower().replace("&", " and ").replace("-", " ").replace("_", " ").split())


def retrieve(pairs: Pairs, subject: Subject) -> Retrieval | Unmeasured:
    """Return a split's recall both ways, by first captions and by all captions, and examples."""
    if not pairs.rows:
        return {"n": 0, "note": "no pairs"}
    pictures = [row["sha256"] for row in pairs.rows]
    captions = [row["caption"] for row in pairs.rows]
    measured_by = (pairs.groups, subject.resamples, subject.seed)
    all_captions = [
        [caption for caption in row["captions"] if caption] or [row["caption"]]
        for row in pairs.rows
    ]
    return {
        **retrieval(pairs.images, pairs.texts, pictures, captions, *measured_by),
        "all_captions": retrieval_of_all(
            pairs.images, pictures, all_captions, subject.encode_texts, *measured_by
        ),
        "examples": _examples(pairs, pictures, captions, subject),
    }


def _examples(
    pairs: Pairs, pictures: Sequence[str], captions: Sequence[str], subject: Subject
) -> list[Example]:
    """Return the nearest pictures of some captions, drawn by the seed; write their thumbnails.

    `pictures` are the SHA-256 of each pair's picture; equal ones are listed once.
    """
    _, first = np.unique(pictures, return_index=True)
    _, first_queries = np.unique(captions, return_index=True)
    folder = subject.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    examples: list[Example] = []
    for query in np.random.default_rng(subject.seed).permutation(first_queries)[:EXAMPLES]:
        right = {
            picture
            for picture, caption in zip(pictures, captions, strict=True)
            if caption == captions[query]
        }
        cosines = pairs.images[first] @ pairs.texts[query]
        best = first[np.argsort(-cosines, kind="stable")[:EXAMPLE_RESULTS]]
        results: list[ExampleResult] = [
            {
                "picture": write_training_picture(pairs.rows[number], subject.shards, folder),
                "caption": captions[number],
                "is_right": pictures[number] in right,
            }
            for number in best
        ]
        examples.append({"caption": captions[query], "results": results})
    return examples
