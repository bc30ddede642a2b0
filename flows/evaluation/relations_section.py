"""Hands the harness of relations what it needs: the run's scenes, CLIP, search at inference, and a
reader of text where there is one.
"""

from typing import Any

from indexing.data.ocr import text_reader
from indexing.evaluation.context import Subject
from indexing.evaluation.evaluate import EvaluateConfig
from indexing.evaluation.relations import RelationsConfig, Score, relations
from indexing.report.sections import ReportSection
from training.generation.beam_search import Beam, search
from training.generation.unclip import Unclip


def section(
    config: RelationsConfig, whole: EvaluateConfig, model: Unclip, subject: Subject
) -> ReportSection:
    """Judge scenes, sampled plainly and by search."""

    def draw(
        prompts: list[str],
        members: int,
        seed: int,
        steps: int,
        score: Score | None,
        keep: int,
        checks: tuple[float, ...],
    ) -> Any:
        beam = Beam(members, keep, checks)
        return search(model, prompts, beam, seed, steps, whole.guidance, score)

    return relations(config, subject, draw, text_reader())
