"""The report's section on typographic attacks.

Gives `indexing.evaluation.typographic_attack` held-out pairs, CLIP, the decoder's variations, and
the further judges of these: an ImageNet network and the OCR, if installed.
"""

import numpy as np

from indexing.data.held_out import read_pairs
from indexing.data.ocr import text_reader
from indexing.evaluation.attack_judges import Witnesses
from indexing.evaluation.context import Subject
from indexing.evaluation.evaluate import EvaluateConfig
from indexing.evaluation.typographic_attack import TypographicConfig, typographic
from indexing.report.sections import ReportSection
from training.generation.manipulations import variations
from training.generation.unclip import Unclip
from training.models import imagenet_features


def section(
    config: TypographicConfig, whole: EvaluateConfig, model: Unclip, subject: Subject
) -> ReportSection:
    """Attack held-out images and return the section.

    The images are of the held-out style, whose concepts CLIP has learnt; if there are none, they
    are of held-out concepts.
    """
    split = "held_out_style" if len(subject.embedded.rows("held_out_style")) else "held_out_concept"
    pairs = read_pairs(subject.embedded, split, whole.pairs_at_most, whole.seed)

    def vary(pictures: np.ndarray, count: int, seed: int) -> np.ndarray:
        return variations(model, pictures, count, seed, guidance=whole.guidance)

    witnesses = Witnesses(
        imagenet_features.LITE_NAME, imagenet_features.efficientnet_lite0(), text_reader()
    )
    return typographic(
        config,
        subject,
        pairs,
        whole.templates,
        model.clip.logit_scale.exp().item(),
        vary,
        witnesses,
    )
