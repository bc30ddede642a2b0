"""The short trainings of tests: a small model learns a few examples by heart."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def learn(
    model: nn.Module, loss_of: Callable[[int], Tensor], steps: int, learning_rate: float
) -> list[float]:
    """Train in place by `loss_of(step number)` and return all losses; the rate falls to zero, so
    that few steps are enough.
    """
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], learning_rate, fused=True
    )
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses = []
    for number in range(steps):
        loss = loss_of(number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        losses.append(float(loss.detach()))
    return losses
