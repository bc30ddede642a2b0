"""Sharded training for models that one device cannot hold: each worker holds a part of every
weight, gradient, moment and average (ZeRO-3, torch's FSDP2).

A block's parts are gathered before it runs and released after it, in the precision of the
arithmetic. Gains of norms and scalars are not sharded. The model computes the same function as
without sharding, except that sums may be rounded in another order. Files hold whole tensors, so a
run can resume with another number of workers, or unsharded. Uses plain torch.distributed; knows no
model.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.optim.collectives import is_part, local_part, world

if TYPE_CHECKING:  # the loop imports this module
    from training.optim.step import Step

LAYERS = nn.Linear | nn.Conv2d
"""Layers that autocast runs in bfloat16, so their weights may be gathered in it."""


class _WithLoss(nn.Module):
    """The model and its loss as one module, whose forward pass is a training step."""

    def __init__(self, model: nn.Module, loss_of: "Callable[[Step], Tensor]") -> None:
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, step: "Step") -> Tensor:
        """Return this worker's loss."""
        return self.loss_of(step)


def shard(
    model: nn.Module, loss_of: "Callable[[Step], Tensor]", is_bf16: bool
) -> "Callable[[Step], Tensor]":
    """Replace the model's parameters by this worker's parts; return `loss_of` with gathering.

    All workers must call it, with the same weights. `loss_of` may call the model in any way, but
    its blocks only by `forward` or `at`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(next(model.parameters()).device.type, (world()[1],))
    unsharded = unsharded_parameters(model)
    for p in model.parameters():
        p.data = p.data.contiguous()  # FSDP2 cannot shard kernels in channels-last format
    for unit in units(model):
        is_gathered_in_bf16 = is_bf16 and is_layers_only(unit, unsharded)
        policy = MixedPrecisionPolicy(
            torch.bfloat16 if is_gathered_in_bf16 else None,
            torch.float32,
            cast_forward_inputs=False,
        )
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=unsharded)
        if hasattr(unit, "at"):
            register_fsdp_forward_method(unit, "at")
    with_loss = _WithLoss(model, loss_of)
    return fully_shard(with_loss, mesh=mesh, ignored_params=unsharded)  # type: ignore[return-value]


def units(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are gathered one at a time: those in the model's lists.

    Parameters outside lists are gathered for a whole step.
    """
    matched: list[nn.Module] = []

    def visit(module: nn.Module, is_listed: bool) -> None:
        is_list = isinstance(module, nn.ModuleList | nn.Sequential)
        if is_listed and not is_list:
            matched.append(module)
            return
        for child in module.children():
            visit(child, is_list)

    visit(model, False)
    return [unit for unit in matched if any(True for _ in unit.parameters())]


def unsharded_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that every worker holds whole: scalars and those of norms (float32)."""
    norms = [
        module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)
    ]
    return {p for norm in norms for p in norm.parameters()} | {
        p for p in model.parameters() if p.ndim == 0
    }


def is_layers_only(unit: nn.Module, unsharded: set[nn.Parameter]) -> bool:
    """Return whether a unit's sharded parameters are all those of linear layers or convolutions."""
    layers = [module for module in unit.modules() if isinstance(module, LAYERS)]
    return {p for layer in layers for p in layer.parameters()} == set(unit.parameters()) - unsharded


def gathered(x: Tensor) -> Tensor:
    """Return the whole tensor; for a sharded one, all workers must call it."""
    return x.full_tensor() if is_part(x) else x  # type: ignore[attr-defined]


def part(x: Tensor, like: Tensor) -> Tensor:
    """Return x sharded as `like` is; every worker must have the whole x."""
    if not is_part(like):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]
    replicated = DTensor.from_local(x.to(like.device), mesh, [Replicate()], run_check=False)
    return replicated.redistribute(mesh, like.placements)  # type: ignore[attr-defined]


def whole(state: Any, is_wanted: bool) -> Any:
    """Return nested dicts and lists with whole tensors instead of sharded ones, on the CPU.

    All workers must call it; only those with `is_wanted` get the tensors.
    """
    if isinstance(state, dict):
        return {key: whole(value, is_wanted) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value, is_wanted) for value in state]
    if not isinstance(state, Tensor) or not is_part(state):
        return state
    full_state = gathered(state)
    return full_state.cpu() if is_wanted else None


@torch.no_grad()
def put(into: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Copy whole tensors into those of the same names, sharded or not.

    Raises ValueError if the names differ.
    """
    if into.keys() != state.keys():
        raise ValueError(f"{min(into.keys() ^ state.keys())} is in only one of the two states")
    for name, value in state.items():
        local_part(into[name]).copy_(local_part(part(value, into[name])))


def cut(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimiser's whole state as this worker's parts of it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    local_state = {
        index: {
            key: part(value, params[index]).clone() if value.shape == params[index].shape else value
            for key, value in facts.items()
        }
        for index, facts in state["state"].items()
    }
    return state | {"state": local_state}


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> None:
    """Scale a sharded model's gradients so that their total norm is at most `max_norm`."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    parts = [local_part(grad) for grad in grads if is_part(grad)]
    rest = [grad for grad in grads if not is_part(grad)]
    square = nn.utils.get_total_norm(parts) ** 2
    dist.all_reduce(square)
    norm = (square + nn.utils.get_total_norm(rest) ** 2).sqrt()
    torch._foreach_mul_(parts + rest, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def first_says(claim: bool, device: str) -> bool:
    """Return the first worker's claim on all workers."""
    verdict = torch.tensor(int(claim), device=device)
    dist.broadcast(verdict, 0)
    return bool(verdict)
