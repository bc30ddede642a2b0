"""The stages in dependency order, what each reads and which sections configure it, and how one is planned and run.

An adapter `run_<stage>` hands a room's function plain paths and sections and returns its counts; it holds no computation. The truth
about what exists is in the manifests alone. Knows nothing of Prefect: the flow and the tests call `plan` and `run_stage`.
"""

import shutil
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infra import manifests, storage
from infra.cluster import Cluster
from infra.errors import CallerError
from infra.locks import writer_lock
from infra.manifests import Committed
from infra.removals import Removals, read_removals
from infra.storage import Root

if TYPE_CHECKING:  # the sections live beside torch and faiss, which planning with a given config does not need
    from flows.config import RunConfig

Counts = dict[str, Any]
State = Literal["current", "stale", "missing"]


INGEST_VERSION = EMBED_VERSION = 1
INDEX_VERSION = 3


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


def run_ingest(job: StageJob) -> Counts:
    from flows import ingest
    from flows.renewal import is_renewable

    before = job.previous
    is_same = before and before.manifest["stage_version"] == INGEST_VERSION
    if before and is_same and is_renewable(before.manifest["sections"]["data"], job.config.data.keyed()):
        return ingest.run(job.config.data, job.out, job.work, job.removals, before.local())
    return ingest.run(job.config.data, job.out, job.work, job.removals)


def run_curate(job: StageJob) -> Counts:
    from flows import curate

    return curate.run(job.config.curate, job.inputs["ingest"].local(), job.out, job.removals)


def run_clip(job: StageJob) -> Counts:
    from training import jobs

    job.cluster.start()
    ingest, curate = job.inputs["ingest"].local(), job.inputs["curate"].local()
    return jobs.train_clip(job.config.tokenizer, job.config.clip, job.config.cluster, ingest, curate, job.out, job.work)


def run_embed(job: StageJob) -> Counts:
    from training import embed

    job.cluster.start()
    ingest, curate, clip = (job.inputs[name].local() for name in ("ingest", "curate", "clip"))
    before = job.previous
    is_same = before and before.manifest["stage_version"] == EMBED_VERSION
    if before and is_same and before.manifest["input_digests"]["clip"] == job.inputs["clip"].digest:
        embed.know(before.local(), job.work)
    return embed.run(job.config.embed, job.config.cluster, ingest, curate, clip, job.inputs["clip"].key, job.out, job.work)


def run_index(job: StageJob) -> Counts:
    from indexing import index

    return index.build(job.config.index, job.inputs["embed"].local(), job.out, _grown_from(job))


def _grown_from(job: StageJob) -> tuple[Path, Path] | None:
    """Return the last index of the same settings and the embeddings that are in it, where both are still there."""
    before = job.previous
    if (
        before is None
        or before.manifest["stage_version"] != INDEX_VERSION
        or before.manifest["sections"] != {"index": job.config.index.keyed()}
    ):
        return None
    embed = manifests.find(before.root, "embed", before.manifest["inputs"]["embed"])
    is_whole = embed and embed.digest == before.manifest["input_digests"]["embed"] and not manifests.damage(embed)
    return (before.local(), embed.local()) if embed and is_whole else None


def run_dedup(job: StageJob) -> Counts:
    from indexing import duplicates
    from training import embed

    assert job.config.dedup, "a stage without its section is not planned"
    _, encode_images, side_px = embed.encoders(job.inputs["clip"].local())
    shards = job.inputs["ingest"].local() / "shards"
    return duplicates.run(job.config.dedup, shards, job.inputs["embed"].local(), encode_images, side_px, job.out)


def trained_embeddings(job: StageJob) -> Path:
    """Return the embeddings that models train on: those that dedup has kept where the recipe has it, else all."""
    return job.inputs["dedup" if "dedup" in job.inputs else "embed"].local()


def run_prior(job: StageJob) -> Counts:
    from training import jobs

    job.cluster.start()
    clip, embed = job.inputs["clip"].local(), trained_embeddings(job)
    return jobs.train_prior(job.config.prior, job.config.cluster, clip, embed, job.out, job.work)


def run_decoder(job: StageJob) -> Counts:
    from training import jobs

    job.cluster.start()
    ingest, clip, embed = job.inputs["ingest"].local(), job.inputs["clip"].local(), trained_embeddings(job)
    return jobs.train_decoder(job.config.decoder, job.config.cluster, ingest, clip, embed, job.out, job.work)


def run_upsampler(job: StageJob) -> Counts:
    from flows import enlarging
    from training import jobs

    job.cluster.start()
    ingest, curate = job.inputs["ingest"].local(), job.inputs["curate"].local()
    counts = jobs.train_upsampler(getattr(job.config, job.stage), job.config.cluster, ingest, curate, job.out, job.work)
    return counts | {"comparison": enlarging.compare(job.stage, job.out, ingest, curate)}


def run_evaluate(job: StageJob) -> Counts:
    from flows import evaluation  # which imports this module

    return evaluation.run(job)


def clip_parameters(config: "RunConfig") -> int | None:
    from training import clip

    if config.clip.pretrained:  # its sizes are known once it is read
        return None
    return clip.count_parameters(config.clip, config.tokenizer.vocab_size, config.tokenizer.context)


def prior_parameters(config: "RunConfig") -> int | None:
    from training import priors

    if config.clip.pretrained:  # its sizes are known once it is read
        return None
    return priors.count_parameters(config.prior, config.clip, config.tokenizer.vocab_size, config.tokenizer.context)


def decoder_parameters(config: "RunConfig") -> int | None:
    from training import decoder

    if config.clip.pretrained:  # its sizes are known once it is read
        return None
    return decoder.count_parameters(config.decoder, config.clip, config.tokenizer.vocab_size, config.tokenizer.context)


def upsampler_parameters(config: "RunConfig") -> int:
    from training import upsampler

    return upsampler.count_parameters(config.upsampler) if config.upsampler else 0


def upsampler_2_parameters(config: "RunConfig") -> int:
    from training import upsampler

    return upsampler.count_parameters(config.upsampler_2) if config.upsampler_2 else 0


UPSAMPLERS = ("upsampler", "upsampler_2")
REPORTED = ("dedup", *UPSAMPLERS)
"""Stages that the report tells of where the recipe has them."""

STAGES = (
    Stage("ingest", (), ("data",), INGEST_VERSION, run_ingest),
    Stage("curate", ("ingest",), ("curate",), 1, run_curate),
    Stage("clip", ("ingest", "curate"), ("tokenizer", "clip"), 1, run_clip, (), clip_parameters),
    Stage("embed", ("ingest", "curate", "clip"), ("embed",), EMBED_VERSION, run_embed),
    Stage("index", ("embed",), ("index",), INDEX_VERSION, run_index),
    Stage("dedup", ("ingest", "clip", "embed"), ("dedup",), 1, run_dedup),
    Stage("prior", ("clip", "embed"), ("prior",), 1, run_prior, ("dedup",), prior_parameters),
    Stage("decoder", ("ingest", "clip", "embed"), ("decoder",), 1, run_decoder, ("dedup",), decoder_parameters),
    Stage("upsampler", ("ingest", "curate"), ("upsampler",), 1, run_upsampler, (), upsampler_parameters),
    Stage("upsampler_2", ("ingest", "curate"), ("upsampler_2",), 1, run_upsampler, (), upsampler_2_parameters),
    Stage("evaluate", ("ingest", "curate", "clip", "embed", "index", "prior", "decoder"), ("evaluate",), 3, run_evaluate, REPORTED),
)


def stages_of(config: Any, targets: Sequence[str], stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages that a config has: all, or the targets and what they need. A stage whose section is missing is none.

    Raises CallerError for a target that is none.
    """
    missing = {stage.name for stage in stages if any(getattr(config, name) is None for name in stage.sections)}
    for name in targets:
        if name in missing:
            raise CallerError(f"the recipe has no section [{name}], which says how to train it: add one")
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


def plan(root: Root, config: Any, stages: Sequence[Stage]) -> list[StagePlan]:
    """Say of each stage whether it is current, stale (and why) or missing; reads manifests and file sizes, runs nothing."""
    plans: dict[str, StagePlan] = {}
    for stage in stages:
        plans[stage.name] = _plan_one(root, config, stage, [plans[name] for name in inputs_of(stage, plans)])
    return list(plans.values())


def kept(root: Root, config: Any, stage: Stage, trained: Mapping[str, str]) -> Committed | None:
    """Return the model that the recipe keeps although its data may have changed (`retrain = "never"`), or None.

    It is the newest of the same code and settings, made with the same models; `trained` holds the digests of those that it builds on.
    """
    section = getattr(config, stage.name, None) if stage.parameters else None
    if getattr(section, "retrain", "") != "never":
        return None
    found = [manifests.find(root, stage.name, key) for key in storage.list_names(root, stage.name)]
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
        stays = kept(root, config, stage, {name: each.digest for name, each in models.items() if each})
        if stays:
            changed = [name for name, key in inputs.items() if stays.manifest["inputs"].get(name) != key]
            why = f'kept, [{stage.name}] retrain = "never", although {", ".join(changed)} changed' if changed else ""
            return StagePlan(stage, stays.key, "current", why, stays)
    key = key_of(stage, config, inputs)
    committed = manifests.find(root, stage.name, key)
    if committed:
        again = [each.stage.name for each in before if each.state != "current"]
        why = f"{again[0]} will be made again" if again else fault(committed, [each.committed for each in before if each.committed])
        return StagePlan(stage, key, "stale" if why else "current", why, committed)
    last = manifests.newest(root, stage.name)
    if last is None:
        return StagePlan(stage, key, "missing", "", None)
    return StagePlan(stage, key, "stale", _changes(last.manifest, stage, sections_of(stage, config), inputs), None)


def fault(committed: Committed, inputs: Sequence[Committed]) -> str:
    """Return why a committed folder of the right key must still be made again, or "".

    It must when a file is gone or cut, or when an input was made again under its old key and came out otherwise (a training run that was
    deleted and repeated): a folder made from the old one must not stand beside the new one.
    """
    for each in inputs:
        if committed.manifest["input_digests"][each.stage] != each.digest:
            return f"{each.stage} was made again with another result"
    return manifests.damage(committed)


def _changes(manifest: Mapping[str, Any], stage: Stage, sections: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
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
    changes += [f"{name} changed" for name, key in inputs.items() if manifest["inputs"].get(name) != key]
    return ", ".join(changes) or "its inputs changed"


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def run_stage(
    stage: Stage,
    root: Root,
    config: Any,
    inputs: Mapping[str, Committed],
    cluster: Cluster,
    say: Callable[[str], None],
    guard: Callable[[], object] = lambda: None,
) -> StageResult:
    """Run one stage on its inputs and commit what it made, unless that is current already.

    `inputs` holds what `inputs_of` names. Waits (and says so) where another run is making the same folder. Raises StorageError for a
    full disk or a refused write, and whatever the adapter raises, or `guard` just before the commit; what was committed before stays,
    and the stage's `work` folder stays for the next attempt.
    """
    started, clock = manifests.now(), time.monotonic()
    given = {name: inputs[name] for name in inputs_of(stage, inputs)}
    stays = kept(root, config, stage, trained_of(given))
    if stays:
        return StageResult(stage.name, stays.key, "current", time.monotonic() - clock, stays)
    key = key_of(stage, config, {name: committed.key for name, committed in given.items()})
    lock = root.scratch / "locks" / f"{stage.name}-{key}.lock"
    with storage.one_line_errors(root.scratch), writer_lock(lock, f"{stage.name} {key}", say):
        existing = manifests.find(root, stage.name, key)
        if existing and not fault(existing, list(given.values())):
            return StageResult(stage.name, key, "current", time.monotonic() - clock, existing)
        out, work = _folders(root, stage, key)
        try:
            with storage.one_line_errors(out):
                given_too = (read_removals(root), _previous(root, stage, key))
                counts = stage.run(StageJob(stage.name, key, config, given, out, work, cluster, *given_too))
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)  # what may have filled the disk
            raise
        assert counts.keys() >= {"in", "out", "dropped"}, f"{stage.name} must count what came in, went out and was dropped"
        facts = {
            "stage_version": stage.version,
            "config": config.model_dump(mode="json"),
            "sections": sections_of(stage, config),
            "inputs": {name: committed.key for name, committed in given.items()},
            "input_digests": {name: committed.digest for name, committed in given.items()},
            "counts": counts,
            "started": started,
        }
        try:
            guard()
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise
        made = manifests.commit(root, stage.name, key, out, facts, existing.manifest["attempt"] if existing else None)
        shutil.rmtree(work, ignore_errors=True)
        return StageResult(stage.name, key, "ran", time.monotonic() - clock, made)


def trained_of(inputs: Mapping[str, Committed]) -> dict[str, str]:
    """Return the digests of those inputs that are models."""
    return {stage.name: inputs[stage.name].digest for stage in STAGES if stage.parameters and stage.name in inputs}


def _previous(root: Root, stage: Stage, key: str) -> Committed | None:
    last = manifests.newest(root, stage.name)
    return last if last and last.key != key and not manifests.damage(last) else None


def _folders(root: Root, stage: Stage, key: str) -> tuple[Path, Path]:
    """Return an empty `out` and the kept `work` folder; whatever a killed attempt left aside goes first. Called under the lock."""
    aside, work = root.scratch / "aside", root.scratch / stage.name / key
    for left in aside.glob(f"{stage.name}-{key}*"):
        shutil.rmtree(left, ignore_errors=True)
    out = aside / f"{stage.name}-{key}-{time.time_ns():x}"
    out.mkdir(parents=True)
    work.mkdir(parents=True, exist_ok=True)
    return out, work
