"""The Ray Train jobs for CLIP, the prior, the decoder and up-samplers: section -> data and model ->
`loop.run`.

Each `train_*` uses the Ray that the caller started, shows progress, and writes `config.json`,
`weights.safetensors` (averaged), `raw.safetensors`, `metrics.jsonl` and, if captions are read,
`tokenizer.json` into `out`. The state for resuming is in `work`, which all workers must see. The
`fit_*` functions are the workers' side; they do not use Ray.
"""

import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from infra.compute.cluster import ClusterConfig
from infra.console.progress import Progress
from infra.errors import DataError, UnclipError
from training.data import embedding_dataset, shard_check
from training.data.image_reader import LOCATION, Pictures, read_table
from training.models import clip as clip_model
from training.models import open_clip_format, priors
from training.models.clip import CLIP, ClipConfig
from training.models.decoder import Decoder, DecoderConfig
from training.models.diffusion_prior import MAX_MEASURED, Prior, PriorConfig
from training.models.pixels import to_pixels
from training.models.preprocessing import WHOLE, Look
from training.models.tokenizer import Tokenizer, TokenizerConfig
from training.models.upsampler import Upsampler, UpsamplerConfig
from training.optim import fsdp, loop
from training.optim.collectives import world
from training.optim.step import LoopConfig, Step

PHRASING, SHIFT = 11, 12  # streams of randomness in a step
SHIFT_PX = 2
LINE_BYTES = 4096
"""More bytes than a line of metrics.jsonl has."""


def train_clip(
    tokenizer: TokenizerConfig,
    config: ClipConfig,
    cluster: ClusterConfig,
    ingest: Path,
    curate: Path,
    out: Path,
    work: Path,
) -> dict[str, Any]:
    """Train CLIP on the keep list's training pairs, or take a pretrained one.

    The tokenizer is fitted to their captions first.
    """
    table = read_table(curate / "keep.parquet", "train", ["captions", *shard_check.READ])
    if not table.num_rows:
        raise DataError(
            "curate kept no pair for training: loosen [curate] or give [data] more sources"
        )
    if config.pretrained:
        return {
            "in": table.num_rows,
            "out": table.num_rows,
            "dropped": {},
            **_adopt(config, tokenizer, out, work),
        }
    dropped = shard_check.settle(table, ingest / "shards", config.broken_pictures, work)
    if not (work / "tokenizer.json").exists():
        fitted = Tokenizer.fit(
            (
                caption.as_py()
                for captions in table["captions"].chunks
                for caption in captions.flatten()
            ),
            tokenizer,
        )
        fitted.save(work / "tokenizer.tmp")
        (work / "tokenizer.tmp").replace(work / "tokenizer.json")
    paths = {"ingest": str(ingest), "curate": str(curate)}
    _train("clip", fit_clip, config, cluster, cluster.clip_workers, _Folders(paths, out, work))
    return {
        "in": table.num_rows,
        "out": table.num_rows - sum(dropped.values()),
        "dropped": dropped,
        **_outcome(out),
    }


def train_prior(
    config: PriorConfig, cluster: ClusterConfig, clip: Path, embed: Path, out: Path, work: Path
) -> dict[str, Any]:
    """Train the prior on the embeddings; CLIP is frozen."""
    count = _start_from_clip(clip, embed, work)
    _train(
        "prior",
        fit_prior,
        config,
        cluster,
        cluster.prior_workers,
        _Folders({"clip": str(clip), "embed": str(embed)}, out, work),
    )
    return {"in": count, "out": count, "dropped": {}, **_outcome(out)}


def train_decoder(
    config: DecoderConfig,
    cluster: ClusterConfig,
    ingest: Path,
    clip: Path,
    embed: Path,
    out: Path,
    work: Path,
) -> dict[str, Any]:
    """Train the decoder on images and their embeddings; CLIP is frozen."""
    count = _start_from_clip(clip, embed, work)
    dropped = shard_check.settle(
        read_table(embed / "metadata", "train", shard_check.READ),
        ingest / "shards",
        config.broken_pictures,
        work,
    )
    paths = {"ingest": str(ingest), "clip": str(clip), "embed": str(embed)}
    _train(
        "decoder", fit_decoder, config, cluster, cluster.decoder_workers, _Folders(paths, out, work)
    )
    return {"in": count, "out": count - sum(dropped.values()), "dropped": dropped, **_outcome(out)}


def train_upsampler(
    config: UpsamplerConfig,
    cluster: ClusterConfig,
    ingest: Path,
    curate: Path,
    out: Path,
    work: Path,
) -> dict[str, Any]:
    """Train an up-sampler on crops of the keep list's training images."""
    table = read_table(curate / "keep.parquet", "train", shard_check.READ)
    count = table.num_rows
    if not count:
        raise DataError(
            "curate kept no picture for training: loosen [curate] or give [data] more sources"
        )
    dropped = shard_check.settle(table, ingest / "shards", config.broken_pictures, work)
    paths = {"ingest": str(ingest), "curate": str(curate)}
    _train(
        "upsampler",
        fit_upsampler,
        config,
        cluster,
        cluster.upsampler_workers,
        _Folders(paths, out, work),
    )
    return {"in": count, "out": count - sum(dropped.values()), "dropped": dropped, **_outcome(out)}


def fit_clip(
    config: ClipConfig, paths: dict[str, Path], work: Path, device: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Train CLIP on one worker; return the model and its averaged weights."""
    table = read_table(
        paths["curate"] / "keep.parquet", "train", ["caption", "captions", "key", *LOCATION]
    )
    table = table.filter(pa.array(shard_check.is_readable(table, work)))
    tokenizer = Tokenizer.load(work / "tokenizer.json")
    pictures = _pictures(table, paths, config, config.image_size_px, config.look)
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
    config: PriorConfig, paths: dict[str, Path], work: Path, device: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Train the prior on one worker; return the model and its averaged weights."""
    clip, tokenizer = clip_model.load(paths["clip"])
    table, z_i = embedding_dataset.read(paths["embed"], "train", ["captions"])
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

    averaged = loop.run(model, config, loss_of, work)
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
    config: DecoderConfig, paths: dict[str, Path], work: Path, device: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Train the decoder on one worker; return the model and its averaged weights."""
    tokenizer = Tokenizer.load(paths["clip"] / "tokenizer.json")
    table, z_i = embedding_dataset.read(paths["embed"], "train", ["captions", "key", *LOCATION])
    readable = shard_check.is_readable(table, work)
    table, z_i = table.filter(pa.array(readable)), z_i.where(readable)
    pictures = _pictures(table, paths, config, config.image_size_px)
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
    config: UpsamplerConfig, paths: dict[str, Path], work: Path, device: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Train an up-sampler on one worker; return the model and its averaged weights."""
    table = read_table(paths["curate"] / "keep.parquet", "train", ["key", *LOCATION])
    pictures = _pictures(
        table.filter(pa.array(shard_check.is_readable(table, work))),
        paths,
        config,
        config.image_size_px,
    )
    torch.manual_seed(config.seed)
    model = Upsampler(config).to(device)

    def loss_of(step: Step) -> Tensor:
        x_0 = pictures[step.samples(len(pictures))]
        _read_ahead(pictures, step, config.ahead_steps)
        return model.loss(step, x_0)

    return model, loop.run(model, config, loss_of, work, waited_s=lambda: pictures.waited_s)


def _pictures(
    table: pa.Table, paths: dict[str, Path], config: LoopConfig, side_px: int, look: Look = WHOLE
) -> Pictures:
    return Pictures(
        table, paths["ingest"] / "shards", side_px, look, config.readers, config.cache_bytes
    )


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


def _adopt(config: ClipConfig, tokens: TokenizerConfig, out: Path, work: Path) -> dict[str, Any]:
    """Write the pretrained CLIP as if it had been trained here."""
    model, tokenizer, source = open_clip_format.read(config, tokens)
    tokenizer.save(work / "tokenizer.json")
    write_model("clip", model, model.state_dict(), model.config, work)
    (work / "metrics.jsonl").write_text("")
    _hand_over(work, out)
    return {"parameters": sum(p.numel() for p in model.parameters()), **source}


class Job(TypedDict):
    """A training as its workers get it from Ray Train."""

    fit: str
    """Name of the `fit_*` function."""
    section: str
    """The model's config section as JSON."""
    paths: dict[str, str]
    """Folders of the stages that it reads, by stage."""
    work: str
    threads: int
    use_gpu: bool


Fit = Callable[[Any, dict[str, Path], Path, str], tuple[nn.Module, dict[str, Tensor]]]


def _start_from_clip(clip: Path, embed: Path, work: Path) -> int:
    shutil.copyfile(clip / "tokenizer.json", work / "tokenizer.json")
    count = read_table(embed / "metadata", "train", ["key"]).num_rows
    if not count:
        raise DataError(
            "no embedded pair is in the training split: loosen [curate] or give [data] more sources"
        )
    return count


@dataclass(frozen=True)
class _Folders:
    """Folders of the stages that a job reads by name, of its result, and of its state."""

    inputs: dict[str, str]
    out: Path
    work: Path


def _train(
    name: str,
    fit: Fit,
    config: LoopConfig,
    cluster: ClusterConfig,
    workers: int,
    folders: _Folders,
) -> None:
    """Run `fit` on `workers` Ray Train workers, then copy the results to the result's folder.

    When a worker is lost, it restarts from the last state, up to `max_failures` times. Raises the
    UnclipError of a worker, or one that says why the training failed.
    """
    work = folders.work
    job: Job = {
        "fit": fit.__name__,
        "section": config.model_dump_json(),
        "paths": folders.inputs,
        "work": str(work),
        "threads": max(1, int(cluster.cpus_per_worker)),
        "use_gpu": cluster.use_gpu,
    }
    with Progress(name, config.images, "images") as progress:
        is_over = threading.Event()
        watcher = threading.Thread(
            target=_watch, args=(work / "metrics.jsonl", progress, is_over), daemon=True
        )
        watcher.start()
        try:
            for left in reversed(range(cluster.max_failures + 1)):
                try:
                    _run_group(job, name, cluster, workers)
                    break
                except Exception as error:
                    worker_error = _worker_error(error)
                    if worker_error or not left:
                        raise worker_error or UnclipError(_one_line(name, error)) from error
                    logging.getLogger("unclip").warning(
                        "%s; restarting it from its last state, %d restarts left",
                        _one_line(name, error),
                        left,
                    )
        finally:
            is_over.set()
            watcher.join()
    _hand_over(work, folders.out)


def _hand_over(work: Path, out: Path) -> None:
    for file in ("config.json", "weights.safetensors", "raw.safetensors", "metrics.jsonl"):
        shutil.copyfile(work / file, out / file)
    if (work / "tokenizer.json").exists():  # up-samplers have none
        shutil.copyfile(work / "tokenizer.json", out / "tokenizer.json")


def _run_group(job: Job, name: str, cluster: ClusterConfig, workers: int) -> None:
    """Train data-parallel with Ray Train."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {})
    TorchTrainer(
        _worker,
        train_loop_config=dict(job),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            # a new name each time: training resumes from our state in `work`, not from Ray's
            name=f"{name}-{time.time_ns():x}",
            storage_path=str((Path(job["work"]) / "ray").absolute()),
            # no retries by Ray, which would also repeat errors that are ours
            failure_config=FailureConfig(max_failures=0),
        ),
        torch_config=TorchConfig(
            backend="nccl" if cluster.use_gpu else "gloo", timeout_s=cluster.collective_timeout_s
        ),
    ).fit()


def _worker(job: dict[str, Any]) -> None:
    """Run on every Ray Train worker."""
    import ray.train

    ray.train.report({"images_seen": _fit(cast(Job, job))})


def _fit(job: Job) -> int:
    """What every worker does: train as the job says and write the model. Returns the images
    seen.
    """
    torch.set_num_threads(job["threads"])
    fits: dict[str, tuple[Fit, type[LoopConfig]]] = {
        "fit_clip": (fit_clip, ClipConfig),
        "fit_prior": (fit_prior, PriorConfig),
        "fit_decoder": (fit_decoder, DecoderConfig),
        "fit_upsampler": (fit_upsampler, UpsamplerConfig),
    }
    fit, section = fits[job["fit"]]
    config, work = section.model_validate_json(job["section"]), Path(job["work"])
    model, averaged = fit(
        config,
        {name: Path(path) for name, path in job["paths"].items()},
        work,
        "cuda" if job["use_gpu"] else "cpu",
    )
    write_model(job["fit"].removeprefix("fit_"), model, averaged, config, work)
    return config.images


def write_model(
    name: str, model: nn.Module, averaged: dict[str, Tensor], config: LoopConfig, work: Path
) -> None:
    """Write `config.json` and the weights, averaged and raw, each by renaming.

    Every worker calls it; the first one writes.
    """
    is_first = world()[0] == 0
    raw = fsdp.whole(model.state_dict(), is_first)
    if not is_first:
        return
    facts: dict[str, Any] = {
        name: config.model_dump(mode="json"),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if (work / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(work / "tokenizer.json")
        null = getattr(model, "null_z", getattr(model, "null_text", None))
        embed_dim = len(null) if null is not None else facts[name]["embed_dim"]
        facts |= {
            "vocab_size": tokenizer.vocab_size,
            "context": tokenizer.context,
            "embed_dim": embed_dim,
        }
    for file, state in (("weights.safetensors", averaged), ("raw.safetensors", raw)):
        part = work / f"{file}.{os.getpid()}.tmp"
        save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, part)
        part.replace(work / file)
    (work / "config.json").write_text(json.dumps(facts, indent=1))


def _watch(metrics: Path, progress: Progress, is_over: threading.Event) -> None:
    """Show the newest row of the metrics file until `is_over` is set."""
    while True:
        ended = is_over.wait(0.5)
        last = _last_line(metrics) if metrics.exists() else ""
        if last.endswith("}"):
            row = json.loads(last)
            progress.update(row["images_seen"], f"loss {row['loss']:.3f}")
        if ended:
            return


def _last_line(file: Path) -> str:
    """Return the last line of a file with short lines; only its end is read, since it grows."""
    with file.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - LINE_BYTES))
        return (opened.read().decode(errors="replace").splitlines() or [""])[-1]


def _outcome(out: Path) -> dict[str, Any]:
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "parameters": json.loads((out / "config.json").read_text())["parameters"],
        "images_seen": last["images_seen"],
        "loss": last["loss"],
        "train_seconds": last["seconds"],
    }


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
