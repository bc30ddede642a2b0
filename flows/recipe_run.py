"""One run of a recipe: what the command line and the Prefect flow do before and after the stages.

`begin` compacts ROOT and chooses the stages, `current_results` finds out whether all of them are
current, and `finish` records and promotes the run. Knows nothing of Prefect: the caller may wrap
each step with retries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import flows.orchestration.stages as stages
from flows.live_index.compaction import compact
from flows.runs.planning import plan, stages_of
from flows.runs.promotion import described, promote_if_passed
from flows.runs.records import RunSummary, summary, write_run
from flows.runs.stage import Stage, StageResult
from infra.storage import manifests
from infra.storage.store import Root

if TYPE_CHECKING:  # its sections import torch and faiss
    from flows.config.run_config import RunConfig

Result = TypeVar("Result")


@dataclass(frozen=True)
class RecipeRun:
    """A recipe that runs into a ROOT under a name."""

    root: Root
    name: str
    recipe: str
    """The recipe's name or path, as the person gave it."""
    config: "RunConfig"
    stages: tuple[Stage, ...]
    started: str


def call(name: str, action: Callable[[], Result]) -> Result:
    """Do a step of a run without retries; `flows.pipeline.do` does it as a Prefect task."""
    return action()


def begin(
    root: Root,
    name: str,
    recipe: str,
    config: "RunConfig",
    targets: Sequence[str],
    say: Callable[[str], None],
    step: Callable[[str, Callable[[], Any]], Any] = call,
) -> RecipeRun:
    """Compact ROOT and return the run of these targets, or of all stages if there is no target."""
    started = manifests.now()
    step("compact", lambda: compact(root, say))
    return RecipeRun(root, name, recipe, config, stages_of(config, targets, stages.STAGES), started)


def current_results(run: RecipeRun) -> list[StageResult] | None:
    """Return the results of a run whose stages are all current; None if a stage must run."""
    results = []
    for stage_plan in plan(run.root, run.config, run.stages):
        if stage_plan.state != "current" or stage_plan.committed is None:
            return None
        committed = stage_plan.committed
        results.append(StageResult(stage_plan.stage.name, committed.key, "current", 0.0, committed))
    return results


def finish(
    run: RecipeRun,
    results: Sequence[StageResult],
    say: Callable[[str], None],
    step: Callable[[str, Callable[[], Any]], Any] = call,
) -> RunSummary:
    """Record a run, promote it if it passes its gate, and return its summary."""
    conditions = run.config.evaluate.promote_if
    committed = {result.stage: result.committed for result in results}
    record = step(
        "record",
        lambda: write_run(run.root, run.name, run.recipe, run.started, committed, bool(conditions)),
    )
    judgement = step("promote", lambda: promote_if_passed(run.root, conditions, record, committed))
    if judgement:
        say(described(judgement))
    return summary(run.root, run.name, results, record["report"], judgement)
