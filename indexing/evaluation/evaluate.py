"""The evaluation of a run: zero-shot classification and retrieval on held-out pairs, generated
pictures, and the report of it all.

Knows the models only as callables and the run only as manifests, metrics, embeddings and shards.
Writes report.json (its schema is report.schema.json), report.html and pictures/*.png.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

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
from indexing.metrics.zero_shot import class_embeddings, member_scores, score
from indexing.report import page
from indexing.report.sections import MakeSection
from infra.schemas import SPLITS
from infra.settings import Section

HELD_OUT = tuple(split for split in SPLITS if split != "train")
EXAMPLES, EXAMPLE_RESULTS = 6, 5


class EvaluateConfig(Section):
    """[evaluate]: what is drawn, how classes are put into words, and how many pairs the figures
    rest on.
    """

    prompts: tuple[str, ...] = Field(
        default=(
            *(
                "a red heart",
                "a yellow smiling face",
                "the flag of Japan",
                "a green apple",
                "a cat face",
                "a blue car",
            ),
            *(
                "the moon",
                "a slice of pizza",
                "a dog face",
                "a house",
                "the sun",
                "a four leaf clover",
            ),
        ),
        min_length=1,
        max_length=256,
    )
    """What is drawn; the report says of each whether it stands among the training captions."""
    count: int = Field(default=6, ge=1, le=64)
    """Pictures of each prompt."""
    seed: int = Field(default=0, ge=0)
    """Seed of the drawn pictures, of what is sampled and of the bootstrap."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps of the decoder; by default the decoder's own."""
    guidance: float | None = Field(default=None, ge=0, le=50)
    """Strength of the decoder's guidance; by default the decoder's own."""
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
    """Prompts around a class name, averaged in embedding space (CLIP, section 3.1.4); {} stands for
    the name."""
    resamples: int = Field(default=2000, ge=100, le=100_000)
    """Bootstrap resamples behind each 95 % interval."""
    pairs_at_most: int = Field(default=10_000, ge=1)
    """Pairs of a held-out split that are judged, drawn by the seed when there are more."""
    pixel_pool: int = Field(default=20_000, ge=1)
    """Training pictures that samples are compared with pixel by pixel, drawn by the seed when there
    are more."""
    latent_prompts: int = Field(default=3, ge=1, le=64)
    """How many of the prompts are followed from noise to picture."""
    latent_pictures: int = Field(default=4, ge=0, le=64)
    """Held-out pictures whose x_t is drawn from again, and that are blended two by two in x_t
    space; 0 leaves both out."""
    latent_times: tuple[float, ...] = Field(default=(0.25, 0.5, 0.75), min_length=1, max_length=8)
    """The t of those, as shares of the decoder's T."""
    latent_steps: int = Field(default=32, ge=1, le=1000)
    """Sampler steps from T to 0 for these pictures; a start at t takes its share of them."""
    likelihood_pictures: int = Field(default=64, ge=0, le=100_000)
    """Held-out pictures behind the decoder's bits per dimension; 0 leaves it out."""
    likelihood_draws: int = Field(default=8, ge=1, le=1000)
    """Times t at which the bound's terms are drawn for each of them."""
    inversion_pictures: int = Field(default=4, ge=0, le=1000)
    """Held-out pictures that are carried to noise and back; 0 leaves it out."""
    inversion_steps: tuple[int, ...] = Field(default=(10, 25, 50), min_length=1, max_length=16)
    """DDIM steps of that way, one row of the report each; counts above the decoder's T are left
    out."""
    swiss_roll_steps: int = Field(default=3000, ge=0, le=1_000_000)
    """Training steps of the Swiss roll that shows the diffusion process itself, some seconds; 0
    leaves it out."""

    fidelity: FidelityConfig | None = FidelityConfig()
    """Distances between generated and real pictures, by guidance."""
    suite: SuiteConfig = SuiteConfig()
    """Labelled sets for zero-shot classification and probes."""
    typographic: TypographicConfig | None = TypographicConfig()
    """Words written on held-out pictures."""
    relations: RelationsConfig | None = None
    """Scenes to be drawn and judged, where the run has learned some; nothing by default."""

    promote_if: tuple[str, ...] = ()
    """Conditions on `report.json` under which a run becomes the current one, such as
    "generation.own_prompt_first >= current - 0.05"; none: there is no gate, and what follows runs
    takes the last one."""

    outside_key: ClassVar[frozenset[str]] = frozenset({"promote_if"})

    @field_validator("latent_times")
    @classmethod
    def _times_are_shares(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < time <= 1 for time in times):
            raise ValueError("a time is a share of T, above 0 and at most 1")
        return times

    @field_validator("inversion_steps")
    @classmethod
    def _steps_are_counts(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if not all(1 <= step_count <= 1000 for step_count in steps):
            raise ValueError("a step count lies in 1..1000")
        return steps

    @field_validator("prompts")
    @classmethod
    def _prompts_say_something(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("a prompt is empty")
        return prompts

    @field_validator("templates")
    @classmethod
    def _templates_have_a_slot(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"{template!r} must hold {{}} once, where the class name goes")
        return templates


def evaluate(
    config: EvaluateConfig,
    run_facts: Mapping[str, Any],
    stage_manifests: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    subject: Subject,
    generate: Generate,
    sections: Sequence[MakeSection] = (),
) -> dict[str, Any]:
    """Evaluate a run, write report.json, report.html and the pictures into the subject's folder,
    and return what report.json holds.

    `run_facts` holds the resolved `config` of the run and whatever else is to be told of it;
    `metrics` the rows of metrics.jsonl of each trained stage; `generate(prompts, count, seed) ->
    uint8 (P, count, H, W, 3)`. A split without pairs is no error: its figures say so. `sections`
    measure the rest of the report, in its order (indexing.report.sections).
    """
    embedded, out = subject.embedded, subject.out
    pairs = {
        split: read_pairs(embedded, split, config.pairs_at_most, subject.seed) for split in HELD_OUT
    }
    facts = {
        "run": page.run_facts(run_facts, stage_manifests)
        | {"data": seen_in_training(embedded, HELD_OUT), "licences": licences(embedded)},
        "stages": [
            page.stage_facts(manifest, metrics.get(manifest["stage"], ()))
            for manifest in stage_manifests
        ],
        "zero_shot": {
            split: zero_shot(config.templates, pairs[split], subject) for split in HELD_OUT
        },
        "retrieval": {split: retrieve(pairs[split], subject) for split in HELD_OUT},
        "generation": generation(
            subject,
            config.prompts,
            config.count,
            config.pixel_pool,
            pairs["held_out_concept"],
            generate,
        )
        | {"steps": config.steps, "guidance": config.guidance},
        "sections": [section for make in sections for section in _several(make())],
    }
    (out / "report.json").write_text(
        json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    (out / "report.html").write_text(page.render(facts, out))
    return facts


def _several(section_or_list: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return section_or_list if isinstance(section_or_list, list) else [section_or_list]


def zero_shot(templates: Sequence[str], pairs: Pairs, subject: Subject) -> dict[str, Any]:
    """Return the scores of a split's pictures by category and subcategory, each in its own words
    and by its members, and by name.

    The classes of the first two are all that occur in any split, their members the first captions
    of training pairs; the classes of the last are the split's own first captions.
    """
    embedded, encode_texts = subject.embedded, subject.encode_texts
    figures_of: dict[str, Any] = {}
    for label in ("category", "subcategory", "name"):
        phrases = [
            row["caption"] if label == "name" else class_phrase(row[label]) for row in pairs.rows
        ]
        every = (
            set(phrases)
            if label == "name"
            else {class_phrase(value) for value in embedded.table[label].unique().to_pylist()}
        )
        names = sorted(every - {""})
        labelled = [number for number, phrase in enumerate(phrases) if phrase]
        if not labelled or len(names) < 2:
            why = (
                "no pairs"
                if not pairs.rows
                else f"no pair has a {label}"
                if not labelled
                else f"one {label} only: nothing to tell apart"
            )
            figures_of[label] = {"n": len(labelled), "classes": len(names), "note": why}
            continue
        numbers = {name: number for number, name in enumerate(names)}
        labels = [numbers[phrases[number]] for number in labelled]
        groups = [pairs.groups[number] for number in labelled]
        images = pairs.images[labelled]
        by_words = images @ class_embeddings(encode_texts, names, templates).T
        figures_of[label] = score(by_words, labels, names, groups, subject.resamples, subject.seed)
        rows, classes = (
            class_members(embedded, label, numbers)
            if label != "name"
            else (np.zeros(0, np.int64),) * 2
        )
        if len(rows):
            by_members = member_scores(images, take(embedded.text_parts, rows), classes, len(names))
            figures_of[f"{label}_by_members"] = score(
                by_members, labels, names, groups, subject.resamples, subject.seed
            ) | {"members": len(rows)}
    return figures_of


def class_members(
    embedded: Embedded, label: str, numbers: Mapping[str, int]
) -> tuple[Rows, NDArray[np.int64]]:
    """Return the rows of the training pairs whose first captions speak for a class, each caption
    once in each class, and the classes.
    """
    rows = embedded.rows("train")
    train = embedded.table.take(rows)
    members: dict[tuple[int, str], int] = {}
    for row, name, caption in zip(
        rows.tolist(), train[label].to_pylist(), train["caption"].to_pylist(), strict=True
    ):
        if phrase := class_phrase(name):
            members.setdefault((numbers[phrase], caption), row)
    return np.array(list(members.values()), np.int64), np.array(
        [number for number, _ in members], np.int64
    )


def class_phrase(label: str) -> str:
    """Turn a class label into words: "Food & Drink" is asked for as "food and drink", "animal-bird"
    as "animal bird".
    """
    return " ".join(label.lower().replace("&", " and ").replace("-", " ").replace("_", " ").split())


def retrieve(pairs: Pairs, subject: Subject) -> dict[str, Any]:
    """Return a split's recall both ways by first captions and by all, and some captions, drawn by
    the seed, with what is found.
    """
    if not pairs.rows:
        return {"n": 0, "note": "no pairs"}
    pictures, captions = (
        [row["sha256"] for row in pairs.rows],
        [row["caption"] for row in pairs.rows],
    )
    measured_by = (pairs.groups, subject.resamples, subject.seed)
    figures_of_split = retrieval(pairs.images, pairs.texts, pictures, captions, *measured_by)
    every = [
        [caption for caption in row["captions"] if caption] or [row["caption"]]
        for row in pairs.rows
    ]
    figures_of_split["all_captions"] = retrieval_of_all(
        pairs.images, pictures, every, subject.encode_texts, *measured_by
    )
    _, first = np.unique(pictures, return_index=True)
    _, first_queries = np.unique(captions, return_index=True)
    folder = subject.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    figures_of_split["examples"] = []
    for query in np.random.default_rng(subject.seed).permutation(first_queries)[:EXAMPLES]:
        right = {
            picture
            for picture, caption in zip(pictures, captions, strict=True)
            if caption == captions[query]
        }
        best = first[
            np.argsort(-(pairs.images[first] @ pairs.texts[query]), kind="stable")[:EXAMPLE_RESULTS]
        ]
        results = [
            {
                "picture": write_training_picture(pairs.rows[number], subject.shards, folder),
                "caption": captions[number],
                "is_right": pictures[number] in right,
            }
            for number in best
        ]
        figures_of_split["examples"].append({"caption": captions[query], "results": results})
    return figures_of_split
