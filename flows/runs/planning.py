"""Where the stages of a config stand in a ROOT: current, stale (and why) or missing. The truth is in the manifests alone; runs nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from flows.runs.stage import Stage, StagePlan, inputs_of, key_of, sections_of
from infra.errors import CallerError
from infra.storage import manifests, store
from infra.storage.manifests import Committed
from infra.storage.store import Root


def stages_of(config: Any, targets: Sequence[str], stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages that a config has: all, or the targets and what they need. A stage whose section is missing is none.

    Raises CallerError for a target that is none.
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
    """Return the named stages and all that they need, in the table's order."""
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


def plan(root: Root, config: Any, stages: Sequence[Stage]) -> list[StagePlan]:
    """Say of each stage whether it is current, stale (and why) or missing; reads manifests and file sizes, runs nothing."""
    plans: dict[str, StagePlan] = {}
    for stage in stages:
        plans[stage.name] = _plan_one(
            root, config, stage, [plans[name] for name in inputs_of(stage, plans)]
        )
    return list(plans.values())


def kept(root: Root, config: Any, stage: Stage, trained: Mapping[str, str]) -> Committed | None:
    """Return the model that the recipe keeps although its data may have changed (`retrain = "never"`), or None.

    It is the newest of the same code and settings, made with the same models; `trained` holds the digests of those that it builds on.
    """
    section = getattr(config, stage.name, None) if stage.parameters else None
    if getattr(section, "retrain", "") != "never":
        return None
    found = [manifests.find(root, stage.name, key) for key in store.list_names(root, stage.name)]
    sections = sections_of(stage, config)
    fitting = [
        each
        for each in found
        if each
        and (each.manifest["stage_version"], each.manifest["sections"]) == (stage.version, sections)
        and {name: each.manifest["input_digests"].get(name) for name in trained} == trained
        and not manifests.damage(each)
    ]
    return max(fitting, key=lambda each: str(each.manifest["finished"]), default=None)


def _plan_one(root: Root, config: Any, stage: Stage, before: Sequence[StagePlan]) -> StagePlan:
    inputs = {each.stage.name: each.key for each in before}
    models = {each.stage.name: each.committed for each in before if each.stage.parameters}
    if all(models.values()):
        stays = kept(
            root, config, stage, {name: each.digest for name, each in models.items() if each}
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
        again = [each.stage.name for each in before if each.state != "current"]
        why = (
            f"{again[0]} will be made again"
            if again
            else fault(committed, [each.committed for each in before if each.committed])
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


def fault(committed: Committed, inputs: Sequence[Committed]) -> str:
    """Return why a committed folder of the right key must still be made again, or "".

    It must when a file is gone or cut, or when an input was made again under its old key and came out otherwise (a training run that was
    deleted and repeated): a folder made from the old one must not stand beside the new one.
    """
    for each in inputs:
        if committed.manifest["input_digests"][each.stage] != each.digest:
            return f"{each.stage} was made again with another result"
    return manifests.damage(committed)


def _changes(
    manifest: Mapping[str, Any],
    stage: Stage,
    sections: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> str:
    """Name what differs from the newest manifest of the stage."""
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
