"""The Ray Train jobs for CLIP, the prior, the decoder and up-samplers: section -> data and model ->
`loop.run`.

Each `train_*` uses the Ray that the caller started, shows progress, and writes `config.json`,
`weights.safetensors` (averaged), `raw.safetensors`, `metrics.jsonl` and, if captions are read,
`tokenizer.json` into the stage's output. The state for resuming is published to ROOT, so that
workers may be on any nodes. The `fit_*` functions are the workers' side; they do not use Ray.
"""

import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import pyarrow as pa
import torch
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
from safetensors.torch import save_file
from torch import Tensor, nn

from infra.compute.cluster import ClusterConfig
from infra.console.progress import Progress
from infra.errors import DataError, StorageError, UnclipError
from infra.storage import store
from infra.storage.atomic_files import atomic_file
from infra.storage.manifest_schema import SampleCounts, StageCounts, TrainingFigures
from infra.storage.shard_reader import ShardReader
from infra.storage.stage_files import StageFiles, pinned_copy
from infra.storage.stage_output import StageOutput
from infra.storage.work_folder import WorkFolder
from training.data import embedding_dataset, shard_check
from training.data.image_reader import LOCATION, Pictures, read_rows
from training.models import clip as clip_model
from training.models import open_clip_format, priors
from training.models.clip import CLIP
from training.models.decoder import Decoder
from training.models.diffusion_prior import MAX_MEASURED, Prior
from training.models.pixels import to_pixels
from training.models.tokenizer import Tokenizer
from training.models.upsampler import Upsampler
from training.optim import fsdp, loop
from training.optim.collectives import world
from training.optim.step import Step
from training.sections.clip_section import ClipConfig
from training.sections.decoder_section import DecoderConfig
from training.sections.loop_section import LoopConfig
from training.sections.preprocessing import WHOLE, Look
from training.sections.prior_section import PriorConfig
from training.sections.tokenizer_section import TokenizerConfig
from training.sections.upsampler_section import UpsamplerConfig

TOKENIZER, KEEP_LIST, MODEL = "tokenizer.json", "keep.parquet", "model"
PHRASING, SHIFT = 11, 12  # streams of randomness in a step
SHIFT_PX = 2


@dataclass(frozen=True)
class TrainingFolders:
    """What a training reads and writes, on whatever node; travels to the workers."""

    inputs: Mapping[str, StageFiles]
    """Files of the stages that it reads, by stage."""
    output: StageOutput
    work: WorkFolder

    @property
    def shards(self) -> ShardReader:
        """The images of the run."""
        return ShardReader(self.inputs["ingest"])

    def folder(self, stage: str, *patterns: str) -> Path:
        """Return a local folder with an input's files that match; they stay with this process."""
        return pinned_copy(self.inputs[stage], *patterns)


def train_clip(
    tokenizer: TokenizerConfig,
    config: ClipConfig,
    cluster: ClusterConfig,
    folders: TrainingFolders,
) -> StageCounts:
    """Train CLIP on the keep list's training pairs, or take a pretrained one.

    The tokenizer is fitted to their captions first. Reads the stages ingest and curate.
    """
    work = folders.work
    columns = ["captions", *shard_check.READ]
    table = read_rows(folders.inputs["curate"], KEEP_LIST, "train", columns)
    if not table.num_rows:
        raise DataError(
            "curate kept no pair for training: loosen [curate] or give [data] more sources"
        )
    if config.pretrained:
        return _adopt(config, tokenizer, folders, table.num_rows)
    dropped = shard_check.settle(table, folders.shards, config.broken_pictures, work)
    if work.fetch(TOKENIZER) is None:
        captions = (
            caption.as_py()
            for captions in table["captions"].chunks
            for caption in captions.flatten()
        )
        _publish_tokenizer(Tokenizer.fit(captions, tokenizer), work)
    facts = _train("clip", fit_clip, config, cluster, cluster.clip_workers, folders)
    return {**_counts(table.num_rows, dropped), **facts}


def train_prior(
    config: PriorConfig, cluster: ClusterConfig, folders: TrainingFolders
) -> StageCounts:
    """Train the prior on the embeddings; CLIP is frozen. Reads the stages clip and embed."""
    table = _start_from_clip(folders, ["key"])
    facts = _train("prior", fit_prior, config, cluster, cluster.prior_workers, folders)
    return {**_counts(table.num_rows, {}), **facts}


def train_decoder(
    config: DecoderConfig, cluster: ClusterConfig, folders: TrainingFolders
) -> StageCounts:
    """Train the decoder on images and their embeddings; CLIP is frozen.

    Reads the stages ingest, clip and embed.
    """
    table = _start_from_clip(folders, shard_check.READ)
    dropped = shard_check.settle(table, folders.shards, config.broken_pictures, folders.work)
    facts = _train("decoder", fit_decoder, config, cluster, cluster.decoder_workers, folders)
    return {**_counts(table.num_rows, dropped), **facts}


def train_upsampler(
    config: UpsamplerConfig, cluster: ClusterConfig, folders: TrainingFolders
) -> StageCounts:
    """Train an up-sampler on crops of the keep list's training images.

    Reads the stages ingest and curate, or another keep list under curate's name.
    """
    table = read_rows(folders.inputs["curate"], KEEP_LIST, "train", shard_check.READ)
    if not table.num_rows:
        raise DataError(
            "curate kept no picture for training: loosen [curate] or give [data] more sources"
        )
    dropped = shard_check.settle(table, folders.shards, config.broken_pictures, folders.work)
    facts = _train("upsampler", fit_upsampler, config, cluster, cluster.upsampler_workers, folders)
    return {**_counts(table.num_rows, dropped), **facts}


def _counts(rows: int, dropped: dict[str, int]) -> SampleCounts:
    return {"in": rows, "out": rows - sum(dropped.values()), "dropped": dropped}


def _publish_tokenizer(tokenizer: Tokenizer, work: WorkFolder) -> None:
    with atomic_file(work.path(TOKENIZER)) as part:
        tokenizer.save(part)
    work.publish(TOKENIZER)


def fit_clip(
    config: ClipConfig, folders: TrainingFolders, device: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Train CLIP on one worker; return the model and its averaged weights."""
    work, columns = folders.work, ["caption", "captions", "key", *LOCATION]
    table = read_rows(folders.inputs["curate"], KEEP_LIST, "train", columns)
    table = table.filter(pa.array(shard_check.is_readable(table, work)))
    tokenizer = Tokenizer.load(work.fetched(TOKENIZER))
    pictures = _pictures(table, folders, config, config.image_size_px, config.look)
    texts = embedding_dataset.Captions(
        table["captions"] if config.style_captions else alone(table["caption"]), tokenizer
    )
    del table
    torch.manual_seed(config.seed)
    model = CLIP(config, tokenizer.vocab_size, tokenizer.context).to(device)
    if config.compile:
        # the towers only: the backward pass encodes chunks again, outside the compiled code
        model.encode_image = torch.compile(model.encode_image)  # type: ignore[method-assign]
        model.encode_text = torch.compile(model.encode_text, dynamic=True)  # type: ignore[method-assign]

    def loss_of(step: Step) -> Tensor:
        rows = step.samples(len(pictures))
        ids, _ = texts.draw(
            rows, embedding_dataset.towards_first(step.uniform(PHRASING), config.first_caption)
        )
        pixels = to_pixels(pictures[rows].to(device), config.image_size_px)
        _read_ahead(pictures, step, config.ahead_steps)
        return model.loss(shifted(pixels, step.uniform(SHIFT, 2)), ids.to(device))

    return model, loop.run(
        model, config, loss_of, work, model.clamp_logit_scale, lambda: pictures.waited_s
    )


def fit_prior(
    config: PriorConfig, folders: TrainingFolders, device: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Train the prior on one worker; return the model and its averaged weights."""
    clip, tokenizer = clip_model.load(folders.folder("clip"))
    embed = folders.folder("embed", *embedding_dataset.FILES)
    table, z_i = embedding_dataset.read(embed, "train", ["captions"])
    texts = embedding_dataset.Captions(table["captions"], tokenizer)
    z_t = texts.embedded(clip.to(device))
    del clip, table  # frees their memory, on the device too
    torch.manual_seed(config.seed)
    model = priors.make(config, z_i.dim, tokenizer.vocab_size, tokenizer.context).to(device)
    sample = z_i.sampled()
    model.fit_to(z_i[sample], z_t(texts.firsts[sample]))

    def loss_of(step: Step) -> Tensor:
        rows = step.samples(len(z_i))
        ids, phrasing = texts.draw(rows, step.uniform(PHRASING))
        return model.loss(step, z_i[rows].to(device), z_t(phrasing).to(device), ids.to(device))

    averaged = loop.run(model, config, loss_of, folders.work)
    if config.kind == "diffusion" and config.sampler == "analytic" and world()[0] == 0:
        sample = sample[:: math.ceil(len(sample) / MAX_MEASURED)]
        trained = Prior(config, z_i.dim, tokenizer.vocab_size, tokenizer.context).to(device)
        trained.load_state_dict(averaged)
        trained.eval().measure(
            z_i[sample].to(device),
            *(column(texts.firsts[sample]).to(device) for column in (z_t, texts.ids)),
        )
        averaged["x_0_error"] = trained.x_0_error
    return model, averaged


def fit_decoder(
    config: DecoderConfig, folders: TrainingFolders, device: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Train the decoder on one worker; return the model and its averaged weights."""
    work = folders.work
    tokenizer = Tokenizer.load(work.fetched(TOKENIZER))
    embed = folders.folder("embed", *embedding_dataset.FILES)
    table, z_i = embedding_dataset.read(embed, "train", ["captions", "key", *LOCATION])
    readable = shard_check.is_readable(table, work)
    table, z_i = table.filter(pa.array(readable)), z_i.where(readable)
    pictures = _pictures(table, folders, config, config.image_size_px)
    texts = embedding_dataset.Captions(table["captions"], tokenizer)
    del table
    torch.manual_seed(config.seed)
    model = Decoder(config, z_i.dim, tokenizer.vocab_size, tokenizer.context).to(device)

    def loss_of(step: Step) -> Tensor:
        rows = step.samples(len(z_i))
        ids, _ = texts.draw(rows, step.uniform(PHRASING))
        x_0 = to_pixels(pictures[rows].to(device), config.image_size_px)
        _read_ahead(pictures, step, config.ahead_steps)
        return model.loss(step, x_0, z_i[rows].to(device), ids.to(device))

    return model, loop.run(model, config, loss_of, work, waited_s=lambda: pictures.waited_s)


def fit_upsampler(
    config: UpsamplerConfig, folders: TrainingFolders, device: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Train an up-sampler on one worker; return the model and its averaged weights."""
    work = folders.work
    table = read_rows(folders.inputs["curate"], KEEP_LIST, "train", ["key", *LOCATION])
    table = table.filter(pa.array(shard_check.is_readable(table, work)))
    pictures = _pictures(table, folders, config, config.image_size_px)
    torch.manual_seed(config.seed)
    model = Upsampler(config).to(device)

    def loss_of(step: Step) -> Tensor:
        x_0 = pictures[step.samples(len(pictures))]
        _read_ahead(pictures, step, config.ahead_steps)
        return model.loss(step, x_0)

    return model, loop.run(model, config, loss_of, work, waited_s=lambda: pictures.waited_s)


def _pictures(
    table: pa.Table, folders: TrainingFolders, config: LoopConfig, side_px: int, look: Look = WHOLE
) -> Pictures:
    return Pictures(table, folders.shards, side_px, look, config.readers, config.cache_bytes)


def _read_ahead(pictures: Pictures, step: Step, steps: int) -> None:
    """Start to read the images of the next steps."""
    for _ in range(steps if pictures.cache is None else 0):
        step = step.next()
        pictures.read_ahead(step.samples(len(pictures)))


def alone(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a list with one text for each caption."""
    return pa.chunked_array(
        [
            pa.ListArray.from_arrays(np.arange(len(chunk) + 1, dtype=np.int32), chunk)
            for chunk in captions.chunks
        ],
        pa.list_(pa.string()),
    )


def shifted(pixels: Tensor, draw: Tensor) -> Tensor:
    """Shift each image (B, 3, S, S) by up to SHIFT_PX, filling with white.

    draw: random shift in [0, 1), (B, 2).
    """
    B, _, S, _ = pixels.shape
    padded = nn.functional.pad(pixels, [SHIFT_PX] * 4, value=1.0)
    offset = (draw * (2 * SHIFT_PX + 1)).long().to(pixels.device)  # (B, 2)
    span = torch.arange(S, device=pixels.device)
    rows, columns = (offset[:, :1] + span)[:, :, None], (offset[:, 1:] + span)[:, None, :]
    return padded.permute(0, 2, 3, 1)[
        torch.arange(B, device=pixels.device)[:, None, None], rows, columns
    ].permute(0, 3, 1, 2)


class AdoptedCounts(StageCounts, open_clip_format.Source):
    """The counts of a pretrained CLIP's manifest."""


def _adopt(
    config: ClipConfig, tokens: TokenizerConfig, folders: TrainingFolders, rows: int
) -> AdoptedCounts:
    """Write the pretrained CLIP as if it had been trained here, on that number of rows."""
    model, tokenizer, source = open_clip_format.read(config, tokens)
    _publish_tokenizer(tokenizer, folders.work)
    folders.work.path(loop.METRICS).write_text("")
    put_model("clip", model, model.state_dict(), model.config, folders)
    return {
        **_counts(rows, {}),
        "parameters": sum(p.numel() for p in model.parameters()),
        **source,
    }


class Job(TypedDict):
    """A training as its workers get it."""

    fit: str
    """Name of the `fit_*` function."""
    section: str
    """The model's config section as JSON."""
    folders: TrainingFolders
    threads: int
    use_gpu: bool


Fit = Callable[[Any, TrainingFolders, str], tuple[nn.Module, dict[str, Tensor]]]


def _start_from_clip(folders: TrainingFolders, columns: Sequence[str]) -> pa.Table:
    """Publish CLIP's tokenizer for the workers; return these columns of the training pairs."""
    target = folders.work.path(TOKENIZER)
    with folders.inputs["clip"].open(TOKENIZER) as file, atomic_file(target) as part:
        part.write_bytes(file.read())
    folders.work.publish(TOKENIZER)
    table = read_rows(folders.inputs["embed"], "metadata/*.parquet", "train", columns)
    if not table.num_rows:
        raise DataError(
            "no embedded pair is in the training split: loosen [curate] or give [data] more sources"
        )
    return table


def _train(
    name: str,
    fit: Fit,
    config: LoopConfig,
    cluster: ClusterConfig,
    workers: int,
    folders: TrainingFolders,
) -> TrainingFigures:
    """Run `fit` on `workers` Ray Train workers; return what they say of the model.

    One worker on this machine runs as a plain Ray task, without the processes that only a group
    needs: they take longer to start than a small training takes. A model that a killed driver's
    workers finished is taken as it is. Raises the UnclipError of a worker, or one that says why the
    training failed.
    """
    finished = folders.output.finished_parts().get(MODEL)
    if finished:
        return finished["facts"]
    job: Job = {
        "fit": fit.__name__,
        "section": config.model_dump_json(),
        "folders": folders,
        "threads": max(1, int(cluster.cpus_per_worker)),
        "use_gpu": cluster.use_gpu,
    }
    with Progress(name, config.images, "images") as progress:
        is_over = threading.Event()
        watcher = threading.Thread(
            target=_watch, args=(folders.work, progress, is_over), daemon=True
        )
        watcher.start()
        try:
            _run_with_restarts(job, name, cluster, workers)
        finally:
            is_over.set()
            watcher.join()
    return folders.output.finished_parts()[MODEL]["facts"]


def _run_with_restarts(job: Job, name: str, cluster: ClusterConfig, workers: int) -> None:
    """Train; after the loss of a worker, restart from the last state, up to `max_failures` times.

    Raises the UnclipError of a worker, or one that says why the last restart failed.
    """
    for left in reversed(range(cluster.max_failures + 1)):
        try:
            if workers == 1 and not cluster.address:
                _run_alone(job, cluster)
            else:
                _run_group(job, name, cluster, workers)
            return
        except Exception as error:
            worker_error = _worker_error(error)
            if worker_error or not left:
                raise worker_error or UnclipError(_one_line(name, error)) from error
            logging.getLogger("unclip").warning(
                "%s; restarting it from its last state, %d restarts left",
                _one_line(name, error),
                left,
            )


def _run_alone(job: Job, cluster: ClusterConfig) -> None:
    """Train in one Ray task; Ray may run it in a process that has imported torch already.

    Raises what the worker raises, and RayError if it was lost.
    """
    import ray

    task = ray.remote(
        num_cpus=cluster.cpus_per_worker, num_gpus=int(cluster.use_gpu), max_retries=0
    )(_fit).remote(job)
    try:
        ray.get(task)
    except BaseException as error:
        if not isinstance(error, Exception):  # the run is interrupted
            ray.cancel(task, force=True)  # only if it still runs: on an ended one Ray may abort
        raise


def _run_group(job: Job, name: str, cluster: ClusterConfig, workers: int) -> None:
    """Train data-parallel with Ray Train."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {})
    file_system, path = _ray_storage(job["folders"].work)
    TorchTrainer(
        cast(Callable[[dict[Any, Any]], None], _worker),
        train_loop_config=cast(dict[str, Any], job),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            # a new name each time: training resumes from our state in `work`, not from Ray's
            name=f"{name}-{time.time_ns():x}",
            storage_path=path,
            storage_filesystem=file_system,
            # no retries by Ray, which would also repeat errors that are ours
            failure_config=FailureConfig(max_failures=0),
        ),
        torch_config=TorchConfig(
            backend="nccl" if cluster.use_gpu else "gloo", timeout_s=cluster.collective_timeout_s
        ),
    ).fit()


def _ray_storage(work: WorkFolder) -> tuple[FileSystem | None, str]:
    """Return where Ray Train may write what it wants to: a place that all nodes see."""
    if work.root.folder:
        return None, str(work.path("ray").absolute())
    return PyFileSystem(FSSpecHandler(work.root.fs)), store.join(work.root, f"work/{work.name}/ray")


def _worker(job: Job) -> None:
    """Run on every Ray Train worker."""
    import ray.train

    ray.train.report({"images_seen": _fit(job)})


def _fit(job: Job) -> int:
    """What every worker does: train as the job says and write the model. Returns the images
    seen. Raises StorageError for a full disk, which no restart would free.
    """
    torch.set_num_threads(job["threads"])
    fits: dict[str, tuple[Fit, type[LoopConfig]]] = {
        "fit_clip": (fit_clip, ClipConfig),
        "fit_prior": (fit_prior, PriorConfig),
        "fit_decoder": (fit_decoder, DecoderConfig),
        "fit_upsampler": (fit_upsampler, UpsamplerConfig),
    }
    fit, section = fits[job["fit"]]
    config = section.model_validate_json(job["section"])
    with store.one_line_errors(job["folders"].work.folder):
        model, averaged = fit(config, job["folders"], "cuda" if job["use_gpu"] else "cpu")
        put_model(job["fit"].removeprefix("fit_"), model, averaged, config, job["folders"])
    return config.images


def put_model(
    name: str,
    model: nn.Module,
    averaged: dict[str, Tensor],
    config: LoopConfig,
    folders: TrainingFolders,
) -> None:
    """Put the model and its metrics into the output, and record the finished part.

    Every worker calls it; the first one writes.
    """
    is_first = world()[0] == 0
    raw = fsdp.whole(model.state_dict(), is_first)
    if not is_first:
        return
    work, output = folders.work, folders.output
    with output.temporary_folder() as folder:
        tokenizer_file = work.fetch(TOKENIZER)  # up-samplers have none
        if tokenizer_file:
            shutil.copyfile(tokenizer_file, folder / TOKENIZER)
        shutil.copyfile(work.path(loop.METRICS), folder / loop.METRICS)
        parameters = write_model(name, model, averaged, config, folder, raw)
        outcome: TrainingFigures = {
            **_outcome(folder / loop.METRICS),
            "parameters": parameters,
        }
        output.record(MODEL, output.put_tree(folder), outcome)


def write_model(
    name: str,
    model: nn.Module,
    averaged: dict[str, Tensor],
    config: LoopConfig,
    folder: Path,
    raw: dict[str, Tensor] | None = None,
) -> int:
    """Write `config.json` and the weights, averaged and raw, into a folder; return their number.

    The sizes of the text side come from the folder's `tokenizer.json`, if it has one. `raw` is for
    sharded models, whose own weights are not whole.
    """
    facts: dict[str, Any] = {
        name: config.model_dump(mode="json"),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if (folder / TOKENIZER).exists():
        facts |= _text_sizes(Tokenizer.load(folder / TOKENIZER), model, facts[name])
    files = {"weights.safetensors": averaged, "raw.safetensors": raw or model.state_dict()}
    for file, state in files.items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(tensors, folder / file)
    (folder / "config.json").write_text(json.dumps(facts, indent=1))
    return int(facts["parameters"])


def _text_sizes(tokenizer: Tokenizer, model: nn.Module, section: dict[str, Any]) -> dict[str, int]:
    """Return the sizes that a model with captions is rebuilt from."""
    null = getattr(model, "null_z", getattr(model, "null_text", None))
    return {
        "vocab_size": tokenizer.vocab_size,
        "context": tokenizer.context,
        "embed_dim": len(null) if null is not None else section["embed_dim"],
    }


def _outcome(metrics: Path) -> TrainingFigures:
    """Return the last row of the metrics as figures of the manifest; {} if there is none."""
    rows = metrics.read_text().splitlines()
    if not rows:
        return {}
    last = json.loads(rows[-1])
    return {
        "images_seen": last["images_seen"],
        "loss": last["loss"],
        "train_seconds": last["seconds"],
    }


def _watch(work: WorkFolder, progress: Progress, is_over: threading.Event) -> None:
    """Show the newest published row of the metrics until `is_over` is set."""
    while True:
        ended = is_over.wait(0.5 if work.root.folder else 2)
        try:
            newest = work.fetch(loop.PROGRESS)
        except StorageError:  # the store is away: there is nothing to show
            newest = None
        if newest:
            row = json.loads(newest.read_text())
            progress.update(row["images_seen"], f"loss {row['loss']:.3f}")
        if ended:
            return


def _worker_error(error: BaseException) -> UnclipError | None:
    """Return the UnclipError that a worker raised, if that is why Ray Train failed.

    A restart would only raise it again.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        for inner in (cause, *getattr(cause, "worker_failures", {}).values()):
            inner_cause = getattr(inner, "cause", inner)
            if isinstance(inner_cause, UnclipError):
                return type(inner_cause)(str(inner_cause))
        cause = cause.__cause__
    return None


def _one_line(name: str, error: BaseException) -> str:
    """Return the reason of a failed training in one line.

    Ray's message contains the workers' tracebacks, truncated; they are left out.
    """
    lines = str(error).splitlines()
    message = " ".join(
        line
        for line in lines
        if not line.startswith(("  ", "Traceback ", "... (Output")) and '", line ' not in line
    )
    message = " ".join(message.split())[:400]
    return f"training {name} failed: {message}; the log has the full message"
