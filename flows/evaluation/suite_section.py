"""Hands the zero-shot suite its sets, CLIP and the frozen networks of the probes."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import flows.demo.packaged_sets as packaged_sets
from indexing.data.labelled_sets import open_set
from indexing.evaluation.context import Subject
from indexing.evaluation.evaluate import EvaluateConfig
from indexing.evaluation.zero_shot_suite import SuiteConfig, suite
from indexing.report.sections import ReportSection
from infra.errors import CallerError
from training.data.image_reader import as_square
from training.generation.unclip import Unclip
from training.models import imagenet_features


def networks(config: SuiteConfig) -> dict[str, imagenet_features.Features]:
    """Return the networks whose features are probed, by name: the packaged one where it is
    installed, a ResNet-50 where a path is given.
    """
    probes = {imagenet_features.LITE_NAME: imagenet_features.efficientnet_lite0()}
    named = {name: network for name, network in probes.items() if network is not None}
    return named | (
        {
            imagenet_features.RESNET_NAME: imagenet_features.resnet_50(
                Path(config.features).expanduser()
            )
        }
        if config.features
        else {}
    )


def sections(
    config: SuiteConfig, whole: EvaluateConfig, model: Unclip, subject: Subject, folder: Path
) -> list[ReportSection]:
    """Judge the sets; packaged ones are unpacked into the cache folder, and one that cannot be had
    is told of: the others still count.
    """
    loaded, missing = [], []
    for name in config.sets:
        try:
            loaded.append(
                replace(
                    open_set(packaged_sets.set_path(name, folder)),
                    square=partial(as_square, look=model.clip.config.look),
                )
            )
        except CallerError as error:
            if name not in packaged_sets.SETS:
                raise
            missing.append(
                f"{name} is not measured: {str(error).removeprefix('[evaluate.suite] ')}"
            )
    side_px, probed = model.clip.config.image_size_px, networks(config) if config.probe else {}
    return suite(config, subject, loaded, whole.templates, side_px, probed, missing)
