"""The stage evaluate: gives `indexing.evaluation` the trained models and the data of a run.

`indexing.evaluation.evaluate` computes all figures; it gets the models as plain callables, because
indexing does not import training. Reads the folders of the input stages; writes the report.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flows.runs.stage import StageJob
from infra.console.progress import Progress
from infra.storage.manifest_schema import StageCounts
from infra.storage.shard_reader import ShardReader

if TYPE_CHECKING:
    import numpy as np

    from indexing.evaluation.context import Subject
    from indexing.metrics.zero_shot import Classification
    from indexing.report.report_types import MetricsRow, Unmeasured
    from indexing.report.sections import MakeSection
    from training.generation.unclip import Unclip

TRAINED = ("clip", "prior", "decoder")


class EvaluateCounts(StageCounts):
    """The counts of the stage's manifest."""

    figures: "dict[str, dict[str, Classification | Unmeasured]]"
    """The report's `zero_shot`."""


def run(job: StageJob) -> EvaluateCounts:
    """Evaluate the models on held-out pairs; write `report.html`, `report.json` and pictures."""
    from indexing.data.held_out import open_embedded
    from indexing.evaluation.context import Subject
    from indexing.evaluation.evaluate import evaluate
    from training.generation.unclip import Unclip

    folders = {
        name: job.local_copy(committed)
        for name, committed in job.inputs.items()
        if name != "ingest"
    }
    shards = ShardReader(job.inputs["ingest"].files)
    model = Unclip.load(folders["clip"], folders["prior"], folders["decoder"])
    config = job.config.evaluate
    metrics = {name: read_metrics(folders[name] / "metrics.jsonl") for name in TRAINED}
    clip = (model.encode_texts, model.encode_images)
    embedded = open_embedded(folders["embed"])
    subject = Subject(embedded, shards, *clip, config.resamples, config.seed, job.out)
    stages = [committed.manifest for committed in job.inputs.values()]
    with Progress("evaluate", None, "pictures drawn") as progress:
        drawn = 0

        def generate(prompts: list[str], count: int, seed: int) -> "np.ndarray":
            nonlocal drawn
            pictures = model.generate(prompts, count, seed, config.steps, config.guidance)
            drawn += len(prompts) * count
            progress.update(drawn)
            return pictures

        figures = evaluate(
            config,
            {"config": job.config.model_dump(mode="json")},
            stages,
            metrics,
            subject,
            generate,
            sections_of(job, model, subject, folders),
        )
    return {
        "in": job.inputs["embed"].manifest["counts"]["out"],
        "out": drawn,
        "dropped": {},
        "figures": figures["zero_shot"],
    }


def sections_of(
    job: StageJob, model: "Unclip", subject: "Subject", folders: Mapping[str, Path]
) -> list["MakeSection"]:
    """Return functions that measure the report's further sections, in the order of the page."""
    import flows.evaluation.decoder_section as decoder_section
    import flows.evaluation.swiss_roll_section as swiss_roll_section
    import flows.evaluation.upsampler_section as upsampler_section
    from indexing.evaluation.dedup_section import copies_section
    from indexing.evaluation.prior import prior_section

    config, embed, shards = job.config.evaluate, folders["embed"], subject.shards
    prior = model.prior.config

    def predict(captions: list[str], seed: int, best_of: int | None) -> "np.ndarray":
        # Every pair has its own noise, because captions repeat.
        return model.predict(captions, range(seed, seed + len(captions)), best_of)

    section_makers: list[MakeSection] = [
        partial(prior_section, subject, predict, prior.kind, prior.best_of),
        partial(decoder_section.section, config, model, embed, shards, job.out),
    ]
    if config.swiss_roll_steps:
        section_makers.append(partial(swiss_roll_section.section, config, job.out))
    section_makers.append(partial(upsampler_section.sections, folders, job.out))
    if "dedup" in folders:
        counts = job.inputs["dedup"].manifest["counts"]
        section_makers.append(
            partial(copies_section, folders["dedup"], embed, shards, counts, job.out)
        )
    return [*section_makers, *_optional_sections(job, model, subject)]


def _optional_sections(
    job: StageJob, model: "Unclip", subject: "Subject"
) -> Iterator["MakeSection"]:
    """Yield the functions of the sections that have a section of their own in `[evaluate]`."""
    import flows.evaluation.fidelity_section as fidelity_section
    import flows.evaluation.relations_section as relations_section
    import flows.evaluation.suite_section as suite_section
    import flows.evaluation.typographic_section as typographic_section

    config = job.config.evaluate
    if config.fidelity is not None:
        yield partial(fidelity_section.section, config.fidelity, config, model, subject)
    if config.suite.sets:
        cache = Path(job.config.data.cache).expanduser()
        yield partial(suite_section.sections, config.suite, config, model, subject, cache)
    if config.typographic is not None:
        yield partial(typographic_section.section, config.typographic, config, model, subject)
    if config.relations is not None:
        yield partial(relations_section.section, config.relations, config, model, subject)


def read_metrics(path: Path) -> "list[MetricsRow]":
    """Return the rows of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines()]
