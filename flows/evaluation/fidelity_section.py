"""Hands the distances between generated and real pictures what they need: drawings at any guidance,
CLIP, the packaged network.
"""

from typing import Any

from indexing.evaluation.context import Subject
from indexing.evaluation.evaluate import EvaluateConfig
from indexing.evaluation.fidelity import FidelityConfig, fidelity
from indexing.report.sections import ReportSection
from training.generation.unclip import Unclip
from training.models import imagenet_features


def section(
    config: FidelityConfig, whole: EvaluateConfig, model: Unclip, subject: Subject
) -> ReportSection:
    """Compare drawings of held-out captions with their real pictures."""

    def draw(
        prompts: list[str], seed: int, guidance: float
    ) -> Any:  # captions repeat: with one seed for all, so would pictures
        return model.generate(prompts, 1, range(seed, seed + len(prompts)), whole.steps, guidance)[
            :, 0
        ]

    network = imagenet_features.efficientnet_lite0()
    networks = {imagenet_features.LITE_NAME: network} if network else {}
    return fidelity(config, subject, model.decoder.config.image_size_px, draw, networks)
