"""The training loop that all models share: plain torch, no Ray, no files except its own state and
metrics.

The samples and the noise of a step depend only on the seed and the samples seen, not on the number
of workers (dropout does depend on it). A killed run therefore resumes exactly at its last state.
Writes `state.pt` (complete, by renaming) and `metrics.jsonl` into the work folder. Progress counts
images seen.
Legend: B global batch, b this worker's part of it.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TextIO

import torch
from torch import Tensor, nn

from infra.errors import DataError
from infra.storage.atomic_files import atomic_file
from infra.storage.work_folder import Publisher, WorkFolder
from training.optim import fsdp
from training.optim.collectives import agree, average, average_gradients, local_part, world
from training.optim.muon import Muon
from training.optim.step import Step, learning_rate
from training.sections.loop_section import LoopConfig

STATE, METRICS, PROGRESS = "state.pt", "metrics.jsonl", "progress.json"
PROGRESS_S = 1.0
"""Seconds between two publications of the newest row of the metrics."""


def make_optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW, with weight decay on matrices and kernels only, and Muon if the config says so.

    Muon takes the weights of linear layers and convolutions.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    layers: list[Tensor] = []
    if config.optimizer == "muon":
        weights = [
            layer.weight for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)
        ]
        layers = [weight for weight in weights if weight.requires_grad]
    muons, unsharded = {id(p) for p in layers}, {id(p) for p in fsdp.unsharded_parameters(model)}
    trained = [p for p in trained if id(p) not in muons]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {
            "params": [p for p in trained if p.ndim < 2 and id(p) not in unsharded],
            "weight_decay": 0.0,
        },
        # a group of their own, since a fused step cannot mix sharded and whole tensors
        {"params": [p for p in trained if id(p) in unsharded], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(0.9, config.beta_2),
            eps=config.adam_eps,
            fused=True,
        )
    ]
    if layers:
        optimizers.append(Muon(layers, config.learning_rate, config.weight_decay))
    return optimizers


def run(
    model: nn.Module,
    config: LoopConfig,
    loss_of: Callable[[Step], Tensor],
    work: WorkFolder,
    after_step: Callable[[], None] | None = None,
    waited_s: Callable[[], float] | None = None,
) -> dict[str, Tensor]:
    """Train the model in place and return its averaged (EMA) weights.

    Resumes from the published `state.pt` of `work`, if there is one. `loss_of(step)` returns the
    mean loss over this worker's b samples. `waited_s()` returns the seconds that it has waited for
    data so far, which are logged as a share of the time (`waiting`). All workers must call it with
    equal arguments. A sharded model stays sharded, and only the first worker gets its averaged
    weights. Raises DataError if the loss is not finite.
    """
    rank, workers = world()
    _check_batch_size(config, workers)
    is_sharded = config.shard and workers > 1
    if is_sharded:
        loss_of = fsdp.shard(model, loss_of, config.precision == "bf16")
    optimizers = make_optimizers(model, config)
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    seen, spent_s = _resume(work, model, optimizers, ema, is_sharded)
    steps = math.ceil(config.images / config.batch_size)
    with contextlib.ExitStack() as stack:
        publisher = stack.enter_context(Publisher(work))
        file = stack.enter_context(_metrics(work, seen)) if rank == 0 else None
        log = _Log(file, spent_s, waited_s, publisher)
        saved_s = log.started_s
        for number in range(seen // config.batch_size, steps):
            first = number * config.batch_size
            step = Step(number, first, config.batch_size, config.seed, rank, workers)
            loss = _learn(model, config, loss_of, optimizers, step, is_sharded)
            if after_step:
                after_step()
            _average_weights(ema, model, min(config.ema_decay, (1 + number) / (10 + number)))
            seen, is_last = first + config.batch_size, number == steps - 1
            now_s = time.monotonic()
            # Reading the loss makes the workers wait, so it is read every tenth step only.
            is_loss_read = is_last or number % 10 == 0
            if is_loss_read:
                log.write(seen, _finite_mean(loss, seen, config), now_s, is_last)
            is_due = is_last or now_s - saved_s >= config.state_every_s
            if _must_save(model, loss, is_due, is_loss_read, is_sharded):
                _save(publisher, model, optimizers, ema, seen, log.seconds(now_s))
                saved_s = time.monotonic()
    return fsdp.whole(ema, rank == 0) if is_sharded else ema


def _must_save(
    model: nn.Module, loss: Tensor, is_due: bool, is_loss_read: bool, is_sharded: bool
) -> bool:
    """Return whether this worker saves a state now: the first, or all of a sharded model."""
    must_save = world()[0] == 0 and is_due and math.isfinite(float(loss))
    if is_sharded:
        return is_loss_read and fsdp.first_says(must_save, next(model.parameters()).device.type)
    return must_save


def _check_batch_size(config: LoopConfig, workers: int) -> None:
    """Raise DataError unless the workers can share a batch equally."""
    if config.batch_size % workers:
        raise DataError(
            f"batch_size = {config.batch_size} cannot be divided by {workers} workers: set it to "
            "a multiple"
        )


class _Log:
    """Writes rows of `metrics.jsonl` on the first worker, at most two in a second.

    The newest row is published as `progress.json`, for whoever shows it.
    """

    def __init__(
        self,
        file: TextIO | None,
        spent_s: float,
        waited_s: Callable[[], float] | None,
        publisher: Publisher,
    ) -> None:
        self.file, self.spent_s, self.waited_s = file, spent_s, waited_s
        self.publisher = publisher
        self.started_s = self.logged_s = self.published_s = time.monotonic()

    def seconds(self, now_s: float) -> float:
        """Return the seconds of training until `now_s`, including those before a restart."""
        return self.spent_s + now_s - self.started_s

    def write(self, seen: int, loss: float, now_s: float, is_last: bool) -> None:
        """Write a row, unless the previous one is less than half a second old."""
        if self.file is None or not (is_last or now_s - self.logged_s >= 0.5):
            return
        elapsed_s = now_s - self.started_s
        row = {
            "images_seen": seen,
            "loss": round(loss, 6),
            "seconds": round(self.seconds(now_s), 2),
        }
        if self.waited_s:
            row["waiting"] = round(self.waited_s() / max(elapsed_s, 1e-9), 4)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.logged_s = now_s
        if is_last or now_s - self.published_s >= PROGRESS_S:
            with atomic_file(self.publisher.work.path(PROGRESS)) as part:
                part.write_text(json.dumps(row))
            self.publisher.publish(PROGRESS)
            self.published_s = now_s


def _finite_mean(loss: Tensor, seen: int, config: LoopConfig) -> float:
    """Return the mean loss over the workers. Raises DataError if it is not finite."""
    value = float(average(loss))
    if not math.isfinite(value):
        raise DataError(
            f"the loss is {value} after {seen:,} images: lower learning_rate (now "
            f"{config.learning_rate:g})"
        )
    return value


def _learn(
    model: nn.Module,
    config: LoopConfig,
    loss_of: Callable[[Step], Tensor],
    optimizers: list[torch.optim.Optimizer],
    step: Step,
    is_sharded: bool,
) -> Tensor:
    """Take one step along the clipped gradient of the mean loss of all workers; return this
    worker's loss.
    """
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = learning_rate(config, step.first + config.batch_size)
    torch.manual_seed(config.seed * 1_000_003 + step.number * step.workers + step.rank)  # dropout
    with torch.autocast(
        next(model.parameters()).device.type,
        dtype=torch.bfloat16,
        enabled=config.precision == "bf16",
    ):
        loss = loss_of(step)
    loss.backward()
    average_gradients(model)
    if is_sharded:
        fsdp.clip_gradients(model, config.gradient_clip)
    else:
        nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


@torch.no_grad()
def _average_weights(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    state = model.state_dict()
    names = [name for name in ema if ema[name].is_floating_point()]
    torch._foreach_lerp_(
        [local_part(ema[name]) for name in names],
        [local_part(state[name]) for name in names],
        1 - decay,
    )


def _save(
    publisher: Publisher,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    ema: dict[str, Tensor],
    seen: int,
    seconds: float,
) -> None:
    """Write the state so that a kill or a full disk leaves the state before it.

    All workers take part in gathering; the first one writes.
    """
    moments = [optimizer.state_dict() for optimizer in optimizers]
    state = {
        "model": model.state_dict(),
        "optimizers": moments,
        "ema": ema,
        "images_seen": seen,
        "seconds": seconds,
    }
    is_first, work = world()[0] == 0, publisher.work
    state = fsdp.whole(state, is_first)
    if is_first:
        # Into a file of Python's, whose errors say why: torch's own writer calls a full disk an
        # "iostream error".
        with (
            work.room(_tensor_bytes(state)),
            atomic_file(work.path(STATE)) as part,
            part.open("wb") as file,
        ):
            torch.save(state, file)
        publisher.publish(METRICS)
        publisher.publish(STATE)


def _tensor_bytes(value: object) -> int:
    """Return the bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def _resume(
    work: WorkFolder,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    ema: dict[str, Tensor],
    is_sharded: bool,
) -> tuple[int, float]:
    """Load the last state, if there is one; return the images seen and the seconds until then.

    Raises DataError if the state is damaged, or if the workers found different ones in a local
    folder; RuntimeError if they did in a store, where an earlier worker may still have written.
    """
    path = work.fetch(STATE)
    seen, spent_s = 0, 0.0
    if path:
        seen, spent_s = _load(path, model, optimizers, ema, is_sharded)
    if not agree(seen):
        line = f"the workers found different states in {work.folder}"
        if work.root.folder:
            raise DataError(f"{line}: it must be one folder that all workers share")
        raise RuntimeError(line)
    return seen, spent_s


def _load(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    ema: dict[str, Tensor],
    is_sharded: bool,
) -> tuple[int, float]:
    """Load a state file in place; return its images seen and seconds."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_sharded)
        fsdp.put(model.state_dict(), state["model"])
        for optimizer, moments in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(fsdp.cut(optimizer, moments))
        fsdp.put(ema, state["ema"])
    except (EOFError, LookupError, OSError, RuntimeError, UnpicklingError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path} is damaged or from another version of this code ({reason}): delete it to "
            "train from the start"
        ) from error
    return state["images_seen"], state["seconds"]


@contextlib.contextmanager
def _metrics(work: WorkFolder, seen: int) -> Iterator[TextIO]:
    """Open `metrics.jsonl` for appending, without rows that are newer than the last state."""
    before, path = work.fetch(METRICS), work.path(METRICS)
    rows_before = []
    if before:
        for line in before.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that a kill left incomplete
                row = json.loads(line)
                if row["images_seen"] <= seen:
                    rows_before.append(json.dumps(row) + "\n")
    with atomic_file(path) as part:
        part.write_text("".join(rows_before))
    with path.open("a") as file:
        yield file
