"""The report's section on relations, counting and writing.

Gives `indexing.evaluation.relations` the trained models, beam search and the OCR, if installed.
"""

import numpy as np

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
    """Judge scenes that are sampled with and without beam search."""

    def draw(
        prompts: list[str],
        members: int,
        seed: int,
        steps: int,
        score: Score | None,
        keep: int,
        checks: tuple[float, ...],
    ) -> np.ndarray:
        beam = Beam(members, keep, checks)
        return search(model, prompts, beam, seed, steps, whole.guidance, score)

    return relations(config, subject, draw, text_reader())
