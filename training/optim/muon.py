"""Muon: momentum that is orthogonalised layer by layer before each step (Jordan et al. 2024), for
short trainings.

Orthogonal steps use all directions of a matrix equally, where otherwise a few large ones dominate;
the quickstart's decoder needs about a third of the images that AdamW needs. AdamW trains the gains,
biases, embeddings and maps (`training/optim/loop.py`).
"""

import torch
from torch import Tensor

from training.optim.collectives import local_part
from training.optim.fsdp import gathered, part

STEPS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Coefficients of the odd quintic whose iteration moves all singular values towards 1; they end
between 0.7 and 1.2 (Jordan et al. 2024)."""
STACKED = 1 << 22
"""Maximum number of elements in the matrices that are orthogonalised at once."""
ADAMS_RMS = 0.2
"""Root mean square of AdamW's usual step divided by its learning rate. Muon's steps have this size
too, so that one rate and one decay fit both (Liu et al. 2025, arXiv 2502.16982)."""


class Muon(torch.optim.Optimizer):
    """Steps of orthogonalised Nesterov momentum with decoupled weight decay.

    For weights of linear layers and convolutions; a kernel (out, in, k, k) is treated as a matrix
    (out, in k k). State and arithmetic are float32. The momentum of sharded weights stays sharded;
    each worker computes the step of the whole matrix and applies its own part.
    """

    def __init__(
        self, params: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step for every weight that has a gradient."""
        for group in self.param_groups:
            for weights in _stacks(
                [weight for weight in group["params"] if weight.grad is not None]
            ):
                directions = orthogonal(
                    torch.stack([self._momentum(weight, group["momentum"]) for weight in weights])
                )
                for weight, direction in zip(weights, directions, strict=True):
                    size = ADAMS_RMS * max(direction.shape) ** 0.5
                    local_part(weight).mul_(1 - group["lr"] * group["weight_decay"])
                    local_part(weight).add_(
                        local_part(part(direction.view(weight.shape), weight)),
                        alpha=-group["lr"] * size,
                    )

    def _momentum(self, weight: Tensor, beta: float) -> Tensor:
        """Update the momentum with a gradient; return Nesterov's look-ahead as a whole matrix (out,
        in k k).
        """
        gradient, state = weight.grad, self.state[weight]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = local_part(state["momentum"]).lerp_(local_part(gradient), 1 - beta)
        local_part(gradient).lerp_(momentum, beta)  # in place: the gradient is not needed again
        return gathered(gradient).flatten(1)


def _stacks(weights: list[Tensor]) -> list[list[Tensor]]:
    """Group weights of one shape, so that cores share matrices instead of parts of each product."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for weight in weights:
        by_shape.setdefault(weight.shape, []).append(weight)
    stacks = []
    for shape, alike in by_shape.items():
        stack_size = max(1, STACKED // shape.numel())
        stacks += [alike[start : start + stack_size] for start in range(0, len(alike), stack_size)]
    return stacks


def orthogonal(matrices: Tensor) -> Tensor:
    """Return float32 matrices (..., m, n) with singular values of about 1 and the same singular
    vectors.

    A matrix of zeros stays zero. All factors are polynomials in the Gram matrix of the shorter
    side, so the iteration runs on that matrix and touches the long side twice: 2.5 times cheaper
    than on the matrix itself for a 3 x 3 kernel. It needs float32, since rounding errors grow with
    every iteration.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonal(matrices.mT).mT
    a, b, c = COEFFICIENTS
    gram = matrices @ matrices.mT
    norm = (
        gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[..., None, None]
        + torch.finfo(gram.dtype).tiny ** 0.5
    )
    gram = gram / norm**2
    identity = torch.eye(gram.shape[-1], device=gram.device)
    total = a * identity + b * gram + c * (gram @ gram)
    factor = total
    for _ in range(STEPS - 1):
        gram = factor @ gram @ factor
        factor = a * identity + b * gram + c * (gram @ gram)
        total = factor @ total
    return (total / norm) @ matrices
