"""The stages in dependency order, with their inputs, config sections and adapters.

An adapter `run_<stage>` passes plain paths and sections to the function that does the work, and
returns its counts; it computes nothing itself.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flows.runs.stage import UPSAMPLERS, Stage, StageJob
from infra.compute import cluster
from infra.storage import manifests
from infra.storage.manifest_schema import StageCounts
from infra.storage.manifests import Committed
from infra.storage.shard_reader import ShardReader
from infra.storage.stage_files import StageFiles

if TYPE_CHECKING:  # the sections import torch and faiss, which planning does not need
    from flows.config.run_config import RunConfig

INGEST_VERSION, EMBED_VERSION, INDEX_VERSION = 2, 1, 5


def run_ingest(job: StageJob) -> StageCounts:
    import flows.ingest.ingest as ingest
    from flows.ingest.shard_reuse import is_reusable

    before = job.previous
    is_same = before and before.manifest["stage_version"] == INGEST_VERSION
    is_taken_over = (
        before
        and is_same
        and is_reusable(before.manifest["sections"].get("data") or {}, job.config.data.keyed())
    )
    return ingest.run(
        job.config.data,
        job.cluster,
        job.output,
        job.out,
        job.work,
        job.removals,
        before if is_taken_over else None,
    )


def run_curate(job: StageJob) -> StageCounts:
    import flows.ingest.curate as curate

    ingest = job.inputs["ingest"]
    images = ingest.manifest["counts"]["out"]
    return curate.run(job.config.curate, ingest.files, job.out, job.removals, images)


def run_clip(job: StageJob) -> StageCounts:
    from training.jobs import train

    job.cluster.start()
    folders = train.TrainingFolders(job.input_files("ingest", "curate"), job.output, job.state)
    return train.train_clip(job.config.tokenizer, job.config.clip, job.config.cluster, folders)


def run_embed(job: StageJob) -> StageCounts:
    from training.jobs import embed

    job.cluster.start()
    files, before = job.input_files("ingest", "curate", "clip"), job.previous
    is_same = before and before.manifest["stage_version"] == EMBED_VERSION
    if is_same and before:
        is_same = before.manifest["input_digests"].get("clip") == job.inputs["clip"].digest
    folders = embed.EmbedFolders(
        **files,
        output=job.output,
        work=job.state,
        previous=before.files if before and is_same else None,
    )
    clip_key = job.inputs["clip"].key
    return embed.run(job.config.embed, job.config.cluster, folders, clip_key, job.out)


def run_index(job: StageJob) -> StageCounts:
    from indexing.ann import index

    embed, spread = job.local_copy(job.inputs["embed"]), None
    if index.is_spread(embed):
        job.cluster.start()
        spread = partial(cluster.spread, job.config.cluster)
    return index.build(job.config.index, embed, job.out, _grown_from(job), spread)


def _grown_from(job: StageJob) -> tuple[Path, Path] | None:
    """Return the folders of the last index with the same settings and of its embeddings, or None.

    Both must still exist unchanged.
    """
    before = job.previous
    if (
        before is None
        or before.manifest["stage_version"] != INDEX_VERSION
        or before.manifest["sections"] != {"index": job.config.index.keyed()}
    ):
        return None
    embed = manifests.find(before.root, "embed", before.manifest["inputs"].get("embed", ""))
    is_whole = (
        embed
        and embed.digest == before.manifest["input_digests"].get("embed")
        and not manifests.damage(embed)
    )
    return (job.local_copy(before), job.local_copy(embed)) if embed and is_whole else None


def run_dedup(job: StageJob) -> StageCounts:
    from indexing.dedup import deduplicate
    from training.jobs import embed

    assert job.config.dedup, "a stage without its section is not planned"
    _, encode_images, side_px = embed.encoders(job.local_copy(job.inputs["clip"]))
    return deduplicate.run(
        job.config.dedup,
        ShardReader(job.inputs["ingest"].files),
        job.local_copy(job.inputs["embed"]),
        encode_images,
        side_px,
        job.out,
    )


def trained_embeddings(job: StageJob) -> StageFiles:
    """Return the files of the training embeddings: dedup's if the recipe has it, else embed's."""
    return job.inputs["dedup" if "dedup" in job.inputs else "embed"].files


def run_prior(job: StageJob) -> StageCounts:
    from training.jobs import train

    job.cluster.start()
    files = {**job.input_files("clip"), "embed": trained_embeddings(job)}
    folders = train.TrainingFolders(files, job.output, job.state)
    return train.train_prior(job.config.prior, job.config.cluster, folders)


def run_decoder(job: StageJob) -> StageCounts:
    from training.jobs import train

    job.cluster.start()
    files = {**job.input_files("ingest", "clip"), "embed": trained_embeddings(job)}
    folders = train.TrainingFolders(files, job.output, job.state)
    return train.train_decoder(job.config.decoder, job.config.cluster, folders)


def run_upsampler(job: StageJob) -> StageCounts:
    import flows.evaluation.upsampler_comparison as upsampler_comparison
    from training.jobs import train

    job.cluster.start()
    keep_list = job.inputs["dedup" if "dedup" in job.inputs else "curate"].files
    files = {**job.input_files("ingest"), "curate": keep_list}
    folders = train.TrainingFolders(files, job.output, job.state)
    counts = train.train_upsampler(getattr(job.config, job.stage), job.config.cluster, folders)
    comparison = upsampler_comparison.compare(
        job.stage, job.output, job.out, folders.shards, keep_list
    )
    compared: upsampler_comparison.UpsamplerCounts = {**counts, "comparison": comparison}
    return compared


def run_evaluate(job: StageJob) -> StageCounts:
    import flows.evaluation.evaluate as evaluate

    return evaluate.run(job)


def clip_parameters(config: "RunConfig") -> int | None:
    from training.models import clip

    if config.clip.pretrained:  # its sizes are known once it is read
        return None
    return clip.count_parameters(config.clip, config.tokenizer.vocab_size, config.tokenizer.context)


def prior_parameters(config: "RunConfig") -> int | None:
    from training.models import priors

    if config.clip.pretrained:  # its sizes are known once it is read
        return None
    return priors.count_parameters(
        config.prior, config.clip, config.tokenizer.vocab_size, config.tokenizer.context
    )


def decoder_parameters(config: "RunConfig") -> int | None:
    from training.models import decoder

    if config.clip.pretrained:  # its sizes are known once it is read
        return None
    return decoder.count_parameters(
        config.decoder, config.clip, config.tokenizer.vocab_size, config.tokenizer.context
    )


def upsampler_parameters(config: "RunConfig") -> int:
    from training.models import upsampler

    return upsampler.count_parameters(config.upsampler) if config.upsampler else 0


def upsampler_2_parameters(config: "RunConfig") -> int:
    from training.models import upsampler

    return upsampler.count_parameters(config.upsampler_2) if config.upsampler_2 else 0


REPORTED = ("dedup", *UPSAMPLERS)
"""Optional stages that the report includes if the recipe has them."""

STAGES = (
    Stage("ingest", (), ("data",), INGEST_VERSION, run_ingest),
    Stage("curate", ("ingest",), ("curate",), 1, run_curate),
    Stage("clip", ("ingest", "curate"), ("tokenizer", "clip"), 2, run_clip, (), clip_parameters),
    Stage("embed", ("ingest", "curate", "clip"), ("embed",), EMBED_VERSION, run_embed),
    Stage("index", ("embed",), ("index",), INDEX_VERSION, run_index),
    Stage("dedup", ("ingest", "clip", "embed"), ("dedup",), 2, run_dedup),
    Stage("prior", ("clip", "embed"), ("prior",), 2, run_prior, ("dedup",), prior_parameters),
    Stage(
        "decoder",
        ("ingest", "clip", "embed"),
        ("decoder",),
        2,
        run_decoder,
        ("dedup",),
        decoder_parameters,
    ),
    Stage(
        "upsampler",
        ("ingest", "curate"),
        ("upsampler",),
        2,
        run_upsampler,
        ("dedup",),
        upsampler_parameters,
    ),
    Stage(
        "upsampler_2",
        ("ingest", "curate"),
        ("upsampler_2",),
        2,
        run_upsampler,
        ("dedup",),
        upsampler_2_parameters,
    ),
    Stage(
        "evaluate",
        ("ingest", "curate", "clip", "embed", "index", "prior", "decoder"),
        ("evaluate",),
        6,
        run_evaluate,
        REPORTED,
    ),
)


def trained_of(inputs: Mapping[str, Committed]) -> dict[str, str]:
    """Return the digests of the inputs that are models, by stage."""
    return {
        stage.name: inputs[stage.name].digest
        for stage in STAGES
        if stage.parameters and stage.name in inputs
    }
