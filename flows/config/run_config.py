"""The complete config of a run, and the checks across its sections.

Each section's class is in the module that it configures; only this module compares sections. Reads
recipe files.
"""

import math
from collections.abc import Sequence

from flows.config.promotion_conditions import parsed
from flows.config.recipe_file import find_recipe, read_recipe, validated
from flows.ingest.curate import CurateConfig
from flows.sources.url_table import DataConfig
from indexing.ann.index import IndexConfig
from indexing.dedup.deduplicate import DedupConfig
from indexing.evaluation.evaluate import EvaluateConfig
from infra.compute.cluster import ClusterConfig
from infra.errors import CallerError
from infra.settings import Section
from training.sections.clip_section import ClipConfig
from training.sections.decoder_section import DecoderConfig
from training.sections.embed_section import EmbedConfig
from training.sections.prior_section import PriorConfig
from training.sections.tokenizer_section import TokenizerConfig
from training.sections.upsampler_section import UpsamplerConfig

CONV_FOLD = 8
"""The convolutional image tower halves an image's side three times."""


class RunConfig(Section):
    """One resolved recipe.

    A section that the recipe leaves out has its defaults, or is None if it is optional.
    """

    data: DataConfig
    curate: CurateConfig
    tokenizer: TokenizerConfig
    clip: ClipConfig
    embed: EmbedConfig
    dedup: DedupConfig | None = None
    """Without this section the models train on all pairs that curate keeps."""
    index: IndexConfig
    prior: PriorConfig
    decoder: DecoderConfig
    upsampler: UpsamplerConfig | None = None
    """Enlarges the decoder's pictures; without this section there is no such stage."""
    upsampler_2: UpsamplerConfig | None = None
    """Enlarges the first up-sampler's pictures."""
    evaluate: EvaluateConfig
    cluster: ClusterConfig


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply overrides of the form `section.key=value`, and check the result.

    `recipe` is a path or the name of a built-in recipe. Raises CallerError with one line that names
    the recipe, the section, the key, the value and what is allowed.
    """
    path = find_recipe(recipe)
    tree = {
        name: {} for name, field in RunConfig.model_fields.items() if field.is_required()
    } | read_recipe(path, overrides)
    config = validated(tree, RunConfig, path.name)
    disagreement = find_disagreement(config)
    if disagreement:
        raise CallerError(f"{path.name}: {disagreement}")
    return config


def find_disagreement(config: RunConfig) -> str:
    """Return a message on two keys that contradict each other and how to mend it, or ""."""
    return (
        _size_disagreement(config)
        or _upsampler_disagreement(config)
        or _worker_disagreement(config)
        or _malformed_condition(config)
    )


def _size_disagreement(config: RunConfig) -> str:
    data, clip, decoder = config.data, config.clip, config.decoder
    trained = (
        (("decoder", decoder.image_size_px),)
        if clip.pretrained
        else (("clip", clip.image_size_px), ("decoder", decoder.image_size_px))
    )
    for name, side_px in trained:
        if side_px > data.image_size_px:
            return (
                f"[{name}] image_size_px = {side_px} but [data] image_size_px = "
                f"{data.image_size_px}: "
                "pictures would be enlarged, lower the first or raise the second"
            )
    if not clip.pretrained and clip.image_tower == "vit" and clip.image_size_px % clip.patch_px:
        return (
            f"[clip] image_size_px = {clip.image_size_px} but [clip] patch_px = {clip.patch_px}: "
            "the first must be a multiple of the second"
        )
    if not clip.pretrained and clip.image_tower == "conv" and clip.image_size_px % CONV_FOLD:
        return (
            f'[clip] image_size_px = {clip.image_size_px} but [clip] image_tower = "conv": it must '
            f"be a multiple of {CONV_FOLD}"
        )
    if config.prior.kind == "autoregressive" and config.prior.pca_dims > clip.embed_dim:
        return (
            f"[prior] pca_dims = {config.prior.pca_dims} but [clip] embed_dim = {clip.embed_dim}: "
            "there are no more components than that"
        )
    fold = decoder.patch_px * 2 ** (len(decoder.multiples) - 1)
    if decoder.image_size_px % fold:
        return (
            f"[decoder] image_size_px = {decoder.image_size_px} but [decoder] patch_px = "
            f"{decoder.patch_px} with "
            f"{len(decoder.multiples)} multiples: it must be a multiple of {fold}"
        )
    return ""


def _upsampler_disagreement(config: RunConfig) -> str:
    if config.upsampler_2 and not config.upsampler:
        return (
            "[upsampler_2] enlarges what [upsampler] draws, which is missing: call the section "
            "[upsampler]"
        )
    before = ("decoder", config.decoder.image_size_px)
    for name, section in (("upsampler", config.upsampler), ("upsampler_2", config.upsampler_2)):
        if section is None:
            continue
        side_px = section.image_size_px
        if side_px > config.data.image_size_px:
            return (
                f"[{name}] image_size_px = {side_px} but [data] image_size_px = "
                f"{config.data.image_size_px}: "
                "it would learn to enlarge as interpolation does, raise the second"
            )
        if side_px != before[1] * section.factor:
            return (
                f"[{name}] image_size_px = {side_px} but it gets pictures of {before[1]} px from "
                f"[{before[0]}] "
                f"and factor = {section.factor}: it must be {before[1] * section.factor}"
            )
        fold = math.lcm(section.factor, section.patch_px * 2 ** (len(section.multiples) - 1))
        if section.crop_px % fold or section.crop_px > side_px:
            return (
                f"[{name}] crop_fraction = {section.crop_fraction:g} cuts crops of "
                f"{section.crop_px} px: with factor = {section.factor}, "
                f"patch_px = {section.patch_px} and {len(section.multiples)} multiples that must "
                f"be a multiple of {fold}"
            )
        before = (name, side_px)
    return ""


def _worker_disagreement(config: RunConfig) -> str:
    cluster = config.cluster
    trained = (
        ("clip", config.clip.batch_size, cluster.clip_workers),
        ("prior", config.prior.batch_size, cluster.prior_workers),
        ("decoder", config.decoder.batch_size, cluster.decoder_workers),
        *(
            ("upsampler", section.batch_size, cluster.upsampler_workers)
            for section in (config.upsampler, config.upsampler_2)
            if section
        ),
    )
    for name, batch_size, workers in trained:
        if batch_size % workers:
            return (
                f"[{name}] batch_size = {batch_size} but [cluster] {name}_workers = {workers}: the "
                "first must be a multiple of the second"
            )
    return ""


def _malformed_condition(config: RunConfig) -> str:
    for condition in config.evaluate.promote_if:
        try:
            parsed(condition)
        except ValueError as error:
            return f"[evaluate] promote_if: {error}"
    return ""
