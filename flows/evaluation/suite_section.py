"""The report's sections on zero-shot classification of labelled sets.

Gives `indexing.evaluation.zero_shot_suite` the sets, CLIP and the networks that probes are trained
on. Writes packaged sets into the cache folder.
"""

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
    """Return the networks whose features are probed, by name.

    These are the packaged EfficientNet, if installed, and a ResNet-50, if the config has its path.
    """
    by_name = {}
    lite = imagenet_features.efficientnet_lite0()
    if lite is not None:
        by_name[imagenet_features.LITE_NAME] = lite
    if config.features:
        path = Path(config.features).expanduser()
        by_name[imagenet_features.RESNET_NAME] = imagenet_features.resnet_50(path)
    return by_name


def sections(
    config: SuiteConfig, whole: EvaluateConfig, model: Unclip, subject: Subject, folder: Path
) -> list[ReportSection]:
    """Judge CLIP on the sets; packaged sets are unpacked into the cache folder.

    A packaged set that is not available is named in the report, and the others are still judged.
    Raises CallerError for a set that is no path and not packaged.
    """
    loaded, missing = [], []
    for name in config.sets:
        try:
            labelled = open_set(packaged_sets.set_path(name, folder))
            square = partial(as_square, look=model.clip.config.look)
            loaded.append(replace(labelled, square=square))
        except CallerError as error:
            if name not in packaged_sets.SETS:
                raise
            missing.append(
                f"{name} is not measured: {str(error).removeprefix('[evaluate.suite] ')}"
            )
    side_px, probed = model.clip.config.image_size_px, networks(config) if config.probe else {}
    return suite(config, subject, loaded, whole.templates, side_px, probed, missing)
