"""Muon's steps are orthogonal, of AdamW's size, and keep the singular vectors; checked against an
SVD.
"""

import pytest
import torch
from torch import nn

from training.optim.muon import ADAMS_RMS, Muon, orthogonal


def a_matrix(rows: int, columns: int, condition: float = 1e3) -> torch.Tensor:
    """A matrix of the shape with singular values from 1 down to 1 / condition."""
    made = torch.Generator().manual_seed(rows * columns)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, generator=made), full_matrices=False)
    return u * torch.logspace(0, -torch.tensor(condition).log10().item(), min(rows, columns)) @ v


@pytest.mark.parametrize("shape", [(64, 576), (576, 64), (48, 48), (1, 9), (9, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_singular_values_come_near_one_and_vectors_stay(
    shape: tuple[int, int], scale: float
) -> None:
    matrix = a_matrix(*shape, condition=50.0)
    made = orthogonal(matrix * scale)
    values = torch.linalg.svdvals(made)
    assert made.shape == matrix.shape and values.min() > 0.6 and values.max() < 1.25
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ made @ v.T  # diagonal, when the vectors are the same
    assert (inner - inner.diagonal().diag()).abs().max() < 0.05
    assert inner.diagonal().min() > 0.6


def test_it_is_the_iteration_on_the_matrix_itself() -> None:
    matrix = a_matrix(24, 216)
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(orthogonal(matrix).double(), x, rtol=0, atol=2e-3)


def test_a_gradient_of_nothing_is_no_step() -> None:
    assert orthogonal(torch.zeros(4, 36)).eq(0).all()
    kernel = nn.Parameter(torch.ones(4, 4, 3, 3))
    kernel.grad = torch.zeros_like(kernel)
    Muon([kernel], 0.1, 0.0).step()
    assert kernel.eq(1).all()


@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (32, 256, 1, 1)])
def test_a_step_has_adams_size_whatever_the_gradients(shape: tuple[int, ...]) -> None:
    for scale in (1e-3, 1e3):
        kernel = nn.Parameter(torch.zeros(shape).to(memory_format=torch.channels_last))
        kernel.grad = (
            torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
                memory_format=torch.channels_last
            )
            * scale
        )
        Muon([kernel], 0.01, 0.0).step()
        moved = kernel.detach()
        assert 0.8 < moved.square().mean().sqrt() / (0.01 * ADAMS_RMS) < 1.2
        assert (moved * kernel.grad).sum() < 0


def test_weights_of_one_shape_step_together_as_each_would_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = [(16, 8, 3, 3), (16, 24), (16, 8, 3, 3), (24, 16), (16, 24), (16, 8, 3, 3)]

    def moved(stacked: int) -> list[torch.Tensor]:
        monkeypatch.setattr("training.optim.muon.STACKED", stacked)
        made = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape, generator=made)) for shape in shapes]
        still = nn.Parameter(torch.ones(16, 24))  # without a gradient
        optimizer = Muon([*weights[:3], still, *weights[3:]], 0.1, 0.1)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=made)
            optimizer.step()
        assert still.eq(1).all()
        return [weight.detach() for weight in weights]

    for stacked in (2 * 16 * 8 * 9, 1 << 22):
        for together, alone in zip(moved(stacked), moved(0), strict=True):
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
