"""The types of a stage, its job, plan and result, and the content key of its output.

The stages themselves are in `flows.orchestration.stages`.
"""

from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infra.compute.cluster import Cluster
from infra.storage import manifests
from infra.storage.manifest_schema import StageCounts
from infra.storage.manifests import Committed
from infra.storage.removal_log import Removals
from infra.storage.stage_files import StageFiles
from infra.storage.stage_output import StageOutput
from infra.storage.work_folder import WorkFolder

if TYPE_CHECKING:  # the sections import torch and faiss, which planning does not need
    from flows.config.run_config import RunConfig

UPSAMPLERS = ("upsampler", "upsampler_2")
"""The up-sampling stages, in the order in which they are applied to the decoder's images."""

State = Literal["current", "stale", "missing"]


@dataclass(frozen=True)
class StageJob:
    """The arguments of a stage's adapter.

    After it returns, the caller commits the files in `out` and those of the parts that were
    recorded in `output`.
    """

    stage: str
    key: str
    config: "RunConfig"
    inputs: Mapping[str, Committed]
    out: Path
    """An empty local folder."""
    output: StageOutput
    """Where tasks on any node put finished files and record parts; killed attempts keep theirs."""
    work: Path
    """A local folder for state to resume from; it survives killed attempts of the same key."""
    cluster: Cluster
    removals: Removals
    """Samples that were taken down and must not be used again."""
    previous: Committed | None = None
    """The stage's last commit, under another key; results for the same inputs may be reused."""
    copies: ExitStack = field(default_factory=ExitStack)
    """Local copies of committed folders, which the caller releases when the adapter returns."""

    @property
    def state(self) -> WorkFolder:
        """State to resume from, on whatever node."""
        return WorkFolder(self.output.root, f"{self.stage}/{self.key}")

    def input_files(self, *names: str) -> dict[str, StageFiles]:
        """Return the files of these inputs, by stage."""
        return {name: self.inputs[name].files for name in names}

    def local_copy(self, committed: Committed, *patterns: str) -> Path:
        """Return a local folder with the files that match, or all; it stays for this job."""
        return self.copies.enter_context(committed.files.local_copy(*patterns))


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Increase `version` when its code gives other results for the same inputs and config.
    """

    name: str
    needs: tuple[str, ...]
    sections: tuple[str, ...]
    version: int
    run: Callable[[StageJob], StageCounts]
    wants: tuple[str, ...] = ()
    """Optional inputs: stages whose folders it uses if the recipe has them."""
    parameters: "Callable[[RunConfig], int | None] | None" = None
    """Counts the parameters of the model that the stage trains; None for stages that train none.

    It returns None if the count is not known before the stage runs.
    """


@dataclass(frozen=True)
class StagePlan:
    """The state of one stage in a ROOT under a config; `why` is the reason why it is stale."""

    stage: Stage
    key: str
    state: State
    why: str
    committed: Committed | None


@dataclass(frozen=True)
class StageResult:
    """The result of running one stage."""

    stage: str
    key: str
    state: Literal["ran", "current"]
    seconds: float
    committed: Committed


def inputs_of(stage: Stage, there: Container[str]) -> list[str]:
    """Return the stages that a stage reads: those it needs, and those it wants that are present."""
    return [*stage.needs, *(name for name in stage.wants if name in there)]


def sections_of(stage: Stage, config: "RunConfig") -> dict[str, Any]:
    """Return the config fields that the stage's key depends on, by section.

    A section that the recipe does not have is None.
    """
    chosen = ((name, getattr(config, name)) for name in stage.sections)
    return {name: section.keyed() if section is not None else None for name, section in chosen}


def key_of(stage: Stage, config: "RunConfig", input_keys: Mapping[str, str]) -> str:
    """Return the content key of the stage's output for these input keys and this config."""
    return manifests.content_key(stage.name, stage.version, sections_of(stage, config), input_keys)
