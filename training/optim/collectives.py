"""Collective operations between the workers of a job: averaged gradients, gathered features.

With one worker they cost nothing. A tensor may be sharded (training/optim/fsdp.py): each worker
then has a part of it. Uses plain torch.distributed, so the process group may come from Ray Train,
torchrun or a test.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world() -> tuple[int, int]:
    """Return this worker's rank and the number of workers."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def local_part(x: Tensor) -> Tensor:
    """Return this worker's part of a sharded tensor, as a view; other tensors are returned
    unchanged.
    """
    return x.to_local() if is_part(x) else x  # type: ignore[attr-defined]


def is_part(x: Tensor) -> bool:
    """Return whether a tensor is sharded, so that other workers hold the rest of it."""
    return hasattr(x, "to_local")  # a DTensor, whose module takes 1.5 s to import


class _Gather(torch.autograd.Function):
    """All-gather whose gradient is the sum of all workers' gradients for this worker's rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """Return every worker's rows, (workers * b, ...) in rank order, differentiable.

    b must be equal on all workers.
    """
    return _Gather.apply(x) if world()[1] > 1 else x


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replace every gradient that is not sharded by its mean over the workers, in one message."""
    count = world()[1]
    if count == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None and not is_part(p.grad)]
    if not grads:
        return
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= count
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


@torch.no_grad()
def average(value: Tensor) -> Tensor:
    """Return the mean of a scalar over the workers."""
    count = world()[1]
    if count == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / count


def agree(number: int) -> bool:
    """Return whether all workers have the same number."""
    rank, count = world()
    if count == 1:
        return True
    numbers = torch.zeros(
        count, dtype=torch.int64, device="cuda" if dist.get_backend() == "nccl" else "cpu"
    )
    numbers[rank] = number
    dist.all_reduce(numbers)
    return bool((numbers == number).all())
