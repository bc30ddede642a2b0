"""Hands the typographic attack what it needs: held-out pairs, CLIP, the decoder's variations, and who judges these besides CLIP."""

from pathlib import Path
from typing import Any

from indexing.evaluate import EvaluateConfig
from indexing.held_out import open_embedded, read_pairs
from indexing.reading import text_reader
from indexing.sections import ReportSection
from indexing.typographic import TypographicConfig, typographic
from indexing.varied import Witnesses
from training import features
from training.generate import Unclip
from training.manipulate import variations


def section(config: TypographicConfig, whole: EvaluateConfig, model: Unclip, embed: Path, shards: Path, out: Path) -> ReportSection:
    """Attack pictures of the held-out style, whose things CLIP knows and can be led astray about; without one, held-out concepts."""
    embedded = open_embedded(embed)
    split = "held_out_style" if len(embedded.rows("held_out_style")) else "held_out_concept"
    pairs = read_pairs(embedded, split, whole.pairs_at_most, whole.seed)

    def vary(pictures: Any, count: int, seed: int) -> Any:
        return variations(model, pictures, count, seed, guidance=whole.guidance)

    witnesses = Witnesses(features.LITE_NAME, features.efficientnet_lite0(), text_reader())
    models = (model.encode_texts, model.encode_images, model.clip.logit_scale.exp().item(), vary, witnesses)
    return typographic(config, embedded, pairs, whole.templates, shards, *models, whole.resamples, whole.seed, out)
