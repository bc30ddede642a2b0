"""The report's section on the distance between generated and real images.

Gives `indexing.evaluation.fidelity` the trained models and the ImageNet network, if installed.
"""

import numpy as np

from indexing.evaluation.context import Subject
from indexing.evaluation.evaluate import EvaluateConfig
from indexing.evaluation.fidelity import FidelityConfig, fidelity
from indexing.report.sections import ReportSection
from training.generation.unclip import Unclip
from training.models import imagenet_features


def section(
    config: FidelityConfig, whole: EvaluateConfig, model: Unclip, subject: Subject
) -> ReportSection:
    """Compare images drawn from held-out captions with their real images."""

    def draw(prompts: list[str], seed: int, guidance: float) -> np.ndarray:
        # Every prompt has its own seed: captions repeat, and equal images would repeat with them.
        seeds = range(seed, seed + len(prompts))
        return model.generate(prompts, 1, seeds, whole.steps, guidance)[:, 0]

    network = imagenet_features.efficientnet_lite0()
    networks = {imagenet_features.LITE_NAME: network} if network else {}
    return fidelity(config, subject, model.decoder.config.image_size_px, draw, networks)
