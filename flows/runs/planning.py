"""Plan: decide for the stages of a config whether they are current, stale (and why) or missing.

Reads only manifests and file sizes in ROOT; runs and writes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flows.runs.stage import Stage, StagePlan, inputs_of, key_of, sections_of
from infra.errors import CallerError
from infra.storage import manifests, store
from infra.storage.manifest_schema import Manifest
from infra.storage.manifests import Committed
from infra.storage.store import Root

if TYPE_CHECKING:  # its sections import torch and faiss
    from flows.config.run_config import RunConfig


def stages_of(
    config: "RunConfig", targets: Sequence[str], stages: Sequence[Stage]
) -> tuple[Stage, ...]:
    """Return the stages of a config: all of them, or the targets and the stages that they need.

    Stages without a section in the config are left out. Raises CallerError for an unknown target or
    one without a section.
    """
    missing = {
        stage.name
        for stage in stages
        if any(getattr(config, name) is None for name in stage.sections)
    }
    for name in targets:
        if name in missing:
            raise CallerError(
                f"the recipe has no section [{name}], which says how to train it: add one"
            )
    present = tuple(stage for stage in stages if stage.name not in missing)
    return with_needs(targets, present) if targets else present


def with_needs(names: Sequence[str], stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the named stages and all stages that they need, in the order of `stages`."""
    by_name = {stage.name: stage for stage in stages}
    wanted: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in by_name:
            raise CallerError(f"there is no stage {name}: choose from {', '.join(by_name)}")
        if name not in wanted:
            wanted.add(name)
            left += inputs_of(by_name[name], by_name)
    return tuple(stage for stage in stages if stage.name in wanted)


def plan(root: Root, config: "RunConfig", stages: Sequence[Stage]) -> list[StagePlan]:
    """Return for each stage whether it is current, stale (and why) or missing."""
    plans: dict[str, StagePlan] = {}
    for stage in stages:
        plans[stage.name] = _plan_one(
            root, config, stage, [plans[name] for name in inputs_of(stage, plans)]
        )
    return list(plans.values())


def frozen_model(
    root: Root, config: "RunConfig", stage: Stage, trained: Mapping[str, str]
) -> Committed | None:
    """Return the model that the recipe keeps although its data changed, or None.

    Only a stage with `retrain = "never"` has one: the newest with the same code version, settings
    and input models. `trained` holds the digests of the input models by stage.
    """
    section = getattr(config, stage.name, None) if stage.parameters else None
    if getattr(section, "retrain", "") != "never":
        return None
    committed = [
        manifests.find(root, stage.name, key) for key in store.list_names(root, stage.name)
    ]
    sections = sections_of(stage, config)
    fitting = [
        candidate
        for candidate in committed
        if candidate
        and (candidate.manifest["stage_version"], candidate.manifest["sections"])
        == (stage.version, sections)
        and {name: candidate.manifest["input_digests"].get(name) for name in trained} == trained
        and not manifests.damage(candidate)
    ]
    return max(fitting, key=lambda candidate: str(candidate.manifest["finished"]), default=None)


def _plan_one(
    root: Root, config: "RunConfig", stage: Stage, before: Sequence[StagePlan]
) -> StagePlan:
    inputs = {stage_plan.stage.name: stage_plan.key for stage_plan in before}
    models = {
        stage_plan.stage.name: stage_plan.committed
        for stage_plan in before
        if stage_plan.stage.parameters
    }
    if all(models.values()):
        stays = frozen_model(
            root, config, stage, {name: model.digest for name, model in models.items() if model}
        )
        if stays:
            changed = [
                name for name, key in inputs.items() if stays.manifest["inputs"].get(name) != key
            ]
            why = (
                f'kept, [{stage.name}] retrain = "never", although {", ".join(changed)} changed'
                if changed
                else ""
            )
            return StagePlan(stage, stays.key, "current", why, stays)
    key = key_of(stage, config, inputs)
    committed = manifests.find(root, stage.name, key)
    if committed:
        again = [stage_plan.stage.name for stage_plan in before if stage_plan.state != "current"]
        why = (
            f"{again[0]} will be made again"
            if again
            else fault(
                committed, [stage_plan.committed for stage_plan in before if stage_plan.committed]
            )
        )
        return StagePlan(stage, key, "stale" if why else "current", why, committed)
    last = manifests.newest(root, stage.name)
    if last is None:
        return StagePlan(stage, key, "missing", "", None)
    return StagePlan(
        stage,
        key,
        "stale",
        _changes(last.manifest, stage, sections_of(stage, config), inputs),
        None,
    )


def find_current(
    root: Root, stage_name: str, key: str, inputs: Sequence[Committed]
) -> Committed | None:
    """Return the committed folder if it is whole and made from the inputs as they are now."""
    committed = manifests.find(root, stage_name, key)
    return committed if committed and not fault(committed, inputs) else None


def fault(committed: Committed, inputs: Sequence[Committed]) -> str:
    """Return why a committed folder with the right key must still be made again, or "".

    That is the case if a file is missing or truncated, or if an input was made again under the same
    key with another result (a training run that was deleted and repeated).
    """
    for committed_input in inputs:
        made_from = committed.manifest["input_digests"].get(committed_input.stage)
        if made_from != committed_input.digest:
            return f"{committed_input.stage} was made again with another result"
    return manifests.damage(committed)


def _changes(
    manifest: Manifest,
    stage: Stage,
    sections: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> str:
    """Return the differences from the stage's newest manifest, as text."""
    changes = []
    if manifest["stage_version"] != stage.version:
        changes.append(f"code version {manifest['stage_version']} -> {stage.version}")
    for name, section in sections.items():
        old, new = manifest["sections"].get(name) or {}, section or {}
        changes += [
            f"[{name}] {field}: {_short(old.get(field))} -> {_short(new.get(field))}"
            for field in sorted({*old, *new})
            if old.get(field) != new.get(field)
        ]
    changes += [
        f"{name} changed" for name, key in inputs.items() if manifest["inputs"].get(name) != key
    ]
    return ", ".join(changes) or "its inputs changed"


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
