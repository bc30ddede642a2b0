"""A run's whole config: the sections, each from beside the code it configures, and what must agree between them.

The only place that checks agreement across sections. Reads recipe files; knows nothing of ROOT and stages.
"""

from collections.abc import Sequence

from indexing.evaluate import EvaluateConfig
from indexing.index import IndexConfig
from training.clip import ClipConfig
from training.decoder import DecoderConfig
from training.embed import EmbedConfig
from training.prior import PriorConfig
from training.tokenizer import TokenizerConfig

from flows.curate import CurateConfig
from flows.recipe import find_recipe, read_recipe, validated
from flows.sources import DataConfig
from infra.cluster import ClusterConfig
from infra.errors import CallerError
from infra.settings import Section


class RunConfig(Section):
    """One recipe, resolved. A section that the recipe leaves out has its defaults."""

    data: DataConfig
    curate: CurateConfig
    tokenizer: TokenizerConfig
    clip: ClipConfig
    embed: EmbedConfig
    index: IndexConfig
    prior: PriorConfig
    decoder: DecoderConfig
    evaluate: EvaluateConfig
    cluster: ClusterConfig


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe (a path, or the name of a built-in one), apply `section.key=value` overrides and check it whole.

    Raises CallerError: one line that names the recipe, the section, the key, the value and what is allowed.
    """
    path = find_recipe(recipe)
    tree = {name: {} for name in RunConfig.model_fields} | read_recipe(path, overrides)
    config = validated(tree, RunConfig, path.name)
    disagreement = find_disagreement(config)
    if disagreement:
        raise CallerError(f"{path.name}: {disagreement}")
    return config


def find_disagreement(config: RunConfig) -> str:
    """Return what two sections contradict each other in, naming both and the mend, or ""."""
    return ""
