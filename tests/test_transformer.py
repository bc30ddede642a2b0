"""A tower's last block is computed only where it is read, and that is what the whole block says there."""

import pytest
import torch

from training.transformer import Block, QuickGELU, TextEncoder


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_block_at_one_place_is_the_block_there(is_causal: bool, activation: str) -> None:
    torch.manual_seed(0)
    block = Block(48, is_causal, heads=3, mlp_width=64, activation=activation)  # type: ignore[arg-type]
    x, places = torch.randn(5, 7, 48, requires_grad=True), torch.tensor([0, 6, 3, 3, 1])
    whole = block(x)[torch.arange(5), places]
    part = block.at(x, places)
    torch.testing.assert_close(part, whole, atol=1e-6, rtol=1e-5)
    weight = torch.randn(5, 48)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), [x, *block.parameters()]) for y in (part, whole)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_text_at_its_end_is_the_hidden_state_there() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(20, 9, 32, 2)
    ids, places = torch.randint(0, 20, (4, 7)), torch.tensor([6, 2, 0, 5])
    torch.testing.assert_close(encoder.at(ids, places), encoder(ids)[torch.arange(4), places], atol=1e-6, rtol=1e-5)
    with_other_ends = ids.clone()
    with_other_ends[1, 3:] = 0
    torch.testing.assert_close(encoder.at(with_other_ends, places)[1], encoder.at(ids, places)[1])


def test_quick_gelu_is_near_gelu_but_not_it() -> None:
    x = torch.linspace(-4, 4, 41)
    gap = (QuickGELU()(x) - torch.nn.functional.gelu(x)).abs()
    assert 0.005 < float(gap.max()) < 0.03
