"""Trains any model for a given time, for the peers that are compared after equal seconds. Plain
torch: knows nothing of ours nor of theirs.

AdamW with decay on matrices, clipped gradients, a warm-up and a cosine to nothing over the steps
that fit into the time, averaged weights
as ours are averaged: so models and their losses are compared and not the trainers' defaults, which
are made for days.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

CALIBRATION_STEPS = 4
DECAY, CLIP = 0.01, 0.5


def count(model: nn.Module) -> int:
    """Count a model's trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def nearest(make: Callable[[int], nn.Module], options: Iterable[int], parameters: int) -> nn.Module:
    """Return the model whose number of parameters comes nearest."""
    sizes = {}
    for option in options:
        with torch.device("meta"):
            sizes[option] = count(make(option))
    return make(min(sizes, key=lambda option: abs(sizes[option] - parameters)))


class Trained:
    """A model, whose output is its loss, with its optimiser."""

    def __init__(self, model: nn.Module, learning_rate: float, decay: float, clip: float) -> None:
        self.model, self.clip = model.train(), clip
        groups = [
            {
                "params": [p for p in model.parameters() if p.requires_grad and p.ndim >= 2],
                "weight_decay": decay,
            },
            {
                "params": [p for p in model.parameters() if p.requires_grad and p.ndim < 2],
                "weight_decay": 0.0,
            },
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99))

    def step(self, bf16: bool, **batch: Tensor) -> float:
        """Make one step and return the loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = self.model(**batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def train(
    model: nn.Module,
    batch_of: Callable[[Tensor], dict[str, Tensor]],
    samples: int,
    seconds: float,
    batch: int,
    learning_rate: float,
    bf16: bool,
) -> tuple[nn.Module, dict[str, float]]:
    """Train for so many seconds; returns the averaged model and what it took, `first_loss` and
    `loss` being medians of a twentieth each.
    """
    trained, averaged = Trained(model, learning_rate, DECAY, CLIP), copy.deepcopy(model).eval()
    started_s, steps, number, order, losses = (
        time.monotonic(),
        0,
        0,
        torch.empty(0, dtype=torch.long),
        [],
    )
    while not steps or number < steps:
        passed_s = time.monotonic() - started_s
        if number == CALIBRATION_STEPS:
            steps = max(number + 1, int(seconds / (passed_s / number)))
        done = number / steps if steps else 0.0
        rate = min(done / 0.05, 0.5 * (1 + math.cos(math.pi * done)))
        for group in trained.optimizer.param_groups:
            group["lr"] = learning_rate * max(rate, 1e-3)
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(samples)])
        rows, order = order[:batch], order[batch:]
        losses.append(trained.step(bf16, **batch_of(rows)))
        with torch.no_grad():
            decay = min(0.999, (1 + number) / (10 + number))
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        number += 1
        if time.monotonic() - started_s > seconds:
            break
    part = max(1, len(losses) // 20)
    return averaged, {
        "parameters": count(model),
        "images_seen": number * batch,
        "seconds": time.monotonic() - started_s,
        "first_loss": statistics.median(losses[:part]),
        "loss": statistics.median(losses[-part:]),
    }
