"""What a stage is, what it is handed, and the key of what it makes. The stages themselves are in flows.orchestration.stages."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infra.compute.cluster import Cluster
from infra.storage import manifests
from infra.storage.manifests import Committed
from infra.storage.removal_log import Removals

if (
    TYPE_CHECKING
):  # the sections live beside torch and faiss, which planning with a given config does not need
    from flows.config.run_config import RunConfig

UPSAMPLERS = ("upsampler", "upsampler_2")
"""The stages that enlarge what the decoder draws, one behind the other."""

Counts = dict[str, Any]
State = Literal["current", "stale", "missing"]


@dataclass(frozen=True)
class StageJob:
    """What an adapter gets; everything written to `out` is committed by the caller once the adapter returns."""

    stage: str
    key: str
    config: "RunConfig"
    inputs: Mapping[str, Committed]
    out: Path
    """An empty local folder."""
    work: Path
    """A local folder that persists across killed attempts of the same key: state for resuming lives here."""
    cluster: Cluster
    removals: Removals
    """What was taken down and must not come back."""
    previous: Committed | None = None
    """What the stage committed last, under another key: whatever it has of the same inputs may be taken over."""


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline. Raise `version` when its code makes other results from the same input and config."""

    name: str
    needs: tuple[str, ...]
    sections: tuple[str, ...]
    version: int
    run: Callable[[StageJob], Counts]
    wants: tuple[str, ...] = ()
    """Stages whose folder it takes as well where the recipe has them."""
    parameters: Callable[[Any], int | None] | None = None
    """Counts the parameters of the model that the stage would train under a config, where it trains one; None: not known before it runs."""


@dataclass(frozen=True)
class StagePlan:
    """Where one stage stands in a ROOT under a config; `why` says what makes it stale."""

    stage: Stage
    key: str
    state: State
    why: str
    committed: Committed | None


@dataclass(frozen=True)
class StageResult:
    """What running one stage came to."""

    stage: str
    key: str
    state: Literal["ran", "current"]
    seconds: float
    committed: Committed


def inputs_of(stage: Stage, there: Container[str]) -> list[str]:
    """Return the stages whose folders a stage takes: what it needs, and what it wants where it is there."""
    return [*stage.needs, *(name for name in stage.wants if name in there)]


def sections_of(stage: Stage, config: Any) -> dict[str, Any]:
    """Return the config that the stage's key depends on, by section; a section that the recipe leaves out is None."""
    chosen = ((name, getattr(config, name)) for name in stage.sections)
    return {name: section.keyed() if section is not None else None for name, section in chosen}


def key_of(stage: Stage, config: Any, input_keys: Mapping[str, str]) -> str:
    """Return the content key of what the stage makes from inputs of these keys under this config."""
    return manifests.content_key(stage.name, stage.version, sections_of(stage, config), input_keys)
