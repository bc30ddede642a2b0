"""Hands the harness of relations what it needs: the run's scenes, CLIP, search at inference, and a reader of text where there is one."""

from pathlib import Path
from typing import Any

from indexing.evaluate import EvaluateConfig
from indexing.held_out import open_embedded
from indexing.reading import text_reader
from indexing.relations import RelationsConfig, Score, relations
from indexing.sections import ReportSection
from training.generate import Unclip
from training.search import search


def section(config: RelationsConfig, whole: EvaluateConfig, model: Unclip, embed: Path, out: Path) -> ReportSection:
    """Judge scenes, sampled plainly and by search."""

    def draw(prompts: list[str], members: int, seed: int, steps: int, score: Score | None, keep: int, checks: tuple[float, ...]) -> Any:
        return search(model, prompts, members, seed, steps, whole.guidance, score, keep, checks)

    models = (model.encode_texts, model.encode_images, draw, text_reader())
    return relations(config, open_embedded(embed), *models, whole.resamples, whole.seed, out)
