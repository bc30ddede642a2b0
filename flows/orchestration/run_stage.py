"""Run one stage under its lock and commit its output.

Reads the committed folders of the inputs, and writes the stage's `work` and output folders. Knows
nothing of Prefect.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flows.orchestration.stages import trained_of
from flows.runs.planning import find_current, frozen_model
from flows.runs.stage import Stage, StageJob, StageResult, inputs_of, key_of, sections_of
from infra.compute.cluster import Cluster
from infra.storage import commits, manifests, store
from infra.storage.locks import lock_file, reader_lock, reading_file, writer_lock
from infra.storage.manifest_schema import StageCounts, StageFacts
from infra.storage.manifests import Committed
from infra.storage.removal_log import read_removals
from infra.storage.stage_output import open_output
from infra.storage.store import Root
from infra.storage.temporary_folders import remove_dead, writing_folder

if TYPE_CHECKING:  # its sections import torch and faiss
    from flows.config.run_config import RunConfig


@dataclass(frozen=True)
class Target:
    """What a stage reads and the folder that holds, or will hold, its output."""

    inputs: dict[str, Committed]
    key: str
    frozen: Committed | None
    """The model that the recipe keeps although its data changed; then the stage does not run."""


def target_of(
    root: Root, config: "RunConfig", stage: Stage, available: Mapping[str, Committed]
) -> Target:
    """Return a stage's target, given the committed folders of the stages before it."""
    inputs = {name: available[name] for name in inputs_of(stage, available)}
    frozen = frozen_model(root, config, stage, trained_of(inputs))
    key = key_of(stage, config, {name: committed.key for name, committed in inputs.items()})
    return Target(inputs, frozen.key if frozen else key, frozen)


def run_stage(
    stage: Stage,
    root: Root,
    config: "RunConfig",
    inputs: Mapping[str, Committed],
    cluster: Cluster,
    say: Callable[[str], None],
    guard: Callable[[], object] = lambda: None,
) -> StageResult:
    """Run one stage on its inputs and commit its output, unless that is already current.

    `inputs` holds at least the stages in `inputs_of`. Waits, and reports it through `say`, while
    another process makes the same folder or compacts an input. `guard` is called just before the
    commit and may raise to prevent it. Raises StorageError for a full disk or a refused write, and
    everything that the adapter or `guard` raises; earlier commits stay, and so does the stage's
    `work` folder, for the next attempt.
    """
    started, clock = manifests.now(), time.monotonic()
    target = target_of(root, config, stage, inputs)
    key = target.key
    if target.frozen:
        return StageResult(stage.name, key, "current", time.monotonic() - clock, target.frozen)
    with (
        store.one_line_errors(root.scratch),
        writer_lock(lock_file(root.scratch, stage.name, key), f"{stage.name} {key}", say),
        _reading(root, target.inputs.values(), say) as inputs_now,
    ):
        commits.recover(root, stage.name, key)
        damaged = manifests.find(root, stage.name, key)
        current = find_current(root, stage.name, key, inputs_now)
        work = root.scratch / stage.name / key
        if current:  # its writer may have been killed just after the commit
            remove_dead(root.scratch)
            shutil.rmtree(work, ignore_errors=True)
            return StageResult(stage.name, key, "current", time.monotonic() - clock, current)
        stage_inputs = dict(zip(target.inputs, inputs_now, strict=True))
        work.mkdir(parents=True, exist_ok=True)
        with writing_folder(root.scratch, f"{stage.name}-{key}") as out:
            job = StageJob(
                stage=stage.name,
                key=key,
                config=config,
                inputs=stage_inputs,
                out=out,
                output=open_output(root, stage.name, key),
                work=work,
                cluster=cluster,
                removals=read_removals(root),
                previous=_previous(root, stage, key),
            )
            counts = _run_adapter(stage, job, say)
            facts = _facts(stage, job, counts, started)
            guard()
            committed = _commit(job, facts, damaged)
        shutil.rmtree(work, ignore_errors=True)
        return StageResult(stage.name, key, "ran", time.monotonic() - clock, committed)


def _run_adapter(stage: Stage, job: StageJob, say: Callable[[str], None]) -> StageCounts:
    """Run the stage's adapter while nobody compacts the previous commit."""
    previous = [job.previous] if job.previous else []
    root = job.output.root
    with store.one_line_errors(job.out), _reading(root, previous, say), job.copies:
        counts = stage.run(job)
    assert counts.keys() >= {"in", "out", "dropped"}, (
        f"{stage.name} must count what came in, went out and was dropped"
    )
    return counts


def _commit(job: StageJob, facts: StageFacts, damaged: Committed | None) -> Committed:
    """Commit the files in `job.out` and those of the recorded parts, in place of a damaged folder.

    Where the commit fails the parts stay, for the next attempt.
    """
    parts = job.output.finished_parts()
    files = [*job.output.put_tree(job.out), *(f for part in parts.values() for f in part["files"])]
    return commits.commit_output(
        job.output, files, facts, damaged.manifest["attempt"] if damaged else None
    )


def _facts(stage: Stage, job: StageJob, counts: StageCounts, started: str) -> StageFacts:
    """Return the stage's own fields of the manifest."""
    return {
        "stage_version": stage.version,
        "config": job.config.model_dump(mode="json"),
        "sections": sections_of(stage, job.config),
        "inputs": {name: committed.key for name, committed in job.inputs.items()},
        "input_digests": {name: committed.digest for name, committed in job.inputs.items()},
        "counts": counts,
        "started": started,
    }


@contextmanager
def _reading(
    root: Root, folders: Iterable[Committed], say: Callable[[str], None]
) -> Iterator[list[Committed]]:
    """Prevent compaction of folders while the block runs; yield their current state."""
    with ExitStack() as stack:
        now = []
        for folder in folders:
            name = f"{folder.stage} {folder.key}"
            stack.enter_context(
                reader_lock(reading_file(root.scratch, folder.stage, folder.key), name, say)
            )
            now.append(manifests.find(root, folder.stage, folder.key) or folder)
        yield now


def _previous(root: Root, stage: Stage, key: str) -> Committed | None:
    last = manifests.newest(root, stage.name)
    return last if last and last.key != key and not manifests.damage(last) else None
