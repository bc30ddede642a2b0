"""The training loop that every model shares: plain torch, no Ray, no files but its own state and
metrics.

A step's samples and noise are functions of seed and samples seen alone, never of the number of
workers (dropouts are, of that too), so a run that was killed resumes exactly where its last state
stands. Writes `state.pt` (whole, renamed into place) and `metrics.jsonl` into the work folder.
Progress counts images seen. Legend: B global batch, b this worker's part of it.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TextIO

import torch
from torch import Tensor, nn

from infra.errors import DataError
from training.optim import fsdp
from training.optim.collectives import agree, average, average_gradients, local_part, world
from training.optim.muon import Muon
from training.optim.step import LoopConfig, Step, learning_rate


def make_optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW, fused, with weight decay on matrices and kernels only; beside it Muon, for the layers'
    own, where the recipe says so.
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
        {
            "params": [p for p in trained if id(p) in unsharded],
            "weight_decay": 0.0,
        },  # a fused step takes parts or wholes, not both
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
    work: Path,
    after_step: Callable[[], None] | None = None,
    waited_s: Callable[[], float] | None = None,
) -> dict[str, Tensor]:
    """Train the model in place and return its averaged (EMA) weights; resumes from `work/state.pt`
    where that exists.

    `loss_of(step)` returns the mean loss over this worker's b samples; `waited_s()` for how long it
    waited for data so far, which is logged as a share of the time (`waiting`). Called by every
    worker with equal arguments. Where the model is sharded it stays so, and the averaged weights
    are the first worker's alone. Raises DataError when the loss is no longer finite.
    """
    rank, workers = world()
    if config.batch_size % workers:
        raise DataError(
            f"batch_size {config.batch_size} cannot be shared by {workers} workers: choose a "
            "multiple"
        )
    device_type = next(model.parameters()).device.type
    is_sharded = config.shard and workers > 1
    if is_sharded:
        loss_of = fsdp.shard(model, loss_of, config.precision == "bf16")
    optimizers = make_optimizers(model, config)
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    seen, spent_s = _resume(work, model, optimizers, ema, is_sharded)
    if not agree(seen):
        raise DataError(
            f"the workers found different states in {work}: it must be one folder that all of "
            "them see"
        )
    steps = math.ceil(config.images / config.batch_size)
    started_s = saved_s = logged_s = time.monotonic()
    with _metrics(work, seen) if rank == 0 else contextlib.nullcontext() as metrics:
        for number in range(seen // config.batch_size, steps):
            step = Step(
                number, number * config.batch_size, config.batch_size, config.seed, rank, workers
            )
            loss = _learn(model, config, loss_of, optimizers, step, is_sharded)
            if after_step:
                after_step()
            _average_weights(ema, model, min(config.ema_decay, (1 + number) / (10 + number)))
            seen, last = step.first + config.batch_size, number == steps - 1
            now = time.monotonic()
            if last or number % 10 == 0:
                value = float(average(loss))
                if not math.isfinite(value):
                    raise DataError(
                        f"the loss is {value} after {seen:,} images: lower learning_rate (now "
                        f"{config.learning_rate:g})"
                    )
                if metrics and (last or now - logged_s >= 0.5):
                    row = {
                        "images_seen": seen,
                        "loss": round(value, 6),
                        "seconds": round(spent_s + now - started_s, 2),
                    }
                    if waited_s:
                        row["waiting"] = round(waited_s() / max(now - started_s, 1e-9), 4)
                    metrics.write(json.dumps(row) + "\n")
                    metrics.flush()
                    logged_s = now
            is_due = (
                rank == 0
                and (last or now - saved_s >= config.state_every_s)
                and math.isfinite(float(loss))
            )
            # all must take part; asked as rarely as the loss is read, since it makes the workers
            # wait
            if is_sharded:
                is_due = (last or number % 10 == 0) and fsdp.first_says(is_due, device_type)
            if is_due:
                _save(work, model, optimizers, ema, seen, spent_s + now - started_s, rank)
                saved_s = time.monotonic()
    return fsdp.whole(ema, rank == 0) if is_sharded else ema


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
    work: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    ema: dict[str, Tensor],
    seen: int,
    seconds: float,
    rank: int,
) -> None:
    """Write the state aside and rename it: a kill leaves the old one or the new one. The first
    worker writes, whoever helps to gather.
    """
    moments = [optimizer.state_dict() for optimizer in optimizers]
    state = {
        "model": model.state_dict(),
        "optimizers": moments,
        "ema": ema,
        "images_seen": seen,
        "seconds": seconds,
    }
    state = fsdp.whole(state, rank == 0)
    if rank == 0:
        part = work / f"state.{os.getpid()}.tmp"
        torch.save(state, part)
        part.replace(work / "state.pt")


def _resume(
    work: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    ema: dict[str, Tensor],
    is_sharded: bool,
) -> tuple[int, float]:
    """Load the last state into place, if there is one; return the images seen and the seconds spent
    by then.
    """
    path = work / "state.pt"
    if not path.exists():
        return 0, 0.0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_sharded)
        fsdp.put(model.state_dict(), state["model"])
        for optimizer, moments in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(fsdp.cut(optimizer, moments))
        fsdp.put(ema, state["ema"])
    except (EOFError, LookupError, OSError, RuntimeError, UnpicklingError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path} is damaged or of another version of this code ({reason}): remove it to train "
            "from the start"
        ) from error
    return state["images_seen"], state["seconds"]


@contextlib.contextmanager
def _metrics(work: Path, seen: int) -> Iterator[TextIO]:
    """Open `metrics.jsonl` for appending, without the rows of steps that a killed run made after
    its last state.
    """
    path = work / "metrics.jsonl"
    rows_before = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the line that a kill cut
                row = json.loads(line)
                if row["images_seen"] <= seen:
                    rows_before.append(json.dumps(row) + "\n")
    part = work / f"metrics.{os.getpid()}.tmp"
    part.write_text("".join(rows_before))
    part.replace(path)
    with path.open("a") as file:
        yield file
